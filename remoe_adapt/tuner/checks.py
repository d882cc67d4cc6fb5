"""What an adapter's tensors must be before a model takes them: readable, of the right names and shapes, finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from remoe_adapt.errors import AdapterCorruptError

StoredShapes = dict[str, tuple[int, ...]]
_PREFIX = "remoe_"
_SHOWN = 3


def stored_shapes(folder: Path) -> StoredShapes | None:
    """Shapes of the REMOE tensors in the folder's adapter file, by key without PEFT's prefix; None without a file.

    Raises AdapterCorruptError when the file cannot be read to its end or holds NaN or Inf.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return None
    shapes: StoredShapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if f".{_PREFIX}" in key:
                    tensor = file.get_tensor(key)
                    shapes[plain_key(key)] = tuple(tensor.shape)
                    check_finite(key, tensor, str(path))
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AdapterCorruptError):
            raise
        raise AdapterCorruptError(
            f"{path} is not a complete safetensors file ({error}): copy or save the adapter again."
        ) from error
    if not shapes:
        raise AdapterCorruptError(f"{path} holds no {_PREFIX} tensors: it is not the file of a REMOE adapter.")
    return shapes


def plain_key(key: str) -> str:
    """A stored key relative to the base model."""
    return key.removeprefix("base_model.model.")


def check_finite(key: str, tensor: Tensor, where: str) -> None:
    """Raises AdapterCorruptError when `tensor` holds NaN or Inf; tensors without values (meta) pass."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterCorruptError(f"{key} in {where} holds NaN or Inf: train or save the adapter again.")


def check_shapes(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: str) -> None:
    """Compare tensor names and shapes with what the model's routers need.

    Raises AdapterCorruptError that names missing, unexpected and misshapen tensors.
    """
    faults = []
    if missing := [key for key in expected if key not in found]:
        faults.append(f"missing {_listing(missing)}")
    if unexpected := [key for key in found if key not in expected]:
        faults.append(f"unexpected {_listing(unexpected)}")
    wrong = [
        f"{key} is {list(shape)}, the router needs {list(expected[key])}"
        for key, shape in found.items()
        if key in expected and tuple(shape) != tuple(expected[key])
    ]
    if wrong:
        faults.append(_listing(wrong))
    if faults:
        raise AdapterCorruptError(
            f"{where} does not fit the routers of this model: {'; '.join(faults)}. "
            "Is it the adapter of another model, or an incomplete copy?"
        )


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], where: str) -> None:
    """`check_shapes`, then every tensor is finite. Raises AdapterCorruptError."""
    check_shapes({key: tensor.shape for key, tensor in found.items()}, expected, where)
    for key, tensor in found.items():
        check_finite(key, tensor, where)


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
