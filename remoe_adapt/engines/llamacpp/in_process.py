"""llama.cpp in this process: the C API of the xllamacpp wheel through ctypes, as far as tracing and parity need it.

Structs are those of one llama.cpp version, so the wheel's version is checked before anything is called.
"""

from __future__ import annotations

import ctypes as C
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from remoe_adapt._support import printable
from remoe_adapt.engines.llamacpp.prior import EngineCacheStatus, EnginePrior, PriorStatus, budget_of, engine_prior
from remoe_adapt.errors import ConfigError, MissingDependencyError, TraceError
from remoe_adapt.recency_settings import Recency

VERSION = "2026.10.11549"
# llama.cpp calls the ids of the chosen experts of a layer so; the layer's number follows.
_TOP_K = "ffn_moe_topk-"
_LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1}
_LOG_LINES = 8

_Pointer, _Ints, _Floats = C.c_void_p, C.POINTER(C.c_int32), C.POINTER(C.c_float)
_OnEval = C.CFUNCTYPE(C.c_bool, _Pointer, C.c_bool, _Pointer)
_OnLog = C.CFUNCTYPE(None, C.c_int, C.c_char_p, _Pointer)


def _named(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _ModelParams(C.Structure):
    _fields_ = (
        *_named(_Pointer, "devices tensor_buft_overrides"),
        *_named(C.c_int32, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        *_named(_Pointer, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        *_named(C.c_bool, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    )


class _ContextParams(C.Structure):
    _fields_ = (
        *_named(C.c_uint32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
        *_named(C.c_int32, "n_threads n_threads_batch"),
        *_named(C.c_int32, "ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"),
        *_named(C.c_float, "rope_freq_base rope_freq_scale"),
        *_named(C.c_float, "yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow"),
        ("yarn_orig_ctx", C.c_uint32),
        ("defrag_thold", C.c_float),
        ("cb_eval", _OnEval),
        ("cb_eval_user_data", _Pointer),
        *_named(C.c_int32, "type_k type_v"),
        ("moe_cache_size", C.c_size_t),
        *_named(_Pointer, "abort_callback abort_callback_data"),
        *_named(C.c_bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        ("samplers", _Pointer),
        ("n_samplers", C.c_size_t),
        ("ctx_other", _Pointer),
    )


class _Batch(C.Structure):
    _fields_ = (
        ("n_tokens", C.c_int32),
        ("token", _Ints),
        ("embd", _Floats),
        ("pos", _Ints),
        ("n_seq_id", _Ints),
        ("seq_id", C.POINTER(_Ints)),
        ("logits", C.POINTER(C.c_int8)),
    )


class _Tensor(C.Structure):
    """The head of struct ggml_tensor: ne are sizes from the fastest dimension on, nb the strides in bytes."""

    _fields_ = (("type", C.c_int32), ("buffer", _Pointer), ("ne", C.c_int64 * 4), ("nb", C.c_size_t * 4))


_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "llama_backend_init": ([], None),
    "llama_log_set": ([_OnLog, _Pointer], None),
    "llama_model_default_params": ([], _ModelParams),
    "llama_context_default_params": ([], _ContextParams),
    "llama_model_load_from_file": ([C.c_char_p, _ModelParams], _Pointer),
    "llama_init_from_model": ([_Pointer, _ContextParams], _Pointer),
    "llama_model_free": ([_Pointer], None),
    "llama_free": ([_Pointer], None),
    "llama_decode": ([_Pointer, _Batch], C.c_int32),
    "llama_get_logits": ([_Pointer], _Floats),
    "llama_model_get_vocab": ([_Pointer], _Pointer),
    "llama_vocab_n_tokens": ([_Pointer], C.c_int32),
    "llama_tokenize": ([_Pointer, C.c_char_p, C.c_int32, _Ints, C.c_int32, C.c_bool, C.c_bool], C.c_int32),
    "llama_model_meta_val_str": ([_Pointer, C.c_char_p, C.c_char_p, C.c_size_t], C.c_int32),
    "llama_get_memory": ([_Pointer], _Pointer),
    "llama_memory_clear": ([_Pointer, C.c_bool], None),
    "llama_memory_seq_rm": ([_Pointer, C.c_int32, C.c_int32, C.c_int32], C.c_bool),
    "llama_memory_seq_cp": ([_Pointer, C.c_int32, C.c_int32, C.c_int32, C.c_int32], None),
    "llama_adapter_lora_init": ([_Pointer, C.c_char_p], _Pointer),
    "llama_set_adapters_lora": ([_Pointer, C.POINTER(_Pointer), C.c_size_t, _Floats], C.c_int32),
    "ggml_get_name": ([_Pointer], C.c_char_p),
    "ggml_backend_tensor_get": ([_Pointer, _Pointer, C.c_size_t, C.c_size_t], None),
}
_log: list[str] = []


@_OnLog
def _on_log(level: int, text: bytes, user_data: object) -> None:
    _log.append(text.decode("utf-8", "replace").strip())
    del _log[:-_LOG_LINES]


@cache
def library() -> Any:
    """The loaded library with the types of its functions set. Raises MissingDependencyError without the right wheel."""
    spec = importlib.util.find_spec("xllamacpp")
    found = importlib.metadata.version("xllamacpp") if spec else "none"
    if spec is None or found != VERSION:
        raise MissingDependencyError(
            f"llama.cpp is called through xllamacpp {VERSION} (found: {found}): pip install 'remoe-adapt[llamacpp]'"
        )
    (path,) = (p for folder in spec.submodule_search_locations or () for p in Path(folder).glob("xllamacpp*.so"))
    # Read once, when its OpenMP is loaded: threads that spin make a token 50 times as slow on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    loaded = C.CDLL(str(path))
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    loaded.llama_log_set(_on_log, None)
    loaded.llama_backend_init()
    return loaded


class LlamaVocabulary:
    """What a GGUF says of its model and its tokens; its weights are not read. Close it, or use `with`.

    Raises MissingDependencyError without the wheel, ConfigError when llama.cpp refuses the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        params = library().llama_model_default_params()
        params.vocab_only = True
        self._load(path, params)

    def _load(self, path: str | os.PathLike[str], params: _ModelParams) -> None:
        self._lib = library()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ConfigError(f"llama.cpp cannot load {printable(os.fspath(path))}: {_last_words()}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.architecture = self.metadata("general.architecture")
        # By the file, as the engine knows neither of a vocabulary alone.
        self.trained_tokens, self.num_experts = (self._number(key) for key in ("context_length", "expert_count"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether it can tokenize: files made for ids of another tokenizer cannot."""
        return self.metadata("tokenizer.ggml.model") not in ("", "no_vocab")

    def metadata(self, key: str) -> str:
        """An entry of the file as text; empty when there is none."""
        buffer = C.create_string_buffer(256)
        size = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if size >= 0 else ""

    def _number(self, key: str) -> int:
        """An entry of the architecture; 0 where there is none that is a number."""
        text = self.metadata(f"{self.architecture}.{key}")
        return int(text) if text.isdecimal() else 0

    def tokenize(self, text: str) -> list[int]:
        """Token ids without special ones. Raises ConfigError when the file has no tokenizer for it."""
        data = text.encode()
        ids = (C.c_int32 * (len(data) + 1))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        if count < 0:
            raise ConfigError(f"llama.cpp cannot tokenize with this model's vocabulary: {_last_words()}")
        return ids[:count]


class LlamaModel(LlamaVocabulary):
    """A GGUF model with one context of `context_tokens` in memory, on the CPU, KV cache in F32; close it, or use
    `with`.

    trace: `routes` holds the chosen experts int32 [T, K] of every call of each layer since it was last cleared.
    repack: let the engine rearrange quantised weights in memory of their own; by default where there is no
    expert_cache. sequences: how many there may be, which share the context. ubatch_tokens: how many the engine computes
    at once; all by default.
    recency: a recency prior ("ema", "last", "resident", "cost") that ranks the experts; gain: of all layers, or one for
    each layer with experts, in model order; decay, share: as `recency_prior`. Or all of it as one Recency. Where a
    probe finds that the engine or the model is not as the prior needs it, it stays off and `prior_status` says why.
    renormalise: divide the weights of the chosen experts by their sum, as models with `norm_topk_prob` do and
    llama.cpp's qwen2moe and olmoe do not; it needs a `recency`, be its gain 0. expert_cache: keep so many experts of
    the mapped file in memory (a size, bytes, or a share of all experts), those that are of most use, and read missing
    ones as soon as their ids are known. Recency "resident" then prefers those that are held, and with "cost" those are
    held that it prefers, as many as fit.

    Raises MissingDependencyError without the wheel, or for an expert_cache without a C compiler, ConfigError when
    llama.cpp refuses the file or a setting cannot be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        context_tokens: int = 512,
        threads: int = 1,
        trace: bool = False,
        load_mode: str = "auto",
        repack: bool | None = None,
        sequences: int = 1,
        ubatch_tokens: int | None = None,
        recency: str | Recency | None = None,
        gain: float | Sequence[float] = 0.2,
        decay: float | None = None,
        share: float | None = None,
        renormalise: bool = False,
        expert_cache: str | int | float | None = None,
    ) -> None:
        settings = (
            recency if recency is None or isinstance(recency, Recency) else Recency.of(recency, gain, decay, share)
        )
        if settings is None and renormalise:
            raise ConfigError('renormalise=True needs a recency prior in the engine: recency="ema", gain=0.')
        if expert_cache is not None:
            budget_of(expert_cache)  # before a model is loaded
            if load_mode == "auto":
                load_mode = "mmap"
            settings = settings or Recency.of("ema", 0.0)
        if sequences < 1:
            raise ConfigError(f"{sequences} sequences: give 1 or more.")
        self._context: int | None = None
        self._prior: EnginePrior | None = None
        self._has_cache = expert_cache is not None
        self.routes: dict[int, list[NDArray[np.int32]]] = {}
        self.positions, self.context_tokens = [0] * sequences, context_tokens
        params = library().llama_model_default_params()
        params.load_mode, params.n_gpu_layers = _LOAD_MODES[load_mode], 0
        # Experts that were rearranged lie in memory of their own, which nobody can read ahead or give back.
        params.use_extra_bufts = expert_cache is None if repack is None else repack
        self._load(path, params)
        options = self._lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_outputs_max = context_tokens
        options.n_ubatch = ubatch_tokens or context_tokens
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = options.flash_attn_type = 0
        # One stream of the cache for all: else the engine reorders the rows of a batch that mixes sequences.
        options.n_seq_max, options.kv_unified = sequences, True
        # Kept: the context calls it for as long as it lives.
        self._on_eval = _OnEval(self._take_route)
        if settings is not None:
            self._prior = engine_prior(
                self._lib, sequences, settings, renormalise=renormalise, only_c=expert_cache is not None
            )
            options.cb_eval, options.cb_eval_user_data = _OnEval(self._prior.callback), self._prior.user_data
        if trace:
            options.cb_eval = self._on_eval
        self._context = self._lib.llama_init_from_model(self._model, options)
        if not self._context:
            self.close()
            raise ConfigError(f"llama.cpp has no context for {os.fspath(path)}: {_last_words()}")
        if settings is not None and self._prior is not None:
            try:
                self._prove_prior(self._prior, settings, expert_cache)
            except BaseException:
                self.close()
                raise

    def _prove_prior(self, prior: EnginePrior, settings: Recency, expert_cache: str | int | float | None) -> None:
        """Run a token through the model, by which the prior sees whether the graph is as it must be; a second one shows
        where experts lie."""
        self.decode([0])
        prior.settle()
        if expert_cache is not None:
            prior.hold(*budget_of(expert_cache))
            self.decode([0])
            found = prior.cache_status()
            if found is None or not found.acts:
                raise ConfigError(f"expert_cache={expert_cache!r} can do nothing here: {found and found.reason}.")
            prior.settle()
        self.clear()
        self.routes.clear()
        prior.set(settings)

    @property
    def position(self) -> int:
        """Tokens decoded in sequence 0."""
        return self.positions[0]

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        super().close()
        if self._prior is not None:
            self._prior.close()
        self._context = self._prior = None

    def decode(self, ids: Sequence[int], sequences: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Logits [T, V] of these tokens, which follow those decoded before.

        sequences: which each token belongs to; sequence 0 by default. Raises TraceError when there is no room for them,
        no token, or no such sequence.
        """
        count = len(ids)
        if not 1 <= count <= self.context_tokens - sum(self.positions):  # llama.cpp ends the process
            raise TraceError(
                f"cannot decode {count} tokens after {sum(self.positions)}: the context has {self.context_tokens}"
            )
        owners = [0] * count if sequences is None else [int(sequence) for sequence in sequences]
        if len(owners) != count or not all(0 <= owner < len(self.positions) for owner in owners):
            raise TraceError(f"sequences {owners} of {count} tokens: one for each, below {len(self.positions)}")
        after, positions = list(self.positions), []
        for owner in owners:
            positions.append(after[owner])
            after[owner] += 1
        cells = [C.cast((C.c_int32 * 1)(number), _Ints) for number in range(len(self.positions))]
        batch = _Batch(
            count,
            (C.c_int32 * count)(*ids),
            None,
            (C.c_int32 * count)(*positions),
            (C.c_int32 * count)(*[1] * count),
            (_Ints * count)(*[cells[owner] for owner in owners]),
            # All, for the engine leaves out what no logits depend on: the last layer's experts.
            (C.c_int8 * count)(*[1] * count),
        )
        if self._prior is not None:
            self._prior.rows(owners, positions)
        if status := self._lib.llama_decode(self._context, batch):
            raise TraceError(f"llama.cpp could not decode {count} tokens at {positions[0]} ({status}): {_last_words()}")
        self.positions = after
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (count, self.vocab_size)).copy()

    def clear(self) -> None:
        """Start all sequences anew."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self.positions = [0] * len(self.positions)
        if self._prior is not None:
            self._prior.reset()

    def rewind(self, tokens: int, sequence: int = 0) -> None:
        """Forget all but the first `tokens` of a sequence; the prior goes back with it.

        Raises TraceError when there are fewer, or the model's memory cannot be cut.
        """
        if not 0 <= sequence < len(self.positions) or not 0 <= tokens <= self.positions[sequence]:
            raise TraceError(f"cannot go back to {tokens} tokens of sequence {sequence}: there are {self.positions}")
        if not self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), sequence, tokens, -1):
            raise TraceError(f"llama.cpp cannot cut sequence {sequence} at {tokens} tokens: {_last_words()}")
        self.positions[sequence] = tokens

    def set_gain(self, gain: float | Sequence[float]) -> None:
        """Another gain of the recency prior from the next layer on: of all layers, or one for each with experts.

        Raises ConfigError without a prior, or for a wrong number or value.
        """
        if self._prior is None:
            raise ConfigError('there is no recency prior: make the model with recency="ema" (gain 0 is none).')
        now = self._prior.recency
        self._prior.set(Recency.of(now.mode, gain, now.decay, now.share or None))

    def prior_status(self) -> PriorStatus | None:
        """Whether the recency prior acts, or why not, and what it did; None without one."""
        return None if self._prior is None else self._prior.status()

    def set_expert_cache(self, budget: str | int | float) -> None:
        """Another budget of the expert cache from the next layer on. Raises ConfigError without one, or for what is no
        budget."""
        if self._prior is None or not self._has_cache:
            raise ConfigError('there is no expert cache: make the model with expert_cache="1GiB", or a share as 0.25.')
        self._prior.hold(*budget_of(budget))

    def cache_status(self) -> EngineCacheStatus | None:
        """What the expert cache holds and did; None without one."""
        return self._prior.cache_status() if self._prior is not None and self._has_cache else None

    def load_lora(self, path: str | os.PathLike[str]) -> int:
        """A LoRA for `set_loras`; it lives as long as the model. Raises ConfigError when llama.cpp refuses it."""
        adapter = self._lib.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise ConfigError(f"llama.cpp cannot load the LoRA {os.fspath(path)}: {_last_words()}")
        return int(adapter)

    def set_loras(self, scales: dict[int, float]) -> None:
        """Use these LoRAs with these scales from the next decode on, and no others."""
        count = len(scales)
        adapters = (_Pointer * max(count, 1))(*scales)
        values = (C.c_float * max(count, 1))(*scales.values())
        self._lib.llama_set_adapters_lora(self._context, adapters, count, values)

    def _take_route(self, tensor: int, ask: bool, user_data: object) -> bool:
        wanted = self._prior is not None and self._prior.ask(tensor, ask)
        name = self._lib.ggml_get_name(tensor).decode()
        if not name.startswith(_TOP_K):
            return wanted or not ask
        if not ask:
            head = _Tensor.from_address(tensor)
            ids_TK = np.empty((head.ne[1], head.ne[0]), np.int32)
            # A view of all experts in order of score: rows are as far apart as all of them.
            for token, row_K in enumerate(ids_TK):
                self._lib.ggml_backend_tensor_get(tensor, row_K.ctypes.data, token * head.nb[1], row_K.nbytes)
            self.routes.setdefault(int(name.removeprefix(_TOP_K)), []).append(ids_TK)
        return True


def _last_words() -> str:
    return " ".join(line for line in _log[-3:] if line) or "it gives no reason"
