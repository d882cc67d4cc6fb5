"""`remoe plan`: what it says of memory is what loading does, its commands are commands, and bad input is one error."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import found, refused
from gguf_checkpoints import experts_in, random_model, write_checkpoint
from tiny_checkpoints import save_tiny
from typer.main import get_command

from remoe_adapt import load_with_expert_cache
from remoe_adapt.cli.app import app
from remoe_adapt.errors import ConfigError, RemoeError
from remoe_adapt.evaluation.planning import BASE_RATES, GAINS, MISS_RATIOS, HitRates, between, known_rates, open_source
from remoe_adapt.eviction import hit_rates
from remoe_adapt.expert_cache import expert_cache_of, pack_experts
from remoe_adapt.traces import Trace

DATA = Path(__file__).parent / "data"
# Nothing is measured but a layer of a tiny model.
GIVEN = ("--storage-mib", 2000, "--ram-mib", 8000)


def parses(line: str) -> None:
    """Fails as the command line would, and runs nothing."""
    command: Any = get_command(app)
    names, rest = ["remoe"], shlex.split(line)[1:]
    while hasattr(command, "commands"):
        names.append(rest[0])
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(" ".join(names), rest)


def checked(result: dict[str, Any]) -> None:
    """Sums that must hold in every plan."""
    formats = {row["name"]: row for row in result["formats"]}
    assert result["rows"] and result["unknown"]
    for row in result["rows"]:
        assert row["tpot_ms"] == pytest.approx(row["compute_ms"] + row["read_ms"])
        assert 0 <= row["hit_rate"] <= 1 and row["memory_bytes"] >= formats[row["format"]]["dense_bytes"]
    for line in result["advice"]["commands"]:
        parses(line)
    compile(result["advice"]["python"], "advice", "eval")


def test_a_model_that_is_not_there_on_a_device_that_is_not_here() -> None:
    result = found("plan", DATA / "qwen3-30b-a3b", "--profile", "laptop-16gb", *GIVEN)
    checked(result)
    assert result["known_from"] == "config.json"
    four = next(row for row in result["formats"] if (row["bits"], row["dense_bits"]) == (4, 8))
    assert four["fits"] and four["memory_bytes"] <= 8.1 * 2**30 and 0.3 < four["share"] < 0.4
    by_way = {row["way"]: row for row in result["rows"] if row["format"] == four["name"]}
    assert set(by_way) == {"strength 0", *(f"resident {gain:g}" for gain in GAINS)}
    rates = [by_way[way]["hit_rate"] for way in ("strength 0", "resident 0.1", "resident 0.2")]
    assert rates == sorted(rates)
    plain = by_way["strength 0"]
    # 48 layers with 8 of a token; all that is not hit is read at the rate that was given.
    assert plain["bytes_per_token"] == pytest.approx(48 * 8 * four["expert_bytes"] * (1 - plain["hit_rate"]), rel=0.01)
    assert plain["read_ms"] == pytest.approx(plain["bytes_per_token"] / (2000 << 20) * 1e3)
    pack, run = result["advice"]["commands"]
    assert pack.startswith("remoe pack ") and "--storage" in run and "--profile laptop-16gb" in run


def test_what_does_not_fit_says_so() -> None:
    result = found("plan", DATA / "olmoe-1b-7b", "--memory", "256MiB", *GIVEN)
    assert result["rows"] == [] and result["advice"] is None
    assert all(not row["fits"] and "dense part alone takes" in row["why"] for row in result["formats"])


def test_memory_is_divided_as_it_is_when_the_model_is_loaded(tmp_path: Path) -> None:
    folder, pack = save_tiny(tmp_path / "model", "qwen2_moe"), tmp_path / "pack"
    pack_experts(folder, pack, bits=4)
    for storage in (None, pack):
        model = load_with_expert_cache(folder, 1.0, memory="156KiB", storage=storage)
        cache = expert_cache_of(model)
        assert cache is not None
        options = () if storage is None else ("--storage", storage)
        result = found("plan", folder, "--memory", "156KiB", "--share", 1.0, *GIVEN, *options)
        planned = result["formats"][0 if storage is None else 1]
        assert planned["budget_bytes"] == cache.budget_bytes
    assert result["known_from"] == "safetensors headers"
    checked(result)


def test_a_gguf(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    path = write_checkpoint(model, "qwen3_moe", tmp_path / "m.gguf", experts_in("Q4_0", "Q8_0", dense="Q8_0"))
    result = found("plan", path, "--memory", "1GiB", *GIVEN)
    checked(result)
    assert result["known_from"] == "GGUF header" and result["formats"][0]["stored_bytes"] <= path.stat().st_size


def routing(tmp_path: Path) -> Path:
    """64 experts, 4 of a token, half of which stay from one token to the next."""
    generator = np.random.default_rng(0)
    tokens = [generator.permutation(64)[:4]]
    for _ in range(299):
        kept = tokens[-1][:2]
        fresh = [expert for expert in generator.permutation(64) if expert not in kept][:2]
        tokens.append(np.array([*fresh, *kept]))
    trace = Trace(np.array([tokens] * 2, dtype=np.int16), {"num_experts": 64})
    trace.save(tmp_path / "t.npz")
    return tmp_path / "t.npz"


def test_hit_rates_of_a_trace_are_those_of_its_replay(tmp_path: Path) -> None:
    path = routing(tmp_path)
    known = known_rates(path, None, [0.3])
    assert known.rate(0.3) == hit_rates(Trace.load(path), ["lrfu"], [0.3])["lrfu@0.3"]
    assert known.rate(1.0) > known.rate(0.5) > known.rate(0.1) and "replayed" in known.source
    # The prior's part of the misses is of the shipped model.
    assert 1 - known.rate(0.25, 0.2) == pytest.approx((1 - known.rate(0.25)) * MISS_RATIOS[0.2][0.25])


def test_hit_rates_by_default_and_between_what_is_known() -> None:
    known = HitRates(BASE_RATES, "", {})
    assert [known.rate(share) for share in BASE_RATES] == list(BASE_RATES.values())
    assert known.rate(0.0) == 0 and known.rate(1.0) == 1
    assert between({0.25: 0.5, 0.5: 0.8}, 0.375) == pytest.approx(0.65)
    assert all(list(ratios) == sorted(ratios) and max(ratios.values()) < 1 for ratios in MISS_RATIOS.values())


def test_a_family_brings_the_hit_rates_of_its_certificates(repo_root: Path) -> None:
    family = repo_root / "examples" / "tiny_moe" / "family"
    point = json.loads((family / "family.json").read_text())["points"][-1]
    known = known_rates(None, str(family), [])
    assert known.at_strength(point["strength"], 0.25) == pytest.approx(point["certificate"]["lru@0.25"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"layer_types": ["full_attention"] * 100_000}, "100000 entries"),
        ({"hidden_size": 1 << 50}, "no model is so large"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "1000000 layers"),
        ({"num_experts": -4}, "without its weights"),
        ({"hidden_size": 1 << 39, "moe_intermediate_size": 1 << 39}, "without its weights"),
        ({"num_attention_heads": 0}, "."),
        ({"model_type": "nothing"}, "."),
        ({"num_hidden_layers": "many"}, "."),
    ],
)
def test_a_configuration_that_cannot_be_is_one_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    entries = json.loads((DATA / "olmoe-1b-7b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | change))
    with pytest.raises(RemoeError, match=message):
        open_source(tmp_path).checkpoint.skeleton()


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    shutil.copy(DATA / "olmoe-1b-7b" / "config.json", tmp_path / "config.json")
    index = tmp_path / "model.safetensors.index.json"
    for content in ("[]", "{", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": 3}'):
        index.write_text(content)
        assert "index" in refused("plan", tmp_path, *GIVEN)
    index.write_text(json.dumps({"metadata": {"total_size": 13_838_000_000}, "weight_map": {"a": "a.safetensors"}}))
    source = open_source(tmp_path)
    assert (source.known_from, source.stored_bytes, source.has_files) == ("the index", 13_838_000_000, False)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "nested too deeply" in refused("plan", tmp_path, *GIVEN, status=2)
    assert "cannot be found" in refused("plan", "nobody/nothing", *GIVEN, status=2)
    assert "pack again" in refused("plan", packed(tmp_path), *GIVEN, status=2)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "GGUF" in refused("plan", tmp_path / "cut.gguf", *GIVEN)


def packed(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "experts.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("bits", "dense_bits"), [(4, None), (8, 8)])
def test_a_pack_alone_is_planned_as_beside_its_model(bits: int, dense_bits: int | None, tmp_path: Path) -> None:
    folder, pack = save_tiny(tmp_path / "model", "qwen3_moe"), tmp_path / "pack"
    pack_experts(folder, pack, bits=bits, dense_bits=dense_bits)
    beside = found("plan", folder, "--storage", pack, "--memory", "1GiB", *GIVEN)
    shutil.rmtree(folder)
    alone = found("plan", pack, "--memory", "1GiB", *GIVEN)
    checked(alone)
    assert alone["known_from"] == "the pack" and alone["parameters"] == beside["parameters"]
    assert alone["formats"] == beside["formats"][1:]
    rows = [row for row in beside["rows"] if row["format"] == "pack pack"]
    assert [row["bytes_per_token"] for row in alone["rows"]] == [row["bytes_per_token"] for row in rows]
    assert f"--storage {pack}" in alone["advice"]["commands"][0] and "remoe run model" in alone["advice"]["commands"][0]
    assert "itself" in refused("plan", pack, "--storage", pack, *GIVEN, status=2)


def test_a_pack_that_says_too_little_or_too_much_is_one_line(tmp_path: Path) -> None:
    folder, pack = save_tiny(tmp_path / "model", "qwen3_moe"), tmp_path / "pack"
    pack_experts(folder, pack)
    manifest = json.loads((pack / "experts.json").read_text())
    assert manifest["config"]["model_type"] == "qwen3_moe"

    def refusal(config: Any) -> str:
        (pack / "experts.json").write_text(json.dumps({**manifest, "config": config}))
        return refused("plan", pack, *GIVEN, status=2)

    assert "--storage" in refusal({})  # of an older version
    assert "is not whole" in refusal([1])
    assert "1000000000 layers" in refusal(manifest["config"] | {"num_hidden_layers": 10**9})
    assert "pack of another model" in refusal(manifest["config"] | {"num_local_experts": 3})


@pytest.mark.parametrize("wrong", [("--storage-mib", 0), ("--ram-mib", -1), ("--memory", "much"), ("--share", 2)])
def test_options_that_cannot_work_are_bad_usage(wrong: tuple[str, Any]) -> None:
    refused("plan", DATA / "olmoe-1b-7b", *wrong, status=2)


def test_a_configuration_is_of_a_gguf_alone() -> None:
    with pytest.raises(ConfigError, match="GGUF"):
        open_source(DATA / "olmoe-1b-7b", config="x")
