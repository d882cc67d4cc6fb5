"""Data files of every kind, their faults by name and line, and rows that know where documents begin."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from tiny_family import byte_tokenizer

from remoe_adapt.errors import DataError
from remoe_adapt.training.data import PackedRows, data_files, read_documents, tokenize_documents


def lines(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_the_three_kinds_of_records(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        lines(
            {"text": "plain", "question": "ignored", "answer": "too"},
            {"question": "Two and two?", "answer": "Four."},
            {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "task_id": 0},
            {"text": "  \n"},
        )
        + "\n"
    )
    assert list(read_documents([file])) == ["plain", "Two and two?\nFour.", "def f():\n    return 1\n"]


def test_text_files_folders_and_gzip(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    (folder.parent / "b.txt").write_text("one\n\ndocument")
    (folder.parent / "empty.txt").write_text("")
    (folder.parent / "README.md").write_text("not data")
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.write(lines({"text": "packed ä"}))
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as packed:
        packed.write("last")
    found = list(read_documents([tmp_path / "data", str(tmp_path / "c.txt.gz")]))
    assert found == ["one\n\ndocument", "packed ä", "last"]
    assert [path.name for path in data_files([tmp_path / "data"])] == ["b.txt", "a.jsonl.gz", "empty.txt"]


def test_line_separators_inside_records_do_not_end_them(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\re\x0cf"
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines({"text": text}, {"text": "next"}).replace("\\r", "\r").encode())
    with pytest.raises(DataError, match="line 1: not JSON"):  # a raw carriage return is no legal JSON: still one line
        list(read_documents([file]))
    file.write_bytes(lines({"text": text}, {"text": "next"}).replace("\n", "\r\n").encode())
    assert list(read_documents([file])) == [text, "next"]


def test_a_byte_order_mark_and_half_characters(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"text": "half \\ud83d."}\n')
    (text,) = read_documents([file])
    assert text == "half ?."
    assert tokenize_documents([text], byte_tokenizer()) == [byte_tokenizer()(text)["input_ids"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "ok"}\n\n{"text": \n', r"a\.jsonl, line 3: not JSON"),
        ('{"text": "ok"}\n["list"]\n', r"line 2: no text in this record \(found list\)"),
        ('{"text": 5, "question": "q"}\n', r"line 1: no text in this record \(found 'text', 'question'\)"),
        ('{"text": ' + "9" * 5000 + "}\n", r"line 1: not JSON"),
    ],
)
def test_bad_records_are_named_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path]))


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"some text that is long enough to be cut " * 50)
    cases = {
        "magic.txt.gz": b"not gzip at all",
        "cut.txt.gz": whole[:-20],
        "flipped.txt.gz": whole[:14] + bytes([whole[14] ^ 0xFF, whole[15] ^ 0xFF]) + whole[16:],
        "latin.txt": "ä".encode("latin-1"),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            list(read_documents([tmp_path / name]))


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for paths, message in (
        ([], "no data given"),
        ([tmp_path / "absent.txt"], "does not exist"),
        ([tmp_path / "a.csv"], "not a data file"),
        ([tmp_path], "holds no data file"),
    ):
        with pytest.raises(DataError, match=message):
            data_files(paths)


def test_tokens_stop_at_the_limit() -> None:
    tokenizer = byte_tokenizer()
    whole = tokenize_documents(["abc", "", "defgh", "ij"], tokenizer)
    assert [len(ids) for ids in whole] == [3, 5, 2]
    assert tokenize_documents(["abc", "", "defgh", "ij"], tokenizer, max_tokens=5) == [whole[0], whole[1][:2]]

    def endless() -> object:
        while True:
            yield "abc"

    assert len(tokenize_documents(endless(), tokenizer, max_tokens=7)) == 3  # type: ignore[arg-type]


def test_a_long_document_is_encoded_in_pieces_cut_at_line_ends() -> None:
    seen: list[str] = []

    class Spy:
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            seen.append(text)
            return {"input_ids": [len(text)]}

    text = "aaaa\nbbbb\n" + "c" * 25
    tokenize_documents([text], Spy(), chunk_chars=10)
    assert "".join(seen) == text
    assert seen == ["aaaa\nbbbb", "\ncccccccccc"[:10], "c" * 10, "c" * 6]


def test_packed_rows_mask_the_first_token_of_each_document_and_row() -> None:
    documents = [[10, 11], [20, 21, 22, 23, 24, 25, 26], [30]]
    rows = PackedRows(documents, length=4, eos_id=1, seed=0)
    assert len(rows) == 3  # 13 tokens with the ends, the last row is not full
    tokens: dict[int, list[int]] = {}
    for index in range(len(rows)):
        row = rows[index]
        ids, labels, numbers = (row[key].tolist() for key in ("input_ids", "labels", "document_ids"))
        assert all(row[key].dtype == torch.long for key in row)
        for t, (token, label, number) in enumerate(zip(ids, labels, numbers, strict=True)):
            starts = t == 0 or numbers[t - 1] != number
            assert label == (-100 if starts else token)
            assert token == 1 or token // 10 == number + 1
            tokens.setdefault(number, []).append(token)
    assert sum(map(len, tokens.values())) == 12
    again = PackedRows(documents, length=4, eos_id=1, seed=0)
    assert all(torch.equal(rows[i]["input_ids"], again[i]["input_ids"]) for i in range(3))


def test_a_document_longer_than_rows_loses_nothing_but_the_last_part() -> None:
    document = list(range(100))
    rows = PackedRows([document], length=16, eos_id=None)
    parts = sorted(rows[i]["input_ids"].tolist() for i in range(len(rows)))
    assert parts == [document[i : i + 16] for i in range(0, 96, 16)]
    assert [rows[i]["input_ids"][0].item() for i in range(6)] != list(range(0, 96, 16)), "rows are shuffled apart"


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="3 tokens do not fill one row of 8"):
        PackedRows([[1, 2]], length=8, eos_id=0)
