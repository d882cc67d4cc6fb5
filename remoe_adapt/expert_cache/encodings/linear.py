"""The dense part in codes: linear and embedding modules whose weight stays in ggml blocks.

`dense_modules` says which modules of a model may be encoded, `encode_dense` puts encoded ones in their places while the
model is on the meta device, and `load_blocks` fills them. They are linear and embedding modules to everybody else, so
that PEFT finds its targets: only their `weight` is a frozen tensor of bytes, which no `to(dtype)` touches.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, TypeGuard

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt.errors import MergeStateError, UncacheableError
from remoe_adapt.expert_cache.encodings.blocks import BlockType, dequantise
from remoe_adapt.expert_cache.encodings.ggml import Ggml, ggml
from remoe_adapt.libraries import Patches, override, replace_module

# From as many tokens on, products in fp32 make up for the time that it takes to dequantise a weight.
_MANY_TOKENS = 16
# Values of a weight that are dequantised at a time for those.
_PART_VALUES = 1 << 22


class _Encoded(nn.Module, ABC):
    """What both kinds of modules share: the blocks of their weight [rows, cols].

    fast: compute on the codes where that can be, within a tolerance; else, and wherever a gradient may be asked for,
        on the dequantised weight, bit-equal to a model that was loaded with it.
    """

    weight: Tensor
    float_like: Tensor
    kind: BlockType
    fast: bool

    def _place(self, kind: BlockType, like: nn.Linear | nn.Embedding) -> None:
        rows, cols = self.shape
        shape = (rows, kind.row_bytes(cols))
        self.kind, self.fast, self.training = kind, False, like.training
        # Holds nothing: as a floating tensor of the module it has the type that the model is told to have.
        self.register_buffer("float_like", like.weight.new_empty(0), persistent=False)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)
        # transformers would draw random floats for a weight that it misses in a checkpoint.
        self._is_hf_initialized = True

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the weight that the blocks stand for."""

    def dequantize(self) -> Tensor:
        """The weight [rows, cols] as floats of the model's type."""
        return self._floats(self.weight)

    def _floats(self, blocks_NB: Tensor) -> Tensor:
        return dequantise(blocks_NB, self.kind, self.shape[1], self.float_like.dtype)


class _OnWeight(torch.autograd.Function):
    """`F.linear` on a weight that is dequantised for it, and once more for its gradient: the graph keeps the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_N: Tensor | None, blocks_NB: Tensor, module: _Encoded) -> Tensor:
        ctx.save_for_backward(blocks_NB)
        ctx.module = module
        # In one call with the bias: added afterwards, the sum of half floats would be rounded twice. First to the
        # model's type and then to autocast's, as a weight in memory would be.
        return F.linear(x, module._floats(blocks_NB).to(x.dtype), bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (blocks_NB,) = grads, ctx.saved_tensors
        grad_x = grad_N = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.module._floats(blocks_NB).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_N = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_N, None, None


class EncodedLinear(_Encoded, nn.Linear):
    """A linear module whose weight [out_features, in_features] is kept as blocks [out_features, row bytes].

    Its outputs have the type of its inputs, or autocast's.
    """

    def __init__(self, like: nn.Linear, kind: BlockType) -> None:
        """like: the module whose place it takes: its sizes, its bias, and whether it is trained."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias
        self._place(kind, like)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def W_q(self) -> Tensor:
        """The codes, under the name by which PEFT knows modules that it has to ask for `dequantize()`, as for DoRA."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of any floating type -> [..., out_features]."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias_N = None if self.bias is None else self.bias.to(x.dtype)
        # Training mode counts as well: a checkpointed forward runs without a graph first, and must compute the same.
        exact = not self.fast or self.training or torch.is_grad_enabled()
        if not exact and (found := self._on_codes(x)) is not None:
            return (found if bias_N is None else found.add_(bias_N)).to(x.dtype)
        y: Tensor = _OnWeight.apply(x, bias_N, self.weight, self)  # type: ignore[no-untyped-call]
        return y

    def _on_codes(self, x: Tensor) -> Tensor | None:
        """The product in fp32 by ggml's kernels; None where they cannot be used."""
        if x.device.type != "cpu" or not x.numel():
            return None
        kernels = ggml()
        if kernels is None or self.kind not in kernels.types:
            return None
        x_TK = x.reshape(-1, self.in_features)
        if len(x_TK) < _MANY_TOKENS:
            y_TN = kernels.matmul(x_TK, self.weight, self.kind, self.out_features)
        else:
            y_TN = self._in_parts(kernels, x_TK.float())
        return y_TN.view(*x.shape[:-1], self.out_features)

    def _in_parts(self, kernels: Ggml, x_TK: Tensor) -> Tensor:
        """The product with the weight in fp32, some of its rows at a time: of an lm_head all would take a gigabyte."""
        y_TN = x_TK.new_empty(len(x_TK), self.out_features)
        step = max(1, _PART_VALUES // self.in_features)
        for part_TM, blocks_MB in zip(y_TN.split(step, dim=1), self.weight.split(step), strict=True):
            torch.mm(x_TK, kernels.dequantise(blocks_MB, self.kind, self.in_features).T, out=part_TM)
        return y_TN

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind.name}"


class EncodedEmbedding(_Encoded, nn.Embedding):
    """An embedding whose weight is kept as blocks [num_embeddings, row bytes]; rows are dequantised when looked up.

    Its outputs have the type of the weight in whose place the blocks came, or the one that `to` gave the model since.
    """

    def __init__(self, like: nn.Embedding, kind: BlockType) -> None:
        """like: the module whose place it takes: its sizes and its type."""
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx, self.sparse = like.padding_idx, False
        self.max_norm, self.norm_type, self.scale_grad_by_freq = None, 2.0, False
        self._place(kind, like)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., embedding_dim]."""
        rows_TB = F.embedding(ids.flatten(), self.weight)
        return self._floats(rows_TB).view(*ids.shape, -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind.name}"


def dense_modules(model: nn.Module, leave: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Modules that may be encoded, by name: (rows, cols) of their weights.

    leave: names of modules that stay as they are with everything below them: experts and routers.

    A module stays too when it is of a class derived from torch's, which may compute otherwise; when it renormalises its
    weight as it is read; and when the code of a module around it reads its weight past its forward, for instance for
    its type. Modules that share one weight stay together.
    """
    left = tuple(f"{name}." for name in leave)
    found: dict[str, nn.Linear | nn.Embedding] = {}
    kept: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_left = name in leave or name.startswith(left)
        if _is_plain(module) and not is_left and name.rpartition(".")[2] not in _read_around(model, name):
            found[name] = module
        else:
            kept.add(id(weight))
    return {name: module.weight.shape for name, module in found.items() if id(module.weight) not in kept}


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear | nn.Embedding]:
    """Of torch's own classes, not derived from them, and reading its weight as it is."""
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def _read_around(model: nn.Module, name: str) -> set[str]:
    parents = name.split(".")[:-1]
    classes: set[Any] = {type(model.get_submodule(".".join(parents[:depth]))) for depth in range(len(parents) + 1)}
    return set().union(*(_weights_read(cls) for cls in classes))


@cache
def _weights_read(cls: type) -> frozenset[str]:
    """Names of the attributes whose `.weight` the code of this class and of its bases reads, but for its device."""
    found: set[str] = set()
    for each in cls.__mro__:
        if each.__module__.startswith("torch."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError, SyntaxError):  # of a class that was made by code
            continue
        found.update(_reads(tree))
    return frozenset(found)


def _reads(node: ast.AST) -> Iterator[str]:
    # Both run before any weight is encoded.
    if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "_init_weights"):
        return
    if isinstance(node, ast.Attribute) and node.attr == "device":
        node = node.value.value if isinstance(node.value, ast.Attribute) else node.value
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
        yield node.value.attr
    for child in ast.iter_child_nodes(node):
        yield from _reads(child)


def encode_dense(model: nn.Module, which: Mapping[str, tuple[BlockType, int, int]], *, fast: bool = False) -> Patches:
    """Put encoded modules, still empty, in the places of these modules of a model on the meta device.

    which: by the name of a module: how its weight is encoded, and (rows, cols) of it in the file.
    fast: compute on the codes where that can be.

    Modules that share their weight with a named one are encoded with it and share its blocks.

    Raises UncacheableError, with the model as it was, for a module that is not there, is no linear or embedding module
    of torch's own class, shares its weight with one of those, or has another shape.
    """
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            places.setdefault(id(weight), []).append(name)
    made: dict[str, _Encoded] = {}
    for name, (kind, rows, cols) in which.items():
        module = _encodable(model, name)
        if tuple(module.weight.shape) != (rows, cols):
            raise UncacheableError(
                f"{name}.weight is {rows} x {cols} in the file, and {' x '.join(map(str, module.weight.shape))} in the "
                "model: is the configuration that of another checkpoint?"
            )
        new: _Encoded | None = None
        for place in places[id(module.weight)]:
            other = made.get(place) or _encoded(_encodable(model, place), kind)
            if other.kind != kind:
                raise UncacheableError(
                    f"{name} and {place} share one weight, which is {other.kind.name} and {kind.name}: give one."
                )
            new = new or other
            other.weight, other.fast, made[place] = new.weight, fast, other
    return Patches(*(replace_module(model, name, module) for name, module in made.items()))


def _encodable(model: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise UncacheableError(f"{name!r}: {type(model).__name__} has no such module to encode.") from error
    if _is_plain(module):
        return module
    raise UncacheableError(
        f"{name} is a {type(module).__name__}, and linear and embedding modules alone keep their weight in codes: load "
        "it as floats."
    )


def _encoded(module: nn.Linear | nn.Embedding, kind: BlockType) -> EncodedLinear | EncodedEmbedding:
    return EncodedLinear(module, kind) if isinstance(module, nn.Linear) else EncodedEmbedding(module, kind)


def load_blocks(model: nn.Module, name: str, blocks_NB: Tensor) -> None:
    """Fill an encoded module and those that share its weight.

    blocks_NB: uint8 [rows, row bytes], on the device where the module computes; it is kept as it is, not copied.

    Raises UncacheableError when there is no such module, and for blocks of another shape or type.
    """
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, _Encoded):
        raise UncacheableError(f"{name!r} is no encoded module of {type(model).__name__}: name it to encode_dense.")
    before = module.weight
    if blocks_NB.dtype != torch.uint8 or blocks_NB.shape != before.shape:
        raise UncacheableError(
            f"{name}: {tuple(blocks_NB.shape)} of {blocks_NB.dtype} are no {module.kind.name} blocks of its weight, "
            f"which are {tuple(before.shape)} bytes: is the file damaged?"
        )
    weight = nn.Parameter(blocks_NB.contiguous(), requires_grad=False)
    for other in [each for each in model.modules() if isinstance(each, _Encoded) and each.weight is before]:
        other.weight = weight
        other.float_like = torch.empty(0, dtype=other.float_like.dtype, device=blocks_NB.device)


def _refuse_merge(check: Any, tuner: BaseTuner, *args: Any, **kwargs: Any) -> None:
    """PEFT's check before a merge; a delta cannot be added to codes, and PEFT itself would fail half way."""
    check(tuner, *args, **kwargs)
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(base := layer.get_base_layer(), _Encoded):
            raise MergeStateError(
                f"{name} keeps its weight as {base.kind.name} blocks, which cannot take an adapter's weights: leave "
                "the adapter unmerged, or merge it into the model loaded with from_pretrained."
            )


override(BaseTuner, "_check_merge_allowed", _refuse_merge)
