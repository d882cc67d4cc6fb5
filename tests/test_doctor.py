"""The doctor's probes are real: what they say holds on this machine, and a broken place is a finding, not a crash."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
import torch

from remoe_adapt import doctor
from remoe_adapt.device_profile import list_profiles
from remoe_adapt.doctor import Probe, as_result, examine
from remoe_adapt.gating import dispatch
from remoe_adapt.report import doctor_table


@pytest.fixture(scope="module")
def probes() -> dict[str, Probe]:
    return {probe.name: probe for probe in examine()}


def test_required_parts_are_found_with_their_versions(probes: dict[str, Probe]) -> None:
    for package in ("torch", "transformers", "peft", "safetensors", "psutil"):
        assert probes[package] == Probe(package, True, importlib.metadata.version(package), required=True)
    assert probes["peft type REMOE"].ok and "RemoeModel" in probes["peft type REMOE"].value


def test_devices_agree_with_torch(probes: dict[str, Probe]) -> None:
    if torch.cuda.is_available():
        assert probes["cuda:0"].ok
    else:
        assert not probes["cuda"].ok and probes["cuda"].remedy
        assert not probes["triton"].ok


def test_it_says_which_gates_run_and_why(probes: dict[str, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes["gating on cpu"] == Probe("gating on cpu", True, "torch: tensors are on cpu: Triton needs a GPU")
    monkeypatch.setattr(dispatch, "_forced", "cuda")
    broken = next(probe for probe in examine() if probe.name == "gating on cpu")
    assert not broken.ok and "'cuda': give one of auto, torch, triton" in broken.remedy


def test_profiles_are_counted_and_faults_named(
    probes: dict[str, Probe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert probes["profiles"].value == ", ".join(list_profiles())
    (tmp_path / "remoe" / "profiles").mkdir(parents=True)
    (tmp_path / "remoe" / "profiles" / "mine.yaml").write_text("name: mine\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    broken = next(probe for probe in examine() if probe.name == "profiles")
    assert not broken.ok and "mine.yaml" in broken.remedy


def test_missing_extras_name_their_install_command(probes: dict[str, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "no_such_module_anywhere", ("eval", "nothing"))
    missing = [probe for probe in examine() if "no_such_module_anywhere" in probe.value]
    assert missing == [
        Probe(
            "extra: eval", False, "no_such_module_anywhere is not installed",
            "pip install 'remoe-adapt[eval]' for nothing",
        )
    ]  # fmt: skip


def fake_machine(root: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc", root / "sys"


PSI = "some avg10=1.50 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


def test_limit_and_pressure_of_the_own_v2_group(tmp_path: Path) -> None:
    proc, cgroups = fake_machine(
        tmp_path, "0::/box/me\n",
        {"sys/box/me/memory.max": f"{3 << 30}\n", "sys/box/me/memory.pressure": PSI, "proc/pressure/memory": PSI},
    )  # fmt: skip
    found = {probe.name: probe for probe in examine(proc, cgroups)}
    assert found["cgroup v2 memory"].value == "limit 3.00 GiB"
    assert found["PSI of this cgroup"].ok and "avg10=1.50" in found["PSI of this cgroup"].value
    assert found["memory pressure (PSI)"].ok
    assert not found["cgroup v1 memory"].ok


def test_hybrid_tree_with_a_v1_limit(tmp_path: Path) -> None:
    proc, cgroups = fake_machine(
        tmp_path, "5:cpu,memory:/jobs\n0::/\n",
        {"sys/memory/jobs/memory.limit_in_bytes": str(1 << 30), "sys/unified/cgroup.procs": ""},
    )  # fmt: skip
    found = {probe.name: probe for probe in examine(proc, cgroups)}
    assert found["cgroup v1 memory"].value == "limit 1.00 GiB"
    assert found["cgroup v2 memory"].value == "no memory controller"
    assert not found["memory pressure (PSI)"].ok and not found["PSI of this cgroup"].ok


def test_unlimited_groups_say_so(tmp_path: Path) -> None:
    proc, cgroups = fake_machine(
        tmp_path, "5:memory:/\n0::/\n",
        {"sys/memory/memory.limit_in_bytes": "9223372036854771712", "sys/unified/memory.max": "max"},
    )  # fmt: skip
    found = {probe.name: probe for probe in examine(proc, cgroups)}
    assert found["cgroup v1 memory"].value == found["cgroup v2 memory"].value == "no limit"


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    found = {probe.name: probe for probe in examine(tmp_path, tmp_path)}
    assert not found["cgroup memory limit"].ok
    assert found["torch"].ok


def test_a_failing_probe_is_a_finding(tmp_path: Path) -> None:
    proc, cgroups = fake_machine(tmp_path, "not a cgroup line\n", {})
    found = [probe for probe in examine(proc, cgroups) if "report it" in probe.remedy]
    assert found and all(not probe.ok for probe in found)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT on this system")
def test_direct_reads_are_tried_and_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    probe = next(probe for probe in examine() if probe.name == "direct reads (O_DIRECT)")
    assert str(tmp_path) in probe.value
    assert list(tmp_path.iterdir()) == []


def test_result_is_json_and_a_table(probes: dict[str, Probe]) -> None:
    result = as_result(list(probes.values()))
    assert result["ok"] is True
    assert doctor_table(json.loads(json.dumps(result))["rows"]).row_count == len(probes)
    broken = [Probe("torch", False, "", "", required=True), Probe("cuda", False, "")]
    assert as_result(broken)["ok"] is False
    assert as_result(broken[1:])["ok"] is True
