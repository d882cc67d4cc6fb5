"""What becomes of weights in the recency mode `cost`: experts that stay weigh what they weighed, in C and in numpy, or
the prior stays off."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from fake_graph import Graph, Node, _op_desc, node, operation_of
from llama_engine import skip_without_engine
from numpy.typing import NDArray
from torch import Tensor

from remoe_adapt.engines.llamacpp.prior.cost import Ranks
from remoe_adapt.engines.llamacpp.prior.fallback import NumpyPrior
from remoe_adapt.engines.llamacpp.prior.native import MODES
from remoe_adapt.engines.llamacpp.prior.weights import Divided, kept_part
from remoe_adapt.gating.reference import PriorStep, topk_gating
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers import RouterSpec

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from remoe_adapt.engines.llamacpp.in_process import library

E, K, TOKENS, DECAY, SHARE = 24, 4, 40, 0.95, 0.3
OFF = "by a sum that the mode cost cannot reach"
Ask = Callable[[int, bool], bool]
Floats = NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def _right_version() -> None:
    skip_without_engine()


def spec(scoring: str, **facts: Any) -> RouterSpec:
    return RouterSpec(
        scoring=scoring, num_experts=E, top_k=K, hidden_size=8, weight_name="weight", num_rows=E, **facts
    )  # fmt: skip


@dataclass(frozen=True)
class Router:
    """A router, and what llama.cpp makes of it: the operation of its scores, the nodes behind the gathered weights."""

    spec: RouterSpec
    scores: str
    chain: tuple[str, ...]
    ranks: Ranks
    renormalise: bool = False


SUM = ("RESHAPE", "SUM", "ADD_TO_SUM", "DIV", "RESHAPE", "SCALE", "MUL")
ROUTERS = {
    "softmax": Router(spec("softmax"), "SOFT_MAX", ("MUL",), Ranks.SOFTMAX),
    "softmax over its sum": Router(spec("softmax", normalize=True), "SOFT_MAX", SUM, Ranks.SOFTMAX),
    "softmax over its sum, by us": Router(
        spec("softmax", normalize=True), "SOFT_MAX", ("MUL",), Ranks.SOFTMAX, renormalise=True
    ),
    "softmax over the chosen": Router(
        spec("topk_softmax", weight_rule="chosen_softmax"), "ADD", ("RESHAPE", "SOFT_MAX", "RESHAPE", "MUL"),
        Ranks.LOGITS,
    ),
    "softmax and a bias": Router(spec("softmax_bias", normalize=True), "SOFT_MAX", SUM, Ranks.SCORES),
    "sigmoid": Router(spec("sigmoid", score="sigmoid"), "SIGMOID", ("SCALE", "MUL"), Ranks.SCORES),
    "sigmoid over its sum": Router(spec("sigmoid", score="sigmoid", normalize=True), "SIGMOID", SUM, Ranks.SCORES),
    "sigmoid and a bias": Router(spec("sigmoid_bias", score="sigmoid", normalize=True), "SIGMOID", SUM, Ranks.SCORES),
    "groups": Router(
        spec("sigmoid_group", score="sigmoid", normalize=True, n_group=4, topk_group=2, group_score="top2"), "SIGMOID",
        SUM, Ranks.SCORES,
    ),
}  # fmt: skip
DIVIDED = [name for name, router in ROUTERS.items() if router.spec.normalize or router.spec.is_chosen_softmax]


@dataclass
class Layer:
    """One layer as llama.cpp's scheduler computes it: before each node a prior is asked, and called behind it if it
    wanted to be. Memory of the scores is another tensor's as soon as nothing needs them any more.

    change: of a node that was made, before it is asked about; by its operation. asked: the operations of the nodes that
    were wanted. nodes: the last one of each operation.
    """

    ask: Ask
    router: Router
    number: int = 0
    change: dict[str, Callable[[Node], None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    kept: list[Node] = field(default_factory=list)

    def compute(self, logits_TE: Tensor, bias_E: Tensor | None) -> tuple[NDArray[np.int32], Floats]:
        """The ids and the weights [T, K] of the experts that the products use."""
        facts, rows = self.router.spec, len(logits_TE)
        self.asked.clear()
        given_TE = logits_TE if self.router.scores == "ADD" else facts.scores(logits_TE)
        scores_TE = given_TE.numpy().copy()
        scores = self._node(self.router.scores, scores_TE)
        choice = scores
        if "bias" in facts.scoring or facts.n_group > 1:
            ranked_TE = facts.choice_scores(logits_TE, bias_E).numpy().copy()
            choice = self._node("ADD", ranked_TE, sources=[scores])
            if facts.n_group > 1:
                choice = self._node("RESHAPE", ranked_TE, sources=[choice])
        order_TE = np.argsort(-choice.kept[0], axis=1, kind="stable").astype(np.int32)
        order = self._node("ARGSORT", order_TE, sources=[choice])
        top = self._made("VIEW", order_TE, name=f"ffn_moe_topk-{self.number}", sources=[order])
        top.ne[0], top.view_src = K, order.at
        self._run(top)
        ids_TK = order_TE[:, :K].copy()
        weights_TK1 = np.take_along_axis(scores_TE, ids_TK, 1)[..., None].copy()
        flat = self._node("RESHAPE", scores_TE, sources=[scores])
        last = self._node("GET_ROWS", weights_TK1, name=f"ffn_moe_weights-{self.number}", sources=[flat, top])
        scores_TE[:] = np.nan
        weights_TK = weights_TK1[..., 0]
        sum_T1 = np.ones((rows, 1), np.float32)
        added = self._node("NONE", sum_T1)
        for step in self.router.chain:
            if step in ("SUM", "ADD_TO_SUM"):
                if step == "SUM":
                    sum_T1[:] = weights_TK.sum(-1, keepdims=True)
                sources = [last if step == "SUM" else added]
                added = self._node({"SUM": "SUM_ROWS"}.get(step, "ADD"), sum_T1, sources=sources)
                continue
            if step == "SOFT_MAX":
                weights_TK[:] = torch.from_numpy(weights_TK).softmax(-1).numpy()
            elif step == "DIV":
                weights_TK /= sum_T1
            shape_TK = weights_TK if last.ne[0] != K and step == "RESHAPE" else last.kept[0]
            last = self._node(step, shape_TK, sources=[last, added] if step == "DIV" else [last])
        matrices = node("NONE", np.zeros((E, 2, 2), np.float32))
        self._node("MUL_MAT_ID", np.zeros((1, 1), np.float32), sources=[matrices, matrices, top])
        return ids_TK, weights_TK.copy()

    def _made(self, operation: str, values: Any, **options: Any) -> Node:
        made = self.nodes[operation] = node(operation, values, **options)
        self.kept.append(made)  # no address is another node's, as in one graph
        if operation in self.change:
            self.change[operation](made)
        return made

    def _node(self, operation: str, values: Any, **options: Any) -> Node:
        made = self._made(operation, values, **options)
        self._run(made)
        return made

    def _run(self, made: Node) -> None:
        if operation_of(made) != b"NONE" and self.ask(made.at, True):
            self.asked.append(operation_of(made).decode())
            self.ask(made.at, False)


class InC:
    """prior.c, which sees one layer; nothing about it is taken on trust."""

    def __init__(self, router: Router, sequences: int = 1, mode: str = "cost") -> None:
        self.graph = Graph(library(), sequences)
        self.graph.lib.rp_renorm(self.graph.prior, router.renormalise)
        self.control = self.graph.control
        self.control.mode, self.control.decay, self.control.share = MODES[mode], DECAY, SHARE

    def ask(self, tensor: int, ask: bool) -> bool:
        return bool(self.graph.lib.rp_cb(tensor, ask, self.graph.prior))

    def settle(self) -> None:
        self.graph.lib.rp_settle(self.graph.prior)
        self.graph.lib.rp_reset(self.graph.prior, -1)

    def rows(self, count: int, begin: int = 0, outputs: list[int] | None = None) -> None:
        self.graph.rows([0] * count, range(begin, begin + count), outputs)

    def turn(self, gain: float) -> None:
        self.control.gain = gain

    def swapped(self) -> int:
        return int(self.control.swapped)

    def why(self) -> str:
        return self.graph.why()

    def seen(self) -> tuple[int, bool]:
        normalised = C.c_bool()
        return self.graph.lib.rp_ranks(self.graph.prior, 0, C.byref(normalised)), normalised.value


class _Engine:
    """llama.cpp's library, by which nodes of ours have operations of ours."""

    def __init__(self) -> None:
        def op_desc(tensor: int) -> bytes:
            return operation_of(Node.from_address(tensor))

        self.ggml_op_desc: Any = op_desc

    def __getattr__(self, name: str) -> Any:
        return getattr(library(), name)


class InNumpy:
    """The same in numpy."""

    def __init__(self, router: Router, mode: str = "cost") -> None:
        self.settings = Recency.of(mode, 0.0, DECAY, SHARE if mode == "cost" else None)
        self.prior = NumpyPrior(_Engine(), 1, self.settings, renormalise=router.renormalise)
        self.ask, self.settle = self.prior.ask, self.prior.settle

    def rows(self, count: int, begin: int = 0) -> None:
        self.prior.rows([0] * count, range(begin, begin + count))

    def turn(self, gain: float) -> None:
        self.prior.set(Recency.of(self.settings.mode, gain, DECAY, self.settings.share or None))

    def swapped(self) -> int:
        return self.prior.status().swapped

    def why(self) -> str:
        return self.prior.status().reason

    def seen(self) -> tuple[int, bool]:
        return self.prior._weighing[0].ranks, self.prior._weighing[0].is_normalised


KINDS = [InC, InNumpy]
Prior = InC | InNumpy


@pytest.fixture(params=KINDS, ids=["c", "numpy"])
def kind(request: pytest.FixtureRequest) -> type[Prior]:
    found: type[Prior] = request.param
    return found


def tokens(router: Router, seed: int = 0, rows: int = TOKENS) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    has_bias = "bias" in router.spec.scoring or router.spec.n_group > 1
    bias_E = 0.2 * torch.randn(E, generator=generator) if has_bias else None
    return 1.5 * torch.randn(rows, E, generator=generator), bias_E


def proven(kind: type[Prior], router: Router, **options: Any) -> tuple[Any, Layer]:
    """A prior that has seen a graph to its end, and its layer."""
    prior = kind(router, **options)
    layer = Layer(prior.ask, router)
    prior.rows(2)
    layer.compute(*tokens(router, rows=2))
    prior.settle()
    return prior, layer


@pytest.mark.parametrize("name", ROUTERS)
def test_ids_and_weights_are_those_of_the_definition(name: str, kind: type[Prior]) -> None:
    router = ROUTERS[name]
    prior, layer = proven(kind, router)
    assert prior.why() == "on"
    for seed, gain in enumerate((0.0, 0.05, 0.3, 1.5)):
        logits_TE, bias_E = tokens(router, seed)
        step = PriorStep(torch.zeros(1, E), torch.tensor(gain), DECAY, None, SHARE)
        expected, chosen = topk_gating(logits_TE, K, router.spec, step, bias_E=bias_E)
        prior.turn(gain)
        prior.rows(TOKENS)
        before = prior.swapped()
        ids_TK, weights_TK = layer.compute(logits_TE, bias_E)
        assert ids_TK.tolist() == chosen.tolist() and (prior.swapped() > before) == (gain > 0)
        assert np.abs(weights_TK - expected.numpy()).max() < 3e-7
        if gain and name in DIVIDED:
            plain = router.spec.expert_weights(logits_TE, chosen).numpy()
            assert np.abs(weights_TK - plain).max() > 0.01, "nothing was to be corrected here, so this shows nothing"


@pytest.mark.parametrize("name", ROUTERS)
def test_c_and_numpy_weigh_the_same(name: str) -> None:
    router = ROUTERS[name]
    logits_TE, bias_E = tokens(router, 5)
    logits_TE[3], logits_TE[4, :5], logits_TE[5, 0] = 0.0, -60.0, 40.0
    found = []
    for kind in (InC, InNumpy):
        prior, layer = proven(kind, router)
        prior.turn(0.4)
        prior.rows(TOKENS)
        found.append(layer.compute(logits_TE, bias_E))
    (ids_TK, weights_TK), (other_ids_TK, other_TK) = found
    assert ids_TK.tolist() == other_ids_TK.tolist() and np.allclose(weights_TK, other_TK, rtol=3e-7, atol=0)


def test_the_engine_is_stopped_a_second_time_only_where_weights_must_be_corrected(kind: type[Prior]) -> None:
    for name, router in ROUTERS.items():
        where = {"SUM" in router.chain: "SUM_ROWS", "SOFT_MAX" in router.chain: "SOFT_MAX"}.get(True)
        always = ["VIEW", "GET_ROWS"] if router.renormalise else ["VIEW"]
        prior, layer = proven(kind, router)
        row_1E, bias_E = tokens(router, rows=1)
        # To the first token of a text none is held; the next one would have other experts, and gets its.
        for gain, position, wanted in ((0.0, 0, always), (16.0, 0, always), (16.0, 1, [*always, where])):
            prior.turn(gain)
            prior.rows(1, position)
            before = prior.swapped()
            layer.compute(-row_1E if position else row_1E, bias_E)
            assert (prior.swapped() > before) == (position > 0)
            assert layer.asked == [each for each in wanted if each], (name, gain)
        prior, layer = proven(kind, router, mode="ema")
        prior.turn(0.5)
        prior.rows(TOKENS)
        layer.compute(*tokens(router))
        assert layer.asked == always and prior.swapped() > 0


@pytest.mark.parametrize("name", ["softmax over its sum", "softmax over the chosen"])
def test_no_node_is_corrected_twice_or_in_place_of_another(name: str, kind: type[Prior]) -> None:
    router = ROUTERS[name]
    prior, layer = proven(kind, router)
    where = "SUM_ROWS" if "SUM" in router.chain else "SOFT_MAX"
    prior.turn(1.5)
    prior.rows(TOKENS)
    wrong: list[Node] = []

    def ask_others(top: Node) -> None:
        """Of another choice, of factors by the same ids, of no gathered weights."""
        values = np.ones((TOKENS, 1 if where == "SUM_ROWS" else K), np.float32)
        for name, ids in (("ffn_moe_weights-0", layer.nodes["ARGSORT"]), ("factors", top), ("ffn_moe_weights-0", None)):
            sources = [layer.nodes["ARGSORT"]] + ([] if ids is None else [ids])
            gathered = node("GET_ROWS", values, name=name, sources=sources)
            wrong.append(node(where, values.copy(), sources=[gathered]))

    def ask(tensor: int, ask: bool) -> bool:
        wanted = prior.ask(tensor, ask)
        made = Node.from_address(tensor)
        if operation_of(made) == b"VIEW" and not ask:
            ask_others(layer.nodes["VIEW"])
            assert len(wrong) == 3 and not any(prior.ask(each.at, True) for each in wrong)
            for each in wrong:
                prior.ask(each.at, False)
        return wanted

    layer.ask = ask
    layer.compute(*tokens(router))
    assert layer.asked == ["VIEW", where] and all((each.kept[0] == 1).all() for each in wrong)
    right = layer.nodes[where]
    before = right.kept[0].copy()
    assert not prior.ask(right.at, True)
    prior.ask(right.at, False)
    assert np.array_equal(right.kept[0], before) and prior.why() == "on"


def test_rows_of_a_last_layer_that_computes_fewer_are_told_apart() -> None:
    """llama.cpp leaves out there what no logits depend on."""
    router = ROUTERS["softmax over its sum"]
    prior = InC(router)
    first, last = Layer(prior.ask, router), Layer(prior.ask, router, number=1)
    logits_TE, _ = tokens(router)
    outputs = [int(at % 3 == 1) for at in range(TOKENS)]
    seen_TE = logits_TE[[at for at, kept in enumerate(outputs) if kept]] * 2
    for gain in (0.0, 0.3):
        prior.rows(TOKENS, outputs=outputs)
        prior.turn(gain)
        found = first.compute(logits_TE, None), last.compute(seen_TE, None)
        prior.settle()
    for given_TE, (ids_TK, weights_TK) in zip((logits_TE, seen_TE), found, strict=True):
        step = PriorStep(torch.zeros(1, E), torch.tensor(0.3), DECAY, None, SHARE)
        expected, chosen = topk_gating(given_TE, K, router.spec, step)
        assert ids_TK.tolist() == chosen.tolist() and np.abs(weights_TK - expected.numpy()).max() < 3e-7
    assert first.asked == last.asked == ["VIEW", "SUM_ROWS"]


CHAINS = {
    "softmax": ("SOFT_MAX", ("MUL",), Ranks.SOFTMAX, False),
    "softmax over its sum": ("SOFT_MAX", SUM, Ranks.SOFTMAX, True),
    "over the chosen": ("ADD", ("RESHAPE", "SOFT_MAX", "RESHAPE", "MUL"), Ranks.LOGITS, False),
    "over the chosen, and over its sum": ("ADD", ("RESHAPE", "SOFT_MAX", "SUM", "DIV", "MUL"), Ranks.LOGITS, True),
    "nothing after logits": ("ADD", ("MUL",), Ranks.UNKNOWN, False),
    "a softmax twice": ("SOFT_MAX", ("RESHAPE", "SOFT_MAX", "MUL"), Ranks.UNKNOWN, False),
    "another operation": ("SOFT_MAX", ("SQRT", "MUL"), Ranks.UNKNOWN, False),
    "never used": ("SOFT_MAX", ("RESHAPE",), Ranks.UNKNOWN, False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_weights_are_is_read_off_the_graph_or_the_prior_stays_off(name: str, kind: type[Prior]) -> None:
    scores, chain, ranks, is_normalised = CHAINS[name]
    of = "softmax over the chosen" if scores == "ADD" else "softmax"
    prior, layer = proven(kind, Router(ROUTERS[of].spec, scores, chain, ranks))
    assert prior.seen() == (ranks, is_normalised)
    assert prior.why() == "on" if ranks else "what the weights" in prior.why()
    prior.turn(1.0)
    prior.rows(TOKENS)
    _, weights_TK = layer.compute(*tokens(layer.router))
    assert (prior.swapped() > 0) == bool(ranks)
    if ranks == Ranks.LOGITS:
        # Over either sum they are those of a softmax over the chosen.
        step = PriorStep(torch.zeros(1, E), torch.tensor(1.0), DECAY, None, SHARE)
        expected, _ = topk_gating(tokens(layer.router)[0], K, layer.router.spec, step)
        assert np.abs(weights_TK - expected.numpy()).max() < 3e-7


def test_scores_that_a_sigmoid_makes_are_ranked_themselves_or_as_logits() -> None:
    for ranked, ranks in (("scores", Ranks.SCORES), ("logits", Ranks.BARE_LOGITS)):
        graph = Graph(library())
        graph.control.mode = MODES["cost"]
        values = np.random.default_rng(6).random((8, E)).astype(np.float32)
        graph.choose(values, K, operation="ADD")
        scores = node("SIGMOID", values, sources=[graph.choice])
        if ranked == "scores":  # with a bias, so that they are another tensor
            graph.choice.src[0] = scores.at
            scores.src[0] = None
        graph.consume(np.zeros((E, 2, 2), np.float32))
        graph.weigh(scores, ["MUL"])
        assert graph.lib.rp_settle(graph.prior) == 1, graph.why()
        assert graph.lib.rp_ranks(graph.prior, 0, C.byref(C.c_bool())) == ranks
        graph.close()


def test_a_mode_that_is_turned_on_later_says_what_it_misses() -> None:
    for name, chain, words in (
        ("softmax over the chosen", ("MUL",), "what the weights"),
        ("softmax over its sum", ("RESHAPE", "DIV", "MUL"), OFF),
    ):
        router = ROUTERS[name]
        prior, layer = proven(InC, Router(router.spec, router.scores, chain, router.ranks), mode="ema")
        prior.turn(1.0)
        prior.rows(TOKENS)
        layer.compute(*tokens(router))
        swapped = prior.swapped()
        prior.control.mode = MODES["cost"]
        layer.compute(*tokens(router))
        assert prior.swapped() == swapped > 0 and words in prior.why()


def _nothing(made: Node) -> None:
    made.data = None


def _whole_numbers(made: Node) -> None:
    made.type = 26


def _more_rows(made: Node) -> None:
    made.ne[1] += 1


def _no_source(made: Node) -> None:
    made.src[0] = None


FAULTS = {
    "no sum": ("softmax over its sum", ("RESHAPE", "DIV", "MUL"), {}),
    "divided twice": ("softmax over its sum", ("RESHAPE", "SUM", "DIV", "SUM", "DIV", "MUL"), {}),
    "a sum without memory": ("softmax over its sum", SUM, {"SUM_ROWS": _nothing}),
    "a sum of another type": ("softmax over its sum", SUM, {"SUM_ROWS": _whole_numbers}),
    "a sum of other rows": ("softmax over its sum", SUM, {"SUM_ROWS": _more_rows}),
    "a softmax of other rows": ("softmax over the chosen", None, {"SOFT_MAX": _more_rows}),
    "weights of another type": ("softmax over its sum, by us", None, {"GET_ROWS": _whole_numbers}),
    "a bias whose scores are not found": ("sigmoid and a bias", None, {"ADD": _no_source}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_where_the_sum_is_out_of_reach_the_prior_is_off_from_the_start(name: str, kind: type[Prior]) -> None:
    of, chain, change = FAULTS[name]
    router = ROUTERS[of]
    router = Router(router.spec, router.scores, chain or router.chain, router.ranks, router.renormalise)
    prior = kind(router)
    layer = Layer(prior.ask, router, change=change)
    prior.turn(0.5)
    prior.rows(2)
    layer.compute(*tokens(router, rows=2))
    prior.settle()
    assert OFF in prior.why()
    layer.compute(*tokens(router))
    assert prior.swapped() == 0


@pytest.mark.parametrize("then", ["the next layer", "the next batch", "a node of another form", "scores not found"])
def test_a_graph_that_changes_after_it_was_seen_turns_it_off(then: str, kind: type[Prior]) -> None:
    router = ROUTERS["sigmoid and a bias"]
    prior, layer = proven(kind, router)
    prior.turn(1.5)
    prior.rows(TOKENS)
    if then == "a node of another form":
        layer.change = {"SUM_ROWS": _more_rows}
    elif then == "scores not found":
        layer.change = {"ADD": _no_source}
    else:
        layer.router = Router(router.spec, router.scores, ("MUL",), router.ranks)
    layer.compute(*tokens(router))
    if then == "the next layer":
        Layer(prior.ask, router, number=1).compute(*tokens(router))
    elif then == "the next batch":
        prior.rows(1)
    assert OFF in prior.why() and (prior.swapped() > 0) == (then != "scores not found")
    before = prior.swapped()
    layer.compute(*tokens(router))
    assert prior.swapped() == before


def test_weights_in_the_memory_of_a_device_are_read_and_written_by_its_functions() -> None:
    """Of each of the nodes; without a function to write with it stays off."""
    calls: list[tuple[str, bytes]] = []
    move = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_size_t, C.c_size_t)

    @move
    def get(tensor: int, values: int, offset: int, size: int) -> None:
        calls.append(("get", operation_of(Node.from_address(tensor))))
        C.memmove(values, Node.from_address(tensor).data + offset, size)

    @move
    def put(tensor: int, values: int, offset: int, size: int) -> None:
        calls.append(("set", operation_of(Node.from_address(tensor))))
        C.memmove(Node.from_address(tensor).data + offset, values, size)

    @C.CFUNCTYPE(C.c_bool, C.c_void_p)
    def is_host(buffer: int) -> bool:
        return False

    def far(made: Node) -> None:
        made.buffer = 1

    change = dict.fromkeys(("ARGSORT", "SIGMOID", "SOFT_MAX", "ADD", "SUM_ROWS", "RESHAPE", "GET_ROWS"), far)
    for name in ("softmax over its sum", "softmax over the chosen", "sigmoid and a bias"):
        router = ROUTERS[name]
        for has_functions in (True, False):
            prior = InC(router)
            pointers = [C.cast(each, C.c_void_p) if has_functions else None for each in (get, put)]
            lib, at = prior.graph.lib, C.cast(_op_desc, C.c_void_p)
            lib.rp_backend(prior.graph.prior, at, C.cast(is_host, C.c_void_p), *pointers)
            # Without functions the ids and their scores are the host's, the sums are not.
            layer = Layer(prior.ask, router)
            layer.change = change if has_functions else dict.fromkeys(("SUM_ROWS", "SOFT_MAX"), far)
            if not has_functions and router.scores == "SOFT_MAX":
                layer.change = {"SUM_ROWS": far}
            prior.rows(2)
            layer.compute(*tokens(router, rows=2))
            prior.settle()
            calls.clear()
            prior.turn(0.5)
            prior.rows(TOKENS)
            logits_TE, bias_E = tokens(router)
            ids_TK, weights_TK = layer.compute(logits_TE, bias_E)
            if not has_functions:
                assert OFF in prior.why() and prior.swapped() == 0
                continue
            step = PriorStep(torch.zeros(1, E), torch.tensor(0.5), DECAY, None, SHARE)
            expected, chosen = topk_gating(logits_TE, K, router.spec, step, bias_E=bias_E)
            assert ids_TK.tolist() == chosen.tolist() and np.abs(weights_TK - expected.numpy()).max() < 3e-7
            where = b"SOFT_MAX" if router.ranks == Ranks.LOGITS else b"SUM_ROWS"
            assert {("set", b"VIEW"), ("set", where), ("get", where)} < set(calls)


def test_a_part_that_is_no_number_is_1() -> None:
    ids_2, own_2 = np.array([2, 3], np.int32), np.array([0, 1], np.int32)
    for values, part in (([0, 0, 0.5, 0], 1), ([np.nan, 0, 1, 1], 1), ([0.5, 0.5, 0.25, 0], 0.25), ([1, 0, 0, 0], 0)):
        assert kept_part(Ranks.SCORES, np.array(values, np.float32), ids_2, own_2) == part
    logits_4 = np.array([900, -900, 898, -np.inf], np.float32)
    assert kept_part(Ranks.LOGITS, logits_4, ids_2, own_2) == pytest.approx(np.exp(-2))
    halves_4 = np.zeros(4, np.float32)
    assert kept_part(Ranks.BARE_LOGITS, halves_4, ids_2, own_2) == 1 and not Divided.NOWHERE
