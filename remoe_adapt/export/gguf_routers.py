"""The routers in a GGUF model: found by name, read, checked against a family, and computed at a strength."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError, ExportError, FamilyError, FingerprintMismatchError, UnsupportedRouterError
from remoe_adapt.export.base import BaseFiles, read_tensor, tensor_bytes
from remoe_adapt.export.files import read_at
from remoe_adapt.export.gguf_file import GgufFile, GgufTensor, shard_paths
from remoe_adapt.export.gguf_undo import Undo
from remoe_adapt.family import Family
from remoe_adapt.routers.families import GGUF_ARCH, GGUF_CORRECTION_BIAS, GGUF_LOGIT_BIAS, GGUF_ROUTER_WEIGHT
from remoe_adapt.routers.fingerprint import fingerprint_of_weights

# Types that hold a router without quantisation, as ggml numbers them.
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
Pieces = dict[Path, dict[str, bytes]]


class GgufModel:
    """A GGUF model (all its parts), opened by its headers.

    `weights` and `correction_biases` are the tensors of its routers by layer; those of layers that only predict
    further tokens are left out. Values are the original ones, also while the file is patched in place.

    Raises ConfigError when there is no such file, ExportError for damaged files, adapters and models without routers,
    UnsupportedRouterError when routers are quantised.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"{self.path} is no file: give a GGUF model (of a split one, its first part).")
        self.files = [GgufFile(part) for part in shard_paths(self.path)]
        self.undos = {file.path: undo for file in self.files if (undo := Undo.beside(file))}
        first = self.files[0]
        self.architecture = str(first.values.get("general.architecture", ""))
        if first.values.get("general.type", "model") != "model":
            raise ExportError(f"{self.path} is of the type {first.values['general.type']}, not a model.")
        hidden = self._number("nextn_predict_layers")
        self.num_blocks = self._number("block_count") - hidden
        self.weights = self._by_layer(GGUF_ROUTER_WEIGHT)
        self.correction_biases = self._by_layer(GGUF_CORRECTION_BIAS)
        if not self.weights:
            raise ExportError(
                f"{self.path} has no router ({GGUF_ROUTER_WEIGHT.format(layer='N')}): it is a dense "
                f"{self.architecture or 'unknown'} model."
            )
        self._check_shapes()

    def weights_ED(self) -> dict[int, Tensor]:
        """Original router weights [E, D] by layer, in the file's dtype."""
        return {layer: self._read(tensor) for layer, tensor in self.weights.items()}

    def router_tensors(self) -> list[GgufTensor]:
        """All small tensors that routing depends on, in file order."""
        names = [_pattern(text) for text in (GGUF_ROUTER_WEIGHT, GGUF_LOGIT_BIAS, GGUF_CORRECTION_BIAS)]
        return [t for file in self.files for t in file.tensors if any(name.fullmatch(t.name) for name in names)]

    def originals(self, path: Path) -> dict[str, bytes]:
        """The original bytes of the router weights that lie in one file."""
        return {t.name: tensor_bytes(self._read(t)) for t in self.weights.values() if t.path == path}

    def check(
        self, family: Family, base: str | os.PathLike[str] | None = None, *, force: bool = False
    ) -> dict[str, int]:
        """Layer by router name of the family, once everything fits: number and shapes of the routers, and their values
        as the family's fingerprint has them.

        With `base` (folder or hub id) the architecture, the number of layers and the selection biases are compared as
        well, and the routers value by value as rounded to the file's type; an F16 copy of fp32 routers needs it.

        Raises FingerprintMismatchError when this is another base (unless `force`), FamilyError when the deltas do not
        fit, else as `BaseFiles`.
        """
        layers: dict[str, int] = {}
        for name, delta_ED in family.points[0].deltas.items() if family.points else ():
            layers[name] = layer = layer_of(name)
            tensor = self.weights.get(layer)
            if tensor is None or tensor.shape != tuple(delta_ED.shape):
                has = f"{list(tensor.shape)} there" if tensor else f"routers in layers {sorted(self.weights)}"
                raise FamilyError(
                    f"family {family.path} changes router {name} by {list(delta_ED.shape)}, {self.path} has {has}."
                )
        if len(set(layers.values())) < len(layers):
            raise ExportError(f"family {family.path} has several routers in a layer, a GGUF has one.")
        if not force:
            weights = self.weights_ED()
            found = fingerprint_of_weights(weights.values())
            if base is not None:
                self._compare(BaseFiles(base), family, weights)
            elif found != family.fingerprint:
                raise FingerprintMismatchError(
                    f"family {family.path} was made for {family.base_id!r} ({family.fingerprint[:19]}...), the routers "
                    f"in {self.path} are others ({found[:19]}...): give a GGUF of that base; --base BASE where it was "
                    "converted through F16; --force if you know that they fit."
                )
        return layers

    def live(self, family: Family, strength: float, layers: dict[str, int]) -> Pieces:
        """Bytes of every router at `strength` by file and tensor name: `Family.live` in the file's own dtype."""
        weights = self.weights_ED()
        live = family.live(strength, {name: weights[layer] for name, layer in layers.items()})
        weights |= {layer: live[name] for name, layer in layers.items()}
        pieces: defaultdict[Path, dict[str, bytes]] = defaultdict(dict)
        for layer, tensor in self.weights.items():
            pieces[tensor.path][tensor.name] = tensor_bytes(weights[layer])
        return dict(pieces)

    def placed(self, pieces: dict[str, bytes], path: Path) -> list[tuple[int, bytes]]:
        """(offset, bytes) of tensors of one file."""
        return [(t.offset, pieces[t.name]) for t in self.weights.values() if t.path == path and t.name in pieces]

    def _read(self, tensor: GgufTensor) -> Tensor:
        dtype = DTYPES[tensor.type]
        undo = self.undos.get(tensor.path)
        if undo and tensor.name in undo.originals:
            data = bytearray(undo.originals[tensor.name])
        else:
            data = read_at(tensor.path, tensor.offset, prod(tensor.shape) * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)

    def _number(self, key: str) -> int:
        return int(self.files[0].values.get(f"{self.architecture}.{key}", 0))

    def _by_layer(self, template: str) -> dict[int, GgufTensor]:
        name = _pattern(template)
        tensors = [(match, t) for file in self.files for t in file.tensors if (match := name.fullmatch(t.name))]
        found = {int(match[1]): tensor for match, tensor in tensors}
        return {layer: found[layer] for layer in sorted(found) if layer < self.num_blocks}

    def _check_shapes(self) -> None:
        expected = (self._number("expert_count"), self._number("embedding_length"))
        for tensor in self.weights.values():
            if tensor.type not in DTYPES:
                raise UnsupportedRouterError(
                    f"{self.path}: router {tensor.name} is quantised ({_type_name(tensor.type)}), which would round "
                    "the deltas away: give a GGUF whose routers are F32, BF16 or F16, as llama.cpp's tools leave them."
                )
            if tensor.shape != expected:
                raise ExportError(
                    f"{self.path}: {tensor.name} is {list(tensor.shape)}, its metadata says {list(expected)}."
                )
            if prod(tensor.shape) * DTYPES[tensor.type].itemsize > tensor.span:
                raise ExportError(f"{self.path}: {tensor.name} is cut off at byte {tensor.offset + tensor.span}.")

    def _compare(self, base: BaseFiles, family: Family, weights: dict[int, Tensor]) -> None:
        base.check(family)
        text = base.config.get_text_config()
        expected = GGUF_ARCH.get(text.model_type)
        if expected not in (None, self.architecture):
            raise FingerprintMismatchError(
                f"{self.path} is a {self.architecture} model, {base.folder} converts to {expected}."
            )
        layers = {layer_of(router.name): router for router in base.routers}
        blocks = int(text.num_hidden_layers)
        if sorted(layers) != sorted(weights) or blocks != self.num_blocks:
            raise FingerprintMismatchError(
                f"{self.path} has {self.num_blocks} layers, routers in {sorted(weights)}; {base.folder} has {blocks}, "
                f"routers in {sorted(layers)}."
            )
        for layer, router in layers.items():
            if not torch.equal(weights[layer], base.weights[router.name].to(weights[layer].dtype)):
                raise FingerprintMismatchError(
                    f"{self.weights[layer].name} of {self.path} is not {router.name} of {base.folder} rounded to "
                    f"{weights[layer].dtype}: it was made from another base, or changed since."
                )
            bias = self.correction_biases.get(layer)
            stored = router.correction_bias
            if (bias is None) != (stored is None) or (
                bias
                and stored
                and not torch.equal(self._read(bias), read_tensor(stored).to(DTYPES[bias.type]).flatten())
            ):
                raise FingerprintMismatchError(
                    f"the selection bias of layer {layer} of {self.path} is not that of {base.folder}."
                )


def layer_of(router: str) -> int:
    """The layer that a router's path names. Raises ExportError when it names none."""
    numbers = [part for part in router.split(".") if part.isdigit()]
    if not numbers:
        raise ExportError(f"router {router} names no layer: it cannot be found in a GGUF.")
    return int(numbers[0])


def _pattern(template: str) -> re.Pattern[str]:
    before, after = template.split("{layer}")
    return re.compile(re.escape(before) + r"(\d+)" + re.escape(after))


def _type_name(number: int) -> str:
    try:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(number).name)
    except (ImportError, ValueError):
        return f"ggml type {number}"
