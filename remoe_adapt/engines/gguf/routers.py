"""The routers in a GGUF model: found by name, read, checked against a family, and computed at a strength."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from remoe_adapt._support import disk_faults, is_file, printable
from remoe_adapt.checkpoints import ARCHITECTURE_KEY, GgufFile, GgufTensor, check_parts, shard_paths
from remoe_adapt.engines import BaseFiles, read_at, read_tensor, tensor_bytes
from remoe_adapt.engines.gguf.undo import Undo
from remoe_adapt.errors import ConfigError, ExportError, FamilyError, FingerprintMismatchError, UnsupportedRouterError
from remoe_adapt.family import Family
from remoe_adapt.routers import (
    GGUF_ARCH,
    GGUF_CORRECTION_BIAS,
    GGUF_LOGIT_BIAS,
    GGUF_ROUTER_WEIGHT,
    fingerprint_of_weights,
)

# Types that hold a router without quantisation, as ggml numbers them.
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
Pieces = dict[Path, dict[str, bytes]]


class GgufModel:
    """A GGUF model (all its parts), opened by its headers.

    `weights` and `correction_biases` are the tensors of its routers by layer; those of layers that only predict
    further tokens are left out. Values are the original ones, also while the file is patched in place.

    Raises ConfigError when there is no such file, ExportError for damaged files (as `GgufFile`), parts of several
    models, adapters, models without routers and undo files that are not this model's, UnsupportedRouterError when
    routers are quantised.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not is_file(self.path):
            raise ConfigError(f"{printable(path)} is no file: give a GGUF model (of a split one, its first part).")
        self.files = [GgufFile(part) for part in shard_paths(self.path)]
        check_parts(self.files)
        first = self.files[0]
        self.architecture = first.text(ARCHITECTURE_KEY, "")
        if (kind := first.text("general.type", "model")) != "model":
            raise ExportError(f"{printable(path)} is of the type {printable(kind)}, not a model.")
        blocks = self._number("block_count")
        # Layers that predict further tokens come last and are not run in ordinary decoding, so families do not know
        # them.
        self.num_blocks = blocks - (hidden := self._number("nextn_predict_layers"))
        if self.num_blocks < 0:
            raise ExportError(f"{printable(path)} has {blocks} layers, of which {hidden} predict: is the file damaged?")
        self.weights = self._by_layer(GGUF_ROUTER_WEIGHT, blocks)
        self.correction_biases = self._by_layer(GGUF_CORRECTION_BIAS, blocks)
        if not self.weights:
            raise ExportError(
                f"{printable(path)} has no router ({GGUF_ROUTER_WEIGHT.format(layer='N')}): it is a dense "
                f"{printable(self.architecture or 'unknown')} model."
            )
        self._check_shapes()
        self.undos: dict[Path, Undo] = {}
        with disk_faults(self.path, ExportError, "fetch it again, or end what changes it"):
            for file in self.files:
                # An undo file is believed only when it holds exactly these routers at these lengths.
                sizes = {t.name: t.size for t in self.weights.values() if t.path == file.path}
                if undo := Undo.beside(file, sizes):
                    self.undos[file.path] = undo
        for tensor in self.weights.values():
            if tensor.path in self.undos:
                self._check_finite(tensor.name, self._read(tensor))

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

    def undone(self) -> list[tuple[GgufFile, Undo]]:
        """The files with an undo file beside them, and that."""
        return [(file, self.undos[file.path]) for file in self.files if file.path in self.undos]

    def check(
        self, family: Family, base: str | os.PathLike[str] | None = None, *, force: bool = False
    ) -> dict[str, int]:
        """Layer by router name of the family, once everything fits: number and shapes of the routers, and their values
        as the family's fingerprint has them.

        With `base` (folder or hub id) the architecture, the number of layers and the selection biases are compared as
        well, and the routers value by value as rounded to the file's type; an F16 copy of fp32 routers needs it.

        Raises FingerprintMismatchError when this is another base (unless `force`), FamilyError when the deltas do not
        fit, ExportError when there are none, else as `BaseFiles`.
        """
        family.check_has_adapters("written into a GGUF")
        layers: dict[str, int] = {}
        for name, delta_ED in family.points[0].deltas.items() if family.points else ():
            layers[name] = layer = layer_of(name)
            tensor = self.weights.get(layer)
            if tensor is None or tensor.shape != tuple(delta_ED.shape):
                has = f"{list(tensor.shape)} there" if tensor else f"routers in layers {sorted(self.weights)}"
                raise FamilyError(
                    f"family {printable(family.path)} changes router {printable(name)} by {list(delta_ED.shape)}, "
                    f"{printable(self.path)} has {has}."
                )
        if len(set(layers.values())) < len(layers):
            raise ExportError(f"family {printable(family.path)} has several routers in a layer, a GGUF has one.")
        # Values decide, not names: a fine-tuning has the same names and shapes as its base.
        if not force:
            weights = self.weights_ED()
            found = fingerprint_of_weights(weights.values())
            if base is not None:
                self._compare(BaseFiles(base), family, weights)
            # Without the base only routers that were stored as they are can be recognised; those rounded to F16 need
            # it.
            elif found != family.fingerprint:
                raise FingerprintMismatchError(
                    f"family {printable(family.path)} was made for {printable(family.base_id)!r} "
                    f"({printable(family.fingerprint[:19])}...), the routers in {printable(self.path)} are others "
                    f"({found[:19]}...): give a GGUF of that base; --base BASE where it was converted through F16; "
                    "--force if you know that they fit."
                )
        return layers

    def live(self, family: Family, strength: float, layers: dict[str, int]) -> Pieces:
        """Bytes of every router at `strength` by file and tensor name: `Family.live` in the file's own dtype.

        Raises ExportError when a value of the original is not finite, else as `Family.live`, which refuses deltas too
        large for the file's dtype.
        """
        weights = self.weights_ED()
        live = family.live(strength, {name: weights[layer] for name, layer in layers.items()})
        for layer, tensor in self.weights.items():
            self._check_finite(tensor.name, weights[layer])
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
        # While a file is patched in place, its original routers are in the undo file only.
        if undo and tensor.name in undo.originals:
            data = bytearray(undo.originals[tensor.name])
        else:
            with disk_faults(tensor.path, ExportError, "fetch it again"):
                data = read_at(tensor.path, tensor.offset, tensor.size)
        return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)

    def _number(self, key: str) -> int:
        return self.files[0].number(f"{self.architecture}.{key}", 0)

    def _by_layer(self, template: str, blocks: int) -> dict[int, GgufTensor]:
        name = _pattern(template)
        tensors = [(match, t) for file in self.files for t in file.tensors if (match := name.fullmatch(t.name))]
        found = {int(match[1]): tensor for match, tensor in tensors}
        # A router beyond the last layer means that metadata and tensors are of different models.
        if found and max(found) >= blocks:
            raise ExportError(
                f"{printable(self.path)} has {found[max(found)].name}, its metadata says {blocks} layers: is the file "
                "damaged?"
            )
        return {layer: found[layer] for layer in sorted(found) if layer < self.num_blocks}

    def _check_shapes(self) -> None:
        experts, hidden = self._number("expert_count"), self._number("embedding_length")
        of_shape: list[tuple[GgufTensor, tuple[int, ...]]]
        of_shape = [(tensor, (experts, hidden)) for tensor in self.weights.values()]
        of_shape += [(tensor, (experts,)) for tensor in self.correction_biases.values()]
        for tensor, expected in of_shape:
            if tensor.type not in DTYPES:
                raise UnsupportedRouterError(
                    f"{printable(self.path)}: {tensor.name} is quantised ({_type_name(tensor.type)}), which would "
                    "round the deltas away: give a GGUF whose routers are F32, BF16 or F16, as llama.cpp's tools leave "
                    "them."
                )
            if tensor.shape != expected:
                found = f"{tensor.name} is {list(tensor.shape)}, its metadata says {list(expected)}"
                raise ExportError(f"{printable(self.path)}: {found}.")

    def _check_finite(self, name: str, weight_ED: Tensor) -> None:
        if not torch.isfinite(weight_ED).all():
            raise ExportError(f"{printable(self.path)}: {name} has values that are not finite: fetch it again.")

    def _compare(self, base: BaseFiles, family: Family, weights: dict[int, Tensor]) -> None:
        base.check(family)
        text = base.config.get_text_config()
        # An architecture that is not in our table is no contradiction: values are compared below all the same.
        expected = GGUF_ARCH.get(text.model_type)
        if expected not in (None, self.architecture):
            raise FingerprintMismatchError(
                f"{printable(self.path)} is a {printable(self.architecture)} model, {base.folder} converts to "
                f"{expected}."
            )
        layers = {layer_of(router.name): router for router in base.routers}
        blocks = int(text.num_hidden_layers)
        if sorted(layers) != sorted(weights) or blocks != self.num_blocks:
            raise FingerprintMismatchError(
                f"{printable(self.path)} has {self.num_blocks} layers, routers in {sorted(weights)}; {base.folder} has "
                f"{blocks}, routers in {sorted(layers)}."
            )
        for layer, router in layers.items():
            if not torch.equal(weights[layer], base.weights[router.name].to(weights[layer].dtype)):
                raise FingerprintMismatchError(
                    f"{self.weights[layer].name} of {printable(self.path)} is not {router.name} of {base.folder} "
                    f"rounded to {weights[layer].dtype}: it was made from another base, or changed since."
                )
            bias, stored = self.correction_biases.get(layer), router.correction_bias
            same = bias is None and stored is None
            if bias and stored:
                same = torch.equal(self._read(bias), read_tensor(stored).to(DTYPES[bias.type]).flatten())
            if not same:
                raise FingerprintMismatchError(
                    f"the selection bias of layer {layer} of {printable(self.path)} is not that of {base.folder}."
                )


def layer_of(router: str) -> int:
    """The layer that a router's path names. Raises ExportError when it names none."""
    numbers = [part for part in router.split(".") if re.fullmatch(r"[0-9]{1,6}", part)]
    if not numbers:
        raise ExportError(f"router {printable(router)} names no layer: it cannot be found in a GGUF.")
    return int(numbers[0])


def _pattern(template: str) -> re.Pattern[str]:
    before, after = template.split("{layer}")
    # Layer numbers have no leading zeros, as engines write them; else "07" and "7" would be routers of one layer.
    return re.compile(re.escape(before) + r"(0|[1-9][0-9]{0,5})" + re.escape(after))


def _type_name(number: int) -> str:
    try:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(number).name)
    except (ImportError, ValueError):
        return f"ggml type {number}"
