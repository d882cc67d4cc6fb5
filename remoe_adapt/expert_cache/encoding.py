"""How an expert is encoded: its bytes in the files and in its slot, and the arithmetic that computes with them.

A new encoding is an Encoding in a file of its own, and one call of `register`. The store, packs, slots, tiers and the
experts modules know it by this protocol alone: they see tensors with names, shapes and types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from remoe_adapt.checkpoints import Extent
from remoe_adapt.errors import UncacheableError

# For types alone, because experts.py imports this file.
if TYPE_CHECKING:
    from remoe_adapt.expert_cache.experts import ChosenExperts

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Indices and masks, which files may hold beside experts of any encoding.
_NO_WEIGHTS = (torch.int64, torch.bool)


class Encoding(Protocol):
    """How the experts of some checkpoints are encoded, in their files and in slots."""

    @property
    def method(self) -> str | None:
        """The `quant_method` of configurations whose experts are encoded so; None: of those without one."""
        ...

    def prepare(self, model: PreTrainedModel) -> None:
        """Give the experts modules of a model on the meta device the parameters [E, ...] that the files hold.

        One row of each is what a slot holds of one expert: its bytes are counted by them.
        """
        ...

    def check_files(self, folder: Path, extents: Iterable[Extent]) -> None:
        """Raises UncacheableError for an expert's tensor in a format that is not of this encoding."""
        ...

    def arithmetic(
        self, module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, chosen: ChosenExperts
    ) -> Tensor:
        """Compute one layer's experts on slots of this encoding.

        module: the experts module, which has no parameters.
        hidden_TD: the hidden states of the tokens.
        ids_TK: the chosen experts of each token.
        weights_TK: what each choice counts.
        chosen: the slots of all experts that `ids_TK` names.
        """
        ...


class _Rows:
    """Stands for a parameter [E, ...]: row e is read from the slot of expert e."""

    __slots__ = ("_chosen", "_param")

    def __init__(self, chosen: ChosenExperts, param: str) -> None:
        self._chosen, self._param = chosen, param

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self._chosen.slot(int(expert))[self._param]


def eager_function(cls: type[nn.Module]) -> Callable[..., Tensor]:
    """The forward of an experts class below transformers' choice of an implementation."""
    found: Callable[..., Tensor] = inspect.unwrap(cls.forward)
    return found


def has_graph(hidden_TD: Tensor, weights_TK: Tensor) -> bool:
    """Whether a gradient will be asked of what is computed from these."""
    return torch.is_grad_enabled() and (hidden_TD.requires_grad or weights_TK.requires_grad)


def eagerly(
    module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, rows: Mapping[str, Any]
) -> Tensor:
    """Compute one layer by the eager function of its module's class.

    rows: what stands for each parameter: `rows[param][expert]` is that expert's.
    """
    # The function reads its parameters from `self`: it gets a shallow copy of the module that has rows in their place.
    # A copy for each call needs no lock and no thread-local, and shares the submodules.
    copied: Any = object.__new__(type(module))
    fields = vars(copied)
    fields.update(vars(module))
    fields.update(rows)
    return eager_function(type(module))(copied, hidden_TD, ids_TK, weights_TK)


class Floats:
    """Plain numbers: the parameters of transformers' experts modules, computed by their eager function."""

    method: str | None = None

    def prepare(self, model: PreTrainedModel) -> None:
        """Do nothing: the modules hold these parameters already."""

    def check_files(self, folder: Path, extents: Iterable[Extent]) -> None:
        """Refuse quantised experts."""
        for extent in extents:
            if "expert" in extent.tensor and extent.dtype not in (*_FLOATS, *_NO_WEIGHTS):
                raise UncacheableError(
                    f"{folder}: {extent.tensor} is quantised; the expert cache reads experts in F64, F32, F16 or BF16. "
                    "Give it the checkpoint that this was made from, or a dequantised copy of it."
                )

    def arithmetic(
        self, module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, chosen: ChosenExperts
    ) -> Tensor:
        """Call the eager function of the module's class, which computes one expert after another in rising order.

        So every bit of the result is transformers' own, also when the experts come in several groups.
        """
        # Every slot has the same parameters, so one of them names all.
        params = next(iter(chosen.slots.values()), ())
        return eagerly(module, hidden_TD, ids_TK, weights_TK, {param: _Rows(chosen, param) for param in params})


FLOATS = Floats()
_ENCODINGS: dict[str | None, Encoding] = {None: FLOATS}


def register(encoding: Encoding) -> None:
    """From now on, checkpoints whose configuration names its `method` are read so."""
    _ENCODINGS[encoding.method] = encoding


def encoding_of(config: PretrainedConfig) -> Encoding | None:
    """The encoding of a checkpoint's experts by the `quant_method` of its configuration: floats where it names none,
    None where nobody has registered that one here."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            entries = settings if isinstance(settings, Mapping) else vars(settings)
            method = entries.get("quant_method")
            return _ENCODINGS.get(str(getattr(method, "value", method)))
    return FLOATS
