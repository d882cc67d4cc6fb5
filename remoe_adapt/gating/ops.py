"""Gating as operators of torch (`remoe::...`), so that compilers and graphs see one call: kernels where `backend.py`
says so, the definition (`reference.py`) elsewhere.

Autograd can be registered for functional operators only, so there are two gates: `topk_gating` returns the recency
moved on and is differentiable in the logits; `topk_gating_` moves it on in place, for decoding. A rule travels as a
string, because an operator takes no dataclass. One operator serves all devices, and looks at the tensors' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.gating import reference
from remoe_adapt.gating.backend import backend
from remoe_adapt.gating.cost import divides
from remoe_adapt.gating.reference import PriorStep
from remoe_adapt.recency_settings import held_experts
from remoe_adapt.routers import RouterSpec, best_ids

if TYPE_CHECKING:
    from remoe_adapt.triton_kernels.rule import Rule

MAX_EXPERTS, MAX_CHOSEN, MAX_ROUTE_TOKENS = 1024, 32, 16
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def spec_text(spec: RouterSpec) -> str:
    """What gating depends on in a spec, as text. Nothing but formatting, so that compilers can trace it."""
    return (
        f"{spec.scoring} {spec.score} {spec.weight_rule} {spec.group_score} {spec.num_experts} {spec.null_experts} "
        f"{spec.n_group} {spec.topk_group} {spec.normalize} {spec.normalize_eps} {spec.scaling} {spec.group_fill}"
    )


@cache
def spec_of_text(rule: str) -> RouterSpec:
    """A spec that gates as the encoded one did; it names no module."""
    scoring, score, weight_rule, group_score, experts, nulls, groups, kept, normalize, eps, scaling, fill = rule.split()
    return RouterSpec(
        scoring=scoring, score=score, weight_rule=weight_rule,
        group_score=None if group_score == "None" else group_score,
        num_experts=int(experts), null_experts=int(nulls), n_group=int(groups), topk_group=int(kept),
        normalize=normalize == "True", normalize_eps=float(eps), scaling=float(scaling), group_fill=float(fill),
        top_k=1, hidden_size=1, weight_name="", num_rows=int(experts),
    )  # fmt: skip


def unsupported(spec: RouterSpec, k: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot gate for such a router; None where they can."""
    if spec.weight_rule not in ("score", "chosen_softmax", "null_is_zero"):
        return f"weights by the rule {spec.weight_rule!r} do not follow from the logits"
    if spec.num_experts > MAX_EXPERTS or k > MAX_CHOSEN:
        return f"top-{k} of {spec.num_experts} experts: the kernels take up to {MAX_CHOSEN} of {MAX_EXPERTS}"
    if dtype not in _KERNEL_DTYPES:
        return f"logits of {dtype}: the kernels take fp32, fp16 and bf16"
    return None


@cache
def kernel_rule(rule: str) -> Rule:
    """The encoded spec in the kernels' words."""
    from remoe_adapt.triton_kernels import rule as words

    spec = spec_of_text(rule)
    grouped = spec.group_score is not None and not spec.ranks_logits and spec.scoring != "sigmoid"
    return words.Rule(
        score={"softmax": words.SOFTMAX, "sigmoid": words.SIGMOID}.get(spec.score, words.SQRT_SOFTPLUS),
        rank=words.BY_LOGIT
        if spec.ranks_logits
        else words.BY_BIASED_LOGIT
        if spec.scoring == "logit_bias_sigmoid"
        else words.BY_SCORE,
        groups=words.NO_GROUPS if not grouped else words.GROUP_MAX if spec.group_score == "max" else words.GROUP_TOP2,
        num_groups=spec.n_group if grouped else 1,
        kept_groups=spec.topk_group if grouped else 1,
        fill=spec.group_fill,
        chosen_softmax=spec.is_chosen_softmax,
        normalize=spec.normalize,
        eps=spec.normalize_eps,
        null_from=spec.num_experts - spec.null_experts if spec.weight_rule == "null_is_zero" else None,
        scaling=spec.scaling,
    )


def _bias(bias: Tensor | None, rule: str) -> Tensor | None:
    """The selection bias as the kernels read it; None where the scoring ranks without one."""
    spec = spec_of_text(rule)
    unbiased = bias is None or spec.ranks_logits or spec.scoring == "sigmoid"
    return None if bias is None or unbiased else bias.float().reshape(-1).contiguous()


def _gate(
    logits: Tensor, bias: Tensor | None, recency: Tensor | None, gain: Tensor | None, decay: float | None,
    flags: Tensor | None, share: float | None, k: int, rule: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kernels, or the definition elsewhere and beyond them; `recency` moves on in place if there is a decay."""
    if backend(logits.device) != "triton" or unsupported(spec_of_text(rule), k, logits.dtype) is not None:
        prior = None if recency is None or gain is None else PriorStep(recency, gain, decay, flags, share)
        weights, ids = reference.topk_gating(logits, k, spec_of_text(rule), prior, bias_E=bias)
        return weights, ids.contiguous()
    bias = _bias(bias, rule)
    held = None if share is None else held_experts(share, k, logits.shape[1])
    if recency is None or gain is None or decay is None or len(recency) == len(logits):
        from remoe_adapt.triton_kernels.gate import launch_gate

        gated: tuple[Tensor, Tensor] = launch_gate(
            logits, k, kernel_rule(rule), bias, recency, gain, decay, flags, held_count=held
        )
        return gated
    from remoe_adapt.triton_kernels.scan import launch_scan

    scanned: tuple[Tensor, Tensor] = launch_scan(
        logits, k, kernel_rule(rule), bias, recency, gain, decay, flags, held_count=held
    )
    return scanned


@torch.library.custom_op("remoe::topk_gating", mutates_args=())
def _topk_gating(
    logits: Tensor, bias: Tensor | None, recency: Tensor | None, gain: Tensor | None, decay: float | None,
    flags: Tensor | None, share: float | None, k: int, rule: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    after = _after(logits, recency, decay)
    moving = recency if recency is None or decay is None else after
    return *_gate(logits, bias, moving, gain, decay, flags, share, k, rule), after


@_topk_gating.register_fake
def _(
    logits: Tensor, _bias: Any, recency: Tensor | None, _gain: Any, decay: float | None, _flags: Any, _share: Any,
    k: int, _rule: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return *_empty(logits, k), _after(logits, recency, decay)


def _after(logits: Tensor, recency: Tensor | None, decay: float | None) -> Tensor:
    """Memory for the recency after the call, holding the recency before; empty where nothing moves."""
    if recency is None or decay is None:
        return logits.new_empty((0,), dtype=torch.float32)
    return recency.clone(memory_format=torch.contiguous_format)


def _empty(like: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (like.shape[0], k)
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, bias, recency, _, _, _, share, _, ctx.rule = inputs
    ctx.is_priced = recency is not None and share is not None
    # The bias takes part in the router's own choice alone, over whose sum the weights of a priced prior are.
    ctx.save_for_backward(logits, output[1], bias if ctx.is_priced else None)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_weights: Tensor, _ids: Any, _after: Any) -> tuple[Tensor | None, ...]:
    logits, ids, bias = ctx.saved_tensors
    spec = spec_of_text(ctx.rule)
    own = best_ids(spec.choice_scores(logits, bias).float(), ids.shape[1]) if ctx.is_priced else None
    return weights_backward(grad_weights, logits, ids, spec, own), *(None,) * 8


_topk_gating.register_autograd(_backward, setup_context=_save)


def weights_backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, spec: RouterSpec, own_TK: Tensor | None = None
) -> Tensor:
    """Gradient in the logits [T, E] (their dtype) of `spec.expert_weights(logits_TE, ids_TK)`, in closed form; with
    own_TK of that times `cost.kept_part`.

    softmax: dz = p * (dp - sum(dp * p)); renormalised u = s / t, t = sum(s) + eps: ds = (du - sum(du * u)) / t; over
    the sum t of others ds = du / t, and theirs -sum(du * u) / t; sigmoid: s * (1 - s); sqrt(softplus):
    sigmoid / (2 s).
    """
    chosen_TK = logits_TE.gather(-1, ids_TK).float()
    grad_TK = grad_TK * spec.scaling
    if own_TK is not None and divides(spec):
        return _over_own_backward(grad_TK, logits_TE, ids_TK, spec, own_TK)
    if spec.is_chosen_softmax:
        p_TK = chosen_TK.softmax(dim=-1)
        return _spread(p_TK * (grad_TK - (grad_TK * p_TK).sum(dim=-1, keepdim=True)), ids_TK, logits_TE)
    if spec.weight_rule == "null_is_zero":
        grad_TK = grad_TK.masked_fill(ids_TK >= spec.num_experts - spec.null_experts, 0.0)
    if spec.score == "softmax":
        p_TE = logits_TE.float().softmax(dim=-1)
        score_TK = p_TE.gather(-1, ids_TK)
    else:
        score_TK = spec.scores(chosen_TK)
    if spec.normalize:
        total_T1 = score_TK.sum(dim=-1, keepdim=True) + spec.normalize_eps
        grad_TK = (grad_TK - (grad_TK * score_TK / total_T1).sum(dim=-1, keepdim=True)) / total_T1
    if spec.score == "softmax":
        inner_TK = grad_TK * score_TK
        return (_spread(inner_TK, ids_TK, p_TE) - p_TE * inner_TK.sum(dim=-1, keepdim=True)).to(logits_TE.dtype)
    return _spread(grad_TK * _slope(chosen_TK, score_TK, spec), ids_TK, logits_TE)


def _over_own_backward(grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, spec: RouterSpec, own_TK: Tensor) -> Tensor:
    """`weights_backward` where weights are over the sum of the router's own best."""
    if spec.weight_rule == "null_is_zero":
        grad_TK = grad_TK.masked_fill(ids_TK >= spec.num_experts - spec.null_experts, 0.0)
    z_TE, zeros_TE = logits_TE.float(), torch.zeros(logits_TE.shape, dtype=torch.float32, device=logits_TE.device)
    if spec.is_chosen_softmax:
        total_T1 = z_TE.gather(-1, own_TK).logsumexp(dim=-1, keepdim=True)
        inner_TK = grad_TK * (z_TE.gather(-1, ids_TK) - total_T1).exp()
        of_own_TK = -inner_TK.sum(dim=-1, keepdim=True) * (z_TE.gather(-1, own_TK) - total_T1).exp()
        return zeros_TE.scatter(-1, ids_TK, inner_TK).scatter_add_(-1, own_TK, of_own_TK).to(logits_TE.dtype)
    score_TE = spec.scores(z_TE)
    total_T1 = score_TE.gather(-1, own_TK).sum(dim=-1, keepdim=True) + spec.normalize_eps
    grad_TK = grad_TK / total_T1
    lost_T1 = (grad_TK * score_TE.gather(-1, ids_TK)).sum(dim=-1, keepdim=True) / total_T1
    of_score_TE = zeros_TE.scatter(-1, ids_TK, grad_TK).scatter_add_(-1, own_TK, -lost_T1.expand(own_TK.shape))
    if spec.score == "softmax":
        return (score_TE * (of_score_TE - (of_score_TE * score_TE).sum(dim=-1, keepdim=True))).to(logits_TE.dtype)
    return (of_score_TE * _slope(z_TE, score_TE, spec)).to(logits_TE.dtype)


def _slope(logits: Tensor, score: Tensor, spec: RouterSpec) -> Tensor:
    """Of scores in the logits, where each is of its own logit alone; any shape."""
    return score * (1 - score) if spec.score == "sigmoid" else logits.sigmoid() / (2 * score)


def _spread(values_TK: Tensor, ids_TK: Tensor, like_TE: Tensor) -> Tensor:
    """`values_TK` at their experts, zeros elsewhere, in the dtype of `like_TE`."""
    zeros_TE = torch.zeros(like_TE.shape, dtype=values_TK.dtype, device=like_TE.device)
    return zeros_TE.scatter(-1, ids_TK, values_TK).to(like_TE.dtype)


@torch.library.custom_op("remoe::topk_gating_", mutates_args=("recency",))
def _topk_gating_in_place(
    logits: Tensor, bias: Tensor | None, recency: Tensor, gain: Tensor, decay: float, flags: Tensor | None,
    share: float | None, k: int, rule: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _gate(logits, bias, recency, gain, decay, flags, share, k, rule)


@_topk_gating_in_place.register_fake
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty(logits, args[-2])


@torch.library.custom_op("remoe::route_", mutates_args=("recency",))
def _route(
    hidden: Tensor, weight: Tensor, linear_bias: Tensor | None, bias: Tensor | None, recency: Tensor | None,
    gain: Tensor | None, decay: float | None, flags: Tensor | None, share: float | None, linear_fp32: bool, k: int,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    per_token = recency is None or decay is None or len(recency) == len(hidden)
    kernels = backend(hidden.device) == "triton" and unsupported(spec_of_text(rule), k, hidden.dtype) is None
    if kernels and per_token and (linear_fp32 or hidden.dtype == weight.dtype):
        from remoe_adapt.triton_kernels.route import fits_route, launch_route

        if fits_route(hidden, weight):
            dtype = torch.float32 if linear_fp32 else hidden.dtype
            held = None if share is None else held_experts(share, k, weight.shape[0])
            prior = (recency, gain, decay, flags)
            routed: tuple[Tensor, Tensor, Tensor] = launch_route(
                hidden, weight, linear_bias, k, kernel_rule(rule), dtype, _bias(bias, rule), *prior, held_count=held
            )
            return routed
    logits = _product(hidden, weight, linear_bias, linear_fp32)
    return logits, *_gate(logits, bias, recency, gain, decay, flags, share, k, rule)


@_route.register_fake
def _(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, linear_fp32, k, _rule = args
    dtype = torch.float32 if linear_fp32 else hidden.dtype
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=dtype), *_empty(hidden, k)


def _product(hidden: Tensor, weight: Tensor, linear_bias: Tensor | None, linear_fp32: bool) -> Tensor:
    if linear_fp32:
        return F.linear(hidden.float(), weight.float(), None if linear_bias is None else linear_bias.float())
    return F.linear(hidden, weight, linear_bias)


def gate_of(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """`reference.topk_gating` by the backend for this device; (logits_TE, k, spec, prior, bias_E=) -> weights, ids."""
    # Traced code always gets the operators, which ask for the backend whenever they run.
    if torch.compiler.is_compiling() or backend(device) == "triton":
        return fused_gating
    return reference.topk_gating


def fused_gating(
    logits_TE: Tensor, k: int, spec: RouterSpec, prior: PriorStep | None = None, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.topk_gating` as one operator: weights fp32 [T, K], ids int64 [T, K]; the prior moves on in place.

    Raises ConfigError when k or a shape does not fit.
    """
    reference.check_shapes(logits_TE, k, prior, bias_E)
    recency_BE, gain, decay, flags_T, share = _parts(prior)
    rule = spec_text(spec)
    if recency_BE is not None and gain is not None and decay is not None:
        if not _needs_grad(logits_TE):
            in_place: tuple[Tensor, Tensor] = torch.ops.remoe.topk_gating_(
                logits_TE, bias_E, recency_BE, gain, decay, flags_T, share, k, rule
            )
            return in_place
        weights_TK, ids_TK, after_BE = torch.ops.remoe.topk_gating(
            logits_TE, bias_E, recency_BE, gain, decay, flags_T, share, k, rule
        )
        recency_BE.copy_(after_BE)
        return weights_TK, ids_TK
    weights_TK, ids_TK, _ = torch.ops.remoe.topk_gating(
        logits_TE, bias_E, recency_BE, gain, None, flags_T, share, k, rule
    )
    return weights_TK, ids_TK


def fused_route(
    hidden_TD: Tensor, weight_ED: Tensor, k: int, spec: RouterSpec, prior: PriorStep | None = None,
    bias_E: Tensor | None = None, linear_bias_E: Tensor | None = None, linear_fp32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Router product and gate: logits [T, E], weights fp32 [T, K], ids int64 [T, K]; the prior moves on in place.

    One launch on a CUDA device for up to 16 tokens of different sequences; product and gate one after the other where
    there are more, or where gradients are needed. `linear_fp32`: product of operands cast to fp32, logits fp32; else
    logits have the dtype of hidden_TD. Raises ConfigError when k or a shape does not fit.
    """
    if hidden_TD.shape[0] > MAX_ROUTE_TOKENS or _needs_grad(hidden_TD, weight_ED, linear_bias_E):
        logits_TE = _product(hidden_TD, weight_ED, linear_bias_E, linear_fp32)
        return logits_TE, *fused_gating(logits_TE, k, spec, prior, bias_E)
    reference.check_shapes(hidden_TD[:, :1].expand(-1, weight_ED.shape[0]), k, prior, bias_E)
    recency_BE, gain, decay, flags_T, share = _parts(prior)
    routed: tuple[Tensor, Tensor, Tensor] = torch.ops.remoe.route_(
        hidden_TD,
        weight_ED,
        linear_bias_E,
        bias_E,
        recency_BE,
        gain,
        decay,
        flags_T,
        share,
        linear_fp32,
        k,
        spec_text(spec),
    )
    return routed


def _parts(
    prior: PriorStep | None,
) -> tuple[Tensor | None, Tensor | None, float | None, Tensor | None, float | None]:
    if prior is None:
        return (None,) * 5
    return prior.recency_BE, prior.gain, prior.decay, prior.flags_T, prior.share


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
