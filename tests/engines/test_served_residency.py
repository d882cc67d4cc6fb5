"""Recency `resident` in a served GGUF: experts that are out of memory are avoided, and where that cannot be told it is
said."""

from __future__ import annotations

import ctypes as C
import functools
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")
from gguf_writer import small_model, write_gguf
from preloaded import Asked, asked, command, prompts, running, served, stock_server
from waiting import until

from remoe_adapt.cli.watch import text_of
from remoe_adapt.engines.llamacpp.process import mapped_spans
from remoe_adapt.engines.llamacpp.residency import expert_spans, why_blind
from remoe_adapt.engines.llamacpp.serve import ServedGguf

_PROCESS_MADVISE, _PAGEOUT = 440, 21
_ADVICE = """
#include <sys/mman.h>
int posix_madvise(void *at, size_t bytes, int advice) { (void)advice; return madvise(at, bytes, MADV_RANDOM); }
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 16 pages in each tensor."""
    path = tmp_path_factory.mktemp("resident") / "model.gguf"
    made = small_model("qwen3moe", hidden=128, inner=128)
    made.lm_head.weight.data[127:] = 0  # a stock server gives out nothing but text
    write_gguf(made, "qwen3moe", path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # what is not written yet cannot be let go
    return path


@pytest.fixture(scope="module", params=["wheel", "stock"])
def server(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ServedGguf]:
    """Reads no more from storage than it touches, as on a disk without read-ahead: models are larger than that, this
    one is not."""
    program = {} if request.param == "wheel" else {"llama_server": stock_server()}
    if program == {"llama_server": None}:
        pytest.skip("$REMOE_LLAMA_SERVER names no llama-server with shared libraries")
    folder = tmp_path_factory.mktemp("advice")
    (folder / "advice.c").write_text(_ADVICE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "advice.so", folder / "advice.c"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(folder / "advice.so"))
        with served(model, mode="resident", **program) as found:
            patch.undo()
            yield found


def let_go(server: ServedGguf, model: Path) -> None:
    """The later half of all experts is in memory no more."""
    assert server.pid is not None
    later_halves(model)
    libc = C.CDLL(None, use_errno=True)
    handle = os.pidfd_open(server.pid)
    try:
        for begin, end in addresses(server.pid, model):
            piece = (C.c_size_t * 2)(begin, end - begin)
            if libc.syscall(_PROCESS_MADVISE, handle, piece, C.c_size_t(1), _PAGEOUT, 0) < 0:
                pytest.skip(f"this system lets nobody page another process out ({os.strerror(C.get_errno())})")
    finally:
        os.close(handle)
    with model.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # or more is read than asked for
        ends = [0, *(end for _, end in sorted(later_halves(model)))]
        for begin, (end, _) in zip(ends, [*sorted(later_halves(model)), (model.stat().st_size, 0)], strict=True):
            os.pread(file.fileno(), end - begin, begin)


def addresses(pid: int, model: Path) -> list[tuple[int, int]]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(model))]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


@functools.cache  # the header is read for it, and much of what is behind it with it
def later_halves(model: Path) -> list[tuple[int, int]]:
    ((path, spans),) = expert_spans(model)
    assert path == model and len(spans) == 9
    return [((begin + end) // 2, end) for begin, end in spans]


def in_memory(model: Path) -> NDArray[np.bool_]:
    """Of the pages that lie wholly in later halves."""
    libc = C.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = C.c_void_p, [C.c_void_p, C.c_size_t, *[C.c_int] * 3, C.c_long]
    libc.mincore.argtypes = libc.munmap.argtypes = None
    size, page = model.stat().st_size, mmap.PAGESIZE
    pages = np.zeros(-(-size // page), np.uint8)
    with model.open("rb") as file:
        at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    assert libc.mincore(C.c_void_p(at), C.c_size_t(size), C.c_void_p(pages.ctypes.data)) == 0
    libc.munmap(C.c_void_p(at), C.c_size_t(size))
    parts = [pages[-(-begin // page) : end // page] for begin, end in later_halves(model)]
    found: NDArray[np.bool_] = np.concatenate(parts) & 1 == 1
    return found


def test_experts_that_are_out_of_memory_are_left_there(model: Path, server: ServedGguf) -> None:
    def at(gain: float) -> tuple[Asked, dict[str, int], float]:
        let_go(server, model)
        if in_memory(model).mean() > 0.2:
            pytest.skip("this file system keeps in memory what it is asked to forget")
        command(server, gain, "resident")
        before = server.status()["prior"]
        one = asked(server.port, prompt)
        after = server.status()["prior"]
        return one, {name: after[name] - before[name] for name in ("changed_rows", "swapped")}, in_memory(model).mean()

    prompt = prompts(1)[0]
    base, counted, base_share = at(0.0)
    assert counted == {"changed_rows": 0, "swapped": 0} and base_share > 0.5
    one, counted, share = at(16.0)
    assert counted["changed_rows"] > 20 and counted["swapped"] > 20
    assert share < base_share / 2 and one.answer.tokens != base.answer.tokens
    status = server.status()["prior"]
    assert (status["state"], status["mode"], status["gain"], status["blind"]) == ("on", "resident", 16.0, None)
    assert status["mincore_ns"] > 0 and status["refused_rows"] == 0
    assert server.shown().recency == "resident" and server.acts() == ("recency prior (resident)",)


def test_the_experts_of_the_server_are_mapped_and_not_copied(model: Path, server: ServedGguf) -> None:
    assert server.pid is not None
    assert why_blind(server.pid, expert_spans(model)) is None
    assert server.why_blind() is None and len(mapped_spans(server.pid, model)) > 0


def test_a_server_that_reads_its_model_into_memory_is_said_to_be_blind_once(model: Path) -> None:
    with (
        served(model, mode="resident", engine={"load_mode": 0}, interval_s=0.02) as server,
        running(server) as events,
    ):
        until(lambda: any(event["event"] == "blind" for event in events))
        (blind,) = (event for event in events if event["event"] == "blind")
        assert "experts of" in blind["reason"] and "in memory of its own" in blind["reason"]
        assert text_of(blind).startswith("warning: recency resident does nothing here: the server")
        assert server.status()["prior"]["blind"] == blind["reason"] == server.shown().detail["prior"]["blind"]
    assert sum(event["event"] == "blind" for event in events) == 1


def test_a_file_of_somebody_else_s_is_no_word(model: Path) -> None:
    assert why_blind(os.getpid(), [(model, [])]) is None
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    model.chmod(0o644)
    os.seteuid(65534)
    try:
        found = why_blind(os.getpid(), [(model, [])])
    finally:
        os.seteuid(0)
    assert found is not None and "belongs to another user" in found


def test_a_served_model_reads_its_experts_ahead_and_answers_the_same(model: Path) -> None:
    prompt = prompts(1)[0]
    with served(model, expert_cache=None) as plain:
        expected = asked(plain.port, prompt).answer.tokens
        assert plain.status()["prior"]["ahead"] == "off"
    with served(model, expert_cache=0.5) as server, running(server):
        until(lambda: server.status()["prior"]["ahead"] == "on" or not asked(server.port, prompt))
        assert asked(server.port, prompt).answer.tokens == expected
        found = server.status()["prior"]
        assert found["ahead_hits"] > 0 < found["ahead_misses"] and found["blind"] is None
        shown = server.shown()
        assert shown.acts[-1] == "expert cache" and shown.hit_rate is not None and 0 < shown.hit_rate < 1
        assert shown.memory.cache_bytes == found["held_bytes"]
        half = sum(end - begin for _, spans in expert_spans(model) for begin, end in spans) // 2
        assert 0 < found["held_bytes"] <= half


def test_a_server_that_copies_its_experts_says_that_none_are_read_ahead(model: Path) -> None:
    with (
        served(model, engine={"load_mode": 0}, interval_s=0.02) as server,
        running(server) as events,
    ):
        asked(server.port, prompts(1)[0])
        asked(server.port, prompts(1)[0])
        until(lambda: any(event["event"] == "uncached" for event in events))
        (event,) = (event for event in events if event["event"] == "uncached")
        assert text_of(event).startswith("experts are not read ahead: no experts lie in a file that is mapped")
