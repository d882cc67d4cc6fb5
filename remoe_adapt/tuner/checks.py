"""What an adapter's tensors must be before a model takes them: of the right names, types and shapes, and finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from remoe_adapt._support import printable
from remoe_adapt.errors import AdapterCorruptError
from remoe_adapt.routers import PEFT_PREFIX

PREFIX = "remoe_"
KINDS = ("remoe_delta", "remoe_A", "remoe_B")
_SHOWN = 3
# Hidden states are up to 16 times larger than normalised ones. Squares of the wide types' norms must stay finite too.
_LARGEST_LOGIT = {torch.float16: 65504.0 / 16}
_LARGEST_WIDE_LOGIT = 1e18


def plain_key(key: str) -> str:
    """A stored key relative to the base model; a compiled base's own prefix is part of what PEFT looks for."""
    return key.removeprefix(PEFT_PREFIX)


def is_router_key(key: str) -> bool:
    """Whether a key without an adapter name is a tensor of ours, beside those of `modules_to_save`."""
    return key.rpartition(".")[2] in KINDS


def check_finite(key: str, tensor: Tensor, where: str) -> None:
    """Raises AdapterCorruptError when `tensor` holds NaN or Inf; tensors without values (meta) pass."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterCorruptError(
            f"{printable(key)} in {printable(where)} holds NaN or Inf: train or save the adapter again."
        )


def check_types(found: Mapping[str, torch.dtype | None], expected: Mapping[str, torch.dtype], where: str) -> None:
    """Raises AdapterCorruptError for a tensor that would change its kind when copied: integers, booleans, complex or
    tiny floats for a float. fp64, fp32, fp16 and bf16 pass for each other."""
    for key, dtype in found.items():
        wanted = expected.get(key)
        if wanted is None or dtype == wanted or (dtype in _FLOATS and wanted in _FLOATS):
            continue
        raise AdapterCorruptError(
            f"{printable(key)} in {printable(where)} has type {'unknown' if dtype is None else dtype}, the model needs "
            f"{wanted}: save the adapter again."
        )


def check_shapes(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: str) -> None:
    """Compare tensor names and shapes with what the model's routers and its `modules_to_save` need.

    Raises AdapterCorruptError that names missing, unexpected and misshapen tensors.
    """
    faults = []
    if missing := [key for key in expected if key not in found]:
        faults.append(f"missing {_listing(missing)}")
    if unexpected := [key for key in found if key not in expected]:
        # A tensor with the name of a base's own would be copied over it without a word.
        foreign = [key for key in unexpected if f".{PREFIX}" not in key]
        remedy = ", of neither a router nor modules_to_save: they would overwrite the base" if foreign else ""
        faults.append(f"unexpected {_listing(foreign or unexpected)}{remedy}")
    wrong = [
        f"{key} is {list(shape)}, the {'router' if f'.{PREFIX}' in key else 'module'} needs {list(expected[key])}"
        for key, shape in found.items()
        if key in expected and tuple(shape) != tuple(expected[key])
    ]
    if wrong:
        faults.append(_listing(wrong))
    if faults:
        raise AdapterCorruptError(
            f"{printable(where)} does not fit this model: {'; '.join(faults)}. "
            "Is it the adapter of another model, or an incomplete copy?"
        )


@torch.no_grad()
def check_router(router: str, weight_ED: Tensor, parts: Mapping[str, Tensor], where: str) -> None:
    """The deltas of one router, of the right shapes, are finite, and so are its logits and its weight [E, D] in its own
    type under them. parts: `remoe_delta` [E, D], or `remoe_A` [r, D] and `remoe_B` [E, r].

    Raises AdapterCorruptError.
    """
    exact = torch.promote_types(weight_ED.dtype, torch.float32)
    for kind, tensor in parts.items():
        check_finite(f"{router}.{kind}", tensor.to(exact), where)
    if weight_ED.is_meta or any(tensor.is_meta for tensor in parts.values()):
        return
    given = {kind: tensor.to(weight_ED.device, exact) for kind, tensor in parts.items()}
    # A caller may have autocast on, which would multiply the halves in 16 bits.
    with torch.autocast(weight_ED.device.type, enabled=False):
        delta_ED = given["remoe_delta"] if "remoe_delta" in given else given["remoe_B"] @ given["remoe_A"]
    if not stays_usable(weight_ED, (weight_ED.to(exact) + delta_ED).to(weight_ED.dtype)):
        raise AdapterCorruptError(
            f"{printable(router)}: the deltas in {printable(where)} are so large that the router's weight or its "
            f"logits are infinite or NaN in {weight_ED.dtype}. Train it again, or load the base in another type."
        )


def stays_usable(before_ED: Tensor, after_ED: Tensor) -> bool:
    """Whether the logits of a router stay finite when its weight changes: a row's norm times that of a normalised
    hidden state, sqrt(D), bounds them. NaN and infinite entries fail; rows that failed before are not asked."""
    exact = torch.promote_types(after_ED.dtype, torch.float32)
    largest = _LARGEST_LOGIT.get(after_ED.dtype, _LARGEST_WIDE_LOGIT) / math.sqrt(after_ED.shape[-1])
    norms_E = torch.linalg.vector_norm(after_ED, dim=-1, dtype=exact)
    fine_E = norms_E <= largest
    if bool(fine_E.all()):
        return True
    known_E = torch.linalg.vector_norm(before_ED, dim=-1, dtype=exact)
    return bool((fine_E | (norms_E <= 2 * known_E) | ~torch.isfinite(known_E)).all())


def by_router(keys: Iterable[str]) -> dict[str, list[str]]:
    """The kinds of tensors that each router has, from keys without adapter names."""
    found: dict[str, list[str]] = {}
    for router, _, kind in (key.rpartition(".") for key in keys if is_router_key(key)):
        found.setdefault(router, []).append(kind)
    return found


_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(printable(plain_key(name)) for name in names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
