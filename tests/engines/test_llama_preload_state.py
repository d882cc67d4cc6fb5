"""The preloaded library follows what a program does with its sequences, and stays off where it must not act."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")
from gguf_writer import small_model, write_gguf
from preloaded_child import FIRST, SECOND, SHIFT, THIRD, memory, shift

from remoe_adapt.engines.llamacpp.in_process import LlamaModel
from remoe_adapt.engines.llamacpp.prior.control import ENVIRONMENT, PreloadStatus, PriorControl
from remoe_adapt.engines.llamacpp.serve import preload_library
from remoe_adapt.recency_settings import Recency

GAIN = 1.5
Found = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(small_model("qwen3moe"), "qwen3moe", tmp_path_factory.mktemp("state") / "model.gguf")


def run(model: Path, control: Path, out: Path, *names: str) -> tuple[Found, str]:
    """Logits of each script, and what the library said."""
    child = Path(__file__).parent.parent / "support" / "preloaded_child.py"
    environment = {"LD_PRELOAD": str(preload_library()), ENVIRONMENT: str(control), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(child), str(model), str(out), *names], env=os.environ | environment, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(out) as found:
        return {name: found[name] for name in found}, done.stderr


@pytest.fixture(scope="module")
def followed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, PreloadStatus]:
    folder = tmp_path_factory.mktemp("followed")
    with PriorControl.create(folder / "control") as control:
        control.command(Recency.of("ema", GAIN))
        found, _ = run(model, control.path, folder / "out.npz")
        return found, control.status()


def plain(model: Path, text: Callable[[LlamaModel], None], gain: float = GAIN) -> NDArray[np.float32]:
    """Logits of THIRD behind a text, by LlamaModel's own prior."""
    with LlamaModel(model, context_tokens=256, sequences=2, recency="ema", gain=gain) as own:
        text(own)
        return np.concatenate([own.decode([token]) for token in THIRD])


@pytest.mark.parametrize("name", ["cut", "copied", "restored", "reopened"])
def test_a_sequence_goes_on_from_what_is_left_of_it(
    model: Path, followed: tuple[Found, PreloadStatus], name: str
) -> None:
    found = followed[0][name]
    np.testing.assert_allclose(found, plain(model, lambda own: own.decode(FIRST)), atol=2e-5)
    assert np.abs(found - plain(model, lambda own: own.decode(FIRST), gain=0.0)).max() > 1e-2


@pytest.mark.parametrize("name", ["shifted", "shifted_and_cut"])
def test_a_context_shift_moves_positions_and_not_what_was_chosen(
    model: Path, followed: tuple[Found, PreloadStatus], name: str
) -> None:
    def text(own: LlamaModel) -> None:
        own.decode(FIRST)
        shift(own)
        assert own._prior is not None
        # To the prior of this loop the positions go on as if nothing had been shifted.
        rows = own._prior.rows
        own._prior.rows = lambda owners, positions: rows(owners, [at + SHIFT for at in positions])  # type: ignore[method-assign]

    np.testing.assert_allclose(followed[0][name], plain(model, text), atol=2e-5)


def test_what_cannot_be_followed_begins_anew_and_is_counted(model: Path, followed: tuple[Found, PreloadStatus]) -> None:
    def text(own: LlamaModel) -> None:
        own.decode(FIRST)
        own._lib.llama_memory_seq_div(memory(own), 0, 0, -1, 2)
        own.positions[0] = (len(FIRST) + 1) // 2
        assert own._prior is not None
        own._prior.reset()
        rows = own._prior.rows
        own._prior.rows = lambda owners, positions: rows(owners, [at - (len(FIRST) + 1) // 2 for at in positions])  # type: ignore[method-assign]

    found, status = followed
    np.testing.assert_allclose(found["unknown"], plain(model, text), atol=2e-5)
    assert status.state == "on" and status.counters["restarts"] == 1 and status.counters["lost_rows"] == 0
    assert status.counters["refused_rows"] == 0 and len(SECOND) > 0


@pytest.mark.parametrize("what", ["another program's", "cut short", "of another version", "a folder", "a link"])
def test_a_control_file_that_is_none_leaves_the_engine_as_it_was(model: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "control"
    PriorControl.create(path).close()
    data = bytearray(path.read_bytes())
    if what == "another program's":
        data[:8] = b"\x7fELF\0\0\0\0"
    elif what == "of another version":
        data[8] = 99
    path.write_bytes(data[:5000] if what == "cut short" else data)
    if what == "a folder":
        path.unlink()
        path.mkdir()
    elif what == "a link":
        path.rename(tmp_path / "there")
        path.symlink_to(tmp_path / "there")
    before = None if path.is_dir() else path.read_bytes()
    found, said = run(model, path, tmp_path / "out.npz", "cut")
    assert said.count("the recency prior stays off") == 1
    np.testing.assert_array_equal(found["cut"], plain(model, lambda own: own.decode(FIRST), gain=0.0))
    assert before is None or path.read_bytes() == before


def test_without_a_control_file_one_is_made_at_gain_0(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "control"
    found, said = run(model, path, tmp_path / "out.npz", "cut")
    assert "remoe" not in said and path.stat().st_mode & 0o777 == 0o600
    np.testing.assert_array_equal(found["cut"], plain(model, lambda own: own.decode(FIRST), gain=0.0))
    with PriorControl(path) as control:
        status = control.status()
    assert (status.state, status.gain, status.layers) == ("on", 0.0, 3) and status.counters["tokens"] > 0
