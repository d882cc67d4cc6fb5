"""The experts of a GGUF: which rows of which tensors are a parameter of one expert, and how they become it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import Extent
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.encodings import BlockType
from remoe_adapt.expert_cache.gguf.tensors import OTHER_CONFIG, Stored, check_kind, decoded, one_row

# Parameter of an experts module, without "_bias" -> tensors that hold it, one after another; the first set that is
# there counts.
_TENSORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("ffn_gate_exps", "ffn_up_exps"), ("ffn_gate_up_exps",)),
    "up_proj": (("ffn_up_exps",),),
    "down_proj": (("ffn_down_exps",),),
}


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The stored tensors of one parameter of the experts of one layer.

    param: its name in the experts module.
    shape: of the parameter of one expert.
    extents: torch.uint8 [E, rows, row bytes], rows of blocks; `extent.row(e, E)` is one expert.
    kinds: ggml's types of their blocks, in the same order.
    cols: numbers in a row; 1 for a bias, whose numbers are rows of their own.
    interleaved: the rows of gate and up come in turns in the parameter, else one after another.
    transposed: the parameter has inputs before outputs; blocks are along the inputs, so theirs are the rows.
    """

    param: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    kinds: tuple[BlockType, ...]
    cols: int
    interleaved: bool
    transposed: bool

    @property
    def is_bias(self) -> bool:
        return len(self.shape) == 1

    @property
    def has_blocks(self) -> bool:
        """Whether `blocks` can give its rows: not where rows of two types come in turns."""
        return not self.interleaved or len(set(self.kinds)) == 1

    def convert(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The parameter of one expert, in `shape`, as transformers makes it.

        pieces: of each extent the bytes of that expert, torch.uint8 [(1,) rows, row bytes].
        dtype: which the dequantised fp32 numbers are rounded to.
        """
        bands = [
            decoded(piece_NB, kind, self.cols, dtype)
            for piece_NB, kind in zip(one_row(pieces), self.kinds, strict=True)
        ]
        weight_NK = self._merged(bands)
        weight = (weight_NK.T if self.transposed and not self.is_bias else weight_NK).reshape(self.shape).contiguous()
        # The bytes are the caller's, who may read the next expert into them.
        return weight.clone() if weight.data_ptr() in [piece.data_ptr() for piece in pieces] else weight

    def blocks(self, pieces: Sequence[Tensor]) -> list[tuple[BlockType, Tensor]]:
        """The same as bands of rows of ggml blocks, (type, torch.uint8 [rows, row bytes]), in the order of the outputs.

        pieces: as in `convert`; no byte of a block is changed.

        Raises UncacheableError where `has_blocks` is False.
        """
        bands = one_row(pieces)
        if not self.interleaved:
            return list(zip(self.kinds, bands, strict=True))
        if not self.has_blocks:
            raise UncacheableError(
                f"{printable(self.extents[0].tensor)} and {printable(self.extents[-1].tensor)} are of types "
                f"{' and '.join(kind.name for kind in self.kinds)}, but their rows come in turns: load it with "
                'arithmetic="exact".'
            )
        return [(self.kinds[0], self._merged(bands))]

    def _merged(self, bands: list[Tensor]) -> Tensor:
        if not self.interleaved:
            return torch.cat(bands) if len(bands) > 1 else bands[0]
        gate, up = bands if len(bands) == 2 else bands[0].chunk(2)
        return torch.stack([gate, up], dim=1).flatten(0, 1)


def expert_groups(
    layer: int, name: str, module: nn.Module, tensors: Mapping[str, Stored], path: object
) -> list[ExpertGroup]:
    """What makes up the parameters of an experts module, in their order.

    layer: number of its layer in the file.
    name: of the module, for messages.
    tensors: of the file, by name.
    path: of the file, for messages.

    Raises ConfigError when tensors are missing or of other sizes than the configuration says, UncacheableError for
    parameters and types that no GGUF has or nobody can read.
    """
    groups = []
    for param, value in module.named_parameters(recurse=False):
        weight, bias = param.removesuffix("_bias"), param.endswith("_bias")
        if weight not in _TENSORS:
            raise UncacheableError(f"{name}.{param}: no tensor of a GGUF is known to hold it.")
        ending = "bias" if bias else "weight"
        sets = [[f"blk.{layer}.{tensor}.{ending}" for tensor in names] for names in _TENSORS[weight]]
        names = next((names for names in sets if all(tensor in tensors for tensor in names)), None)
        if names is None:
            raise ConfigError(
                f"{printable(path)} has no {printable(sets[0][0])}, of which {name}.{param} is made: "
                f"{OTHER_CONFIG}. (Files of early 2024 have a tensor for each expert: convert the model again.)"
            )
        stored = [tensors[tensor] for tensor in names]
        transposed = bool(module.is_transposed)
        groups.append(_group(param, tuple(value.shape), stored, bias, transposed, not _concatenated(module, weight)))
        _check(groups[-1], name, len(value), stored, path)
    return groups


def _concatenated(module: nn.Module, weight: str) -> bool:
    # transformers says of its experts classes whether gate and up are halves of gate_up_proj, or come in turns.
    return weight != "gate_up_proj" or bool(getattr(module, "is_concatenated", True))


def _group(
    param: str, shape: tuple[int, ...], stored: list[Stored], bias: bool, transposed: bool, interleaved: bool
) -> ExpertGroup:
    extents = [piece.extent for piece in stored]
    cols = stored[0].shape[-1]
    if bias:
        # Each number is a row: then they go through the steps that the rows of the matrix go through.
        cols = 1
        extents = [
            replace(extent, shape=(*piece.shape, piece.kind.row_bytes(1)))
            for extent, piece in zip(extents, stored, strict=True)
        ]
    kinds = tuple(piece.kind for piece in stored)
    return ExpertGroup(param, shape[1:], tuple(extents), kinds, cols, interleaved, transposed)


def _check(group: ExpertGroup, name: str, num_experts: int, stored: list[Stored], path: object) -> None:
    for piece in stored:
        check_kind(piece)
        if group.is_bias and piece.kind.values != 1:
            raise UncacheableError(
                f"{printable(path)}: {printable(piece.name)} is a quantised bias, which no GGUF has."
            )
    rows = [extent.shape[1] if len(extent.shape) == 3 else -1 for extent in group.extents]
    found = (sum(rows), group.cols)
    wanted = (*group.shape, 1) if group.is_bias else group.shape[::-1] if group.transposed else group.shape
    whole = all(len(extent.shape) == 3 and extent.shape[0] == num_experts for extent in group.extents)
    alike = len(set(rows)) == 1 and all(piece.shape[-1] == stored[0].shape[-1] for piece in stored)
    if not whole or not alike or found != tuple(wanted):
        shapes = " and ".join(f"{printable(piece.name)} {list(piece.shape)}" for piece in stored)
        raise ConfigError(
            f"{printable(path)}: {shapes} do not make up {name}.{group.param}, {num_experts} x {list(group.shape)}: "
            f"{OTHER_CONFIG}."
        )
