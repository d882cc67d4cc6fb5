"""`remoe watch --live` on a real engine that maps the file: swaps in mid-generation, refusals, the end and kills."""

from __future__ import annotations

import http.client
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import killed_at_write

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")
from gguf_writer import write_gguf
from kv import kv, returned_cache
from llama_child import LlamaChild
from transformers import AutoModelForCausalLM, PreTrainedModel
from watched_server import PlayedSensors, quick

from remoe_adapt.checkpoints.gguf_file import GgufFile
from remoe_adapt.dial.load import profile_of
from remoe_adapt.engines.files import ignore_bytes
from remoe_adapt.engines.gguf import split as gguf_split
from remoe_adapt.engines.gguf.live import LiveRouters
from remoe_adapt.engines.gguf.patch import patch_in_place, undo_in_place
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.engines.gguf.undo import undo_path
from remoe_adapt.engines.llamacpp.in_process import LlamaModel
from remoe_adapt.engines.llamacpp.process import MappingProcess, covers, mapped_by, mapped_spans
from remoe_adapt.engines.llamacpp.watch import Watch, WatchOptions
from remoe_adapt.errors import ConfigError, ServerError
from remoe_adapt.family.family import Family, original_weights


class Shipped:
    """The shipped model, in memory as llama.cpp computes it, as a GGUF and as a split one whose first part is
    `first`."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.family_path = source / "family"
        self.family = Family.load(self.family_path)
        # That engine does not renormalise the weights of chosen experts in this architecture.
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, norm_topk_prob=False
        )
        self.gguf = write_gguf(self.model, "qwen2moe", folder / "model.gguf")
        self.first = Path(split_gguf(self.gguf, self.family, 0.0, folder / "split" / "m.gguf")["out"])
        self.bytes = self.first.read_bytes()

    def untouched(self) -> bool:
        return self.first.read_bytes() == self.bytes and not undo_path(self.first).exists()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Shipped:
    return Shipped(tmp_path_factory.mktemp("live"), repo_root / "examples" / "tiny_moe")


@pytest.fixture(autouse=True)
def _left_as_it_was(shipped: Shipped) -> Iterator[None]:
    yield
    assert shipped.untouched()


def test_llama_cpp_computes_this_model_without_renormalising(shipped: Shipped, repo_root: Path) -> None:
    """Whatever norm_topk_prob says, which is true for the shipped model."""
    ids = list(range(40, 90))
    stored = AutoModelForCausalLM.from_pretrained(repo_root / "examples" / "tiny_moe", dtype=torch.float32)
    assert stored.config.norm_topk_prob
    with torch.no_grad():
        renormalised, plain = (m(input_ids=torch.tensor([ids])).logits[0].numpy() for m in (stored, shipped.model))
    with LlamaModel(shipped.gguf) as engine:
        theirs = engine.decode(ids)
    assert np.abs(theirs - plain).max() <= 1e-4 and np.abs(theirs - renormalised).max() > 1.0


def test_a_swap_in_mid_generation_is_that_of_the_live_model(shipped: Shipped) -> None:
    pieces = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(4))
    strengths = (0.0, 1.0, 0.5, 0.0)
    weights = original_weights(shipped.model)
    base = {name: weight.clone() for name, weight in weights.items()}
    cache, expected = None, []
    with torch.no_grad():
        for ids, strength in zip(pieces, strengths, strict=True):
            for name, value in shipped.family.live(strength, base).items():
                weights[name].copy_(value)
            found = shipped.model(input_ids=ids[None], **kv(cache), use_cache=True)
            cache = returned_cache(found)
            expected.append(found.logits[0].numpy())
        unswapped = shipped.model(input_ids=pieces.flatten()[None]).logits[0].numpy()
    routers = LiveRouters(shipped.first, shipped.family)
    with LlamaModel(shipped.first, load_mode="mmap") as engine:
        for ids, strength, logits in zip(pieces, strengths, expected, strict=True):
            routers.write(strength)
            theirs = np.concatenate([engine.decode([token]) for token in ids.tolist()])
            assert np.abs(theirs - logits).max() <= 1e-4
        # Sentinel: the swaps matter, also to the tokens after them, by what the cache holds.
        assert np.abs(theirs - unswapped[-12:]).max() > 1e-2
    assert undo_path(shipped.first).exists() and routers.swap_s is not None
    routers.close()


def test_a_swap_without_memory_mapping_has_no_effect(shipped: Shipped) -> None:
    """Why the process's maps are looked at."""
    routers = LiveRouters(shipped.first, shipped.family)
    with LlamaModel(shipped.first, load_mode="none") as engine:
        before = engine.decode([5, 6, 7])
        routers.write(1.0)
        engine.clear()
        assert np.array_equal(engine.decode([5, 6, 7]), before)
        assert os.getpid() not in mapped_by(shipped.first)
    routers.close()


@pytest.mark.parametrize("keep", [False, True])
def test_the_file_is_locked_and_left_as_asked(shipped: Shipped, keep: bool) -> None:
    routers = LiveRouters(shipped.first, shipped.family)
    routers.write(1.0)
    routers.write(0.7)
    for second in (
        lambda: LiveRouters(shipped.first, shipped.family),
        lambda: patch_in_place(shipped.first, shipped.family, 1.0),
        lambda: undo_in_place(shipped.first),
    ):
        with pytest.raises(ConfigError, match="being patched by another process"):
            second()
    assert LiveRouters(shipped.first, shipped.family, read_only=True).strength is None
    routers.close(keep)
    if keep:
        assert LiveRouters(shipped.first, shipped.family, read_only=True).strength == 0.7
        assert undo_in_place(shipped.first)["was"] == {shipped.first.name: "patched"}


def test_a_kill_inside_a_swap_is_undone(shipped: Shipped) -> None:
    def swap() -> None:
        routers = LiveRouters(shipped.first, shipped.family)
        routers.write(0.3)
        routers.write(1.0)

    layers = len(shipped.family.points[0].deltas)
    assert killed_at_write(layers + 2, swap) and shipped.first.read_bytes() != shipped.bytes
    routers = LiveRouters(shipped.first, shipped.family)
    assert routers.strength is None
    routers.close()
    assert shipped.untouched()
    assert killed_at_write(layers - 1, swap)
    assert undo_in_place(shipped.first)["was"] == {shipped.first.name: "live"}


def test_files_that_are_not_routers_alone_are_refused(shipped: Shipped, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not split.*--split --strength 0"):
        LiveRouters(shipped.gguf, shipped.family)
    second = shipped.first.with_name("m-00002-of-00002.gguf")
    first, rest = GgufFile(shipped.first), GgufFile(second)
    more, entries = [*first.tensors, rest.tensors[0]], list(first.entries.values())
    gguf_split._write(tmp_path / first.path.name, first, entries, more, {}, ignore_bytes)
    entries = list(rest.entries.values())
    gguf_split._write(tmp_path / second.name, rest, entries, rest.tensors[1:], {}, ignore_bytes)
    with pytest.raises(ConfigError, match=rf"holds more than routers \({rest.tensors[0].name}\)"):
        LiveRouters(tmp_path / first.path.name, shipped.family)
    linked = tmp_path / "linked" / shipped.first.name
    linked.parent.mkdir()
    linked.symlink_to(shipped.first)
    (linked.parent / second.name).symlink_to(second)
    with pytest.raises(ConfigError, match="is a link"):
        LiveRouters(linked, shipped.family)


def test_what_a_process_maps_is_seen(shipped: Shipped) -> None:
    routers = LiveRouters(shipped.first, shipped.family, read_only=True)
    size, page = shipped.first.stat().st_size, mmap.PAGESIZE
    assert size > 4 * page and os.getpid() not in mapped_by(shipped.first)
    process = MappingProcess(shipped.first)
    assert not process.find() and "no process maps" in process.why_unknown
    with shipped.first.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert covers(mapped_spans(os.getpid(), shipped.first), routers.spans)
        process = MappingProcess(shipped.first)
        assert process.find() and process.pid == os.getpid()
    offset = -(-routers.spans[0][1] // page) * page  # as the engine leaves it when the first layer is on a GPU
    with shipped.first.open("rb") as file, mmap.mmap(file.fileno(), size - offset, prot=mmap.PROT_READ, offset=offset):
        spans = mapped_spans(os.getpid(), shipped.first)
        assert spans and not covers(spans, routers.spans)


def options(shipped: Shipped, **more: Any) -> WatchOptions:
    return WatchOptions(live=shipped.first, **more)


def test_a_process_that_does_not_map_the_file_is_refused(shipped: Shipped) -> None:
    watch = Watch(None, str(shipped.family_path), profile_of(None), options(shipped, pid=os.getpid()))
    with pytest.raises(ServerError, match=r"maps nothing of .*--no-mmap"):
        list(watch.events())
    watch.engine.close()
    with pytest.raises(ConfigError, match="--proxy sets single requests"):
        Watch("127.0.0.1:1", str(shipped.family_path), profile_of(None), options(shipped, proxy=("127.0.0.1", 0)))
    with pytest.raises(ConfigError, match="--server URL, or --live"):
        Watch(None, str(shipped.family_path), profile_of(None), WatchOptions())


def generated(server: LlamaChild, count: int, at: int = -1, then: Any = None) -> list[float]:
    """Log probability of each greedy token of one streamed answer; `then` is called when `at` of them have come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": [40, 50, 60, 70], "n_predict": count, "temperature": 0, "n_probs": 1, "stream": True}
    connection.request("POST", "/completion", json.dumps(body | {"ignore_eos": True, "cache_prompt": False}))
    answer, found = connection.getresponse(), []
    for line in answer:
        if line.startswith(b"data: "):
            found += [one["logprob"] for one in json.loads(line[6:]).get("completion_probabilities", [])]
            if at >= 0 and len(found) > at:
                then()
                at = -1
    connection.close()
    return found


def test_a_server_swaps_in_the_midst_of_an_answer(shipped: Shipped) -> None:
    with LlamaChild(shipped.first) as server:
        alone = generated(server, 400)
        watch = Watch(server.url, str(shipped.family_path), quick(profile_of(None)), options(shipped))
        sensors, events = PlayedSensors(), []
        watch.governor.sensors = sensors
        thread = threading.Thread(target=lambda: events.extend(watch.events()))
        thread.start()
        try:
            swapped = generated(server, 400, 20, lambda: setattr(sensors, "pressure", 1.0))
        finally:
            watch.stop()
            thread.join(20)
        assert [event["event"] for event in events[:2]] == ["warning", "start"] and events[-1]["left_at"] == 0.0
        assert str(server.pid) in events[0]["text"] and "--undo" in events[0]["text"] and watch.engine.swaps >= 1
        same = [abs(a - b) < 2e-3 for a, b in zip(alone, swapped, strict=True)]
        first = same.index(False)
        assert 15 < first < 399 and sum(same[first:]) < 0.5 * len(same[first:])
        assert generated(server, 100) == pytest.approx(alone[:100], abs=2e-3)


PROFILE = """name: always
description: one strength, never the base
memory: {budget: null, reserve: 16MiB}
expert_cache: {budget: 0.25}
strength: {curve: [[0.0, 0.8], [1.0, 0.8]]}
controller: {sample_hz: 20, rise_s: 0.05, fall_s: 0.4, dwell_s: 0.1, deadband: 0.02, max_swaps_per_s: 10}
"""


def test_the_command_starts_after_a_kill_and_ends_with_the_originals(shipped: Shipped, tmp_path: Path) -> None:
    profile = tmp_path / "always.yaml"
    profile.write_text(PROFILE)
    command = [sys.executable, "-m", "remoe_adapt", "watch", "--live", str(shipped.first), "--profile", str(profile)]
    command += ["--family", str(shipped.family_path), "--json"]
    with LlamaChild(shipped.first) as server:
        base = generated(server, 40)
        routers = LiveRouters(shipped.first, shipped.family)
        routers.write(0.8)
        dialled = generated(server, 40)
        routers.close()
        assert dialled != pytest.approx(base, abs=2e-3)
        assert killed_at_write(2, lambda: LiveRouters(shipped.first, shipped.family).write(0.3))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            events = [json.loads(process.stdout.readline()) for _ in range(3)]
            # Nobody named the process: it is the one that maps the file.
            assert [event["event"] for event in events] == ["warning", "start", "strength"]
            assert events[1]["pid"] == server.pid and events[2]["strength"] == 0.8
            end = time.monotonic() + 10
            while generated(server, 40) != pytest.approx(dialled, abs=2e-3):
                assert time.monotonic() < end
            process.send_signal(signal.SIGTERM)
            last = json.loads(process.stdout.read().splitlines()[-1])
        assert generated(server, 40) == pytest.approx(base, abs=2e-3)
    assert process.returncode == 0 and last["event"] == "end" and last["swap_ms"] < 1000
    assert last["left_at"] == last["strength"] == 0.0 and last["posts"] >= 1
