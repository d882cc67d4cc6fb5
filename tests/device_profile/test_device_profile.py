"""Profiles: the shipped ones load, every fault names file, line, key and remedy, and the curve is interpolated."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest

from remoe_adapt.device_profile.profile import (
    DeviceProfile,
    PressureProfile,
    check_profile,
    list_profiles,
    load_profile,
    user_profile_dir,
)
from remoe_adapt.device_profile.values import parse_size
from remoe_adapt.errors import ConfigError, ProfileError, RemoeError
from remoe_adapt.eviction.policy import ONLINE
from remoe_adapt.recency_settings import Recency

SHIPPED = ("laptop-16gb", "orin-8gb", "orin-nx-16gb", "rpi5-8gb", "rtx-24gb", "rtx-8gb", "server")

GOOD = """\
name: mine
description: a test device
memory: {budget: 5.5GiB, reserve: 1GiB}
expert_cache: {budget: 0.25, policy: lfu, scope: layer, prefetch: false, direct_io: true}
strength:
  curve: [[0.1, 0.0], [0.5, 0.25], [0.9, 1.0]]
  max: 0.8
controller: {sample_hz: 5, rise_s: 0.5, fall_s: 10, dwell_s: 2, deadband: 0.05}
recency: {mode: ema, gain: 0.1}
families: {"org/base": null, "org/other": ./family}
"""


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the profiles of whoever runs it."""
    home = tmp_path / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    return home


def write(folder: Path, text: str, name: str = "mine") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_shipped_profiles_are_the_seven_and_all_load() -> None:
    assert tuple(list_profiles()) == SHIPPED
    for name, path in list_profiles().items():
        assert check_profile(path) == []
        profile = load_profile(name)
        assert profile.name == name and profile.description
        assert profile.strength_at(0.0) == 0.0, "plenty of memory must mean the base model"
        assert profile.strength_at(1.0) > 0.0
        assert profile.expert_cache.policy in ONLINE


def test_orin_example_of_the_design_is_read_exactly() -> None:
    profile = load_profile("orin-8gb")
    assert profile.memory.budget_bytes == 5_905_580_032 and profile.memory.reserve_bytes == 2**30
    assert profile.expert_cache.share == 0.25 and profile.expert_cache.direct_io is True
    assert profile.controller.sample_hz == 5.0 and profile.controller.fall_s == 10.0
    assert profile.recency == Recency("resident", 0.0, 0.0)
    assert profile.as_keys()["recency"] == {"mode": "resident", "gain": 0.0}
    assert load_profile("server").as_keys()["recency"] == {"mode": "none", "gain": 0.0}
    assert profile.families["Qwen/Qwen1.5-MoE-A2.7B"] is None


def test_curve_is_linear_between_points_constant_outside_and_capped(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, GOOD))
    expected = {0.0: 0.0, 0.1: 0.0, 0.3: 0.125, 0.5: 0.25, 0.7: 0.625, 0.75: 0.71875, 0.9: 0.8, 1.0: 0.8}
    for pressure, strength in expected.items():
        assert profile.strength_at(pressure) == pytest.approx(strength, abs=1e-12), pressure
    for bad in (-0.01, 1.01, math.nan, math.inf):
        with pytest.raises(ConfigError, match="pressure runs from 0"):
            profile.strength_at(bad)


def test_profile_values_are_immutable_and_travel(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, GOOD))
    with pytest.raises(AttributeError):
        profile.name = "other"  # type: ignore[misc]
    assert copy.deepcopy(profile) == profile
    assert pickle.loads(pickle.dumps(profile)) == profile  # noqa: S301 - our own bytes: worker processes receive profiles
    assert len({profile, copy.deepcopy(profile)}) == 1


def test_optional_sections_have_the_documented_defaults(tmp_path: Path) -> None:
    text = "name: mine\ndescription: d\nmemory: {budget: null, reserve: 0B}\nexpert_cache: {budget: 1}\n"
    profile = load_profile(write(tmp_path, text + "strength: {curve: [[0, 0], [1, 1]]}\n"))
    assert profile.memory.budget_bytes is None and profile.memory.reserve_bytes == 0
    assert profile.expert_cache.policy == "lrfu" and profile.strength.max == 1.0
    assert (profile.controller.rise_s, profile.controller.dwell_s) == (0.5, 2.0)
    assert profile.recency is None and profile.families == {}
    assert (profile.expert_cache.floor, profile.expert_cache.regrow_s) == (0.1, 30.0)
    assert profile.controller.max_swaps_per_s == 4.0
    assert profile.pressure == PressureProfile() and profile.pressure.psi_io is None


def test_pressure_ranges_are_read_with_their_units(tmp_path: Path) -> None:
    ranges = "pressure: {faults: [10, 100], swap: [1MiB, 2MiB], psi_io: [0.1, 1], stall: null}\n"
    found = load_profile(write(tmp_path, GOOD + ranges)).pressure
    assert found.faults == (10.0, 100.0) and found.swap == (2.0**20, 2.0**21)
    assert found.psi_io == (0.1, 1.0) and found.stall is None
    assert found.cache_loss == PressureProfile().cache_loss


# (a line of the new keys, key, words of the message); each is line 11 of its file.
PRESSURE_FAULTS = [
    ("pressure: {fault: [1, 2]}", "pressure.fault", "did you mean 'faults'"),
    ("pressure: {faults: 5}", "pressure.faults", "write [from, full], or null"),
    ("pressure: {faults: [1, 2, 3]}", "pressure.faults", "write [from, full], or null"),
    ("pressure: {faults: [2, 1]}", "pressure.faults", "from 2 is not below full 1"),
    ("pressure: {faults: [1, .nan]}", "pressure.faults", "is not a number"),
    ("pressure: {stall: [0.5, 1.5]}", "pressure.stall", "write a number from 0 up to 1"),
    ("pressure: {swap: [1, 2MiB]}", "pressure.swap", "write a number and its unit"),
    ("pressure: high", "pressure", "must hold keys"),
]


@pytest.mark.parametrize(("line", "key", "words"), PRESSURE_FAULTS, ids=[fault[0] for fault in PRESSURE_FAULTS])
def test_faults_of_pressure_ranges_name_their_line(tmp_path: Path, line: str, key: str, words: str) -> None:
    problems = check_profile(write(tmp_path, f"{GOOD}{line}\n"))
    assert [(problem.line, problem.key) for problem in problems] == [(11, key)] and words in problems[0].message


def test_the_stated_time_of_return(tmp_path: Path) -> None:
    assert load_profile(write(tmp_path, GOOD)).recovery_s == 30 + 10 + 2 + 5 / 5


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0B", 0), ("5.5GiB", 5905580032), ("512 MiB", 2**29), ("8GB", 8 * 10**9), ("1kb", 1000), ("2tib", 2**41)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["5.5", "GiB", "-1GiB", "5 giga", "1GiB extra", "", "1e3MiB", 5, 5.5, None, True, ["1GiB"]]
)
def test_sizes_without_a_unit_are_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="write a number and its unit"):
        parse_size(text)


# (what is replaced, by what, line of the fault, key, words of the message)
FAULTS = [
    ("budget: 5.5GiB", "budgt: 5.5GiB", 3, "memory.budgt", "did you mean 'budget'"),
    ("families:", "famlies:", 10, "famlies", "did you mean 'families'"),
    ("families:", "zzz:", 10, "zzz", "the keys here are name, description"),
    ("reserve: 1GiB", "reserve: 1", 3, "memory.reserve", "write a number and its unit"),
    ("budget: 5.5GiB", "budget: 0B", 3, "memory.budget", "write a size above 0"),
    ("policy: lfu", "policy: lruf", 4, "expert_cache.policy", "did you mean 'lr"),
    ("policy: lfu", "policy: belady", 4, "expert_cache.policy", "not one of lru, lfu, lrfu"),
    ("budget: 0.25", "budget: 0", 4, "expert_cache.budget", "write a number above 0 up to 1"),
    ("budget: 0.25", "budget: 25%", 4, "expert_cache.budget", "is not a number"),
    ("direct_io: true", "direct_io: 'true'", 4, "expert_cache.direct_io", "write true or false"),
    ("max: 0.8", "max: .nan", 7, "strength.max", "is not a number"),
    ("max: 0.8", "max: true", 7, "strength.max", "is not a number"),
    ("max: 0.8", "max: 0.8\n  max: 0.9", 8, "strength.max", "appears twice"),
    ("[0.5, 0.25]", "[0.05, 0.25]", 6, "strength.curve", "sort the points"),
    ("[0.5, 0.25]", "[0.1, 0.25]", 6, "strength.curve", "sort the points"),
    ("[0.9, 1.0]", "[0.9, 0.2]", 6, "strength.curve", "may only rise"),
    ("[0.9, 1.0]", "[0.9, 1.5]", 6, "strength.curve", "write a number from 0 up to 1"),
    ("[0.9, 1.0]", "[0.9]", 6, "strength.curve", "write pairs"),
    ("[[0.1, 0.0], [0.5, 0.25], [0.9, 1.0]]", "[]", 6, "strength.curve", "write pairs"),
    ("direct_io: true", "direct_io: true, floor: 0", 4, "expert_cache.floor", "above 0 up to 1"),
    ("direct_io: true", "direct_io: true, regrow_s: -1", 4, "expert_cache.regrow_s", "write a number from 0"),
    ("dwell_s: 2", "dwell_s: 2, max_swaps_per_s: 0", 8, "controller.max_swaps_per_s", "from 0.001 up to 1000"),
    ("sample_hz: 5", "sample_hz: 0", 8, "controller.sample_hz", "from 0.01 up to 1000"),
    ("rise_s: 0.5", "rise_s: -1", 8, "controller.rise_s", "write a number from 0"),
    ("mode: ema", "mode: none", 9, "recency.gain", "has no effect in mode 'none'"),
    ('"org/base": null', '"org/base": 3', 10, "families.org/base", "family path, hub id or null"),
    ('{"org/base": null, "org/other": ./family}', "[a]", 10, "families", "is not a map"),
    ("name: mine", "name: yours", 1, "name", "call the file yours.yaml"),
    ("name: mine", "name: 7", 1, "name", "is not text"),
    ("memory: {budget: 5.5GiB, reserve: 1GiB}", "memory: 5GiB", 3, "memory", "must hold keys (budget, reserve)"),
    ("memory: {budget: 5.5GiB, reserve: 1GiB}", "memory: {budget: 1GiB}", 3, "memory.reserve", "is missing"),
    ("description: a test device\n", "", 1, "description", "is missing"),
    ("gain: 0.1", "gain: !!python/object/apply:os.getcwd []", 9, "recency.gain", "not a plain YAML value"),
    ("families: {", "families: {? [a] : null, ", 10, "families", "a key is one text"),
    ("gain: 0.1}", "gain: 0.1", 10, "", "is not valid YAML"),
    ("max: 0.8", "max: *nowhere", 7, "", "is not valid YAML"),
]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "words"), FAULTS, ids=[f"{f[3]}-{i}" for i, f in enumerate(FAULTS)]
)
def test_each_fault_names_file_line_key_and_remedy(
    tmp_path: Path, old: str, new: str, line: int, key: str, words: str
) -> None:
    assert GOOD.count(old) == 1
    path = write(tmp_path, GOOD.replace(old, new))
    problems = check_profile(path)
    assert [(p.line, p.key) for p in problems][:1] == [(line, key)], problems
    assert words in problems[0].message
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}:{line}: {key}") and words in str(caught.value)
    assert isinstance(caught.value, RemoeError) and isinstance(caught.value, ValueError)


def test_check_reports_all_problems_and_load_counts_the_rest(tmp_path: Path) -> None:
    text = GOOD.replace("policy: lfu", "policy: x").replace("max: 0.8", "max: 2").replace("gain: 0.1", "gian: 0.1")
    path = write(tmp_path, text)
    assert [(p.line, p.key) for p in check_profile(path)] == [
        (4, "expert_cache.policy"),
        (7, "strength.max"),
        (9, "recency.gian"),
    ]
    with pytest.raises(ProfileError, match=r"and 2 more: `remoe profiles check"):
        load_profile(path)


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\x80\x02\xff weights")
    for path, words in (
        (binary, "is not UTF-8"),
        (write(tmp_path, "", "empty"), "is empty"),
        (write(tmp_path, "a\x01b", "control"), "holds the character 0x1"),
        (write(tmp_path, "- a\n- b\n", "list"), "must hold keys"),
        (write(tmp_path, "a: 1\n---\nb: 2\n", "two"), "not valid YAML"),
        (tmp_path / "absent.yaml", "No such file"),
    ):
        assert len(check_profile(path)) == 1
        with pytest.raises(ProfileError, match=words):
            load_profile(path)


def test_values_that_grow_when_expanded_stay_short_in_messages(tmp_path: Path) -> None:
    lines = ["name: [x]", "description: &a0 [x, x, x, x, x, x, x, x, x]"]
    nested = "&b0 [y, y, y, y, y, y, y, y]"
    for level in range(1, 9):
        nested = f"&b{level} [{nested}" + f", *b{level - 1}" * 7 + "]"
    path = write(tmp_path, "\n".join([*lines, f"families: {nested}", ""]))
    assert all(len(problem.message) < 400 for problem in check_profile(path))


def test_user_folder_is_searched_and_hides_shipped_names(config_home: Path) -> None:
    folder = config_home / "remoe" / "profiles"
    assert user_profile_dir() == folder
    mine = write(folder, GOOD)
    override = write(folder, GOOD.replace("name: mine", "name: server"), "server")
    assert list_profiles()["mine"] == mine and list_profiles()["server"] == override
    assert load_profile("mine").expert_cache.policy == "lfu"
    assert load_profile("server").description == "a test device"


def test_relative_xdg_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("relative/dir", ""):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert user_profile_dir() == tmp_path / ".config" / "remoe" / "profiles"


def test_unknown_name_suggests_a_known_one() -> None:
    with pytest.raises(ProfileError, match="did you mean 'orin-8gb'"):
        load_profile("orin8gb")
    with pytest.raises(ProfileError, match="known are laptop-16gb"):
        load_profile("toaster")


def test_a_file_named_like_a_profile_in_the_working_folder_is_not_picked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, GOOD.replace("name: mine", "name: server"), "server")
    monkeypatch.chdir(tmp_path)
    assert load_profile("server").strength.max == 0.5
    assert isinstance(load_profile("server.yaml"), DeviceProfile)
    assert load_profile(Path("server.yaml")).description == "a test device"
