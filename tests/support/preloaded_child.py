"""LlamaModel with every call going through the preloaded library, in a process of its own.

As a program: a GGUF file, a name of a script below, and a .npy file for the logits that it computes. The library has
to be in LD_PRELOAD and its control file in REMOE_PRIOR_CONTROL.
"""

from __future__ import annotations

import ctypes as C
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from remoe_adapt.engines.llamacpp.in_process import LlamaModel

FIRST, SECOND, THIRD = list(range(10, 34)), list(range(60, 72)), list(range(100, 130))
SHIFT = 8
Logits = list[NDArray[np.float32]]
_Pointer, _Int = C.c_void_p, C.c_int32
_MORE = {
    "llama_memory_seq_rm": ([_Pointer, _Int, _Int, _Int], C.c_bool),
    "llama_memory_seq_cp": ([_Pointer, _Int, _Int, _Int, _Int], None),
    "llama_memory_seq_keep": ([_Pointer, _Int], None),
    "llama_memory_seq_add": ([_Pointer, _Int, _Int, _Int, _Int], None),
    "llama_memory_seq_div": ([_Pointer, _Int, _Int, _Int, C.c_int], None),
    "llama_state_seq_get_size": ([_Pointer, _Int], C.c_size_t),
    "llama_state_seq_get_data": ([_Pointer, _Pointer, C.c_size_t, _Int], C.c_size_t),
    "llama_state_seq_set_data": ([_Pointer, _Pointer, C.c_size_t, _Int], C.c_size_t),
}


def interposed() -> Any:
    """The engine's functions by way of the global scope, in which what is preloaded comes first."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations
    (path,) = (p for folder in spec.submodule_search_locations for p in Path(folder).glob("xllamacpp*.so"))
    C.CDLL(str(path), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
    from remoe_adapt.engines.llamacpp import in_process

    found = C.CDLL(None)
    typed(found, in_process._FUNCTIONS)
    found.llama_log_set(in_process._on_log, None)
    found.llama_backend_init()
    return found


def typed(found: Any, functions: Mapping[str, tuple[list[Any], Any]]) -> None:
    for name, (arguments, result) in functions.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result


def memory(model: LlamaModel) -> Any:
    typed(model._lib, _MORE)
    return model._lib.llama_get_memory(model._context)


def saved(model: LlamaModel, sequence: int) -> C.Array[C.c_uint8]:
    typed(model._lib, _MORE)
    size = model._lib.llama_state_seq_get_size(model._context, sequence)
    data = (C.c_uint8 * size)()
    assert model._lib.llama_state_seq_get_data(model._context, data, size, sequence) == size
    return data


def loaded(model: LlamaModel, sequence: int, data: C.Array[C.c_uint8]) -> None:
    assert model._lib.llama_state_seq_set_data(model._context, data, len(data), sequence)


def cut(model: LlamaModel) -> Logits:
    """Rejected tokens: what is decoded after them is as if they had never been there."""
    model.decode(FIRST)
    for token in SECOND:
        model.decode([token])
    model.rewind(len(FIRST))
    return [model.decode([token]) for token in THIRD]


def copied(model: LlamaModel) -> Logits:
    """Sequence 1 goes on from sequence 0, which goes another way."""
    model.decode(FIRST)
    model._lib.llama_memory_seq_cp(memory(model), 0, 1, -1, -1)
    model.positions[1] = len(FIRST)
    model.decode(SECOND)
    return [model.decode([token], [1]) for token in THIRD]


def restored(model: LlamaModel) -> Logits:
    """A saved state comes back into another slot, after its own has gone on to another text."""
    model.decode(FIRST)
    data = saved(model, 0)
    model._lib.llama_memory_seq_rm(memory(model), 0, -1, -1)
    model.positions[0] = 0
    model.decode(SECOND)
    loaded(model, 1, data)
    model.positions[1] = len(FIRST)
    return [model.decode([token], [1]) for token in THIRD]


def reopened(model: LlamaModel) -> Logits:
    """A context in the place of one that is gone."""
    model.decode(SECOND)
    model._lib.llama_free(model._context)
    options = model._lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = options.n_outputs_max = model.context_tokens
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = options.flash_attn_type = 0
    options.n_seq_max, options.kv_unified = 2, True
    model._context = model._lib.llama_init_from_model(model._model, options)
    model.positions = [0, 0]
    model.decode(FIRST[:1])  # another graph has to be proven
    model.clear()
    model.decode(FIRST)
    return [model.decode([token]) for token in THIRD]


def shifted(model: LlamaModel) -> Logits:
    """The context is shifted: tokens from its midst go, those behind move to the front, what was chosen stays."""
    model.decode(FIRST)
    shift(model)
    return [model.decode([token]) for token in THIRD]


def shift(model: LlamaModel) -> None:
    model._lib.llama_memory_seq_rm(memory(model), 0, 4, 4 + SHIFT)
    model._lib.llama_memory_seq_add(memory(model), 0, 4 + SHIFT, len(FIRST), -SHIFT)
    model.positions[0] -= SHIFT


def shifted_and_cut(model: LlamaModel) -> Logits:
    """The same, and tokens behind the shift are taken back."""
    model.decode(FIRST)
    shift(model)
    for token in SECOND:
        model.decode([token])
    model.rewind(len(FIRST) - SHIFT)
    return [model.decode([token]) for token in THIRD]


def unknown(model: LlamaModel) -> Logits:
    """Where a sequence goes on from what nobody saw, its state begins anew."""
    model.decode(FIRST)
    model._lib.llama_memory_seq_div(memory(model), 0, 0, -1, 2)
    model.positions[0] = (len(FIRST) + 1) // 2
    return [model.decode([token]) for token in THIRD]


SCRIPTS: dict[str, Callable[[LlamaModel], Logits]] = {
    each.__name__: each for each in (cut, copied, restored, reopened, shifted, shifted_and_cut, unknown)
}


def run(path: str, names: list[str]) -> dict[str, NDArray[np.float32]]:
    """Each script on a context of its own."""
    from remoe_adapt.engines.llamacpp import in_process

    in_process.library = interposed  # type: ignore[assignment]
    found = {}
    for name in names:
        with in_process.LlamaModel(path, context_tokens=256, sequences=2) as model:
            model.decode(FIRST[:1])  # by which the library proves the graph
            model.clear()
            found[name] = np.concatenate(SCRIPTS[name](model))
    return found


def without_torch() -> None:
    """The faces of these rooms would import it, which takes longer than all that is done here."""
    spec = importlib.util.find_spec("remoe_adapt")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for room in ("", "engines", "engines/llamacpp"):
        face = types.ModuleType(".".join(["remoe_adapt", *room.split("/")]) if room else "remoe_adapt")
        face.__path__ = [str(root / room)]
        sys.modules[face.__name__] = face


if __name__ == "__main__":
    without_torch()
    np.savez(sys.argv[2], **run(sys.argv[1], sys.argv[3:] or list(SCRIPTS)))  # type: ignore[arg-type]
