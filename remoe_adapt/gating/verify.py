"""A router's own forward against a replacement, on a twin of the router and a few random tokens.

What is known of a class was read off one version of its source, so a replacement is used only where both agree here.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt.routers import RouterSpec

TOKENS = 8
# Half precision lets scores that stock rounds before ranking swap places, in so many tokens at most.
_ROUNDED_TOKENS = TOKENS // 4

Forward = Callable[..., Any]


def bare_twin(module: nn.Module) -> nn.Module:
    """A module of the same class on the same tensors, without hooks or a replaced forward; its modes are its own."""
    twin = copy.copy(module)
    state = vars(twin)
    state.pop("forward", None)
    for name, value in state.items():
        if name in ("_parameters", "_buffers"):
            state[name] = value.copy()
        elif name == "_modules":
            state[name] = {child: bare_twin(part) if part is not None else None for child, part in value.items()}
        elif "hook" in name and isinstance(value, dict):
            state[name] = OrderedDict()
    return twin


def perturb(module: nn.Module, generator: torch.Generator) -> None:
    """Give the vectors of a twin new values near the old ones: biases are 0 and scales 1 before training."""
    for part in module.modules():
        groups: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in groups:
            for name, tensor in tuple(tensors.items()):
                if tensor is not None and tensor.is_floating_point() and sum(n > 1 for n in tensor.shape) < 2:
                    tensors[name] = near(tensor, generator)


def near(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """`tensor` plus random numbers of standard deviation 0.2."""
    noise = torch.randn(tensor.shape, generator=generator).mul_(0.2)
    return tensor.detach() + noise.to(tensor.device, tensor.dtype)


def random_hidden(twin: nn.Module, weight_name: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Tokens [TOKENS, D] whose logits under the twin's weight spread by about 2.

    A weight that tells no experts apart (zero before training) would agree with anything: the twin gets a random one.
    """
    owner, _, leaf = weight_name.rpartition(".")
    held: dict[str, Any] = twin.get_submodule(owner)._parameters
    weight_ED: Tensor = held[leaf].detach()
    hidden_TD = torch.randn(TOKENS, weight_ED.shape[1], generator=generator).to(weight_ED.device)
    spread = (hidden_TD @ weight_ED.float().t()).std(dim=-1).mean()
    if not spread > 0:
        weight_ED = torch.randn(weight_ED.shape, generator=generator).to(weight_ED.device, weight_ED.dtype)
        held[leaf], spread = weight_ED, weight_ED.new_tensor(weight_ED.shape[1] ** 0.5)
    return (hidden_TD * (2.0 / spread.float())).to(dtype)


def disagreement(
    stock: Forward, fast: Forward, twin: nn.Module, spec: RouterSpec, inputs: tuple[Any, ...], bias_E: Tensor | None
) -> str | None:
    """How `fast` differs from `stock` on these inputs, without gradients, in both modes of the twin; None if it does
    not. Both start from the same random state, which is as before afterwards."""
    device = inputs[0].device
    others = [device] if device.type not in ("cpu", "mps") else []  # mps cannot give its random state back
    for training in (False, True):
        twin.train(training)
        results = []
        for forward in (stock, fast):
            copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)
            with torch.no_grad(), torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
                results.append((forward(*copies), copies[0]))
        reason = _difference(results[0], results[1], spec, bias_E)
        if reason is not None:
            return f"{reason} (in training)" if training else reason
    return None


def _difference(
    stock: tuple[Any, Tensor], fast: tuple[Any, Tensor], spec: RouterSpec, bias_E: Tensor | None
) -> str | None:
    (stock_out, stock_hidden), (fast_out, fast_hidden) = stock, fast
    if not isinstance(stock_out, tuple) or len(stock_out) != len(fast_out):
        found = f"{len(stock_out)} values" if isinstance(stock_out, tuple) else _kind(stock_out)
        return f"it returns {found}, expected {len(fast_out)}"
    if not torch.equal(stock_hidden, fast_hidden):
        return "it changes its input in place"
    for name, theirs, ours in zip(spec.returns, stock_out, fast_out, strict=True):
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return f"its {name} are {_kind(theirs)}, expected {_kind(ours)}"
    theirs, ours = spec.read(stock_out), spec.read(fast_out)
    if not torch.allclose(theirs.logits_TE, ours.logits_TE, atol=1e-5, rtol=1e-5):
        return f"its logits differ by up to {_gap(theirs.logits_TE, ours.logits_TE):.2g}"
    precise = min(torch.finfo(t.dtype).bits for t in (ours.logits_TE, stock_hidden)) > 16
    tolerance = 1e-5 if precise else 3e-2
    # Equal values may be chosen in any order, so what is compared is how good the chosen are.
    choice_TE = spec.choice_scores(ours.logits_TE, bias_E).float()
    best_TK, best_fast_TK = (choice_TE.gather(-1, out.ids_TK).sort(dim=-1).values for out in (theirs, ours))
    agree_T = torch.isclose(best_TK, best_fast_TK, atol=tolerance, rtol=tolerance).all(dim=-1)
    missed = TOKENS - int(agree_T.sum())
    if missed > (0 if precise else _ROUNDED_TOKENS):
        return f"it chooses other experts for {missed} of {TOKENS} random tokens"
    same_T = (theirs.ids_TK.sort(dim=-1).values == ours.ids_TK.sort(dim=-1).values).all(dim=-1)
    if theirs.weights_TK is None or ours.weights_TK is None:
        return None
    weights_TK, fast_weights_TK = (
        out.weights_TK.float().gather(-1, out.ids_TK.argsort(dim=-1))[same_T]
        for out in (theirs, ours)
        if out.weights_TK is not None
    )
    if not torch.allclose(weights_TK, fast_weights_TK, atol=tolerance, rtol=tolerance):
        return f"its weights differ by up to {_gap(weights_TK, fast_weights_TK):.2g}"
    return None


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
