"""`benchmarks/llamacpp.py`: its worker on a tiny model, its text, and figures and bars from what arms found."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="GGUF (extra: export)")
pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")

from remoe_adapt.bench.harness import why_no_cap, why_no_groups, why_no_loop
from remoe_adapt.engines.gguf.lora import export_gguf_lora
from remoe_adapt.evaluation import score
from remoe_adapt.evaluation.shipped import example_folder
from remoe_adapt.family.family import Family


@pytest.fixture(scope="module")
def bench(repo_root: Path) -> Any:
    if not (example_folder() / "config.json").is_file():
        pytest.skip("the shipped model is not beside the package")
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        import llamacpp
    finally:
        sys.path.pop(0)
    return llamacpp


@pytest.fixture(scope="module")
def windows(bench: Any) -> list[list[int]]:
    found: list[list[int]] = bench.windows_of(bench.Options(quality_tokens=128, window=32))
    return found


def test_windows_are_whole_and_as_many_as_asked_for(windows: list[list[int]]) -> None:
    assert [len(ids) for ids in windows] == [32] * 4
    assert len({tuple(ids) for ids in windows}) == 4


def test_the_worker_decodes_the_shipped_model_one_by_one(
    bench: Any, windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoModelForCausalLM

    home = tmp_path_factory.mktemp("plain")
    bench._write(bench.SHIPPED, home / "plain.gguf")
    export_gguf_lora(home / "plain.gguf", Family.load(bench.SHIPPED / "family" / "trained"), home / "loras")
    loras = [(1.0, str(home / "loras" / f"{Family.adapter_name(1.0)}.gguf"))]
    files = {"lora": str(home / "plain.gguf")}
    worker = bench.Worker()
    models = [("lora", "ema", None), ("lora", "cost", 0.5)]
    worker.answer({"op": "load", "models": models, "files": files, "loras": loras, "engine": {}})

    def decoded(arm: Any) -> dict[str, Any]:
        found: dict[str, Any] = worker.answer({"op": "decode", "arm": asdict(arm), "ids": windows[0], "warm": 8})
        return found

    base = decoded(bench.BASE)
    assert base["tokens"] == 31 - 8 and base["s"] > 0 and {"bytes", "faults"} <= base.keys()
    model = AutoModelForCausalLM.from_pretrained(bench.SHIPPED, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor(windows[:1])).logits[0, :-1]
    wanted = score(logits_TV, torch.tensor(windows[0][1:]))[0].tolist()
    assert base["nll"] == pytest.approx(wanted, abs=0.02), "renormalised, in F16"
    others = [decoded(bench.Arm("much", gain=2.0))["nll"], decoded(bench.Arm("adapter", strength=1.0))["nll"]]
    others.append(decoded(bench.Arm("priced", "cost", 0.3, share=0.5))["nll"])
    assert base["nll"] not in others and len({str(nll) for nll in others}) == 3
    assert decoded(bench.BASE)["nll"] == base["nll"] == decoded(bench.Arm("idle", "cost", share=0.5))["nll"]


def test_every_arm_has_a_name_and_processes_are_of_engine_options(bench: Any) -> None:
    assert bench.ARMS[0] == bench.BASE and len({arm.name for arm in bench.ARMS}) == len(bench.ARMS)
    ahead = bench.Arm("ahead", "resident", 0.1, engine={"b": 1, "a": 2})
    same = bench.Arm("ahead too", "resident", 0.3, engine={"a": 2, "b": 1})
    assert bench._key(ahead) == bench._key(same) != bench._key(bench.BASE)
    # Two modes are two models, which must not map one file in one process if pages of it are given back.
    other = bench.Arm("another mode", "ema", 0.1, engine={"a": 2, "b": 1})
    assert bench._key(other) != bench._key(ahead)
    assert bench._key(bench.Arm("without", "cost", 0.1)) == bench._key(bench.BASE)
    assert [bench.needs_limit(arm) for arm in (ahead, other, bench.BASE)] == [True, False, False]


def found(seconds: float, size: int, nll: dict[int, list[float]]) -> dict[str, Any]:
    count = sum(map(len, nll.values()))
    return {
        "s": seconds, "bytes": size, "faults": 2 * count, "tokens": count, "nll": nll,
        "bytes_in": {window: size / len(nll) for window in nll},
    }  # fmt: skip


def test_figures_and_bars_are_those_of_their_definitions(bench: Any) -> None:
    base, lora = bench.BASE, bench.Arm("adapter 1", strength=1.0)
    resident = bench.Arm("resident", "resident", 0.2)
    ahead = bench.Arm("resident, read ahead", "resident", 0.2, engine={"expert_cache": 1.0})
    both = bench.Arm("both", "resident", 0.2, strength=0.3)
    arms, mib = (base, lora, resident, ahead, both), 1 << 20
    names = [arm.name for arm in arms]
    sizes = dict(zip(names, (8, 4, 2, 1, 1.6), strict=True))
    levels = dict(zip(names, (3.0, 3.1, 3.01, 3.01, 3.0), strict=True))
    capped = {name: found(1.0, 10 * sizes[name] * mib, {0: [levels[name]] * 10}) for name in names}
    capped["base"]["nll"] = {0: [3.002] * 10}
    uncapped = {name: found(s, 0, {0: [0.0] * 10}) for name, s in zip(names, (1.0, 1.0, 0.6, 0.4, 0.1), strict=True)}
    quality = {
        name: found(1.0, 4000 * sizes[name] * mib, {n: [levels[name]] * 2000 for n in range(2)}) for name in names
    }
    del uncapped[lora.name], uncapped[both.name]
    rows = [bench.row(arm, capped, uncapped, quality, {1: 16000.0 * mib}) for arm in arms]
    of_base, of_lora, of_resident, *_ = rows
    assert of_base["mib_per_token"] == 8 and of_base["ratio"] == 1 and of_base["ppl_ratio"] == 1
    assert of_base["nll_gap"] == pytest.approx(0.002) and of_base["quality_mib_per_token"] == 8
    assert of_lora["ratio"] == 0.5 and of_lora["uncapped_ms_per_token"] is None and of_lora["quality_ratio"] is None
    assert of_lora["ppl_ratio"] == pytest.approx(1.105, abs=1e-3) and of_lora["quality_tokens"] == 4000
    assert of_resident["quality_ratio"] == 0.25 and of_resident["quality_mib_per_token"] == 2
    assert of_resident["nll_gap"] is None and of_resident["uncapped_ms_per_token"] == pytest.approx(60)
    bars = bench.bars(rows, arms)
    assert [line["value"] for line in bars] == [pytest.approx(value) for value in (0.5, 0.125, 1.5)]
    assert [line["arm"] for line in bars] == [lora.name, ahead.name, ahead.name]
    assert all(line["met"] for line in bars)
    for row in rows[2:4]:
        row["ppl_ratio"] = 1.03
    assert [line["met"] for line in bench.bars(rows, arms)] == [True, None, True]
    without = bench.bars([row | {"quality_tokens": 100} for row in rows[:3]], arms[:3])
    assert [line["met"] for line in without] == [True, None, None]


@pytest.mark.slow
def test_a_small_run_from_end_to_end(bench: Any, tmp_path: Path) -> None:
    if why := why_no_groups() or why_no_loop() or why_no_cap():
        pytest.skip(why)
    options = bench.Options(
        work=str(tmp_path), expert_bytes=1 << 20, memory_share=1.5, warm=4, tokens=8, quality_tokens=96, window=32,
        base_every=2,
    )  # fmt: skip
    arms = [
        arm
        for arm in bench.ARMS
        if arm.name
        in (
            "base",
            "resident 0.2",
            "adapter 1",
            "adapter 1, split file",
            "base, read ahead",
            "cost 0.1",
            "cost 0.1, read ahead",
        )
    ]
    result = bench.run(options, arms)
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == [arm.name for arm in arms] and len(result["bars"]) == 3
    assert rows["base"]["nll_gap"] < bench.MOST_NLL_GAP and rows["adapter 1, split file"]["nll_gap"] < 0.05
    assert rows["adapter 1"]["ppl_ratio"] == rows["adapter 1, split file"]["ppl_ratio"] != 1
    assert all(row["quality_tokens"] == 3 * 31 for row in rows.values())
    assert not list(tmp_path.glob("disk*"))
