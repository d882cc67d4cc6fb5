"""Text files to documents, documents to token rows; masks know where each document begins."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from remoe_adapt.errors import DataError
from remoe_adapt.training.objective import IGNORED_LABEL

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_RECORDS = (("text",), ("question", "answer"), ("prompt", "canonical_solution"))


def data_files(paths: Sequence[str | Path]) -> list[Path]:
    """The data files named by `paths`, folders expanded (recursively, in name order).

    Raises:
        DataError: nothing named, a path is absent, has another suffix, or a folder holds no data file.
    """
    if not paths:
        raise DataError(f"no data given: name files or folders of {', '.join(SUFFIXES)}")
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            if not inside:
                raise DataError(f"{path} holds no data file: expected {', '.join(SUFFIXES)}")
            files += inside
        elif not path.exists():
            raise DataError(f"{path} does not exist: give a file or folder of {', '.join(SUFFIXES)}")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is not a data file: its name must end in one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def read_documents(paths: Sequence[str | Path]) -> Iterator[str]:
    """Documents of all files in order. A .txt file is one document; a line of .jsonl is one record.

    Raises:
        DataError: see `data_files`; also a file that is not UTF-8 or not gzip, or a record without text, with its line.
    """
    for path in data_files(paths):
        yield from read_file(path)


def read_file(path: Path) -> Iterator[str]:
    """Documents of one file; blank ones are left out. Raises DataError as `read_documents`."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        # newline="\n": records may hold U+2028 and lone carriage returns; -sig: Windows tools write a byte order mark
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            if path.name.removesuffix(".gz").endswith(".txt"):
                documents: Iterable[str] = (file.read(),)
            else:
                documents = (_record_text(line, path, number) for number, line in enumerate(file, 1) if line.strip())
            yield from (text for text in documents if text.strip())
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _record_text(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error})") from error
    if isinstance(record, dict):
        for keys in _RECORDS:
            parts = [record.get(key) for key in keys]
            if all(isinstance(part, str) for part in parts):
                # HumanEval's solution continues its prompt; an answer starts on a new line
                text = ("" if keys[-1] == "canonical_solution" else "\n").join(map(str, parts))
                return text.encode("utf-8", "replace").decode()  # escapes of half a character, which no tokenizer takes
    found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
    raise DataError(
        f"{path}, line {number}: no text in this record (found {found}); give 'text', or 'question' + 'answer', "
        "or 'prompt' + 'canonical_solution'"
    )


def tokenize_documents(
    documents: Iterable[str], tokenizer: Any, max_tokens: int | None = None, chunk_chars: int = 1 << 20
) -> list[list[int]]:
    """Token ids of each document, without special tokens; stops once `max_tokens` are reached (the last one is cut).

    Text is encoded in pieces of at most `chunk_chars` characters, cut at line ends, so one huge file costs no more
    memory or time than it must.
    """
    rows: list[list[int]] = []
    left = max_tokens
    for text in documents:
        ids: list[int] = []
        for piece in pieces(text, chunk_chars if left is None else min(chunk_chars, max(1024, left * 16))):
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            if left is not None and len(ids) >= left:
                break
        ids = ids[:left]
        if ids:
            rows.append(ids)
        if left is not None:
            left -= len(ids)
            if left <= 0:
                break
    return rows


def pieces(text: str, size: int) -> Iterator[str]:
    """`text` in order, in pieces of at most `size` characters, cut behind line ends where there are any."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > size:
            newline = text.rfind("\n", start, start + size)
            end = newline if newline > start else start + size
        yield text[start:end]
        start = end


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens cut from documents in a seeded random order, each document ended by `eos_id`.

    A row has `input_ids`, `labels` (-100 at the first token of each document and of the row) and `document_ids`,
    all int64 [length]. A document longer than a row goes on in the next one, as a document of its own there.
    """

    def __init__(self, documents: Sequence[Sequence[int]], length: int, eos_id: int | None, seed: int = 0) -> None:
        """Raises DataError when the documents do not fill one row."""
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        ids: list[int] = []
        numbers: list[int] = []
        for number in order:
            document = list(documents[number]) + ([] if eos_id is None else [eos_id])
            ids += document
            numbers += [number] * len(document)
        self.rows = len(ids) // length
        if self.rows == 0:
            raise DataError(f"{len(ids)} tokens do not fill one row of {length}: give more text or a smaller --length")
        used = self.rows * length
        self._ids_RT = torch.tensor(ids[:used]).view(self.rows, length)
        self._documents_RT = torch.tensor(numbers[:used]).view(self.rows, length)
        # Neighbouring rows are parts of one long document: shuffle them apart.
        self._order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._order[index]
        ids_T, documents_T = self._ids_RT[row], self._documents_RT[row]
        labels_T = ids_T.clone()
        labels_T[0] = IGNORED_LABEL
        labels_T[1:][documents_T[1:] != documents_T[:-1]] = IGNORED_LABEL
        return {"input_ids": ids_T, "labels": labels_T, "document_ids": documents_T}
