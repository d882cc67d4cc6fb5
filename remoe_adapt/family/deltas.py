"""The deltas of one adapter folder, which take no more memory than the file until a router's are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from remoe_adapt._support import printable, read_json
from remoe_adapt.errors import AdapterCorruptError, FamilyError, FingerprintMismatchError
from remoe_adapt.tuner import KINDS, by_router, check_finite, is_router_key, read_adapter

# The most values that a router's delta may have: 8192 experts at a hidden size of 8192. The largest routers there are
# have a quarter of that; a forged rank could ask for terabytes.
_MAX_VALUES = 1 << 26
_MAX_CONFIG_BYTES = 16 << 20
# Of a fingerprint in messages: "sha256:" and twelve digits tell two bases apart.
_SHOWN_DIGITS = 19


class RouterDeltas(Mapping[str, Tensor]):
    """Deltas [E, D] fp32 by router name. Low-rank ones are kept as they are stored and multiplied out when they are
    first asked for: so whoever compares `shapes` with a model first needs no more memory than that model has routers.

    Raises AdapterCorruptError, when asked for a router, for factors whose product is not finite.
    """

    def __init__(self, factors: Mapping[str, tuple[Tensor, ...]], where: str) -> None:
        """factors: by router (delta [E, D],) or (B [E, r], A [r, D]), fp32."""
        self._factors, self._where = dict(factors), where
        self._products: dict[str, Tensor] = {}
        self.shapes = {name: (held[0].shape[0], held[-1].shape[1]) for name, held in self._factors.items()}

    def __getitem__(self, router: str) -> Tensor:
        held = self._factors[router]
        if len(held) == 1:
            return held[0]
        # Kept once made: swaps ask for the same product again and again.
        if router not in self._products:
            product_ED = held[0] @ held[1]
            check_finite(router, product_ED, self._where)
            self._products[router] = product_ED
        return self._products[router]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


def shapes_of(deltas: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of deltas by router, without multiplying any out."""
    if isinstance(deltas, RouterDeltas):
        return dict(deltas.shapes)
    return {name: tuple(delta_ED.shape) for name, delta_ED in deltas.items()}


def read_deltas(folder: Path, base_id: str, fingerprint: str) -> RouterDeltas:
    """Deltas [E, D] fp32 on the CPU by router name, of one saved REMOE adapter.

    Raises FamilyError when the folder is missing, is another kind of adapter, holds more than router deltas or ones
    that no router can have; AdapterCorruptError when its tensors are truncated, twice there, of an odd type or not
    finite; FingerprintMismatchError when it records another base's fingerprint.
    """
    shown = printable(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise FamilyError(f"{shown} is not a saved adapter: it has no {CONFIG_NAME}.")
    config = read_json(folder / CONFIG_NAME, FamilyError, max_bytes=_MAX_CONFIG_BYTES)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "REMOE":
        raise FamilyError(
            f"{shown} holds a PEFT adapter of type {printable(repr(kind))}: a family is made of REMOE adapters."
        )
    # None says nothing: the configuration was written before the adapter had a base.
    made_for = config.get("base_fingerprint")
    if made_for not in (None, fingerprint):
        raise FingerprintMismatchError(
            f"adapter {shown} was made for {printable(repr(config.get('base_model_name_or_path')))} "
            f"({printable(str(made_for)[:_SHOWN_DIGITS])}...), its family for {printable(repr(base_id))} "
            f"({printable(fingerprint[:_SHOWN_DIGITS])}...): train it on the family's base."
        )
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FamilyError(f"{shown} has no {SAFETENSORS_WEIGHTS_NAME}: copy the family again.")
    adapter = read_adapter(path)
    # A dial writes router weights only; an adapter that changes attention too would lose that part without a word.
    if foreign := [key for key in adapter.tensors if not is_router_key(key)]:
        raise FamilyError(
            f"{printable(path)} holds {printable(foreign[0])}, which is not a router's delta: a family changes routers "
            "only."
        )
    orders = {}
    for router, kinds in by_router(adapter.tensors).items():
        orders[router] = order = ("remoe_delta",) if "remoe_delta" in kinds else ("remoe_B", "remoe_A")
        if set(order) != set(kinds):
            raise FamilyError(
                f"{printable(path)} has {', '.join(sorted(kinds))} for {printable(router)}: a router's delta is "
                f"{KINDS[0]}, or {KINDS[1]} with {KINDS[2]}."
            )
        _check_shapes(printable(path), printable(router), [adapter.tensors[f"{router}.{kind}"].shape for kind in order])
    factors: dict[str, tuple[Tensor, ...]] = {}
    with adapter.values() as values:
        for router, order in orders.items():
            factors[router] = tuple(values[f"{router}.{kind}"].to(torch.float32) for kind in order)
            for tensor in factors[router]:
                check_finite(router, tensor, str(path))
    return RouterDeltas(factors, str(path))


def _check_shapes(path: str, router: str, shapes: list[tuple[int, ...]]) -> None:
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise FamilyError(
            f"{path}: the delta of {router} has shape {' x '.join(str(list(shape)) for shape in shapes)}, not "
            "[experts, hidden]."
        )
    if shapes[0][1] != shapes[-1][0] and len(shapes) == 2:
        raise AdapterCorruptError(f"{path}: {list(shapes[0])} x {list(shapes[1])} of {router} cannot be multiplied.")
    if shapes[0][0] * shapes[-1][1] > _MAX_VALUES:
        raise FamilyError(
            f"{path}: the delta of {router} would be {[shapes[0][0], shapes[-1][1]]}, more than any router has: it is "
            "not the adapter of a model."
        )
