"""The doctor's probes are real: what they say holds on this machine, and a broken place is a finding, not a crash."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
import torch
from fake_cgroups import below, fake_machine, psi, v2_group

from remoe_adapt.cli import doctor
from remoe_adapt.cli.doctor import Probe, as_result, examine, shown
from remoe_adapt.cli.report import doctor_table
from remoe_adapt.device_profile.profile import list_profiles
from remoe_adapt.pressure.reading import Measure

GIB = 1 << 30


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
    monkeypatch.setattr(importlib.import_module("remoe_adapt.gating.backend"), "_forced", "cuda")
    broken = next(probe for probe in examine() if probe.name == "gating on cpu")
    assert not broken.ok and "'cuda': give one of auto, torch, triton" in broken.remedy


def test_it_says_what_computes_on_codes(probes: dict[str, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ggml", "torch int4", "triton"):
        probe = probes[f"4-bit experts: {name}"]
        assert probe.ok != bool(probe.remedy) and not probe.required
    assert probes["4-bit experts: triton"].ok == torch.cuda.is_available()
    ggml = getattr(importlib.import_module("remoe_adapt.expert_cache.encodings"), "ggml", None)
    if callable(ggml) and ggml() is not None:
        version = importlib.metadata.version("xllamacpp")
        assert probes["4-bit experts: ggml"].value.startswith(f"xllamacpp {version}: ")
        assert {"q4_0", "q4_1", "q8_0", "mxfp4"} <= {*probes["4-bit experts: ggml"].value.split(": ")[1].split(", ")}

    class Wrong:
        """torch's kernels, with codes that stand for something else."""

        _convert_weight_to_int4pack_for_cpu = staticmethod(
            lambda codes_NK, tiles: torch.ops.aten._convert_weight_to_int4pack_for_cpu(15 - codes_NK, tiles)
        )
        _weight_int4pack_mm_for_cpu = staticmethod(torch.ops.aten._weight_int4pack_mm_for_cpu)

    if probes["4-bit experts: torch int4"].ok:
        assert doctor.int4_fault() is None and "is wrong by" in str(doctor.int4_fault(Wrong))
    assert "has no attribute" in str(doctor.int4_fault(object()))


def test_a_profile_of_a_larger_device_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "remoe" / "profiles").mkdir(parents=True)
    text = (list_profiles()["orin-8gb"]).read_text(encoding="utf-8").replace("name: orin-8gb", "name: huge")
    text = text.replace("{budget: 5.5GiB, reserve: 1GiB}", "{budget: 2000TiB, reserve: 1000TiB}")
    (tmp_path / "remoe" / "profiles" / "huge.yaml").write_text(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = {probe.name: probe for probe in examine()}
    assert found["profiles"].ok and not found["profile huge"].ok and found["profile huge"].remedy
    assert "memory.reserve 1024000.00 GiB is more than a quarter of the" in found["profile huge"].value
    assert "memory.budget 2048000.00 GiB is more than the" in found["profile huge"].value


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


def test_every_sensor_is_shown_with_its_value_or_why_not(tmp_path: Path) -> None:
    files = below("sys/me", v2_group(3 * GIB, GIB)) | {"sys/me/memory.pressure": psi(0, some_avg10=1.5)}
    proc, cgroups = fake_machine(tmp_path, "0::/me\n", files | {"proc/pressure/memory": psi(9)})
    found = {probe.name: probe for probe in examine(proc, cgroups)}
    assert found["sensor cgroup.limit"].value == "3.00 GiB" and found["sensor cgroup.headroom"].value == "2.00 GiB"
    assert found["sensor psi.cgroup.memory.some_avg10"].value == "1.5% of the time"
    assert found["sensor psi.memory.some"].value == "0.0% of the time"
    assert not found["sensor psi.io"].ok and "psi=1" in found["sensor psi.io"].value
    assert not found["sensor process.faults"].ok and "No such file" in found["sensor process.faults"].value
    assert found["sensor memory.available"].ok
    assert not found["sensor cache"].ok
    assert found["sensor gpu.free" if torch.cuda.is_available() else "sensor gpu"].ok is torch.cuda.is_available()


def test_sensors_of_this_machine_have_values_and_reasons(probes: dict[str, Probe]) -> None:
    sensors = [probe for probe in probes.values() if probe.name.startswith("sensor ")]
    assert len(sensors) > 8 and probes["sensor memory.available"].ok
    assert all(probe.value and (probe.ok or probe.remedy) for probe in sensors)
    assert not any("second sample" in probe.value for probe in sensors), "rates are of two samples"


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    found = {probe.name: probe for probe in examine(tmp_path, tmp_path)}
    assert not found["sensor cgroup"].ok and "no cgroup can be read" in found["sensor cgroup"].value
    assert found["torch"].ok


def test_measures_are_shown_with_their_units() -> None:
    for value, unit, text in (
        (1.0, "flag", "yes"), (2.5, "1/s", "2.5 per second"), (2.0**30, "B/s", "1.00 GiB per second"),
        (4.0 * 2**20, "B/s", "4.0 MiB per second"), (1536.0, "B/s", "1.5 KiB per second"), (0.0, "B", "0 B"),
        (300.0 * 2**20, "B", "300.0 MiB"),
    ):  # fmt: skip
        assert shown(Measure(value, unit, 0.0)) == text


def test_a_failing_probe_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Path]:
        raise RuntimeError("no profiles today")

    monkeypatch.setattr(doctor, "list_profiles", broken)
    found = [probe for probe in examine() if "report it" in probe.remedy]
    assert [probe.value for probe in found] == ["RuntimeError: no profiles today"]


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
