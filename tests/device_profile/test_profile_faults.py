"""Whatever is in a profile's file is read, or is one fault with its line and key: never an exception, never a hang."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from remoe_adapt.cli import profiles as cli_profiles
from remoe_adapt.device_profile.profile import DeviceProfile, check_profile, load_profile, read_profile
from remoe_adapt.device_profile.values import parse_size
from remoe_adapt.errors import ConfigError, ProfileError
from remoe_adapt.recency_settings import MAX_GAIN, Recency

GOOD = """\
name: mine
description: a test device
memory:
  budget: 5.5GiB
  reserve: 1GiB
expert_cache:
  budget: 0.25
  policy: lfu
strength:
  curve:
    - [0.1, 0.0]
    - [0.9, 1.0]
  max: 0.8
controller:
  sample_hz: 5
  rise_s: 0.5
pressure:
  swap:
    - 1MiB
    - 2MiB
recency:
  mode: ema
  gain: 0.1
families:
  "org/base": null
  "org/other": ./family
"""


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the profiles of whoever runs it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def write(folder: Path, content: str | bytes, name: str = "mine") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def found(path: Path) -> list[tuple[int, str]]:
    return [(problem.line, problem.key) for problem in check_profile(path)]


def many(word: str, times: int) -> str:
    return "[" + ", ".join([word] * times) + "]"


LAUGHS = f"[&a {many('x', 10)}, &b {many('*a', 10)}, &c {many('*b', 10)}, &d {many('*c', 10)}, {many('*d', 9)}]"
CHAIN = "[&a0 [x]" + "".join(f", &a{step} [*a{step - 1}]" for step in range(1, 3000)) + "]"
MEMORY = "memory:\n  budget: 5.5GiB\n  reserve: 1GiB"
# (what is replaced, by what, line, key, words): each makes this one fault.
ONE_FAULT = [
    # Lists and maps of several lines: the line is that of the part that is wrong.
    ("- [0.9, 1.0]", "- [0.05, 1.0]", 12, "strength.curve", "sort the points"),
    ("- [0.9, 1.0]", "- - 0.9\n      - 1.5", 13, "strength.curve", "from 0 up to 1"),
    ("- [0.9, 1.0]", "- [0.5, 0.5]\n    - - 0.9\n      - 0.4", 14, "strength.curve", "may only rise"),
    ("- [0.9, 1.0]", "- {0.9: 1.0}", 12, "strength.curve", "write pairs"),
    ("- [0.9, 1.0]", "- [0.9, high]", 12, "strength.curve", "'high' is not a number"),
    ("- [0.1, 0.0]\n    - [0.9, 1.0]", "0.1: 0.0\n    0.9: 1.0", 11, "strength.curve", "is not a curve"),
    ("- 2MiB", "- 2", 20, "pressure.swap", "write a number and its unit"),
    ("- 2MiB", "- 1KiB", 20, "pressure.swap", "is not below full"),
    ("./family", "\n    - a", 27, "families.org/other", "family path, hub id or null"),
    ("./family", "{path: x}", 26, "families.org/other", "family path, hub id or null"),
    ("./family", '""', 26, "families.org/other", "family path, hub id or null"),
    ("./family", "~no-such-user-here/f", 26, "families.org/other", "can be no path"),
    ('"org/other"', "7", 26, "families.7", "is not text"),
    # Keys that come twice, at every depth.
    ("  policy: lfu\n", "  policy: lfu\n  budget: 0.5\n", 9, "expert_cache.budget", "before in line 7"),
    ('"org/other"', '"org/base"', 26, "families.org/base", "before in line 25"),
    ("families:", '"name": mine\nfamilies:', 24, "name", "before in line 1"),
    ("families:", "memory: {}\nfamilies:", 24, "memory", "appears twice"),
    # Sections of another type.
    (MEMORY, "memory:\n  - 5GiB", 4, "memory", "must hold keys"),
    (MEMORY, "memory: 5GiB", 3, "memory", "must hold keys"),
    ("  budget: 0.25\n  policy: lfu\n", "", 6, "expert_cache", "must hold keys"),
    ("recency:\n  mode: ema", "recency: !!omap\n  mode: ema", 21, "recency", "must hold keys"),
    ("families:", "families: !!set", 24, "families", "is not a map"),
    ("  reserve: 1GiB\n", "", 3, "memory.reserve", "is missing"),
    ("  reserve: 1GiB", "  resreve: 1GiB", 5, "memory.resreve", "did you mean 'reserve'"),
    ("name: mine", "nme: mine", 1, "nme", "did you mean 'name'"),
    ("  policy: lfu", "  null: lfu", 8, "expert_cache.null", "is not a key of a profile"),
    ("  policy: lfu", "  7: lfu", 8, "expert_cache.7", "is not a key of a profile"),
    ("  mode: ema", "  mode: none", 23, "recency.gain", "has no effect"),
    # Aliases count where they stand; merges are not of a profile.
    ("sample_hz: 5\n  rise_s: 0.5", "sample_hz: &a 700\n  rise_s: *a", 16, "controller.rise_s", "out of range"),
    ("families:\n", "families: &f\n  x: *f\n", 25, "families.x", "holds itself"),
    ("a test device", "&d [*d]", 2, "description", "holds itself"),
    ("  policy: lfu", "  <<: {policy: lru}", 8, "expert_cache.<<", "write its keys out"),
    ("a test device", LAUGHS, 2, "description", "holds more than"),
    ("a test device", CHAIN, 2, "description", "nested deeper"),
    ("a test device", "[" * 3000 + "]" * 3000, 2, "description", "nested deeper"),
    ("a test device", "{a: " * 3000 + "}" * 3000, 2, "description.a.a", "nested deeper"),
    ("a test device", "[" * 3000, 2, "description", "nested deeper"),
    ("policy: lfu", "policy: lfu\n  ? [a]\n  : 1", 9, "expert_cache", "a key is one text"),
    # Numbers and what looks like them.
    ("gain: 0.1", "gain: " + "9" * 400, 23, "recency.gain", "a number of 400 characters"),
    ("gain: 0.1", "gain: " + "9" * 6000, 23, "recency.gain", "a number of 6000 characters"),
    ("gain: 0.1", "gain: 0x" + "f" * 6000, 23, "recency.gain", "a number of 6002 characters"),
    ("- [0.9, 1.0]", "- [0x" + "f" * 6000 + "]", 12, "strength.curve", "write pairs"),
    ("5.5GiB", "9" * 400 + "GiB", 4, "memory.budget", "more than any machine has"),
    ("5.5GiB", "9223372036854775808B", 4, "memory.budget", "more than any machine has"),
    ("5.5GiB", "5iB", 4, "memory.budget", "'5iB' is not a size"),
    ("1GiB", "1 ib", 5, "memory.reserve", "'1 ib' is not a size"),
    ("rise_s: 0.5", "rise_s: 010", 16, "controller.rise_s", "'010' is not written in plain decimal digits"),
    ("rise_s: 0.5", "rise_s: 1:30", 16, "controller.rise_s", "plain decimal digits"),
    ("rise_s: 0.5", "rise_s: 1_0", 16, "controller.rise_s", "plain decimal digits"),
    ("rise_s: 0.5", "rise_s: 0x10", 16, "controller.rise_s", "plain decimal digits"),
    ("rise_s: 0.5", "rise_s: 0b11", 16, "controller.rise_s", "plain decimal digits"),
    ("1GiB", "\u0661GiB", 5, "memory.reserve", "is not a size"),
    ("rise_s: 0.5", "rise_s: 1e1", 16, "controller.rise_s", "up to 600, as 10"),
    ("rise_s: 0.5", "rise_s: '0.5'", 16, "controller.rise_s", "up to 600, as 0.5"),
    ("sample_hz: 5", "sample_hz: 5Hz", 15, "controller.sample_hz", "is not a number"),
    ("policy: lfu", "prefetch: !!bool maybe", 8, "expert_cache.prefetch", "not a plain YAML value"),
    ("gain: 0.1", "gain: !!int ''", 23, "recency.gain", "not of its tag, int"),
    ("a test device", "!!timestamp foo", 2, "description", "not of its tag, timestamp"),
    # What no terminal should be sent, or cannot be.
    ("a test device", '"\\e[1m"', 2, "description", "cannot be shown"),
    ("a test device", '"\\ud800"', 2, "description", "cannot be shown"),
    ("  policy: lfu", '  "\\ud800\\e": lfu', 8, "expert_cache.\\ud800\\x1b", "is not a key of a profile"),
    ("a test device", "a" * (1 << 18), 1, "", "is larger than 256 KiB"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "key", "words"), ONE_FAULT, ids=map(str, range(len(ONE_FAULT))))
def test_each_is_one_fault_with_its_line_and_key(
    tmp_path: Path, old: str, new: str, line: int, key: str, words: str
) -> None:
    assert GOOD.count(old) >= 1
    problems = check_profile(write(tmp_path, GOOD.replace(old, new, 1)))
    assert len(problems) == 1, problems
    assert problems[0].line == line and problems[0].key[: len(key) if key else None] == key
    assert words in problems[0].message and len(str(problems[0])) < 600
    assert str(problems[0]).encode().isascii() or new.startswith("\u0661")


@pytest.mark.parametrize(
    ("spoil", "line", "words"),
    [
        (lambda text: text.encode("utf-16"), 1, "save YAML as UTF-8"),
        (lambda text: text.encode("utf-16-le"), 1, "save it as UTF-8"),
        (lambda text: text.replace("lfu", "lf\xfc").encode("latin-1"), 8, "save YAML as UTF-8"),
        (lambda text: text.replace("lfu", "lf\0").encode(), 8, "the character 0x0"),
        (lambda text: text.replace("lfu", "lfx").replace("\n", "\r\n").encode(), 8, "did you mean 'lfu'"),
        (lambda text: text.replace("lfu", "lfx").replace("\n", "\r").encode(), 8, "did you mean 'lfu'"),
        (lambda text: text.replace("lfu", "lfx").encode("utf-8-sig"), 8, "did you mean 'lfu'"),
        (lambda text: text.replace("lfu", "lfx").replace("a test", "a\x85\u2028 test").encode(), 8, "mean 'lfu'"),
        (lambda text: text.replace("  policy", "\tpolicy").encode(), 8, "not valid YAML"),
        (lambda text: text.encode() + b"---\nname: mine\n", 27, "found another document"),
        (lambda text: text.replace("[0.1, 0.0]", "[0.1, 0.0").encode(), 12, "a flow sequence in line 11"),
    ],
)
def test_encodings_and_line_ends(tmp_path: Path, spoil: Callable[[str], bytes], line: int, words: str) -> None:
    problems = check_profile(write(tmp_path, spoil(GOOD)))
    assert [problem.line for problem in problems] == [line] and words in problems[0].message


@pytest.mark.parametrize("change", [lambda t: t.encode("utf-8-sig"), lambda t: t.replace("\n", "\r\n").encode()])
def test_other_line_ends_and_a_mark_of_utf8_are_fine(tmp_path: Path, change: Callable[[str], bytes]) -> None:
    plain = load_profile(write(tmp_path / "plain", GOOD))
    assert load_profile(write(tmp_path / "other", change(GOOD))) == plain


def test_aliases_are_values_of_their_own(tmp_path: Path) -> None:
    text = GOOD.replace("swap:\n    - 1MiB\n    - 2MiB", "psi_io: &r [0.1, 0.5]\n  psi_memory: *r\n  stall: *r")
    ranges = load_profile(write(tmp_path, text)).pressure
    assert ranges.psi_io == ranges.psi_memory == ranges.stall == (0.1, 0.5)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("- [0.9, 1.0]", "- [0.9, high]\n    - [2, 1]").replace("./family", '3\n  "org/base": x')
    assert found(write(tmp_path, text.replace("name: mine", "name: other"))) == [
        (1, "name"), (12, "strength.curve"), (13, "strength.curve"), (27, "families.org/other"),
        (28, "families.org/base"),
    ]  # fmt: skip


def numbers(cls: type[Any] = DeviceProfile, prefix: str = "") -> list[tuple[str, str, Any]]:
    """(section, key, reader) of every key of a profile that is read by a reader."""
    keys: list[tuple[str, str, Any]] = []
    for field in fields(cls):
        read = field.metadata["read"]
        keys += numbers(read, field.metadata["key"]) if is_dataclass(read) else [(prefix, field.metadata["key"], read)]
    return keys


NUMBERS = (
    "expert_cache.budget", "expert_cache.floor", "expert_cache.regrow_s", "strength.max", "controller.sample_hz",
    "controller.rise_s", "controller.fall_s", "controller.dwell_s", "controller.deadband",
    "controller.max_swaps_per_s", "recency.gain", "recency.share",
)  # fmt: skip


@pytest.mark.parametrize("dotted", NUMBERS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.0e+300", "-1", "true", "1e999", "-1.0e-300", "[1]"])
def test_no_number_takes_what_breaks_its_use(tmp_path: Path, dotted: str, value: str) -> None:
    section, key = dotted.split(".")
    assert (section, key) in {(found[0], found[1]) for found in numbers()}
    base = "name: mine\ndescription: d\nmemory: {budget: 1GiB, reserve: 1GiB}\n"
    sections = {
        "expert_cache": {"budget": "0.2"},
        "strength": {"curve": "[[0, 0], [1, 1]]"},
        "recency": {"mode": "cost"},
    }
    sections.setdefault(section, {})[key] = value
    lines = [f"{name}: {{{', '.join(f'{k}: {v}' for k, v in keys.items())}}}" for name, keys in sections.items()]
    text = base + "\n".join(lines) + "\n"
    line = 1 + next(place for place, text_line in enumerate(text.splitlines()) if text_line.startswith(section))
    assert found(write(tmp_path, text)) == [(line, dotted)]


def test_a_share_is_of_modes_that_have_one(tmp_path: Path) -> None:
    text = GOOD.replace("mode: ema", "mode: cost")
    assert load_profile(write(tmp_path, text)).recency == Recency("cost", 0.1, 0.95, 0.25)
    with_share = text.replace("mode: cost\n", "mode: cost\n  share: 0.5\n")
    profile = load_profile(write(tmp_path, with_share))
    assert profile.recency == Recency("cost", 0.1, 0.95, 0.5)
    assert profile.as_keys()["recency"] == {"mode": "cost", "gain": 0.1, "share": 0.5}
    with pytest.raises(ProfileError, match=r"share 0\.5 has no effect in mode 'ema'; it is of cost"):
        load_profile(write(tmp_path, with_share.replace("mode: cost", "mode: ema")))


@pytest.mark.parametrize("value", ["1.0e-300", "0.00000000001", "0", "1001"])
def test_a_sampling_rate_that_no_clock_can_wait_for_is_refused(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, GOOD.replace("sample_hz: 5", f"sample_hz: {value}"))
    with pytest.raises(ProfileError, match=r"mine\.yaml:15: controller\.sample_hz: .* from 0\.01 up to 1000"):
        load_profile(path)
    assert load_profile(write(tmp_path, GOOD.replace("sample_hz: 5", "sample_hz: 0.01"))).controller.sample_hz == 0.01


def test_a_window_of_too_many_samples_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace("sample_hz: 5", "sample_hz: 100").replace("rise_s: 0.5", "rise_s: 500")
    assert found(write(tmp_path, text)) == [(16, "controller.rise_s")]


def test_the_largest_gain_is_that_of_the_prior(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, GOOD.replace("gain: 0.1", f"gain: {MAX_GAIN}")))
    assert profile.recency == Recency("ema", MAX_GAIN, 0.7)
    assert found(write(tmp_path, GOOD.replace("gain: 0.1", f"gain: {MAX_GAIN + 0.1}"))) == [(23, "recency.gain")]
    with pytest.raises(ConfigError, match=r"gain 16\.1"):
        Recency("ema", MAX_GAIN + 0.1, 0.7)
    with pytest.raises(ProfileError, match="no effect in mode 'none'"):
        load_profile(write(tmp_path, GOOD.replace("  mode: ema\n", "")))


def test_sizes_end_at_an_exbibyte() -> None:
    assert parse_size("1048576TiB") == 2**60
    with pytest.raises(ConfigError, match="write at most 1048576TiB"):
        parse_size("1048577TiB")


def test_families_are_found_beside_the_file_and_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here, elsewhere = tmp_path / "home", tmp_path / "profiles", tmp_path / "elsewhere"
    for folder in (home, here / "own" / "family", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    named = {
        "a": ("~/family", str(home / "family")),
        "b": ("own/family", str(here / "own" / "family")),
        "c": ("./own/family", str(here / "own" / "family")),
        "d": ("../elsewhere", str(here / ".." / "elsewhere")),
        "e": ("org/family", "org/family"),
        "f": ("./nowhere", "./nowhere"),
        "g": ("null", None),
        "h": ("/some/where", "/some/where"),
    }
    lines = "".join(f"  {base}: {written}\n" for base, (written, _) in named.items())
    write(here, GOOD[: GOOD.index('  "org/base"')] + lines)
    expected = {base: meant for base, (_, meant) in named.items()}
    assert dict(load_profile(here / "mine.yaml").families) == expected
    monkeypatch.chdir(tmp_path)
    relative = load_profile(Path("profiles") / "mine.yaml")
    assert dict(relative.families) == expected, "and stays right when the working folder changes"


def test_a_profile_in_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "home", GOOD)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_profile("~/mine.yaml").name == "mine"
    assert cli_profiles.check(["~/mine.yaml"])[0]["ok"]
    with pytest.raises(ProfileError, match="No such file"):
        load_profile("~no-such-user-here/mine.yaml")


def test_a_broken_file_of_the_user_does_not_break_the_list(config_home: Path) -> None:
    folder = config_home / "remoe" / "profiles"
    for name, (old, new) in {
        "deep": ("a test device", "[" * 3000 + "]" * 3000),
        "huge": ("gain: 0.1", "gain: " + "9" * 400),
        "size": ("5.5GiB", "9" * 400 + "GiB"),
        "sent": ("a test device", '"\\ud800"'),
        "utf16": ("", "\0"),
    }.items():
        write(folder, GOOD.replace("name: mine", f"name: {name}").replace(old, new, 1), name)
    write(folder, GOOD)
    (folder / "folder.yaml").mkdir()
    result, _ = cli_profiles.list_all()
    rows = result["profiles"]
    assert {name for name, row in rows.items() if row["faults"]} == {"deep", "huge", "size", "sent", "utf16", "folder"}
    assert rows["mine"]["expert_cache"]["policy"] == "lfu" and rows["server"]["faults"] == 0
    checked, told = cli_profiles.check()
    assert not checked["ok"] and len(told) == len(checked["faults"]) + 1


def test_what_is_no_regular_file_is_one_fault_and_is_not_waited_for(tmp_path: Path) -> None:
    pipe, folder, secret = tmp_path / "mine.yaml", tmp_path / "folder.yaml", write(tmp_path / "closed", GOOD)
    os.mkfifo(pipe)
    folder.mkdir()
    secret.chmod(0)
    for path, words in ((pipe, "not a regular file"), (folder, "directory"), (tmp_path / "no.yaml", "No such file")):
        assert words in str(check_profile(path)[0])
    if os.getuid():
        assert "ermission denied" in str(check_profile(secret)[0])
    assert "\\x1b[31m" in str(check_profile(tmp_path / "\x1b[31m.yaml")[0]), "no terminal is sent what a name holds"


def test_a_user_without_a_home_has_the_shipped_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    assert load_profile("server").name == "server"


def mutated(text: str, random: Random) -> str:
    """Some bytes of a profile cut, doubled, or replaced by what YAML may mean something else by."""
    odd = ("1e999", ".nan", "0x10", "010", "1:30", "5iB", "9" * 400, "null", "[", "]", "{", "}", ":", "- ", "&a ", "*a",
           "!!int ", "!!binary ", "!!set ", "<<: ", "? ", "| ", "'", '"', "%", "\t", "\n", "\0", "\u2028", "nme", "=",
           "2001-13-45", "---\n", "{a: " * 30)  # fmt: skip
    for _ in range(random.choice((1, 1, 2, 5))):
        begin = random.randrange(len(text))
        end = min(len(text), begin + random.choice((0, 1, 5, 40)))
        middle = random.choice(("", random.choice(odd), text[begin:end] * 20))
        text = text[:begin] + middle + text[end:] or " "
    return text


def test_every_mutation_of_a_shipped_profile_is_a_profile_or_its_faults(tmp_path: Path, repo_root: Path) -> None:
    random, kinds = Random(0), set[bool]()
    shipped = sorted((repo_root / "profiles").glob("*.yaml"))
    for _ in range(150):
        chosen = random.choice(shipped)
        path = write(tmp_path, mutated(chosen.read_text(encoding="utf-8"), random), chosen.stem)
        profile, problems = read_profile(path)
        assert (profile is None) == bool(problems)
        assert all("\n" not in str(problem) and len(str(problem)) < 900 for problem in problems)
        kinds.add(profile is None)
    assert kinds == {True, False}
