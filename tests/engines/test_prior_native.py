"""prior.c by itself: its ranking is the definition, its state follows positions, and no other than sound ids are
written whatever lies in the engine's memory."""

from __future__ import annotations

import ctypes as C
import mmap
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_graph import Graph, Node
from numpy.typing import NDArray

from remoe_adapt.engines.llamacpp.prior import build, compiled
from remoe_adapt.engines.llamacpp.prior.fallback import has_known_layout, rank
from remoe_adapt.engines.llamacpp.prior.native import MODES, Control, find_in, functions, symbol
from remoe_adapt.errors import MissingDependencyError
from remoe_adapt.gating.reference import PriorStep, topk_gating, update_recency
from remoe_adapt.routers import RouterSpec

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from remoe_adapt.engines.llamacpp.in_process import library

E, K = 16, 4
# Where it does not matter how fast the result is.
FAST = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)


@pytest.fixture(scope="module")
def engine() -> Any:
    try:
        return library()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture
def graph(engine: Any) -> Iterator[Graph]:
    made = Graph(engine, trusted=True)
    yield made
    made.close()


def spec(experts: int, k: int) -> RouterSpec:
    return RouterSpec(
        scoring="softmax", num_experts=experts, top_k=k, hidden_size=8, weight_name="weight", num_rows=experts
    )


def random_scores(generator: np.random.Generator, experts: int) -> NDArray[np.float32]:
    """Rows with ties, infinities, NaN, huge and tiny values now and then."""
    scores = generator.normal(size=experts).astype(np.float32)
    scores *= np.float32(10.0 ** generator.integers(-6, 7))
    for special in (np.inf, -np.inf, np.nan, 0.0, -0.0, 3e38, -3e38, scores[0]):
        if generator.random() < 0.2:
            scores[generator.integers(0, experts, generator.integers(1, 4))] = special
    return scores


def test_ranking_is_that_of_the_definition_in_c_and_in_numpy() -> None:
    generator, lib = np.random.default_rng(0), functions()
    for _ in range(200):
        experts = int(generator.integers(2, 200))
        k = int(generator.integers(1, min(experts, 64) + 1))
        gain = float(generator.choice([0.0, 0.1, 0.6, 16.0]))
        scores, ids = random_scores(generator, experts), np.zeros(k, np.int32)
        recency = np.where(generator.random(experts) < 0.5, 0, generator.random(experts)).astype(np.float32)
        lib.rp_rank(scores.ctypes.data, recency.ctypes.data, experts, k, gain, ids.ctypes.data)
        step = PriorStep(torch.from_numpy(recency.copy())[None], torch.tensor(gain), None)
        _, expected = topk_gating(torch.from_numpy(scores)[None], k, spec(experts, k), step)
        assert ids.tolist() == expected[0].tolist(), (scores, recency, gain)
        assert ids.tolist() == rank(scores, recency, k, gain).tolist()


def test_state_moves_as_the_definition(graph: Graph) -> None:
    generator = np.random.default_rng(1)
    graph.control.gain = 0.5
    scores = generator.normal(size=(40, E)).astype(np.float32)
    recency = torch.zeros(1, E)
    step = PriorStep(recency, torch.tensor(0.5), 0.7)
    _, expected = topk_gating(torch.from_numpy(scores), K, spec(E, K), step)
    graph.rows([0] * 40, range(40))
    assert graph.choose(scores, K).tolist() == expected.tolist()
    mine = np.zeros(E, np.float32)
    assert graph.lib.rp_get(graph.prior, 0, 0, mine.ctypes.data, E) == E
    assert np.abs(mine - recency[0].numpy()).max() < 1e-6
    assert graph.control.refused_rows == 0 and graph.control.swapped > 0


def test_positions_are_followed_and_what_cannot_be_is_counted(graph: Graph) -> None:
    generator = np.random.default_rng(2)
    graph.control.gain = 0.5
    scores = generator.normal(size=(6000, E)).astype(np.float32)

    def state_after(count: int) -> NDArray[np.float32]:
        recency = torch.zeros(1, E)
        for ids in chosen[:count]:
            update_recency(recency, torch.from_numpy(ids)[None].long(), 0.7)
        return recency[0].numpy()

    def state() -> NDArray[np.float32]:
        mine = np.zeros(E, np.float32)
        graph.lib.rp_get(graph.prior, 0, 0, mine.ctypes.data, E)
        return mine

    graph.rows([0] * 6000, range(6000))
    chosen = graph.choose(scores, K)
    assert np.abs(state() - state_after(6000)).max() < 1e-6
    for back in (5999, 5000, 2500):
        graph.rows([0], [back])
        assert np.abs(state() - state_after(back)).max() < 1e-6, back
    assert (graph.control.rewinds, graph.control.restarts) == (3, 0)
    graph.rows([0], [2900])  # further than anything known: as a context shift would look
    assert not state().any() and graph.control.restarts == 1
    graph.choose(scores[:1], K)
    graph.rows([0], [0])
    assert not state().any() and graph.control.restarts == 1
    graph.choose(scores[:1], K)
    graph.lib.rp_restart(graph.prior, 0)
    graph.rows([0], [1])
    assert not state().any() and graph.control.restarts == 2
    graph.choose(scores[:1], K)
    graph.rows([0], [0])
    graph.choose(scores[:1], K)
    graph.rows([0], [500])
    graph.choose(scores[:1], K)
    assert graph.control.restarts == 3
    graph.rows([0], [400])  # before what is known of it
    assert not state().any() and graph.control.restarts == 4


def test_far_behind_the_memory_of_a_sequence_it_begins_anew(graph: Graph) -> None:
    scores = np.random.default_rng(2).normal(size=(6000, E)).astype(np.float32)
    graph.rows([0] * 6000, range(6000))
    graph.choose(scores, K)
    graph.rows([0], [1000])
    assert (graph.control.rewinds, graph.control.restarts) == (0, 1)


def test_a_copied_sequence_goes_on_as_the_first(engine: Any) -> None:
    graph = Graph(engine, 3, trusted=True)
    graph.control.gain = 0.5
    scores = np.random.default_rng(3).normal(size=(20, E)).astype(np.float32)
    graph.rows([1] * 10, range(10))
    graph.choose(scores[:10], K)
    graph.lib.rp_copy(graph.prior, 1, 2)
    got = []
    for sequence in (1, 2):
        graph.rows([sequence] * 5, range(8, 13))  # with a step back, which the copy knows as well
        got.append(graph.choose(scores[10:15].copy(), K).tolist())
    assert got[0] == got[1] and (graph.control.rewinds, graph.control.restarts) == (2, 0)
    graph.close()


def test_rows_without_outputs_are_missing_in_the_last_layer_alone(engine: Any) -> None:
    """llama.cpp leaves them out there; each row must find the sequence that it is of."""
    graph = Graph(engine, 2, trusted=True)
    scores = np.random.default_rng(4).normal(size=(4, E)).astype(np.float32)
    graph.rows([0, 1, 0, 1], [0, 0, 1, 1], outputs=[0, 0, 0, 1])
    graph.choose(scores, K, layer=0)
    last = graph.choose(scores[3:].copy(), K, layer=1)
    mine = np.zeros((2, E), np.float32)
    for sequence in range(2):
        graph.lib.rp_get(graph.prior, 1, sequence, mine[sequence].ctypes.data, E)
    assert not mine[0].any() and sorted(np.flatnonzero(mine[1])) == sorted(last[0])
    graph.choose(np.zeros((9, E), np.float32), K, layer=0)  # a graph that no batch announced
    assert graph.control.lost_rows == 9
    graph.close()


@pytest.mark.parametrize(
    "order",
    [
        pytest.param([[99] * E], id="out of range"),
        pytest.param([[-1, *range(1, E)]], id="negative"),
        pytest.param([[3] * E], id="the same twice"),
        pytest.param([list(range(E))], id="not the best"),
    ],
)
def test_ids_that_are_not_the_best_of_the_scores_are_left_alone(graph: Graph, order: list[list[int]]) -> None:
    graph.control.gain = 0.5
    scores = np.arange(E, dtype=np.float32)[None]
    graph.lib.rp_set_resident(graph.prior, 0, E, np.eye(E, dtype=np.float32)[5].ctypes.data)
    graph.control.mode = MODES["resident"]
    ids = np.array(order, np.int32)
    assert graph.choose(scores, K, order=ids.copy()).tolist() == ids[:, :K].tolist()
    assert graph.control.refused_rows == 1 and graph.control.changed_rows == 0


@pytest.mark.parametrize(
    ("experts", "k", "change", "reason"),
    [
        (1025, 8, lambda top: None, "more than 1024"),
        (128, 65, lambda top: None, "more than 64"),
        (E, K, lambda top: setattr(top, "type", 0), "no ranking"),
        (E, K, lambda top: setattr(top, "data", None), "no ranking"),
        (E, K, lambda top: setattr(top, "view_src", None), "no ranking"),
        (E, K, lambda top: top.ne.__setitem__(1, 7), "no ranking"),
    ],
)
def test_nodes_of_another_form_turn_it_off_with_the_reason(
    graph: Graph, experts: int, k: int, change: Any, reason: str
) -> None:
    graph.control.gain = 0.5
    scores = np.random.default_rng(0).normal(size=(1, experts)).astype(np.float32)
    before = np.argsort(-scores, kind="stable")[:, :k].tolist()
    if reason == "no ranking":
        graph.lib.rp_trust(graph.prior, False)
    assert graph.choose(scores, k, change=change).tolist() == before
    assert reason in graph.why()
    assert graph.choose(np.ones((1, E), np.float32), K).tolist() == [list(range(K))] and reason in graph.why()


def test_a_warm_up_with_all_experts_proves_the_graph_and_leaves_no_trace(engine: Any) -> None:
    """llama.cpp's servers begin with one."""
    graph, wide = Graph(engine), 128
    graph.control.gain = 1.0
    scores = np.random.default_rng(9).normal(size=(20, wide)).astype(np.float32)
    graph.choose(scores[:1].copy(), wide)
    graph.consume(np.zeros((wide, 2, 2), np.float32))
    graph.choose(scores.copy(), 8)
    assert graph.why() == "on" and graph.control.changed_rows > 0 and graph.control.unproven_rows == 0
    graph.close()


def test_a_graph_is_proven_before_the_prior_acts(engine: Any) -> None:
    scores = np.random.default_rng(5).normal(size=(30, E)).astype(np.float32)
    weights = np.zeros((E, 2, 2), np.float32)
    graph = Graph(engine)
    graph.control.gain = 1.0
    assert graph.choose(scores, K).tolist() == np.argsort(-scores, kind="stable")[:, :K].tolist()
    assert graph.control.unproven_rows == 30
    graph.consume(weights)
    assert graph.lib.rp_settle(graph.prior) == 1 and graph.why() == "on"
    graph.choose(scores, K)
    assert graph.control.changed_rows > 0
    graph.close()

    for fault in ("other ids", "fewer experts", "no consumer"):
        graph = Graph(engine)
        graph.control.gain = 1.0
        graph.choose(scores, K)
        if fault == "other ids":
            graph.consume(weights, ids=graph.order)
        elif fault == "fewer experts":
            graph.consume(weights[:5])
        graph.lib.rp_settle(graph.prior)
        assert "other ids" in graph.why()
        graph.choose(scores, K)
        assert graph.control.changed_rows == 0
        graph.close()

    graph = Graph(engine)
    graph.lib.rp_settle(graph.prior)
    assert "no experts" in graph.why()
    graph.close()


def test_controls_that_cannot_be_count_as_none(graph: Graph) -> None:
    """They lie in a file that others write."""
    scores = np.random.default_rng(6).normal(size=(20, E)).astype(np.float32)
    for gain in (float("nan"), float("inf"), -1.0, 17.0):
        graph.control.gain = gain
        graph.choose(scores, K)
    assert graph.control.changed_rows == 0
    graph.control.gain, graph.control.decay, graph.control.mode = 0.5, float("nan"), 77
    graph.control.n_layer_gain, graph.control.pages, graph.control.look_every = 1 << 30, 1 << 31, 0
    graph.control.layer_gain[0] = float("nan")
    graph.choose(scores, K)
    assert graph.control.changed_rows == 0
    graph.control.n_layer_gain = 0
    graph.choose(scores, K)
    assert graph.control.changed_rows > 0
    mine = np.zeros(E, np.float32)
    graph.lib.rp_get(graph.prior, 0, 0, mine.ctypes.data, E)
    assert np.isfinite(mine).all()


def test_another_layout_of_tensors_is_found(engine: Any) -> None:
    probe = functions().rp_probe
    assert probe(None, find_in(lambda name: symbol(engine, name)), None) == 1
    assert has_known_layout(engine)
    for missing in ("ggml_init", "ggml_get_name", "ggml_op_desc"):
        assert (
            probe(None, find_in(lambda name, gone=missing: None if name == gone else symbol(engine, name)), None) == 8
        )

    # Tensors as a ggml with a field more before the sources, or with another length of names, would make them.
    view = C.CFUNCTYPE(C.c_void_p, *[C.c_void_p] * 2, *[C.c_int64] * 2, *[C.c_size_t] * 2)
    real = view(symbol(engine, "ggml_view_2d"))
    kept: list[Any] = []

    for at, what in ((Node.src.offset, "sources"), (Node.type.offset, "type"), (Node.ne.offset, "sizes")):

        @view
        def shifted(*arguments: Any, at: int = at) -> int:
            made = real(*arguments)
            copy = C.create_string_buffer(512)
            C.memmove(copy, made, C.sizeof(Node))
            C.memmove(C.addressof(copy) + at + 8, made + at, C.sizeof(Node) - at)
            kept.append(copy)
            return C.addressof(copy)

        fakes = {"ggml_view_2d": C.cast(shifted, C.c_void_p).value}
        graph = Graph(engine)
        found = probe(graph.prior, find_in(lambda name, fakes=fakes: fakes.get(name) or symbol(engine, name)), None)
        assert found == 3, what
        assert "memory" in graph.why()
        graph.close()


def test_residency_from_elsewhere_ranks_as_the_definition(engine: Any) -> None:
    generator = np.random.default_rng(7)
    graph = Graph(engine, trusted=True)
    graph.control.gain, graph.control.mode = 0.4, MODES["resident"]
    scores = generator.normal(size=(30, E)).astype(np.float32)
    held = (generator.random(E) < 0.5).astype(np.float32)
    graph.lib.rp_set_resident(graph.prior, 0, E, held.ctypes.data)
    step = PriorStep(torch.from_numpy(held)[None], torch.tensor(0.4), None)
    _, expected = topk_gating(torch.from_numpy(scores), K, spec(E, K), step)
    assert graph.choose(scores, K).tolist() == expected.tolist()
    changed = graph.control.changed_rows
    held[:] = 1.0  # the same for all is no reason to rank otherwise, not even by a rounding
    graph.lib.rp_set_resident(graph.prior, 0, E, held.ctypes.data)
    assert graph.choose(scores, K).tolist() == np.argsort(-scores, kind="stable")[:, :K].tolist()
    assert graph.control.changed_rows == changed > 0
    graph.close()


def experts_file(path: Path, pages: int = 4) -> NDArray[np.float32]:
    """[E, OUT, IN]: experts of some pages each, mapped from a file, of which none is in memory but the first half."""
    path.write_bytes(os.urandom(E * pages * mmap.PAGESIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # or the kernel reads more than what is touched
    for page in range(E // 2 * pages):
        mapped[page * mmap.PAGESIZE]
    return np.frombuffer(mapped, np.float32).reshape(E, pages, -1)


def test_residency_by_mincore_prefers_what_is_in_memory(engine: Any, tmp_path: Path) -> None:
    weights = experts_file(tmp_path / "experts")
    graph = Graph(engine)
    graph.control.mode, graph.control.gain = MODES["resident"], 1.0
    scores = np.random.default_rng(8).normal(size=(50, E)).astype(np.float32)
    graph.choose(scores.copy(), K)
    graph.consume(weights)
    graph.lib.rp_settle(graph.prior)
    seen = np.zeros(E, np.float32)
    assert graph.lib.rp_mincore_layer(graph.prior, 0, 0) == E
    graph.lib.rp_get(graph.prior, 0, 0, seen.ctypes.data, E)
    if seen[E // 2 :].all():
        pytest.skip("this file system keeps in memory what it is asked to forget")
    assert seen.tolist() == [1.0] * (E // 2) + [0.0] * (E // 2)
    for pages in (1, 2):
        assert graph.lib.rp_mincore_layer(graph.prior, 0, pages) == pages * E
        graph.lib.rp_get(graph.prior, 0, 0, seen.ctypes.data, E)
        assert seen.tolist() == [1.0] * (E // 2) + [0.0] * (E // 2)
    ids = graph.choose(scores.copy(), K)
    before = np.argsort(-scores, kind="stable")[:, :K]
    assert (ids < E // 2).mean() > (before < E // 2).mean() + 0.2
    assert graph.control.is_blind == 0 and graph.control.mincore_ns > 0
    graph.close()


_AS_NOBODY = """
import ctypes as C, mmap, os, sys
sys.path[:0] = [sys.argv[3]]
from fake_graph import Graph
from remoe_adapt.engines.llamacpp.in_process import library
import numpy as np
graph = Graph(library())
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
weights = np.frombuffer(mapped, np.float32).reshape(16, 4, -1)
os.setresuid(65534, 65534, 65534)
graph.choose(np.arange(16, dtype=np.float32)[None], 4)
graph.consume(weights)
graph.lib.rp_settle(graph.prior)
graph.lib.rp_mincore_layer(graph.prior, 0, 1)
print(graph.control.is_blind)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_where_mincore_tells_nothing_the_prior_is_blind_and_says_so(tmp_path: Path, repo_root: Path) -> None:
    """Linux says "all in memory" of a file that one neither owns nor may write."""
    path = tmp_path / "experts"
    experts_file(path)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.parts[1:2] == ("tmp",) and len(folder.parts) > 2:
            folder.chmod(0o755)
    for mode, blind in ((0o644, "1"), (0o666, "0")):
        path.chmod(mode)
        command = [sys.executable, "-c", _AS_NOBODY, str(path), "", str(repo_root / "tests" / "support")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repo_root)
        assert done.stdout.strip() == blind, done.stderr


def test_what_is_compiled_is_kept_and_named_by_what_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FLAGS", FAST)
    folder = tmp_path / "native"
    first = compiled("prior.c", folder=folder)
    written = first.stat().st_mtime_ns
    assert compiled("prior.c", folder=folder) == first and first.stat().st_mtime_ns == written
    assert folder.stat().st_mode & 0o777 == 0o700 and [path.name for path in folder.iterdir()] == [first.name]
    first.write_bytes(b"")  # as a full disk leaves it
    monkeypatch.setattr(build, "FLAGS", (*FAST, "-g"))
    assert compiled("prior.c", folder=folder) != first
    monkeypatch.setattr(build, "FLAGS", FAST)
    assert compiled("prior.c", folder=folder).stat().st_size > 0


def _compile_in(folder: Path) -> str:
    return compiled("prior.c", folder=folder).name


def test_processes_that_compile_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", FAST)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = set(pool.map(_compile_in, [tmp_path / "native"] * 4))
    assert len(names) == 1 and {path.name for path in (tmp_path / "native").iterdir()} == names


def test_a_compiler_that_fails_or_an_unsafe_folder_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'broken on purpose' >&2\n[ \"$1\" = --version ]\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(MissingDependencyError, match=r"cannot compile prior\.c.*broken on purpose"):
        compiled("prior.c", folder=tmp_path / "native")
    assert not list((tmp_path / "native").iterdir())
    monkeypatch.delenv("CC")
    (tmp_path / "native").chmod(0o777)
    with pytest.raises(MissingDependencyError, match="others may write"):
        compiled("prior.c", folder=tmp_path / "native")
    (tmp_path / "file").touch()
    with pytest.raises(MissingDependencyError, match="no place"):
        compiled("prior.c", folder=tmp_path / "file" / "native")


def test_the_control_block_has_the_size_that_c_gives_it() -> None:
    lib = functions()
    prior = lib.rp_new(1, None)
    control = lib.rp_ctl(prior).contents
    assert control.size == C.sizeof(Control) and control.magic == 0x52454D50 and control.version == 3
    lib.rp_free(prior)
