"""The C side of ggml: the library of the pinned wheel, its functions and structs, and proof that they are as written.

ggml's ABI is private: struct ggml_tensor may change with any commit. So the wheel is pinned, another version is not
loaded, and before anything is computed each offset that is used is compared with what ggml's own functions say.
"""

from __future__ import annotations

import ctypes as C
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from remoe_adapt.errors import MissingDependencyError, RemoeError
from remoe_adapt.expert_cache.encodings.blocks import DECODED, F32, BlockType

VERSION = "2026.10.11549"
I32_NUMBER = 26
# More than all structs below need; ggml_init takes the memory for them at once.
_CONTEXT_BYTES, _MAX_NODES = 1 << 14, 8
_Pointer, _Int, _Int64, _Size = C.c_void_p, C.c_int, C.c_int64, C.c_size_t


class Tensor(C.Structure):
    """struct ggml_tensor: ne are sizes from the fastest dimension on, nb the strides in bytes."""

    _fields_ = (
        ("type", C.c_int32),
        ("buffer", _Pointer),
        *((f"ne{i}", _Int64) for i in range(4)),
        *((f"nb{i}", _Size) for i in range(4)),
        ("op", C.c_int32),
        ("op_params", C.c_int32 * 16),
        ("flags", C.c_int32),
        ("src", _Pointer * 10),
        ("view_src", _Pointer),
        ("view_offs", _Size),
        ("data", _Pointer),
        ("name", C.c_char * 64),
        ("extra", _Pointer),
        ("padding", C.c_char * 8),
    )


class Plan(C.Structure):
    """struct ggml_cplan; `rest` is room for fields of no interest here, since ggml writes the whole struct."""

    _fields_ = (
        ("work_size", _Size),
        ("work_data", _Pointer),
        ("n_threads", _Int),
        ("threadpool", _Pointer),
        ("rest", C.c_char * 128),
    )


class _InitParams(C.Structure):
    _fields_ = (("mem_size", _Size), ("mem_buffer", _Pointer), ("no_alloc", C.c_bool))


TensorPointer = C.POINTER(Tensor)
_T = TensorPointer
# quantize_* and dequantize_row_* are asked for as self-tests come to their types.
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "ggml_init": ([_InitParams], _Pointer),
    "ggml_free": ([_Pointer], None),
    "ggml_cpu_init": ([], None),
    "ggml_new_tensor_1d": ([_Pointer, _Int, _Int64], _T),
    "ggml_new_tensor_2d": ([_Pointer, _Int, _Int64, _Int64], _T),
    "ggml_new_tensor_3d": ([_Pointer, _Int, _Int64, _Int64, _Int64], _T),
    "ggml_mul_mat": ([_Pointer, _T, _T], _T),
    "ggml_mul_mat_id": ([_Pointer, _T, _T, _T], _T),
    "ggml_swiglu": ([_Pointer, _T], _T),
    "ggml_new_graph_custom": ([_Pointer, _Size, C.c_bool], _Pointer),
    "ggml_build_forward_expand": ([_Pointer, _T], None),
    "ggml_graph_plan": ([_Pointer, _Int, _Pointer], Plan),
    "ggml_graph_compute": ([_Pointer, C.POINTER(Plan)], _Int),
    "ggml_threadpool_params_init": ([_Pointer, _Int], None),
    "ggml_threadpool_new": ([_Pointer], _Pointer),
    "ggml_threadpool_free": ([_Pointer], None),
    "ggml_type_name": ([_Int], C.c_char_p),
    "ggml_row_size": ([_Int, _Int64], _Size),
    "ggml_blck_size": ([_Int], _Int64),
    "ggml_get_data": ([_T], _Pointer),
    "ggml_get_name": ([_T], C.c_char_p),
    "ggml_set_name": ([_T, C.c_char_p], _T),
    "ggml_nbytes": ([_T], _Size),
    "ggml_is_contiguous": ([_T], C.c_bool),
    "ggml_tensor_overhead": ([], _Size),
}
# Of ggml_init and others, a std::mutex: what a fork must not leave locked.
_MUTEX = "ggml_critical_section_mutex"


def load_library() -> Any:
    """The library, its functions typed and its structs compared with ours.

    Raises MissingDependencyError without the pinned wheel, and RemoeError when it is not what it was: a function is
    missing, or a struct has another form.
    """
    spec = importlib.util.find_spec("xllamacpp")
    found = importlib.metadata.version("xllamacpp") if spec else "none"
    if spec is None or found != VERSION:
        raise MissingDependencyError(f"xllamacpp {VERSION} is needed, found: {found}")
    if sys.byteorder != "little" or C.sizeof(_Pointer) != 8:
        raise RemoeError("its structs are known for little-endian machines of 64 bits alone")
    files = [p for folder in spec.submodule_search_locations or () for p in Path(folder).glob("xllamacpp*.so")]
    if len(files) != 1:
        raise MissingDependencyError(f"the wheel xllamacpp {VERSION} holds {len(files)} libraries where one belongs")
    # Not the Python package: importing that starts llama.cpp, of which nothing is wanted.
    library = C.CDLL(str(files[0]))
    # All of them before the first call: what is missing here would end the process there.
    for name, (arguments, result) in _FUNCTIONS.items():
        if (function := getattr(library, name, None)) is None:
            raise RemoeError(f"{files[0].name} does not export {name}")
        function.argtypes, function.restype = arguments, result
    library.ggml_cpu_init()
    _compare_structs(library)
    return library


class Context:
    """Memory for the structs of a few tensors and one graph; their data lie elsewhere. Freed with the object."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.pointer = library.ggml_init(_InitParams(_CONTEXT_BYTES, None, True))
        if not self.pointer:
            raise RemoeError("ggml has no memory for a graph.")

    def graph(self) -> int:
        """An empty graph of up to eight nodes."""
        return int(self._library.ggml_new_graph_custom(self.pointer, _MAX_NODES, False))

    def __del__(self) -> None:
        if getattr(self, "pointer", None):
            self._library.ggml_free(self.pointer)


def _compare_structs(library: Any) -> None:
    """Raises RemoeError unless ggml's functions see in a tensor what stands in our struct."""
    context = Context(library)
    faults = []

    def check(what: str, theirs: Any, ours: Any) -> None:
        if theirs != ours:
            faults.append(f"{what} is {theirs!r} where {ours!r} belongs")

    # ggml puts a ggml_object of 32 bytes before each tensor.
    check("the size of a tensor", library.ggml_tensor_overhead(), C.sizeof(Tensor) + 32)
    pointer = library.ggml_new_tensor_3d(context.pointer, F32.number, 8, 3, 2)
    tensor = pointer.contents
    check("its type", tensor.type, F32.number)
    check("its sizes", [tensor.ne0, tensor.ne1, tensor.ne2, tensor.ne3], [8, 3, 2, 1])
    check("its strides", [tensor.nb0, tensor.nb1, tensor.nb2, tensor.nb3], [4, 32, 96, 192])
    check("its data", tensor.data, None)
    library.ggml_set_name(pointer, b"probe")
    check("its name", tensor.name, b"probe")
    if not faults:
        tensor.data, tensor.name = 4096, b"probed"
        check("data as set", library.ggml_get_data(pointer), 4096)
        check("the name as set", library.ggml_get_name(pointer), b"probed")
        tensor.nb2, tensor.nb3 = 200, 400
        check("bytes with a stride as set", library.ggml_nbytes(pointer), 200 + 2 * 32 + 7 * 4 + 4)
        check("contiguity", library.ggml_is_contiguous(pointer), False)
        tensor.ne2 = 5
        check("bytes with a size as set", library.ggml_nbytes(pointer), 4 * 200 + 2 * 32 + 7 * 4 + 4)
    if faults:
        raise RemoeError("its tensors have another form: " + "; ".join(faults))


def same_blocks(library: Any, kind: BlockType) -> bool:
    """Whether ggml has this type under this number, with blocks of this size."""
    return (
        kind in DECODED
        and library.ggml_type_name(kind.number) == kind.name.encode()
        and library.ggml_blck_size(kind.number) == kind.values
        and library.ggml_row_size(kind.number, 2 * kind.values) == 2 * kind.bytes
    )


def renew_mutex(library: Any) -> None:
    """In the child of a fork: a mutex that another thread of the parent held would never be unlocked here."""
    try:
        mutex = C.c_char.in_dll(library, _MUTEX)
        C.CDLL(None).pthread_mutex_init(C.byref(mutex), None)
    except (ValueError, AttributeError, OSError):
        # Then this build has no such mutex, or no such thread library.
        return
