"""The expert cache of a memory-mapped GGUF: what is chosen is read at the stop, what has no room is given back."""

from __future__ import annotations

import ctypes as C
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_writer import small_model, write_gguf
from llama_engine import skip_without_engine

from remoe_adapt.errors import ConfigError, MissingDependencyError

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from fake_graph import Graph

from remoe_adapt.engines.llamacpp.in_process import LlamaModel, library
from remoe_adapt.engines.llamacpp.prior import build
from remoe_adapt.engines.llamacpp.prior.cost import held
from remoe_adapt.engines.llamacpp.prior.native import MODES

E, K, PAGES = 16, 2, 4
OFF, ON, NO_FILE = 0, 1, 2
_libc = C.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [C.c_void_p, C.c_size_t, C.c_void_p]


@pytest.fixture(scope="module", autouse=True)
def _right_version() -> None:
    skip_without_engine()


class Mapped:
    """Experts of four pages each in a file of which nothing is in memory, mapped as llama.cpp does."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(os.urandom(E * PAGES * mmap.PAGESIZE))
        self.fd = os.open(path, os.O_RDONLY)
        os.fsync(self.fd)
        self.map = mmap.mmap(self.fd, 0, prot=mmap.PROT_READ)
        # Else the kernel reads what lies around a page as well.
        self.map.madvise(mmap.MADV_RANDOM)
        self.weights = np.frombuffer(self.map, np.float32).reshape(E, PAGES, -1)
        # All at once: the kernel keeps a folio of many pages of which it is asked to forget a part.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if self.inside(set()):
            pytest.skip("this file system keeps in memory what it is asked to forget")

    def forget(self, experts: Any) -> None:
        """As the kernel does when it needs the memory."""
        size = PAGES * mmap.PAGESIZE
        for e in experts:
            self.map.madvise(mmap.MADV_DONTNEED, e * size, size)
            os.posix_fadvise(self.fd, e * size, size, os.POSIX_FADV_DONTNEED)

    def inside(self, expected: set[int] | int) -> set[int] | int:
        """Experts that are in memory with all their pages, or how many, as is expected: reads may be under way still,
        so that is waited for."""
        found: set[int] | int = set()
        for _ in range(500):
            pages = (C.c_uint8 * (E * PAGES))()
            assert _libc.mincore(self.weights.ctypes.data, len(self.map), pages) == 0
            pages_EP = np.frombuffer(pages, np.uint8).reshape(E, PAGES) & 1
            whole, parts = (set(np.flatnonzero(each).tolist()) for each in (pages_EP.all(axis=1), pages_EP.any(axis=1)))
            found = len(whole) if isinstance(expected, int) else whole
            if whole == parts and found == expected:
                break
            time.sleep(0.01)
        return found


@pytest.fixture
def mapped(tmp_path: Path) -> Mapped:
    return Mapped(tmp_path / "experts")


@pytest.fixture
def graph() -> Iterator[Graph]:
    graph = Graph(library())
    yield graph
    graph.close()


def choose(graph: Graph, *rows: tuple[int, ...], weights: Any = None) -> None:
    """Each row's experts are chosen; with weights the products touch all of them afterwards."""
    scores = np.zeros((len(rows), E), np.float32)
    for row, ids in enumerate(rows):
        scores[row, list(ids)] = np.arange(len(ids), 0, -1)
    graph.choose(scores, K)
    if weights is not None:
        for e in {e for ids in rows for e in ids}:
            weights[e].view(np.uint8).max()


def begin(graph: Graph, weights: Any, slots: int) -> None:
    """A first graph shows where experts lie; then so many of them may stay."""
    choose(graph, (0, 1))
    graph.consume(weights)
    graph.lib.rp_settle(graph.prior)
    graph.control.budget_bytes = slots * PAGES * mmap.PAGESIZE


def test_chosen_experts_are_read_whole_before_anything_touches_them(graph: Graph, mapped: Mapped) -> None:
    begin(graph, mapped.weights, 4)
    assert mapped.inside(set()) == set() and graph.control.ahead_state == OFF
    choose(graph, (3, 7))
    assert mapped.inside({3, 7}) == {3, 7} and graph.control.ahead_state == ON
    choose(graph, (7, 9))
    assert mapped.inside({3, 7, 9}) == {3, 7, 9}
    assert (graph.control.ahead_hits, graph.control.ahead_misses) == (1, 3)
    assert graph.control.held_bytes == 3 * PAGES * mmap.PAGESIZE == graph.control.ahead_bytes


def test_what_is_least_used_is_given_back(graph: Graph, mapped: Mapped) -> None:
    begin(graph, mapped.weights, 3)
    for ids in ((1, 2), (1, 2), (1, 3)):
        choose(graph, ids, weights=mapped.weights)
    assert mapped.inside({1, 2, 3}) == {1, 2, 3}
    # Used once, but last; the order of LRU would drop 2.
    choose(graph, (1, 4), weights=mapped.weights)
    assert mapped.inside({1, 2, 4}) == {1, 2, 4} and graph.control.ahead_dropped == 1
    # An expert that is needed now stays, however little it was used.
    choose(graph, (4, 5), weights=mapped.weights)
    assert mapped.inside({1, 4, 5}) == {1, 4, 5}


def test_in_mode_cost_what_stays_is_what_the_prior_prefers(graph: Graph, mapped: Mapped) -> None:
    """Which is not what LRFU would keep: experts that are used once pass through."""
    slots = 3
    begin(graph, mapped.weights, slots)
    control, at = graph.control, 0
    control.mode, control.decay, control.share = MODES["cost"], 0.95, slots / E
    recency_E = np.zeros(E, np.float32)

    def use(*rows: tuple[int, ...]) -> None:
        nonlocal at
        graph.rows([0] * len(rows), range(at, at + len(rows)))
        at += len(rows)
        choose(graph, *rows, weights=mapped.weights)
        graph.lib.rp_get(graph.prior, 0, 0, recency_E.ctypes.data, E)

    for ids in ((1, 2), (1, 2), (1, 3)):
        use(ids)
    assert mapped.inside({1, 2, 3}) == {1, 2, 3} == set(np.flatnonzero(held(recency_E, control.share, K)))
    use((4, 5))
    use((1, 2))  # 4 is given back at this stop: of it and 5, which are equals, one more fits
    assert mapped.inside({1, 2, 5}) == {1, 2, 5} <= set(np.flatnonzero(held(recency_E, control.share, K)))
    assert control.held_bytes == slots * PAGES * mmap.PAGESIZE and control.ahead_spilled == 0
    # After a prompt as well, whatever came first in it: what is read at a time is bounded.
    use((6, 7), (8, 9), (10, 11), (8, 9), (8, 12))
    assert control.ahead_spilled == 4
    use((8, 9))
    wanted = set(np.flatnonzero(held(recency_E, control.share, K)).tolist())
    assert len(wanted) == slots and mapped.inside(wanted) == wanted
    # A text that begins anew has no recency: until it has, those stay that were of use.
    hits, at = control.ahead_hits, 0
    use((8, 13))
    assert control.ahead_hits == hits + 1


def test_a_prompt_that_needs_more_than_there_is_room_for_leaves_no_more_behind(graph: Graph, mapped: Mapped) -> None:
    begin(graph, mapped.weights, 4)
    choose(graph, (0, 1), (2, 3), (4, 5))
    assert graph.control.ahead_spilled == 2 and mapped.inside(4) == 4
    choose(graph, (0, 1), (2, 3), (4, 5), weights=mapped.weights)  # by page faults where it was not read
    assert mapped.inside(set(range(6))) == set(range(6))
    choose(graph, (0, 1), weights=mapped.weights)
    assert mapped.inside(4) == 4 and graph.control.held_bytes == 4 * PAGES * mmap.PAGESIZE


def test_what_the_kernel_took_back_is_found_read_again_and_the_budget_is_cut(graph: Graph, mapped: Mapped) -> None:
    begin(graph, mapped.weights, 8)
    for e in range(0, 8, 2):
        choose(graph, (e, e + 1), weights=mapped.weights)
    assert mapped.inside(8) == 8
    for _ in range(16):  # there is a look at one graph in so many
        if graph.control.ahead_stale:
            break
        mapped.forget([0, 1])
        choose(graph, (0, 1), weights=mapped.weights)
    assert graph.control.ahead_stale == 2 and mapped.inside({0, 1, 5, 6, 7}) == {0, 1, 5, 6, 7}
    for _ in range(2000):  # calm for long enough to have it all back
        choose(graph, (0, 1), weights=mapped.weights)
    for e in range(0, 16, 2):
        choose(graph, (e, e + 1), weights=mapped.weights)
    assert mapped.inside(8) == 8


def test_another_budget_acts_at_once_and_none_ends_it(graph: Graph, mapped: Mapped) -> None:
    begin(graph, mapped.weights, 8)
    for e in range(0, 8, 2):
        choose(graph, (e, e + 1), weights=mapped.weights)
    graph.control.budget_share = 0.25  # which counts in place of the bytes
    choose(graph, (0, 1), weights=mapped.weights)
    assert mapped.inside({0, 1, 6, 7}) == {0, 1, 6, 7}
    graph.control.budget_share = float("nan")
    graph.control.budget_bytes = 0
    choose(graph, (8, 9))
    assert graph.control.ahead_state == OFF and graph.control.held_bytes == 0
    assert mapped.inside({0, 1, 6, 7}) == {0, 1, 6, 7}


def test_residency_is_what_is_held(graph: Graph, mapped: Mapped) -> None:
    begin(graph, mapped.weights, 4)
    choose(graph, (3, 7), weights=mapped.weights)
    graph.control.mode, graph.control.gain = MODES["resident"], 1.0
    scores = np.linspace(0, 1, E, dtype=np.float32)[None]
    assert set(graph.choose(scores, K)[0].tolist()) == {3, 7}
    seen = np.zeros(E, np.float32)
    graph.lib.rp_get(graph.prior, 0, 0, seen.ctypes.data, E)
    assert set(np.flatnonzero(seen).tolist()) == {3, 7}
    assert graph.control.mincore_ns == 0  # the kernel was not asked


def test_memory_that_is_no_file_is_left_alone(graph: Graph, tmp_path: Path) -> None:
    begin(graph, np.ones((E, PAGES, mmap.PAGESIZE // 4), np.float32), 4)
    choose(graph, (3, 7))
    assert graph.control.ahead_state == NO_FILE and graph.control.ahead_misses == 0


def test_pages_that_somebody_wrote_are_never_given_back(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "experts"
    path.write_bytes(bytes(E * PAGES * mmap.PAGESIZE))
    with path.open("rb") as file:
        private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    weights = np.frombuffer(private, np.float32).reshape(E, PAGES, -1)
    private[0] = 7  # a copy of this process alone
    begin(graph, weights, 2)
    for e in range(0, E, 2):
        choose(graph, (e, e + 1))
    assert graph.control.ahead_state == NO_FILE and private[0] == 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ahead") / "model.gguf"
    write_gguf(small_model("olmoe"), "olmoe", path)
    return path


IDS = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("budget", [0.25, 1.0, "64KiB", 1])
def test_a_model_computes_the_same_with_an_expert_cache(model: Path, budget: str | int | float) -> None:
    with LlamaModel(model) as engine:
        expected = [engine.decode(IDS[:20]), *(engine.decode([token]) for token in IDS[20:])]
    with LlamaModel(model, expert_cache=budget) as engine:
        found = [engine.decode(IDS[:20]), *(engine.decode([token]) for token in IDS[20:])]
        status = engine.cache_status()
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert status is not None and status.acts and status.reason == "on"
    assert status.held_bytes <= status.budget_bytes <= status.experts_bytes
    assert status.hits + status.misses > 0 and status.failed == 0
    # Below one expert of a layer nothing is held, and all is left to page faults.
    assert (status.hits > 0) == isinstance(budget, float)
    assert (status.misses == status.spilled) != isinstance(budget, float)


def test_the_budget_of_a_model_can_be_changed(model: Path) -> None:
    with LlamaModel(model, expert_cache=1.0, recency="resident", gain=0.2) as engine:
        engine.decode(IDS)
        before = engine.cache_status()
        engine.set_expert_cache(0.25)
        engine.decode([IDS[0]])
        after = engine.cache_status()
        assert before is not None and after is not None
        assert before.held_bytes > after.held_bytes > 0 and after.dropped > before.dropped
        with pytest.raises(ConfigError, match=r"above 0 and at most 1\.0"):
            engine.set_expert_cache(1.5)
    with LlamaModel(model) as engine:
        assert engine.cache_status() is None
        with pytest.raises(ConfigError, match="there is no expert cache"):
            engine.set_expert_cache(0.5)


def test_where_it_can_do_nothing_it_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"expert_cache=0\.5 can do nothing here: .*file that is mapped"):
        LlamaModel(model, expert_cache=0.5, load_mode="none")
    with pytest.raises(ConfigError, match="expert_cache: 'much' is not a size"):
        LlamaModel(model, expert_cache="much")
    monkeypatch.setenv("CC", "none-such")
    monkeypatch.setenv("PATH", "")
    build.library.cache_clear()
    try:
        with pytest.raises(MissingDependencyError, match="no C compiler"):
            LlamaModel(model, expert_cache=0.5)
    finally:
        build.library.cache_clear()
