"""What is usable on this machine and why not: every row is a real probe, made now."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from remoe_adapt._support import first_line, size_text, usable_cores
from remoe_adapt.device_profile import list_profiles, read_profile
from remoe_adapt.dial import GpuMemory
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation import example_folder
from remoe_adapt.gating import explain
from remoe_adapt.libraries import contracts, versions
from remoe_adapt.pressure import Measure, Sensors, os_sensors, unfit

# Seconds between the two readings that rates are taken from.
_RATES_S = 0.2
# bf16 has three digits; a wrong layout is off by more than its norm.
_INT4_TOLERANCE = 0.02
# The first word of a sensor's name -> how the controller manages without it.
_WITHOUT = {
    "cgroup": "budgets follow the machine's memory",
    "psi": "headroom, faults and the cache stand in",
    "swap": "nothing can be swapped out, so headroom and faults tell",
    "gpu": "models run on the CPU; its memory counts",
}
# The module that an extra installs -> the extra's name, and what it is for.
EXTRAS = {
    "gguf": ("export", "GGUF files"),
    "lm_eval": ("eval", "remoe eval --tasks"),
    "matplotlib": ("plot", "remoe eval --plot"),
    "prometheus_client": ("metrics", "Prometheus metrics"),
}


@dataclass(frozen=True)
class Probe:
    """One finding. `value` says what was found, `remedy` why it is missing and what to do ("" when ok); without a
    `required` one nothing works."""

    name: str
    ok: bool
    value: str
    remedy: str = ""
    required: bool = False


def examine(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[Probe]:
    """All probes, in the order of the report. A probe that itself fails is a finding, never an exception."""
    probes: list[Probe] = []
    for probe in (
        _packages, _peft_type, _processor, _memory, _cuda, _triton, _gating, _encodings, _compiler,
        lambda: _sensors(proc, cgroups), _direct_reads, _extras, _profiles, _example,
    ):  # fmt: skip
        probes += _guarded(probe)
    return probes


def as_result(probes: list[Probe]) -> dict[str, Any]:
    """`{"ok": whether all required probes hold, "rows": [...]}`."""
    return {"ok": all(p.ok for p in probes if p.required), "rows": [asdict(p) for p in probes]}


def examine_contracts() -> dict[str, Any]:
    """`{"ok", "versions", "rows"}`: what we rely on in other libraries, row by row, checked on the installed ones."""
    rows = [
        {
            "name": contract.name,
            "library": contract.library,
            "ok": (fault := contract.fault()) is None,
            "fault": fault or "",
            "relies_on": contract.relies_on,
            "used_in": list(contract.used_in),
            "interposes": contract.interposes,
        }
        for contract in contracts()
    ]
    return {"ok": all(row["ok"] for row in rows), "versions": versions(), "rows": rows}


def _found(name: str, value: str | None, missing: str, remedy: str, *, required: bool = False) -> Probe:
    """What is there, or else (value None) what is missing and what to do."""
    return Probe(name, value is not None, value or missing, "" if value else remedy, required)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _guarded(probe: Callable[[], Iterator[Probe]]) -> list[Probe]:
    try:
        return list(probe())
    except Exception as error:
        # The report must come whatever is broken, for a broken machine is when it is asked for.
        name = getattr(probe, "__name__", "probe").strip("_").replace("_", " ")
        return [Probe(name, False, f"{type(error).__name__}: {error}", "the probe itself failed: please report it")]


def _packages() -> Iterator[Probe]:
    yield Probe("python", True, platform.python_version(), required=True)
    for package in ("torch", "transformers", "peft", "accelerate", "safetensors", "psutil"):
        remedy = "pip install remoe-adapt installs it"
        yield _found(package, _version(package), "not installed", remedy, required=True)


def _peft_type() -> Iterator[Probe]:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    # The package's __init__ registers the type; without it every PEFT route fails with a bare KeyError.
    member = PeftType.__members__.get("REMOE")
    tuner = None if member is None else PEFT_TYPE_TO_TUNER_MAPPING.get(member)
    name = None if tuner is None else f"{tuner.__module__}.{tuner.__name__}"
    yield _found("peft type REMOE", name, "not registered", "`import remoe_adapt` registers it", required=True)


def _processor() -> Iterator[Probe]:
    yield Probe(
        "processor", True, f"{platform.machine()}, {usable_cores()} core(s) usable, {torch.get_num_threads()} threads"
    )


def _memory() -> Iterator[Probe]:
    import psutil

    memory = psutil.virtual_memory()
    yield Probe("memory", True, f"{size_text(memory.available)} available of {size_text(memory.total)}")


def _cuda() -> Iterator[Probe]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield Probe(f"cuda:{index}", True, f"{facts.name}, {size_text(facts.total_memory)}")
    elif torch.version.cuda is None:
        yield Probe("cuda", False, f"torch {torch.__version__} has no CUDA", "install a CUDA build of torch for a GPU")
    else:
        value = f"torch for CUDA {torch.version.cuda} sees no device"
        yield Probe("cuda", False, value, "check the driver: nvidia-smi")


def _triton() -> Iterator[Probe]:
    version = _version("triton")
    if version is None or torch.cuda.is_available():
        yield _found("triton", version, "not installed", "Linux only; without it gating runs in plain torch")
    else:
        yield Probe("triton", False, f"{version}, but no GPU", "gating runs in plain torch on the CPU")


def _gating() -> Iterator[Probe]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in devices:
        try:
            chosen, why = explain(torch.device(name))
        except ConfigError as error:
            yield Probe(f"gating on {name}", False, "no backend", str(error))
            continue
        # On a CPU the plain torch backend is the best there is.
        best = chosen == "triton" or name == "cpu"
        yield Probe(f"gating on {name}", best, f"{chosen}: {why}", "" if best else "fused kernels are faster here")


def _encodings() -> Iterator[Probe]:
    """What computes on the codes of quantised experts; without any of them experts are dequantised on use."""
    name, exact = "4-bit experts: ggml", "quantised experts are dequantised on use"
    version = _version("xllamacpp")
    # Loading it compares every type of block with our own arithmetic, and logs what is wrong.
    kernels = getattr(importlib.import_module("remoe_adapt.expert_cache.encodings"), "ggml", None)
    found = kernels() if callable(kernels) else None
    types = None if found is None else ", ".join(sorted(kind.name for kind in found.types))
    missing = "xllamacpp is not installed" if version is None else f"the kernels of xllamacpp {version} cannot be used"
    remedy = exact + "; pip install 'remoe-adapt[llamacpp]' brings the version that is known"
    yield _found(name, types and f"xllamacpp {version}: {types}", missing, remedy)
    fault = int4_fault()
    value = fault or "int4 in groups of 32, computes as it should"
    yield Probe("4-bit experts: torch int4", fault is None, value, exact if fault else "")
    if torch.cuda.is_available():
        version = _version("triton")
        yield _found("4-bit experts: triton", version, "not installed", "experts on a GPU are dequantised on use")
    else:
        yield Probe("4-bit experts: triton", False, "no GPU", "experts are computed on the CPU")


def int4_fault(kernels: Any = torch.ops.aten) -> str | None:
    """Why torch's product with int4 codes on the CPU cannot be used; None where it can."""
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(0, 16, (64, 64), generator=generator, dtype=torch.int32)
    x_TK = torch.randn(2, 64, generator=generator).bfloat16()
    # Of each group of 32: the scale, and what code 8 stands for.
    scales_GN2 = torch.stack([torch.full((2, 64), 0.125), torch.full((2, 64), 0.5)], dim=-1).bfloat16()
    try:
        packed = kernels._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
        found_TN = kernels._weight_int4pack_mm_for_cpu(x_TK, packed, 32, scales_GN2)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return first_line(error)
    expected_TN = x_TK.float() @ ((codes_NK.float() - 8) * 0.125 + 0.5).T
    off = float((found_TN.float() - expected_TN).norm() / expected_TN.norm())
    return None if off < _INT4_TOLERANCE else f"its result is wrong by {off:.1%} of its norm"


def _compiler() -> Iterator[Probe]:
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    yield _found("torch.compile on the CPU", found, "no C++ compiler", "install g++; eager mode works without")


def _sensors(proc: Path, cgroups: Path) -> Iterator[Probe]:
    """Every sensor of the controller, its value now, and why one is missing."""
    # A GPU that no model uses yet is asked too: the doctor's process ends soon, and its CUDA context with it.
    sensors = Sensors([*os_sensors(proc, cgroups), GpuMemory(proc=proc)])
    sensors.read()
    # Rates are differences of counters, so they need two readings.
    time.sleep(_RATES_S)
    reading = sensors.read()
    sensors.close()
    for name in sorted(reading.measures):
        yield Probe(f"sensor {name}", True, shown(reading.measures[name]))
    for name, why in sorted(reading.missing.items()):
        yield Probe(f"sensor {name}", False, why, _WITHOUT.get(name.split(".")[0], "the others stand in"))
    yield Probe("sensor cache", False, "no model is loaded", "a model with an expert cache brings its own")


def shown(measure: Measure) -> str:
    """A measure with its unit, as people write it."""
    value, unit = measure.value, measure.unit
    if unit == "flag":
        return "yes" if value else "no"
    if unit == "share":
        return f"{value:.1%} of the time"
    if unit == "1/s":
        return f"{value:.1f} per second"
    return size_text(value) + ("" if unit == "B" else " per second")


def _direct_reads() -> Iterator[Probe]:
    name, flag = "direct reads (O_DIRECT)", getattr(os, "O_DIRECT", None)
    # Tried where models lie: whether direct reads work depends on the file system.
    folder = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    folder = folder if folder.is_dir() and os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    if flag is None:
        yield Probe(name, False, f"not on {platform.system()}", "reads go through the page cache")
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix="remoe-doctor-") as file:
        file.write(os.urandom(mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        try:
            # Anonymous maps are page-aligned, as direct reads demand.
            with (
                os.fdopen(os.open(file.name, os.O_RDONLY | flag), "rb", 0) as source,
                mmap.mmap(-1, mmap.PAGESIZE) as buffer,
            ):
                count = os.preadv(source.fileno(), [buffer], 0)
            yield Probe(name, count == mmap.PAGESIZE, f"{count} bytes read from {folder}")
        except OSError as error:
            remedy = "put models on a disk file system; reads here go through the page cache"
            yield Probe(name, False, f"{folder}: {error.strerror}", remedy)


def _extras() -> Iterator[Probe]:
    for module, (extra, purpose) in EXTRAS.items():
        # Looked for and not imported: lm_eval and matplotlib take seconds.
        found = None if importlib.util.find_spec(module) is None else f"{module}, for {purpose}"
        remedy = f"pip install 'remoe-adapt[{extra}]' for {purpose}"
        yield _found(f"extra: {extra}", found, f"{module} is not installed", remedy)


def _profiles() -> Iterator[Probe]:
    found = list_profiles()
    read = {name: read_profile(path) for name, path in found.items()}
    broken = {name: problems[0] for name, (_, problems) in read.items() if problems}
    if not found:
        yield Probe("profiles", False, "none found", "reinstall remoe-adapt, or give profiles by path")
    elif broken:
        yield Probe("profiles", False, f"{len(broken)} of {len(found)} have faults", str(next(iter(broken.values()))))
    else:
        yield Probe("profiles", True, ", ".join(found))
    total = _most_memory()
    for name, (profile, _) in read.items():
        notes = [] if profile is None else unfit(profile, total)
        if notes:
            yield Probe(
                f"profile {name}", False, "; ".join(notes), "it is of another device: use one that fits, or a copy"
            )


def _most_memory() -> float:
    """Bytes of the machine, the cgroup or the largest GPU, whichever a model of this process could fill."""
    reading = Sensors([*os_sensors(), GpuMemory()]).read()
    host = [value for name in ("memory.total", "cgroup.limit") if (value := reading.value(name)) is not None]
    return max(min(host, default=0.0), reading.value("gpu.total") or 0.0)


def _example() -> Iterator[Probe]:
    folder = example_folder()
    if not (folder / "config.json").is_file():
        remedy = "clone the repository for the shipped model, or give `remoe demo --model M --family F`"
        yield Probe("example model", False, "examples/tiny_moe is not beside the package", remedy)
        return
    family = (folder / "family" / "family.json").is_file()
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    value = f"{folder}, {size_text(size)}, {'with' if family else 'without'} a family"
    yield Probe("example model", family, value, "" if family else "train one: remoe train (see README)")
