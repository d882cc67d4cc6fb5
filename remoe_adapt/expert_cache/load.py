"""The two ways in by path or hub id: a model whose experts stay in storage until needed, and a pack of experts."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import (
    CACHE_OPTIONS,
    HUB_OPTIONS,
    check_flags,
    check_memory,
    check_names,
    check_path,
    names_gguf,
    unknown_option,
)
from remoe_adapt.errors import ConfigError, ExpertReadError, MergeStateError, RemoeError
from remoe_adapt.expert_cache.budget import budget_in_bytes, bytes_for_slots, bytes_of_dense, check_budget
from remoe_adapt.expert_cache.cache import READ_THREADS
from remoe_adapt.expert_cache.checkpoint import LOADING, Checkpoint, check_arithmetic, find_checkpoint, kernels_for
from remoe_adapt.expert_cache.checkpoint_store import ExpertStore
from remoe_adapt.expert_cache.device_layout import Kernels
from remoe_adapt.expert_cache.direct_io import Reader
from remoe_adapt.expert_cache.encodings import KINDS, EncodedEmbedding, EncodedLinear, Ggml, encode_dense
from remoe_adapt.expert_cache.experts import IMPLEMENTATION, bind_experts, check_experts, experts_left_out
from remoe_adapt.expert_cache.gpu import find_device, make_cache
from remoe_adapt.expert_cache.pack import PackedStore
from remoe_adapt.expert_cache.pack_sources import DensePart, FloatExperts, QuantisedExperts, StoredExperts
from remoe_adapt.expert_cache.packed_dense import PackedDense
from remoe_adapt.expert_cache.packing import write_pack
from remoe_adapt.expert_cache.plan import experts_modules
from remoe_adapt.expert_cache.prefetch import bind_prefetch
from remoe_adapt.expert_cache.types import check_options
from remoe_adapt.libraries import Handle, become, class_attribute, put_on

_KNOWN = ("expert_cache", "device", "dtype", *CACHE_OPTIONS)
# Options of from_pretrained that place, make, quantise or find weights in ways of their own.
OWN_PLACEMENT = {
    "device_map", "quantization_config", "experts_implementation", "state_dict", "tp_plan", "gguf_file", "config",
    "variant", "subfolder", "key_mapping", "use_safetensors", "transformers_weights",
}  # fmt: skip


def load_with_expert_cache(
    path: str | os.PathLike[str],
    expert_cache: str | int | float = 0.25,
    *,
    device: str | torch.device = "cpu",
    ram_budget: str | int | float | None = None,
    memory: str | int | None = None,
    storage: str | os.PathLike[str] | None = None,
    arithmetic: str = "auto",
    policy: str = "lrfu",
    scope: str = "global",
    prefetch: bool = False,
    direct_io: bool = False,
    dtype: str | torch.dtype | None = None,
    threads: int = READ_THREADS,
    decay: float | None = None,
    reader: Reader = os.preadv,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """The model of a checkpoint folder or hub id, with `.expert_cache`: the ExpertCache of its experts.

    Its memory is the dense part and the slots, nothing mapped. It computes what `from_pretrained` would with
    `experts_implementation="eager"`, generates, and takes PEFT adapters; its experts are frozen.

    path: of the folder, or the hub id.
    expert_cache: the budget: a size as "2GiB", bytes, or a share of all experts (a float above 0, up to 1.0).
    device: the CPU, or a CUDA device, which holds the dense part and the slots of that budget. Below them come slots in
        pinned RAM, filled from storage.
    ram_budget: of the slots in pinned RAM, like expert_cache; None: twice as much, at most all experts.
    memory: what the dense part and the slots may take together, with a sixteenth left for the KV cache; it lowers the
        budget.
    storage: a folder that `remoe pack` made of this model, to read experts from; None: the checkpoint.
    arithmetic: of the experts. "exact": bit-equal to transformers' eager model, quantised ones to its dequantised
        model, for which they are dequantised on use; "fast": quantised ones on a CPU, and all on a GPU, by kernels on
        the slots, within a tolerance (docs/concepts/encodings.md); "auto": fast where there are kernels for it, else
        exact.
    policy: what is evicted, see ExpertCache.
    scope: of the budget, see ExpertCache.
    decay: of lrfu, see ExpertCache.
    threads: reads at a time.
    prefetch: predict each next layer's experts, and read ahead where that pays (see prefetch.py).
    direct_io: past the page cache, where the file system can.
    reader: reads the files, as os.preadv does.
    dtype: as in from_pretrained; None: the checkpoint's (torch_dtype, its old name, counts too).
    from_pretrained_kwargs: other options of from_pretrained, but those that place, quantise or make weights.

    Raises ConfigError for options that cannot work or nobody knows, UncacheableError for models whose experts cannot be
    cached (quantised, or not behind transformers' experts interface), ExpertReadError when the files cannot be read.
    """
    # Everything that can be refused is refused before a file is read or fetched.
    check_names(from_pretrained_kwargs, _KNOWN)
    check_path("path", path, "a model folder or a hub id")
    check_budget("expert_cache", expert_cache)
    if ram_budget is not None:
        check_budget("ram_budget", ram_budget)
    if memory is not None:
        check_memory(memory)
    if storage is not None:
        check_path("storage", storage, "a folder that `remoe pack` made of this model, or None")
    options: dict[str, Any] = {"policy": policy, "scope": scope, "threads": threads, "decay": decay}
    check_options(**options)
    check_flags(prefetch=prefetch, direct_io=direct_io)
    check_arithmetic(arithmetic)
    if not callable(reader):
        raise ConfigError(f"reader {reader!r}: give something that reads as os.preadv does.")
    # A GGUF may not tell its configuration: then it is an option of the checkpoint, and none of from_pretrained.
    of_gguf = names_gguf(path, from_pretrained_kwargs)
    given = {"config", "gguf_file"} if of_gguf else set()
    refused = sorted(OWN_PLACEMENT.intersection(from_pretrained_kwargs) - given)
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: an expert cache places the model itself (device=), unquantised, eager, and reads "
            "the folder's own safetensors files (or the GGUF)."
        )
    old_name = from_pretrained_kwargs.pop("torch_dtype", None)
    dtype = old_name if dtype is None else dtype
    checkpoint = find_checkpoint(path, dtype, from_pretrained_kwargs)
    folder, wanted = checkpoint.folder, checkpoint.dtype
    kwargs = {name: value for name, value in from_pretrained_kwargs.items() if name not in {*HUB_OPTIONS, *given}}
    place = find_device(device)
    with LOADING:
        kernels = kernels_for(arithmetic, place, storage is not None or checkpoint.blocks() is not None)
        skeleton = checkpoint.skeleton()
        modules = experts_modules(skeleton)
        check_experts(modules)
        store = _store(checkpoint, skeleton, storage, kernels, direct_io=direct_io, reader=reader)
        try:
            packed = PackedDense.of(store, checkpoint) if isinstance(store, PackedStore) else None
            dense: Checkpoint | PackedDense = checkpoint if packed is None else packed
            # Codes that nothing computes with would be dequantised in every step: then floats are kept.
            encoded = dense.encoded(skeleton) if isinstance(kernels, Ggml) else {}
            budget_bytes = budget_in_bytes(expert_cache, store.total_bytes)
            if memory is not None:
                # In the places that they will have in the model, so that their bytes are counted.
                encode_dense(skeleton, encoded)
                dense_bytes = bytes_of_dense(skeleton, modules) + store.layout.workspace_bytes
                budget_bytes = min(budget_bytes, bytes_for_slots(memory, dense_bytes))
            cache = make_cache(
                store,
                budget_bytes,
                device=place,
                ram_budget_bytes=None if ram_budget is None else budget_in_bytes(ram_budget, store.total_bytes),
                **options,
            )
            with _without_experts(skeleton, modules):
                model = dense.load(skeleton, encoded, experts_implementation=IMPLEMENTATION, **kwargs)
        except BaseException as error:
            # Also after Ctrl-C: nobody else could close the store's files.
            store.close()
            unknown = unknown_option(error, _KNOWN) if isinstance(error, TypeError) else None
            if unknown is not None:
                raise unknown from error
            if isinstance(error, OSError | SafetensorError) and not isinstance(error, RemoeError):
                raise ExpertReadError(f"{folder} cannot be loaded ({printable(error)}): fetch it again.") from error
            raise
    assert isinstance(model, PreTrainedModel)
    _unmap(model, place, dense.is_mapped)
    model.config._name_or_path = model.name_or_path = os.fspath(path)
    bind_experts(model, cache, wanted, store.layout, place)
    if prefetch:
        bind_prefetch(model, cache)
    put_on(model, "expert_cache", cache)
    # By its class: attributes of the model are hooked and unhooked by others.
    become(model, _Cached)
    return model


@contextmanager
def _without_experts(skeleton: PreTrainedModel, modules: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Within, models of this class are made without their experts' parameters, and nobody misses them in the files."""
    left_out = [f"{name}.{param}" for name, module in modules.items() for param in dict(module.named_parameters())]
    classes = {type(module) for module in modules.values()}
    with experts_left_out(classes), _unexpected(type(skeleton), left_out):
        yield


def _unmap(model: PreTrainedModel, device: torch.device, is_mapped: bool) -> None:
    """Move the dense part from the mapped files, whose pages come and go with memory pressure, to memory of its own."""
    if device.type != "cpu":
        model.to(device)  # type: ignore[arg-type]
        return
    if not is_mapped:
        return
    # One by one, so that no more than a single tensor is in memory twice.
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()


class _Cached:
    """What the class of a model with an expert cache becomes."""

    def save_pretrained(self, *args: object, **kwargs: object) -> NoReturn:
        raise MergeStateError(
            "this model's experts are in its checkpoint, not in the model, so saving it would lose them. Save adapters "
            "with the PeftModel's save_pretrained; to save the whole model, load it with from_pretrained first."
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        # The class that this one is put before is a model's, of which it knows nothing itself.
        model: Any = self
        if any(isinstance(module, EncodedEmbedding | EncodedLinear) for module in model.modules()):
            raise ConfigError(
                "this model's dense part is in codes, which cannot be given other rows: to change its vocabulary, load "
                'it with arithmetic="exact".'
            )
        stock: Any = super()
        return stock.resize_token_embeddings(*args, **kwargs)

    def set_experts_implementation(self, *args: object, **kwargs: object) -> NoReturn:
        raise ConfigError(
            "this model's experts are in a cache, which computes them as "
            f"experts_implementation={IMPLEMENTATION!r} alone: for another implementation load the model with "
            "from_pretrained."
        )


def _store(
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    storage: str | os.PathLike[str] | None,
    kernels: Kernels | None,
    *,
    direct_io: bool,
    reader: Reader,
) -> ExpertStore | PackedStore:
    plan = checkpoint.plan(skeleton)
    if storage is None:
        return ExpertStore(
            checkpoint.folder,
            skeleton,
            checkpoint.encoding,
            plan=plan,
            layout=checkpoint.layout(kernels),
            direct_io=direct_io,
            reader=reader,
        )
    # The pack is compared with the checkpoint, which is needed for nothing else.
    source = ExpertStore(checkpoint.folder, skeleton, checkpoint.encoding, plan=plan)
    try:
        return PackedStore(storage, source, kernels=kernels, direct_io=direct_io, reader=reader)
    finally:
        source.close()


def _unexpected(cls: type[PreTrainedModel], names: list[str]) -> Handle:
    """Until it is undone, models of `cls` do not report these parameters as left over in their checkpoints."""
    prefix = f"{cls.base_model_prefix}."
    patterns = [re.escape(name.removeprefix(prefix)) + "$" for name in names]
    known = cls._keys_to_ignore_on_load_unexpected or ()
    return class_attribute(cls, "_keys_to_ignore_on_load_unexpected", [*known, *patterns])


def pack_experts(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int | None = None,
    dense_bits: int | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    on_start: Callable[[int], None] = lambda total_bytes: None,
    on_bytes: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> dict[str, Any]:
    """Copy the experts of a checkpoint folder or hub id to the folder `out`, for load_with_expert_cache(storage=out).

    path: of the checkpoint, or its hub id.
    out: the folder of the pack.
    bits: 4 or 8: quantise the experts' matrices (q4_1, q8_0: a scale for each 32 numbers of a row); None: copy them,
        those of a quantised checkpoint as blocks of ggml, which lose nothing where ggml has its format.
    dense_bits: 4 or 8: have the dense part in the pack too, its linear layers and embeddings quantised so; 16: as it
        is; None: leave it in the checkpoint.
    dtype: of what is not quantised, which must be that of the model in memory; None: the checkpoint's.
    overwrite: replace a pack that is there.
    on_start: called with the bytes in all.
    on_bytes: called with the bytes that were written since the last call.
    options: of from_pretrained, for the hub.

    Returns and raises what `write_pack` does; ConfigError and UncacheableError also as load_with_expert_cache, and
    ConfigError for other options.
    """
    if unknown := sorted(options.keys() - {*HUB_OPTIONS, "trust_remote_code"}):
        raise ConfigError(
            f"{', '.join(unknown)}: a pack is made of the folder's own safetensors files; give bits, dense_bits, "
            f"dtype, overwrite, trust_remote_code, {', '.join(HUB_OPTIONS)} alone."
        )
    # 4.0 and True are equal to keys of these.
    if bits is not None and (type(bits) is not int or bits not in KINDS):
        raise ConfigError(f"bits {bits!r}: give 4 or 8, or None to copy the experts as they are.")
    if dense_bits is not None and (type(dense_bits) is not int or dense_bits not in (*KINDS, 16)):
        raise ConfigError(f"dense_bits {dense_bits!r}: give 4, 8, or 16, or None to leave the dense part where it is.")
    checkpoint = find_checkpoint(path, dtype, options)
    with LOADING:
        skeleton = checkpoint.skeleton()
    check_experts(experts_modules(skeleton))
    # What is quantised already keeps its codes, unless other bits are asked for.
    layout = None if bits is not None else checkpoint.blocks()
    store = ExpertStore(
        checkpoint.folder,
        skeleton,
        checkpoint.encoding,
        plan=checkpoint.plan(skeleton),
        layout=layout,
        direct_io=True,
    )
    name = Path(checkpoint.name).resolve().name if Path(checkpoint.name).is_dir() else checkpoint.name
    try:
        source: FloatExperts = StoredExperts(store) if layout is not None else FloatExperts(store)
        if bits is not None:
            source = QuantisedExperts(store, KINDS[bits])
        dense = None
        if dense_bits is not None:
            with LOADING, _without_experts(skeleton, experts_modules(skeleton)):
                model = checkpoint.load(skeleton, {}, experts_implementation=IMPLEMENTATION)
            dense = DensePart(model, store.plan, checkpoint.extents(), KINDS.get(dense_bits))
        return write_pack(
            source, out, model_id=name, config=checkpoint.entries(), dense=dense, overwrite=overwrite,
            on_start=on_start, on_bytes=on_bytes,
        )  # fmt: skip
    finally:
        store.close()
