"""Which programs our library can be preloaded into, asked of ELF files that a compiler made here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from remoe_adapt.engines.llamacpp.preloadable import check_preloadable
from remoe_adapt.errors import ConfigError

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

GGML = "void ggml_backend_sched_set_eval_callback(void *s, void *c, void *u) { (void)s; (void)c; (void)u; }"
LLAMA = """
void ggml_backend_sched_set_eval_callback(void *, void *, void *);
int llama_decode(void *c) { ggml_backend_sched_set_eval_callback(c, 0, 0); return 0; }
"""
MAIN = "int llama_decode(void *); int main(void) { return llama_decode(0); }"
NO_LLAMA = "int main(void) { return 0; }"


def compile_here(folder: Path, name: str, text: str, *options: str) -> Path:
    source = folder / f"{name}.c"
    source.write_text(text)
    out = folder / name
    subprocess.run(["cc", "-o", str(out), str(source), *options], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As builds of llama.cpp are: shared throughout, ggml within libllama, all within the program."""
    folder = tmp_path_factory.mktemp("programs")
    here = (f"-L{folder}", "-Wl,-rpath,$ORIGIN")
    compile_here(folder, "libggml.so", GGML, "-shared", "-fPIC")
    compile_here(folder, "libllama.so", LLAMA, "-shared", "-fPIC", *here, "-lggml")
    whole = GGML + LLAMA.partition(";")[2]
    # Calls within one library that is linked so go to its own definitions, and none of them is looked for elsewhere.
    compile_here(folder, "libwhole.so", whole, "-shared", "-fPIC", "-fvisibility=protected")
    return {
        "shared": compile_here(folder, "shared", MAIN, *here, "-lllama", "-lggml"),
        "within": compile_here(folder, "within", whole + NO_LLAMA),
        "half": compile_here(folder, "half", MAIN, *here, "-lwhole"),
        "other": compile_here(folder, "other", NO_LLAMA),
        "static": compile_here(folder, "static", NO_LLAMA, "-static", "-nostdlib", "-Wl,-e,main"),
    }


def test_a_program_that_calls_llama_cpp_from_shared_libraries_is_taken(programs: dict[str, Path]) -> None:
    check_preloadable(programs["shared"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("within", "calls llama.cpp from a shared library"),
        ("half", "takes ggml's scheduler from a shared library"),
        ("other", "calls llama.cpp from a shared library"),
        ("static", "linked statically"),
    ],
)
def test_others_are_refused_with_the_reason(programs: dict[str, Path], name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_preloadable(programs[name])


def test_what_is_no_program_is_one_error(programs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check_preloadable(tmp_path / "missing")
    with pytest.raises(ConfigError, match="no program that may be run"):
        check_preloadable(tmp_path)
    script = tmp_path / "llama-server"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    with pytest.raises(ConfigError, match="no ELF file"):
        check_preloadable(script)
    script.chmod(0o4755)
    with pytest.raises(ConfigError, match="runs as another user"):
        check_preloadable(script)


def test_damaged_files_are_one_error(programs: dict[str, Path], tmp_path: Path) -> None:
    """Every cut, and single bytes of the header and the first tables turned over."""
    data, path = programs["shared"].read_bytes(), tmp_path / "damaged"
    path.touch()
    path.chmod(0o755)
    for at in [*range(0, 64, 3), *range(64, 800, 37), len(data) - 65, len(data) - 1]:
        path.write_bytes(data[:at])
        with pytest.raises(ConfigError):
            check_preloadable(path)
    for at in range(4, 1024, 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            check_preloadable(path)
        except ConfigError:
            continue
