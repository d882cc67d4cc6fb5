"""The prior in C: `prior.c` through ctypes."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from remoe_adapt.engines.llamacpp.prior.base import EngineCacheStatus, EnginePrior, PriorStatus
from remoe_adapt.engines.llamacpp.prior.build import library
from remoe_adapt.engines.llamacpp.prior.control import AHEAD, MODES, NO_FILE
from remoe_adapt.recency_settings import Recency

ON, LAYERS, MAX_EXPERTS = 1, 512, 1024
AHEAD_ON = 1
_WHY_NOT_AHEAD = {
    0: "no layer has been served yet",
    2: NO_FILE,
}
_COUNTERS = (
    "tokens", "calls", "changed_rows", "kept", "chosen", "swapped", "ns", "mincore_ns", "restarts", "rewinds",
    "refused_rows", "lost_rows", "unproven_rows", *AHEAD,
)  # fmt: skip
Find = C.CFUNCTYPE(C.c_void_p, C.c_char_p, C.c_void_p)
_Pointer, _Ints = C.c_void_p, C.POINTER(C.c_int32)


def _named(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Control(C.Structure):
    """`rp_control` of prior.h."""

    _fields_ = (
        *_named(C.c_uint32, "magic size"),
        *_named(C.c_float, "gain budget_share"),
        *_named(C.c_uint32, "mode pages"),
        *_named(C.c_double, "decay share"),
        *_named(C.c_uint64, "tokens calls changed_rows kept chosen swapped ns mincore_ns restarts"),
        *_named(C.c_uint32, "version status"),
        *_named(C.c_uint64, "rewinds refused_rows lost_rows unproven_rows"),
        *_named(C.c_uint32, "look_every is_blind n_layers n_layer_gain"),
        ("layer_gain", C.c_float * LAYERS),
        ("ahead_state", C.c_uint32),
        *_named(C.c_uint64, "budget_bytes held_bytes"),
        *_named(C.c_uint64, " ".join(AHEAD)),
    )


_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "rp_new": ([C.c_int, _Pointer], _Pointer),
    "rp_free": ([_Pointer], None),
    "rp_ctl": ([_Pointer], C.POINTER(Control)),
    "rp_why": ([C.c_uint32], C.c_char_p),
    "rp_backend": ([_Pointer] * 5, None),
    "rp_probe": ([_Pointer, Find, _Pointer], C.c_uint32),
    "rp_settle": ([_Pointer], C.c_uint32),
    "rp_trust": ([_Pointer, C.c_bool], None),
    "rp_weigh": ([_Pointer, C.c_int, C.c_int, C.c_int, C.c_bool], None),
    "rp_ranks": ([_Pointer, C.c_int, C.POINTER(C.c_bool)], C.c_int),
    "rp_rows": ([_Pointer, C.c_int, _Pointer, _Pointer, _Pointer], None),
    "rp_reset": ([_Pointer, C.c_int], None),
    "rp_restart": ([_Pointer, C.c_int], None),
    "rp_rewind": ([_Pointer, C.c_int, C.c_int], C.c_bool),
    "rp_copy": ([_Pointer, C.c_int, C.c_int], None),
    "rp_cb": ([_Pointer, C.c_bool, _Pointer], C.c_bool),
    "rp_set_resident": ([_Pointer, C.c_int, C.c_int, _Pointer], None),
    "rp_mincore_layer": ([_Pointer, C.c_int, C.c_int], C.c_int),
    "rp_expert_bytes": ([_Pointer], C.c_uint64),
    "rp_experts": ([_Pointer, C.c_int], C.c_int),
    "rp_get": ([_Pointer, C.c_int, C.c_int, _Pointer, C.c_int], C.c_int),
    "rp_renorm": ([_Pointer, C.c_bool], None),
    "rp_record": ([_Pointer, _Pointer, C.c_size_t], None),
    "rp_recorded": ([_Pointer], C.c_size_t),
    "rp_rank": ([_Pointer, _Pointer, C.c_int, C.c_int, C.c_float, _Pointer], None),
}


def functions() -> Any:
    """The loaded library with the types of its functions set. Raises MissingDependencyError as `build.compiled`."""
    loaded = library()
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


def symbol(engine: Any, name: str) -> int | None:
    """The address of a function of the engine's library, or None."""
    try:
        return C.cast(getattr(engine, name), C.c_void_p).value
    except AttributeError:
        return None


class NativePrior(EnginePrior):
    """engine: llama.cpp's loaded library. sequences: how many there may be. renormalise: divide the weights of the
    chosen experts by their sum, for a file whose architecture llama.cpp does not.

    Raises MissingDependencyError when prior.c cannot be compiled.
    """

    def __init__(self, engine: Any, sequences: int, recency: Recency, *, renormalise: bool = False) -> None:
        self._lib = functions()
        self._prior = self._lib.rp_new(sequences, None)
        if not self._prior:
            raise MemoryError(f"no memory for a recency prior of {sequences} sequences")
        self.control = self._lib.rp_ctl(self._prior).contents
        backend = "ggml_op_desc ggml_backend_buffer_is_host ggml_backend_tensor_get ggml_backend_tensor_set"
        self._lib.rp_backend(self._prior, *(symbol(engine, name) for name in backend.split()))
        self._lib.rp_probe(self._prior, find_in(lambda name: symbol(engine, name)), None)
        self._lib.rp_renorm(self._prior, renormalise)
        address = symbol(self._lib, "rp_cb")
        assert address is not None
        self.callback, self.user_data = address, self._prior
        self.set(replace(recency, gain=0.0))

    def rows(self, sequences: Sequence[int], positions: Sequence[int]) -> None:
        rows = np.array([sequences, positions], np.int32)
        self._lib.rp_rows(self._prior, rows.shape[1], rows[0].ctypes.data, rows[1].ctypes.data, None)

    def settle(self) -> None:
        self._lib.rp_settle(self._prior)
        self.reset()
        for name in _COUNTERS:
            setattr(self.control, name, 0)

    def reset(self) -> None:
        self._lib.rp_reset(self._prior, -1)

    def copy(self, source: int, target: int) -> None:
        self._lib.rp_copy(self._prior, source, target)

    def ask(self, tensor: int, ask: bool) -> bool:
        return bool(self._lib.rp_cb(tensor, ask, self._prior))

    def status(self) -> PriorStatus:
        control, layers = self.control, self._layers()
        return PriorStatus(
            acts=control.status == ON,
            reason=self._lib.rp_why(control.status).decode(),
            computed_by="c",
            why_numpy="",
            mode=self.recency.mode,
            gains=self.recency.gains(len(layers)),
            decay=self.recency.decay,
            share=self.recency.share or 0.0,
            layers=layers,
            tokens=control.tokens,
            changed_rows=control.changed_rows,
            swapped=control.swapped,
            eor=control.kept / max(control.chosen, 1),
            restarts=control.restarts,
            rewinds=control.rewinds,
            refused_rows=control.refused_rows,
            lost_rows=control.lost_rows,
            is_blind=bool(control.is_blind),
            microseconds_per_layer=control.ns / max(control.calls, 1) / 1e3,
        )

    def hold(self, size_bytes: int, share: float = 0.0) -> None:
        # Of the two the share counts where there is one, so it is set last, and taken away last.
        self.control.budget_bytes, self.control.budget_share = size_bytes, share

    def cache_status(self) -> EngineCacheStatus:
        control, total = self.control, self._lib.rp_expert_bytes(self._prior)
        reason = self._lib.rp_why(control.status).decode()
        if control.status == ON:
            reason = _WHY_NOT_AHEAD.get(control.ahead_state, reason)
        return EngineCacheStatus(
            acts=control.status == ON and control.ahead_state == AHEAD_ON,
            reason=reason,
            budget_bytes=int(control.budget_share * total) if control.budget_share else control.budget_bytes,
            experts_bytes=total,
            held_bytes=control.held_bytes,
            hits=control.ahead_hits,
            misses=control.ahead_misses,
            stale=control.ahead_stale,
            spilled=control.ahead_spilled,
            dropped=control.ahead_dropped,
            read_bytes=control.ahead_bytes,
            failed=control.ahead_failed,
        )

    def close(self) -> None:
        if self._prior:
            self._lib.rp_free(self._prior)
        self._prior = None

    def _layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(LAYERS) if self._lib.rp_experts(self._prior, layer))

    def _write(self, recency: Recency) -> None:
        # A mode of somebody else's is taken for the one of ours that is of its kind.
        self.control.mode = MODES.get(recency.mode, MODES["cost" if recency.kind.is_priced else "ema"])
        self.control.decay, self.control.share = recency.decay, recency.share or 0.0
        if isinstance(recency.gain, tuple):
            # Factors of one gain: the callback reads them layer by layer, so the one gain is written last.
            for layer, gain in zip(self._layers(), recency.gain, strict=True):
                self.control.layer_gain[layer] = gain
            self.control.n_layer_gain, self.control.gain = LAYERS, 1.0
        else:
            self.control.gain, self.control.n_layer_gain = recency.gain, 0


def find_in(look: Callable[[str], int | None]) -> Any:
    """What `rp_probe` asks for functions by name."""
    return Find(lambda name, _user: look(name.decode()))
