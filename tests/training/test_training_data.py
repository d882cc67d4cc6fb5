"""Data files of every kind, their faults by name and line, and rows that know where documents begin."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from tiny_family import byte_tokenizer

from remoe_adapt import texts as data
from remoe_adapt.errors import DataError
from remoe_adapt.texts import data_files, read_documents, tokenize_documents
from remoe_adapt.training.data import PackedRows


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
    with pytest.raises(
        DataError, match="line 1 is not valid JSON"
    ):  # a raw carriage return is no legal JSON: still one line
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
        ('{"text": "ok"}\n\n{"text": \n', r"a\.jsonl, line 3 is not valid JSON"),
        ('{"text": "ok"}\n["list"]\n', r"line 2: no text in this record \(found list\)"),
        ('{"text": 5, "question": "q"}\n', r"line 1: no text in this record \(found 'text', 'question'\)"),
        ('{"text": ' + "9" * 5000 + "}\n", r"line 1 is not valid JSON"),
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


def test_a_gzip_bomb_is_refused_early(tmp_path: Path) -> None:
    for name in ("zeros.txt.gz", "zeros.jsonl.gz"):
        with gzip.open(tmp_path / name, "wb", compresslevel=9) as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
        tracemalloc.start()
        with pytest.raises(DataError, match=rf"{name} expands to more than 100 times its size"):
            list(read_documents([tmp_path / name]))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 200 << 20
    text = "".join(f"{number} is a line of text\n" for number in range(200_000))
    with gzip.open(tmp_path / "text.txt.gz", "wt") as file:
        file.write(text)
    assert list(read_documents([tmp_path / "text.txt.gz"])) == [text]


def test_a_record_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_RECORD_CHARS", 1 << 20)
    monkeypatch.setattr(data, "_FILE_CHARS", 1 << 20)
    (tmp_path / "a.jsonl").write_text(lines({"text": "first"}, {"text": "x" * (1 << 20)}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 has more than 1 Mi characters"):
        list(read_documents([tmp_path / "a.jsonl"]))
    (tmp_path / "a.txt").write_text("x" * (1 << 20) + "y")
    with pytest.raises(DataError, match=r"a\.txt has more than 1 Mi characters"):
        list(read_documents([tmp_path / "a.txt"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is nested too deeply"),
        ('{"text": "a", "id": ' + "9" * 400 + "}", "line 2 is not valid JSON: an integer of 400 digits"),
        ('{"text": "a", "text": "b"}', "line 2 is not valid JSON: the key 'text' stands twice"),
        ('{"\\u001b[31mred": 1}', r"line 2: no text in this record \(found '\\x1b\[31mred'\)"),
    ],
)
def test_hostile_records_are_one_error_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": "fine"}) + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path]))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_endless_links_hang_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    os.mkfifo(folder / "pipe.txt")
    (folder / "round.txt").symlink_to("round.txt")
    (folder / "up").symlink_to(folder, target_is_directory=True)
    with pytest.raises(DataError, match=r"pipe\.txt is a pipe"):
        list(read_documents([folder / "pipe.txt"]))
    with pytest.raises(DataError, match=r"round\.txt does not exist"):
        list(read_documents([folder / "round.txt"]))
    with pytest.raises(DataError, match="holds no data file"):
        list(read_documents([folder]))
    (folder / "real.txt").write_text("text")
    assert list(read_documents([folder])) == ["text"]


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def test_chat_records_go_through_the_tokenizers_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    file = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    file.write_text(lines({"messages": turns}, {"messages": parts}, {"text": "plain", "messages": turns}))
    assert list(read_documents([file], tokenizer)) == [
        "<user>Two and two?\n<assistant>Four.\n", "<user>ab\n", "plain",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list of at least one message"),
        ("hello", "must be a list of at least one message, not hello"),
        (["hello"], "message 1 must be an object with a 'role'"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 2 must be an object with a 'role'"),
        ([{"role": 1, "content": "b"}], "message 1 must be an object with a 'role'"),
        ([{"role": "user", "content": 5}], "content of message 1 must be text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "content of message 1 must be text"),
        ([{"role": "user"}], "content of message 1 must be text"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "template refuses .*take turns"),
    ],
)
def test_bad_messages_are_named_with_their_line(tmp_path: Path, messages: object, message: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length == 2 and messages[0].role == messages[1].role %}"
        "{{ raise_exception('take turns') }}{% endif %}" + TEMPLATE
    )
    (tmp_path / "chat.jsonl").write_text(lines({"text": "fine"}, {"messages": messages}))
    with pytest.raises(DataError, match=rf"chat\.jsonl, line 2: .*{message}"):
        list(read_documents([tmp_path], tokenizer))


def test_chat_records_without_a_template_name_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(lines({"messages": [{"role": "user", "content": "a"}]}))
    for tokenizer in (None, byte_tokenizer()):
        with pytest.raises(DataError, match="this one has none: use the tokenizer of the model's chat version"):
            list(read_documents([tmp_path], tokenizer))
