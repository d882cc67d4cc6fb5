"""Routers of every family the kernels cover, inputs that hurt, and one check of a kernel against the definition."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.gating.cost import held
from remoe_adapt.gating.ops import kernel_rule, spec_text
from remoe_adapt.gating.reference import PADDING, RESTART, PriorStep, topk_gating
from remoe_adapt.recency_settings import held_experts
from remoe_adapt.routers.spec import RouterSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXPERTS = (8, 13, 60, 64, 128, 256, 512)
CHOSEN = (1, 2, 6, 8)
TOKENS = (1, 7, 33, 257)
MODES = ("none", "ema", "last", "resident", "resident_rows", "cost")
GROUPS = {8: 4, 60: 4, 64: 8, 128: 8, 160: 8, 256: 8, 512: 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "softmax": {"scoring": "softmax"},
    "softmax_renormalised": {"scoring": "softmax", "normalize": True, "scaling": 1.5},
    "softmax_eps": {"scoring": "softmax", "normalize": True, "normalize_eps": 1e-9},
    "chosen_softmax": {"scoring": "topk_softmax", "weight_rule": "chosen_softmax", "scaling": 0.5},
    "softmax_bias": {"scoring": "softmax_bias", "normalize": True},
    "null_experts": {"scoring": "softmax_bias", "weight_rule": "null_is_zero", "null_experts": 3},
    "softmax_group_max": {"scoring": "softmax_group", "group_score": "max", "scaling": 16.0},
    "softmax_group_top2": {
        "scoring": "softmax_group",
        "group_score": "top2",
        "normalize": True,
        "normalize_eps": 1e-20,
    },
    "sigmoid": {"scoring": "sigmoid", "score": "sigmoid"},
    "sigmoid_bias": {"scoring": "sigmoid_bias", "score": "sigmoid", "normalize": True, "scaling": 2.5},
    "sigmoid_group": {"scoring": "sigmoid_group", "score": "sigmoid", "group_score": "top2", "normalize_eps": 1e-20},
    # The sum with an eps that shows in the weights.
    "sigmoid_group_eps": {
        "scoring": "sigmoid_group",
        "score": "sigmoid",
        "group_score": "top2",
        "normalize": True,
        "normalize_eps": 0.05,
    },
    "sigmoid_group_filled": {"scoring": "sigmoid_group", "score": "sigmoid", "group_score": "top2", "group_fill": 0.0},
    "logit_bias_sigmoid": {"scoring": "logit_bias_sigmoid", "score": "sigmoid", "normalize": True},
    "sqrt_softplus_bias": {"scoring": "sqrt_softplus_bias", "score": "sqrt_softplus", "normalize": True},
}
# Of no model, but the kernels weigh for them: null experts count in the sum that weights are divided by.
OTHERS: dict[str, dict[str, Any]] = {
    f"null_experts_of_{score}": {
        "scoring": f"{score}_bias",
        "score": score,
        "weight_rule": "null_is_zero",
        "null_experts": 9,
        "normalize": True,
        "normalize_eps": 0.05,
    }
    for score in ("softmax", "sigmoid")
}
BY_LOGIT = ("softmax", "softmax_renormalised", "softmax_eps", "chosen_softmax", "logit_bias_sigmoid")


def spec_of(name: str, experts: int) -> RouterSpec | None:
    """The router, or None where its groups do not divide the experts."""
    facts = dict((FAMILIES | OTHERS)[name])
    if "group_score" in facts:
        if experts not in GROUPS:
            return None
        facts |= {"n_group": GROUPS[experts], "topk_group": max(1, GROUPS[experts] // 2)}
    return RouterSpec(num_experts=experts, top_k=1, hidden_size=1, weight_name="weight", num_rows=experts, **facts)


def bias_of(spec: RouterSpec, seed: int = 0) -> Tensor | None:
    if spec.scoring in ("softmax", "topk_softmax", "sigmoid"):
        return None
    return (torch.randn(spec.num_experts, generator=torch.Generator().manual_seed(seed)) * 0.1).to(DEVICE)


def hard_logits(tokens: int, experts: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random logits on a grid that makes ties, with rows of infinities, NaN and constants among them."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = (torch.randn(tokens, experts, generator=generator) * 2).mul(64).round().div(64)
    specials: tuple[tuple[slice, float], ...] = (
        (slice(0, None, 3), 0.5), (slice(1, None, 2), -math.inf), (slice(2, 3), math.inf), (slice(1, 2), math.nan),
        (slice(0, None), -math.inf), (slice(0, None), 0.25), (slice(0, 1), -0.0),
    )  # fmt: skip
    for row, (columns, value) in zip(range(1, tokens, 4), specials * tokens, strict=False):
        logits_TE[row, columns] = value
    return logits_TE.to(DEVICE, dtype)


def prior_of(
    mode: str, tokens: int, experts: int, seed: int, flagged: bool, rows: int | None = None
) -> PriorStep | None:
    """A prior of this mode, `rows` sequences (default: one per token); flags pad, restart and do both."""
    if mode == "none":
        return None
    generator = torch.Generator().manual_seed(seed + 1)
    rows = 1 if mode == "resident" else tokens if rows is None else rows
    recency_BE = torch.rand(rows, experts, generator=generator)
    if mode not in ("ema", "cost"):
        recency_BE = (recency_BE > 0.7).float()
    flags_T = torch.randint(0, 6, (tokens,), generator=generator).clamp_(max=PADDING | RESTART).to(torch.uint8)
    flags_T[flags_T == 3] *= torch.rand(int((flags_T == 3).sum()), generator=generator).gt(0.6).to(torch.uint8)
    decay = {"ema": 0.7, "last": 0.0, "cost": 0.95}.get(mode)
    gain = torch.tensor(0.35 if mode != "cost" else 0.1, device=DEVICE)
    if mode == "cost":  # with equals and experts that nobody used
        recency_BE = recency_BE.mul(16).floor().sub(4).clamp_(min=0).div(16)
    share = 0.3 if mode == "cost" else None
    return PriorStep(recency_BE.to(DEVICE), gain, decay, flags_T.to(DEVICE) if flagged else None, share)


def copied(prior: PriorStep | None) -> PriorStep | None:
    return prior and PriorStep(prior.recency_BE.clone(), prior.gain, prior.decay, prior.flags_T, prior.share)


def poisoned(tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """Outputs that show every cell a kernel leaves out."""
    weights_TK = torch.full((tokens, k), 7e7, device=DEVICE)  # NaN can be a right answer here
    return weights_TK, torch.full((tokens, k), -999, dtype=torch.int64, device=DEVICE)


def launch(
    logits_TE: Tensor, k: int, spec: RouterSpec, prior: PriorStep | None, bias_E: Tensor | None,
    block_t: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel itself, in poisoned memory; moves `prior` on."""
    from remoe_adapt.triton_kernels.gate import launch_gate
    from remoe_adapt.triton_kernels.scan import launch_scan

    rule, out = kernel_rule(spec_text(spec)), poisoned(len(logits_TE), k)
    if prior is None:
        return launch_gate(logits_TE, k, rule, bias_E, out=out, block_t=block_t)
    args = (rule, bias_E, prior.recency_BE, prior.gain, prior.decay, prior.flags_T)
    count = None if prior.share is None else held_experts(prior.share, k, logits_TE.shape[1])
    if prior.decay is not None and len(prior.recency_BE) != len(logits_TE):
        return launch_scan(logits_TE, k, *args, out=out, held_count=count)
    return launch_gate(logits_TE, k, *args, out=out, block_t=block_t, held_count=count)


def check(name: str, tokens: int, experts: int, k: int, dtype: torch.dtype, mode: str) -> None:
    """Kernel against definition: ids, weights, recency. Interpreted programs are slow, so they take 16 rows each."""
    spec = spec_of(name, experts)
    if spec is None or k > experts:
        return
    seed = zlib.crc32(f"{name} {tokens} {experts} {k} {dtype} {mode}".encode())
    logits_TE, bias_E = hard_logits(tokens, experts, dtype, seed), bias_of(spec)
    prior = prior_of(mode, tokens, experts, seed, flagged=bool(seed % 2))
    ours = copied(prior)
    weights_TK, ids_TK = launch(logits_TE, k, spec, ours, bias_E, 16 if DEVICE == "cpu" and tokens > 4 else None)
    before = copied(prior)
    expected_TK, expected_ids_TK = topk_gating(logits_TE, k, spec, prior, bias_E=bias_E)
    same_T = _same_ids(ids_TK, expected_ids_TK, name, logits_TE, k, spec, before, bias_E)
    torch.testing.assert_close(weights_TK[same_T], expected_TK[same_T], rtol=2e-5, atol=1e-6, equal_nan=True)
    if prior is not None and ours is not None:
        rows = same_T if len(prior.recency_BE) == tokens else torch.ones(1, dtype=torch.bool, device=DEVICE)
        assert torch.equal(ours.recency_BE[rows], prior.recency_BE[rows])


def _same_ids(
    ids_TK: Tensor, expected_TK: Tensor, name: str, logits_TE: Tensor, k: int, spec: RouterSpec,
    prior: PriorStep | None, bias_E: Tensor | None,
) -> Tensor:  # fmt: skip
    """Rows with identical ids. Others fail, unless scores differ by rounding alone: exp is not the same everywhere."""
    assert ((ids_TK >= 0) & (ids_TK < spec.num_experts)).all()
    assert (ids_TK.sort(dim=-1).values.diff(dim=-1) > 0).all(), "an expert was chosen twice"
    same_T = (ids_TK == expected_TK).all(dim=-1)
    exact = name in BY_LOGIT and (prior is None or prior.share is None)
    if exact or bool(same_T.all()):
        assert torch.equal(ids_TK, expected_TK)
        return same_T
    from remoe_adapt.gating.reference import _raised, _scales

    choice_TE = spec.choice_scores(logits_TE, bias_E).float()
    if prior is not None:
        recency_BE = prior.recency_BE.expand(len(choice_TE), -1)
        if prior.flags_T is not None and prior.decay is not None:
            recency_BE = recency_BE.masked_fill((prior.flags_T & RESTART).bool().unsqueeze(-1), 0.0)
        if prior.share is None:
            choice_TE = choice_TE + recency_BE * _scales(choice_TE, prior)
        else:
            choice_TE, raised_TE = _raised(choice_TE, logits_TE, k, spec, prior)
            choice_TE = torch.where(held(recency_BE, prior.share, k), raised_TE, choice_TE)
    torch.testing.assert_close(
        choice_TE.gather(-1, ids_TK), choice_TE.gather(-1, expected_TK), rtol=1e-6, atol=1e-6, equal_nan=True
    )
    assert bool(same_T.float().mean() > 0.9), "too many rows differ"
    return same_T
