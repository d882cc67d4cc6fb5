"""Traces: what is refused, what survives a round trip, and the phone CSV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_adapt.errors import TraceError
from remoe_adapt.traces.trace import Trace

META = {"num_experts": 8, "model": "m", "text": "t", "phase": "decode", "document_starts": [0, 3]}
CSV_HEADER = """# route_trace v1
# model=/somewhere/tiny.gguf arch=x n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=200 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""


def experts_LTK() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.random((2, 5, 8)).argsort(axis=2)[:, :, :3].astype(np.int16)


def csv_rows() -> list[str]:
    """Turn 0: a prefill and a decode token; turn 1: one decode token. Expert = (turn + step + layer + slot) % 4."""
    rows = []
    for turn, phase, step in ((0, 0, 0), (0, 1, 1), (1, 1, 0)):
        for layer in range(2):
            for slot in range(2):
                rows.append(f"{turn},{phase},{step},{layer},{slot},{(turn + step + layer + slot) % 4},0.5,0,0")
    return rows


def write_csv(path: Path, rows: list[str], header: str = CSV_HEADER) -> Path:
    path.write_text(header + "".join(row + "\n" for row in rows))
    return path


def test_properties() -> None:
    trace = Trace(experts_LTK(), META)
    assert (trace.num_layers, trace.num_tokens, trace.top_k, trace.num_experts) == (2, 5, 3, 8)
    assert trace.document_starts == (0, 3)
    assert Trace(experts_LTK(), {"num_experts": 8}).document_starts == (0,)


def test_is_frozen_and_keeps_its_own_meta() -> None:
    meta: dict[str, Any] = {"num_experts": 8, "document_starts": [0, 3]}
    experts = experts_LTK()
    trace = Trace(experts, meta)
    meta["document_starts"].append(4)
    assert trace.document_starts == (0, 3)
    with pytest.raises(ValueError, match="read-only"):
        trace.experts[0, 0, 0] = 1
    assert experts.flags.writeable


def test_round_trip(tmp_path: Path) -> None:
    trace = Trace(experts_LTK(), META | {"note": {"kept": [1, 2.5, None]}})
    trace.save(tmp_path / "t.npz")
    loaded = Trace.load(tmp_path / "t.npz")
    np.testing.assert_array_equal(loaded.experts, trace.experts)
    assert loaded.experts.dtype == np.int16
    assert loaded.meta == trace.meta
    assert [file.name for file in tmp_path.iterdir()] == ["t.npz"]


def test_save_keeps_the_exact_name_and_replaces_whole_files(tmp_path: Path) -> None:
    target = tmp_path / "no-suffix"
    Trace(experts_LTK(), {"num_experts": 8}).save(target)
    before = target.read_bytes()
    with target.open("rb") as reader:
        Trace(experts_LTK(), {"num_experts": 9}).save(target)
        # A reader of the old file is not disturbed: the new one takes its name, not its bytes.
        assert reader.read() == before
    assert Trace.load(target).num_experts == 9


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "t.npz"
    Trace(experts_LTK(), META).save(target)
    before = target.read_bytes()

    def disk_full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    with pytest.raises(TraceError, match=r"t\.npz.*No space left"):
        Trace(experts_LTK(), META).save(target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_first_tokens() -> None:
    trace = Trace(experts_LTK(), META)
    short = trace.tokens(3)
    np.testing.assert_array_equal(short.experts, trace.experts[:, :3])
    assert short.document_starts == (0,)
    assert trace.tokens(4).document_starts == (0, 3)
    for count in (0, -1, 6):
        with pytest.raises(TraceError, match=f"{count} tokens of a trace: this one has 1 to 5"):
            trace.tokens(count)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([], "must be a dict"),
        ({}, "num_experts"),
        ({"num_experts": 0}, "got 0"),
        ({"num_experts": True}, "got True"),
        ({"num_experts": "8"}, "got '8'"),
        ({"num_experts": 8.0}, "got 8.0"),
        ({"num_experts": 40000}, "32767"),
        ({"num_experts": 8, "model": 3}, r"meta\['model'\]"),
        ({"num_experts": 8, "phase": None}, r"meta\['phase'\]"),
        ({"num_experts": 8, "document_starts": []}, "document_starts"),
        ({"num_experts": 8, "document_starts": [1, 2]}, "the first 0"),
        ({"num_experts": 8, "document_starts": [0, 2, 2]}, "rising"),
        ({"num_experts": 8, "document_starts": [0, 1.5]}, "ints"),
        ({"num_experts": 8, "document_starts": 0}, "document_starts"),
        ({"num_experts": 8, "document_starts": [0, 5]}, "ends after 5 tokens"),
        ({"num_experts": 8, "top_k": 4}, "top_k=4.*has 3"),
        ({"num_experts": 8, "n_moe_layers": 3}, "n_moe_layers=3.*has 2"),
        ({"num_experts": 8, "extra": {1, 2}}, "JSON"),
        ({"num_experts": 8, "extra": float("nan")}, "JSON"),
    ],
)
def test_bad_meta_is_refused(meta: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        Trace(experts_LTK(), meta)


def test_bad_arrays_are_refused() -> None:
    good = experts_LTK()
    bad_arrays: list[tuple[Any, str]] = [
        (good.tolist(), "got list"),
        (good.astype(np.int32), r"int32.*astype\(numpy.int16\)"),
        (good[0], r"\(5, 3\)"),
        (good[:, :0], r"\(2, 0, 3\)"),
        (good[:, :, :0], r"\(2, 5, 0\)"),
    ]
    for experts, message in bad_arrays:
        with pytest.raises(TraceError, match=message):
            Trace(experts, {"num_experts": 8})
    for value in (-1, 8):
        bad = good.copy()
        bad[1, 4, 2] = value
        with pytest.raises(TraceError, match=rf"id {value} at layer 1, token 4, slot 2 is outside \[0, 8\)"):
            Trace(bad, {"num_experts": 8})
    twice = good.copy()
    twice[1, 2, 0] = twice[1, 2, 2]
    with pytest.raises(TraceError, match=f"layer 1, token 2 names expert {twice[1, 2, 2]} twice"):
        Trace(twice, {"num_experts": 8})


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.npz"

    def refused(message: str) -> None:
        with pytest.raises(TraceError, match=rf"broken\.npz: .*{message}"):
            Trace.load(path)

    refused("No such file")
    for content, message in ((b"", "neither"), (b"\x93NUMPY", "neither"), (b"PK\x03\x04 nothing", "zip")):
        path.write_bytes(content)
        refused(message)
    np.savez(path, experts=experts_LTK())
    refused("lacks the array 'meta'")
    np.savez(path, meta=np.array("{}"))
    refused("lacks the array 'experts'")
    np.savez(path, experts=experts_LTK(), meta=np.array([1.0]))
    refused("JSON string")
    np.savez(path, experts=experts_LTK(), meta=np.array("{nope"))
    refused("Expecting")
    np.savez(path, experts=experts_LTK(), meta=np.array("[]"))
    refused("must be a dict")
    np.savez(path, experts=np.array([{"a": 1}], dtype=object), meta=np.array("{}"))
    refused("allow_pickle=False")


def test_every_truncation_and_any_flipped_byte_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    trace = Trace(experts_LTK(), META)
    trace.save(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"t\.npz"):
            Trace.load(path)
    refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            loaded = Trace.load(path)
        except TraceError:
            refused += 1
        else:
            # A byte nothing depends on, as a time stamp of the zip.
            np.testing.assert_array_equal(loaded.experts, trace.experts)
            assert loaded.meta == trace.meta
    assert refused > len(whole) / 6


def test_phase_of_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    Trace(experts_LTK(), META).save(path)
    assert Trace.load(path, phase="decode").num_tokens == 5
    with pytest.raises(TraceError, match="'prefill' was asked for, it holds phase 'decode'"):
        Trace.load(path, phase="prefill")
    with pytest.raises(TraceError, match="unknown phase 'warmup': choose one of prefill, decode"):
        Trace.load(path, phase="warmup")


def test_csv(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "run.csv", csv_rows())
    trace = Trace.load(path)
    assert trace.experts[:, :, 0].tolist() == [[0, 1, 1], [1, 2, 2]]
    assert trace.experts[0].tolist() == [[0, 1], [1, 2], [1, 2]]
    assert trace.meta == {
        "num_experts": 4,
        "document_starts": [0, 2],
        "model": "tiny.gguf",
        "expert_bytes": [100, 200],
    }
    decode = Trace.load(path, phase="decode")
    assert decode.experts[0].tolist() == [[1, 2], [1, 2]]
    assert decode.meta["phase"] == "decode"
    assert decode.document_starts == (0, 1)
    assert Trace.load(path, phase="prefill").num_tokens == 1
    decode.save(tmp_path / "run.npz")
    assert Trace.load(tmp_path / "run.npz", phase="decode").meta == decode.meta


def test_csv_rows_may_come_in_any_order(tmp_path: Path) -> None:
    ordered = Trace.load(write_csv(tmp_path / "a.csv", csv_rows()))
    shuffled = Trace.load(write_csv(tmp_path / "b.csv", csv_rows()[::-1]))
    np.testing.assert_array_equal(ordered.experts, shuffled.experts)


def test_broken_csv_is_refused_by_name(tmp_path: Path) -> None:
    rows = csv_rows()
    for broken, message in (
        ([], "ends after its header"),
        (rows[:-1], "a row is missing"),
        ([*rows, rows[0]], "there twice"),
        ([*rows[:-1], rows[0]], "turn 0, step 0, layer 0, slot 0 is there 2 times"),
        ([rows[0].replace(",0.5", "x,0.5"), *rows[1:]], "could not convert"),
        ([rows[0][:5], *rows[1:]], "column"),
        (["0,0,0,0,0,9,0.5,0,0", *rows[1:]], r"id 9 .*outside \[0, 4\)"),
        (["0,0,0,0,0,70000,0.5,0,0", *rows[1:]], "1 to 70000"),
        ([row for row in rows if row.split(",")[1] == "0"], "no tokens of phase 'decode'"),
    ):
        path = write_csv(tmp_path / "run.csv", broken)
        with pytest.raises(TraceError, match=rf"run\.csv: .*{message}"):
            Trace.load(path, phase="decode" if "phase" in message else None)
    for header, name in (
        (CSV_HEADER.replace(",slot,", ",place,"), "slot"),
        (CSV_HEADER.replace("n_expert=", "experts="), "n_expert"),
        ("# route_trace v1\n# nothing else\n", "turn"),
    ):
        path = write_csv(tmp_path / "run.csv", rows if "turn" in header else [], header)
        with pytest.raises(TraceError, match=rf"run\.csv: .*does not name '{name}'"):
            Trace.load(path)


def test_shared_traces_load(shared_dir: Path) -> None:
    traces = shared_dir / "traces"
    qwen = Trace.load(traces / "qwen3-30b-a3b" / "routing-lab_code.npz")
    assert qwen.experts.shape == (48, 8000, 8)
    phone = traces / "phone-decode" / "gemma.route.csv"
    assert [Trace.load(phone, phase).experts.shape for phase in (None, "prefill", "decode")] == [
        (30, 157, 6),
        (30, 29, 6),
        (30, 128, 6),
    ]
    # First and last rows of the file, read by eye.
    lines = [line.split(",") for line in phone.read_text().splitlines() if not line.startswith(("#", "turn"))]
    trace = Trace.load(phone)
    assert trace.experts[0, 0].tolist() == [int(line[5]) for line in lines[:6]]
    assert trace.experts[-1, -1].tolist() == [int(line[5]) for line in lines[-6:]]
    assert len(trace.meta["expert_bytes"]) == 30
    json.dumps(trace.meta)
