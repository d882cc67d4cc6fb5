"""What the command line does before its work: comes at once, refuses what cannot be written or would do nothing."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_family import save_base, save_family
from typer.testing import CliRunner, Result

from remoe_adapt import Trace, checkpoints, evaluation
from remoe_adapt._support.outputs import check_appendable, check_file, write_csv
from remoe_adapt.cli import rows
from remoe_adapt.cli import rules as cli_rules
from remoe_adapt.cli.app import app
from remoe_adapt.cli.plots import check_plot
from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction.replay import layer_rows

TEXT = "It was the best of times, it was the worst of times. " * 8
HEAVY = ("torch", "transformers", "peft", "numpy", "accelerate")
LOADED = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", [m for m in {HEAVY} if m in sys.modules], file=sys.stderr))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, base/family, a.txt, t.npz"""
    home = tmp_path_factory.mktemp("first")
    save_family(save_base(home / "base"), home / "base" / "family")
    (home / "a.txt").write_text(TEXT)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(16, dtype=np.int16), (3, 200, 1)), axis=2)[..., :4]
    Trace(ids, {"num_experts": 16, "document_starts": [0, 90]}).save(home / "t.npz")
    return home


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is work: nothing may have got that far."""

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded before the check")

    monkeypatch.setattr(checkpoints, "load_with_tokenizer", worked)


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def refused(*args: object, status: int) -> str:
    result = call(*args)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--version"], 0), (["--help"], 0), (["eval", "--help"], 0), (["bench", "decode", "--help"], 0), ([], 2),
        (["evall"], 2), (["eval", "--no-such-option"], 2), (["eval", "m", "--data", "f", "--limit", "3"], 2),
        (["run", "m", "--prompt", "x", "--pressure", "0.5", "--strength", "1"], 2), (["profiles", "list"], 0),
        (["trace", "m", "--data", "f", "--out", "t.csv"], 2), (["simulate", "--policy"], 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("started", ["script", "module"])
def test_help_and_typing_errors_load_no_torch(args: list[str], status: int, started: str, tmp_path: Path) -> None:
    if started == "script":  # as pip writes it
        script = tmp_path / "remoe"
        script.write_text(
            f"{LOADED}\nfrom remoe_adapt.cli import main\nif __name__ == '__main__':\n    sys.exit(main())"
        )
        command, env = [str(script)], dict(os.environ)
    else:
        (tmp_path / "sitecustomize.py").write_text(LOADED)
        command, env = ["-m", "remoe_adapt"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command, *args], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == status, done.stderr
    assert done.stderr.endswith("loaded: []\n") and "Traceback" not in done.stderr, done.stderr


def test_importing_the_package_registers_remoe_at_once_unless_it_is_the_command(tmp_path: Path) -> None:
    code = "import remoe_adapt, sys; print('REMOE' in sys.modules['peft'].PeftType.__members__)"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(code)
    (tmp_path / "mine" / "__main__.py").write_text("")
    for command in (["-c", code], ["-m", "mine", "-m", "remoe_adapt"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.stdout == "True\n", done.stderr


def test_whatever_a_command_loads_that_knows_peft_knows_remoe(repo_root: Path) -> None:
    """In a process that is the command: REMOE adapters must load there as they do after `import remoe_adapt`."""
    modules = {
        node.module
        for path in (repo_root / "remoe_adapt" / "cli").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("remoe_adapt.")
    }
    assert {"remoe_adapt.evaluation", "remoe_adapt.dial", "remoe_adapt.engines"} <= modules
    code = (
        "import sys, importlib; sys.argv = ['/usr/bin/remoe', 'eval']; import remoe_adapt\n"
        "assert 'peft' not in sys.modules\n"
        f"for name in {sorted(modules)}:\n"
        "    importlib.import_module(name)\n"
        "    print(name, 'peft' in sys.modules or 'transformers' in sys.modules, 'remoe_adapt.tuner' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stdout.splitlines() if line.endswith("True False")], done.stdout
    assert done.stdout.rstrip().endswith("True")


def test_a_result_file_that_cannot_be_written_is_refused_before_work(home: Path, no_work: None) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    gone, data = home / "no" / "such", ("--data", home / "a.txt")
    eval_, run = ("eval", home / "base", *data), ("run", home / "base", "--prompt", "x")
    trace = ("trace", home / "base", *data, "--out")
    for args in (
        (*eval_, "--plot", gone / "x.png"), (*eval_, "--plot", home / "x.what"), (*eval_, "--plot", home / "x"),
        (*eval_, "--csv", gone / "x.csv"), (*eval_, "--csv", home / "x.xlsx"), (*eval_, "--csv", home),
        (*trace, home / "T.csv"), (*trace, home / "T"), (*trace, home / "a.txt" / "T.npz"), (*trace, "/dev/null"),
        (*trace, "/proc/T.npz"), (*trace, home / ("x" * 300 + ".npz")),
        (*run, "--log", gone / "l.jsonl"), (*run, "--log", home), (*run, "--log", home / "l", "--plot", home / "p.x"),
        ("demo", "--csv", gone / "d.csv"), ("bench", "swap", "--csv", gone / "s.csv"),
        ("bench", "decode", "--csv", "/dev/stdout"), ("simulate", home / "t.npz", "--csv", gone / "t.csv"),
        ("profiles", "list", "--csv", gone / "p.csv"), ("doctor", "--csv", home / "doctor.txt"),
    ):  # fmt: skip
        assert any(str(word) in refused(*args, status=2) for word in args[-1:]) or "x" * 90 in str(args[-1]), args
    before = {path.name for path in home.iterdir()}
    assert before == {"base", "a.txt", "t.npz"}, "nothing is left behind"


def test_extras_and_tasks_are_asked_for_before_work(home: Path, no_work: None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data", home / "a.txt")
    for module, args, extra in (
        ("lm_eval", ("eval", home / "base", *data, "--tasks", "arc_easy"), "eval"),
        ("matplotlib", ("eval", home / "base", *data, "--plot", home / "x.png"), "plot"),
        ("matplotlib", ("run", home / "base", "--prompt", "x", "--log", home / "l", "--plot", home / "x.png"), "plot"),
        ("prometheus_client", ("run", home / "base", "--prompt", "x", "--metrics-port", 0), "metrics"),
    ):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            assert f"remoe-adapt[{extra}]" in refused(*args, status=1)


def test_data_and_values_are_asked_for_before_work(home: Path, no_work: None) -> None:
    eval_ = ("eval", home / "base", "--data", home / "a.txt")
    assert "does not exist" in refused("eval", home / "base", "--data", home / "b.txt", status=1)
    assert "does not exist" in refused("trace", home / "base", "--data", home / "b", "--out", home / "o.npz", status=1)
    for args, words in (
        (("--data", home / "a.txt", "--max-tokens", 3), "too few for 2"), (("--cache", 0), "in (0, 1]"),
        (("--policy", "arc"), "'arc'"), (("--recency", "often"), "'often'"), (("--recency-gain", "a"), "'a'"),
        (("--recency-gain", "0.1,-1"), "gain -1"), (("--recency", "resident"), "expert cache"),
        (("--recency", "ema", "--recency-decay", 1), "decay 1"), (("--recency-gain", "nan"), "nan"),
        (("--recency", "cost", "--recency-share", 1.5), "share 1.5"),
    ):  # fmt: skip
        assert words in refused(*eval_, *args, status=2)


def test_options_that_would_do_nothing_are_refused_by_name(home: Path, no_work: None) -> None:
    base, data = home / "base", ("--data", home / "a.txt")
    run, trace = ("run", base, "--prompt", "x"), ("trace", base, *data, "--out", home / "o.npz")
    for args, words in (
        (("eval", base, *data, "--limit", 3), "--limit does nothing without --tasks"),
        (("eval", base, *data, "--task-folder", home), "--task-folder does nothing without --tasks"),
        (("eval", base, "--tasks", "x", "--plot", home / "p.png"), "--plot does nothing without --data"),
        (("eval", base, "--tasks", "x", "--cache", 0.5), "--cache does nothing without --data"),
        (("eval", base, "--tasks", "x", "--per-layer"), "--per-layer does nothing without --data"),
        (("eval", base, *data, "--certify"), "--certify does nothing without --family"),
        (("eval", base, *data, "--recency-decay", 0.5), "without --recency or --recency-gain"),
        (("eval", base, *data, "--recency", "last", "--recency-decay", 0.5), "--recency-decay is of --recency ema"),
        ((*run, "--recency", "last", "--recency-decay", 0.5), "--recency-decay is of --recency ema"),
        ((*run, "--recency", "ema", "--recency-share", 0.5), "--recency-share is of --recency cost; ema has none"),
        (("eval", base, *data, "--recency-share", 0.5), "--recency-share is of --recency cost"),
        ((*run, "--plot", home / "p.png"), "--plot does nothing without --log"),
        ((*run, "--pressure", 1, "--strength", 1), "--pressure and --strength"),
        ((*trace, "--temperature", 1), "--temperature does nothing without --decode"),
        ((*trace, "--prompt-tokens", 64), "--prompt-tokens does nothing without --decode"),
        (("bench", "decode", "--quick", "--tokens", 50), "--quick and --tokens"),
        (("bench", "controller", "--quick", "--cycles", 2), "--quick and --cycles"),
        (("trace", "m.gguf", *data, "--out", home / "o.npz", "--dtype", "float32"), "not for a GGUF"),
    ):
        assert words in refused(*args, status=2), args


def test_every_rule_names_options_that_are_there() -> None:
    commands = {name: _options(*name.split()) for table in _tables() for name in table}
    for table in _tables():
        for name, rule in table.items():
            for option, others in rule.items():
                assert {option, *others} <= commands[name], (name, option)


def _tables() -> tuple[Any, ...]:
    return cli_rules.NEEDS, cli_rules.EXCLUDES, cli_rules.HINTS


def _options(*path: str) -> set[str]:
    import typer

    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return {parameter.name for parameter in command.params}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["simulate", "t.npz", "--tokens", "201"], "has 200"), (["simulate", "t.npz", "--phase", "warmup"], "'warmup'"),
        (["simulate", "t.npz", "--cache", "2"], "in (0, 1]"), (["profiles", "show", "orin-9gb"], "no profile named"),
        (["run", "base", "--prompt", "x", "--recency-gain", "nan"], "nan"), (["demo", "--expert-cache", "1.5"], "1.5"),
        (["eval", "base", "--data", "a.txt", "--dtype", "int3"], "int3"),
        (["eval", "base", "--data", "a.txt", "--recency", "ema", "--recency-gain", ""], "'' is not a list"),
        (["eval", "base", "--data", "a.txt", "--recency", "ema", "--recency-gain", ","], "',' is not a list"),
        (["eval", "base", "--data", "a.txt", "--window", "999"], "longer than this model's"),
        (["eval", "base", "--data", "a.txt", "--device", "meta"], "device meta"),
        (["eval", "base", "--family", "base/family", "--data", "a.txt", "--certify", "--max-tokens", "900"], "1000"),
        (["run", "base", "--prompt", "x", "--device", "meta"], "device meta"),
        (["run", "base", "--prompt", ""], "no token"),
        (["run", "base", "--prompt", "x", "--max-new-tokens", "9999"], "positions"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_bad_usage(
    home: Path, args: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert words in refused(*args, status=2)


@pytest.mark.parametrize("value", ["--tokens=0", "--tokens=-1", "--tokens=x"])
def test_numbers_out_of_range_are_bad_usage(home: Path, value: str) -> None:
    assert call("simulate", home / "t.npz", value).exit_code == 2


def test_seeds_and_strengths_out_of_range_are_bad_usage(home: Path, tmp_path: Path) -> None:
    places = home / "base", home / "base" / "family", tmp_path / "out"
    for args in (
        ("run", home / "base", "--prompt", "x", "--temperature", 1, "--seed", "9" * 30),
        ("trace", home / "base", "--data", home / "a.txt", "--out", tmp_path / "t.npz", "--seed", "9" * 30),
        ("export", "merged", *places, "--strength", 2), ("export", "lora", *places, "--strength", -0.1),
    ):  # fmt: skip
        result = call(*args)
        assert result.exit_code == 2 and args[-2] in result.stderr, args
    assert not list(tmp_path.iterdir())


def test_checking_contracts_shows_nothing_of_the_libraries_that_are_tried(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging as of_transformers

    before = of_transformers.get_verbosity()
    logger = of_transformers.get_logger("transformers")
    of_transformers.set_verbosity_warning()
    logger.addHandler(caplog.handler)
    try:
        assert call("doctor", "--contracts").exit_code == 0
    finally:
        logger.removeHandler(caplog.handler)
        of_transformers.set_verbosity(before)
    assert not caplog.records


def test_an_export_that_cannot_be_shows_its_error_and_no_bar(home: Path, tmp_path: Path) -> None:
    assert "absent" in refused(
        "export", "merged", home / "absent/x/y", home / "base/family", tmp_path / "o", "--strength", 1, status=2
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    assert "exists already" in refused(
        "export", "merged", home / "base", home / "base/family", tmp_path / "there", "--strength", 1, status=2
    )


def test_what_is_not_there_or_damaged_is_a_failure(home: Path, tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK not a zip")
    assert "cannot read trace" in refused("simulate", tmp_path / "t.npz", status=1)
    assert "cannot read trace" in refused("simulate", tmp_path / "none.npz", status=1)


def test_a_gain_alone_is_an_ema_prior_and_its_rows_are_drawn_and_written(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    csv_file, plot = tmp_path / "e.csv", tmp_path / "e.svg"
    args = ("eval", home / "base", "--data", home / "a.txt", "--recency-gain", "0.1,0.3")
    result = call(*args, "--plot", plot, "--csv", csv_file, "--per-layer", "--json")
    assert result.exit_code == 0, result.stderr
    assert "Loading weights" not in result.stderr
    found = json.loads(result.stdout)
    assert [(row["recency"], row["recency_gain"]) for row in found["priors"]] == [("ema", 0.1), ("ema", 0.3)]
    for row in (found["base"], *found["priors"]):
        assert [layer["layer"] for layer in row["per_layer"]] == [0, 1, 2, 3]
        assert np.mean([layer["lru@0.25/lookup"] for layer in row["per_layer"]]) == pytest.approx(
            row["lru@0.25/lookup"]
        )
    drawn = plot.read_text()
    assert "prior on the base: ema" in drawn and "family" not in drawn
    with csv_file.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["arm"] for line in lines if not line["layer"]] == ["base", "ema 0.1", "ema 0.3"]
    assert len(lines) == 3 * 5 and float(lines[0]["lru@0.5"]) == found["base"]["lru@0.5"]


def test_simulate_has_layers_both_hit_rates_and_says_what_they_are(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    shown = call("simulate", home / "t.npz", "--per-layer", "--csv", out, "--policy", "lru", "--policy", "belady")
    assert shown.exit_code == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    for words in ("belady@0.25/lookup", "see the cache as the previous token left it", "emptied where a document"):
        assert words in text
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = layer_rows(Trace.load(home / "t.npz"), ("lru", "belady"), (0.25,))
    assert [line["layer"] for line in lines] == ["", "0", "1", "2"]
    assert [float(line["belady@0.25"]) for line in lines[1:]] == [row["belady@0.25"] for row in expected]
    assert "per_layer" not in json.loads(call("simulate", home / "t.npz", "--json").stdout)


@pytest.mark.parametrize("command", ["eval", "simulate"])
def test_help_defines_what_is_measured(command: str) -> None:
    text = " ".join(call(command, "--help").stdout.split())
    assert "token see the cache as the previous token left it" in text and "/lookup" in text
    assert ("KL(base || point)" in text) == (command == "eval")


def test_what_was_measured_is_shown_when_a_later_step_fails(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise ConfigError("no space left")

    monkeypatch.setattr(evaluation, "certify", full)
    (tmp_path / "long.txt").write_text(TEXT * 30)
    args = ("eval", home / "base", "--data", tmp_path / "long.txt", "--family", home / "base" / "family", "--certify")
    result = call(*args, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["points"] and found["ok"] is False and "no space left" in found["error"]


def test_checks_of_places_leave_nothing_and_say_why(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("old")
    check_file(tmp_path / "old.csv", "--csv", (".csv",))
    check_file(tmp_path / "new" / "deep" / "t.npz", "--out", (".npz",), new_folders=True)
    check_appendable(Path("/dev/null"), "--log")
    assert [path.name for path in tmp_path.iterdir()] == ["old.csv"] and (tmp_path / "old.csv").read_text() == "old"
    os.mkfifo(tmp_path / "pipe.csv")
    for path, words in (
        (tmp_path / "pipe.csv", "no regular file"), (tmp_path, "must end in"), (tmp_path / "a\x00.csv", "cannot be"),
        (tmp_path / "\x1b[2J.txt", r"\x1b[2J.txt"), (tmp_path / "new" / "t.csv", "No such file"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            check_file(path, "--csv", (".csv",))
        assert words in str(caught.value) and "--csv" in str(caught.value) and str(caught.value).isprintable()


def test_a_csv_has_all_keys_and_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_csv(path, [{"a": 1, "b": {"c": None, "d": 0.5}}, {"a": "x,\n", "e": True}])
    assert path.read_text() == 'a,b.c,b.d,e\n1,,0.5,\n"x,\n",,,True\n'
    with pytest.raises(ConfigError, match="cannot be written"):
        write_csv(tmp_path / "no" / "x.csv", [])
    assert [found.name for found in tmp_path.iterdir()] == ["x.csv"]
    assert list(rows.of_named_arms({"arms": {"stock": {"tpot_ms": 1.0}}})) == [{"arm": "stock", "tpot_ms": 1.0}]


def test_a_plot_without_matplotlib_or_format_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    importlib.import_module("matplotlib")
    check_plot(tmp_path / "x.PNG", "--plot")
    with pytest.raises(ConfigError, match=r"\.pdf.*\.png"):
        check_plot(tmp_path / "x.bmpx", "--plot")
