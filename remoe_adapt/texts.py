"""Text files to documents, documents to token rows; masks know where each document begins."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from remoe_adapt._support import parse_json, printable
from remoe_adapt.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
# A gzip file may expand to this much, or to this many times its size: text packs 3 to 10 times, gzip at most 1030.
_FREE_BYTES, _MOST_EXPANSION = 16 << 20, 100
# Text is held in memory whole: a record or a file beyond these would take several times as much.
_RECORD_CHARS, _FILE_CHARS = 64 << 20, 1 << 30
# Keys whose values make up a document, the first that a record has.
_RECORDS = (("text",), ("question", "answer"), ("prompt", "canonical_solution"))
# A file whose records each name another domain has none: those are ids.
_MOST_DOMAINS = 64


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
            raise DataError(f"{printable(path)} does not exist: give a file or folder of {', '.join(SUFFIXES)}")
        elif not path.is_file():
            raise DataError(f"{printable(path)} is a pipe, socket or device: copy its text into a file")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is not a data file: its name must end in one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def read_documents(paths: Sequence[str | Path], tokenizer: Any = None) -> Iterator[str]:
    """Documents of all files in order. A .txt file is one document; a line of .jsonl is one record: `text`,
    `question` + `answer`, `prompt` + `canonical_solution`, or chat `messages`, which the tokenizer's chat template
    writes out.

    Raises:
        DataError: see `data_files`; also a file that is not UTF-8, not gzip or expands as no text does, or a record
            without text, with its line.
    """
    for path in data_files(paths):
        yield from read_file(path, tokenizer)


def read_file(path: Path, tokenizer: Any = None) -> Iterator[str]:
    """Documents of one file; blank ones are left out. Raises DataError as `read_documents`."""
    return (text for _, text in _documents(path, tokenizer))


def _documents(
    path: Path, tokenizer: Any, wants: Callable[[str | None], bool] = lambda _: True
) -> Iterator[tuple[str | None, str]]:
    """(domain, text) of each document of one file; the domain is what a record says of itself, else None.

    wants: whether documents of a domain are still asked for; others are not made.
    """
    try:
        with path.open("rb") as stored:
            packed = path.name.endswith(".gz")
            raw: Any = io.BufferedReader(_Unpacked(stored, path)) if packed else stored
            # newline="\n", because a record may hold lone carriage returns; -sig, because Windows writes a byte order
            # mark, which would be part of the first word.
            with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as file:
                if path.name.removesuffix(".gz").endswith(".txt"):
                    documents: Iterable[tuple[str | None, str]] = (
                        [(None, _whole_file(file, path))] if wants(None) else []
                    )
                else:
                    documents = _records(file, path, tokenizer, wants)
                yield from ((domain, text) for domain, text in documents if text.strip())
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"cannot read {printable(path)}: {error}") from error


class _Unpacked(io.RawIOBase):
    """A gzip file's contents, as long as they may be text: an expansion that no text has is refused early on."""

    def __init__(self, stored: Any, path: Path) -> None:
        self._stored, self._path, self._given = stored, path, 0
        self._file = gzip.GzipFile(fileobj=stored)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # gzip reads ahead of what it gives, so the position in the file counts a little more than was expanded.
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._given += len(data)
        if self._given > max(_FREE_BYTES, _MOST_EXPANSION * self._stored.tell()):
            raise DataError(
                f"{printable(self._path)} expands to more than {_MOST_EXPANSION} times its size, which no text does: "
                "unpack it and look"
            )
        return len(data)


def _whole_file(file: Any, path: Path) -> str:
    # Piece by piece, because a single read of the limit would take that much memory for any file.
    parts: list[str] = []
    length = 0
    while part := file.read(1 << 20):
        parts.append(part)
        length += len(part)
        if length > _FILE_CHARS:
            raise DataError(
                f"{printable(path)} has more than {_FILE_CHARS >> 20} Mi characters, and a text file is one document: "
                "split it"
            )
    return "".join(parts)


def _records(
    file: Any, path: Path, tokenizer: Any, wants: Callable[[str | None], bool]
) -> Iterator[tuple[str | None, str]]:
    number = 0
    # With a limit: a file without line ends would be one record of its whole size.
    while line := file.readline(_RECORD_CHARS + 1):
        number += 1
        if len(line) > _RECORD_CHARS:
            raise DataError(
                f"{printable(path)}, line {number} has more than {_RECORD_CHARS >> 20} Mi characters: a record is one "
                "document, split it"
            )
        if line.strip():
            where = f"{path}, line {number}"
            record = parse_json(line, where, DataError)
            said = record.get("domain") if isinstance(record, dict) else None
            domain = said if isinstance(said, str) and said.strip() else None
            # Asked before the text is made: a chat template takes its time, and a domain may be full after few records.
            if wants(domain):
                yield domain, _record_text(record, where, tokenizer)


def _record_text(record: Any, where: str, tokenizer: Any) -> str:
    if isinstance(record, dict):
        if not isinstance(record.get("text"), str) and "messages" in record:
            return _whole(chat_text(record, tokenizer, printable(where)))
        for keys in _RECORDS:
            parts = [record.get(key) for key in keys]
            if all(isinstance(part, str) for part in parts):
                # HumanEval's solution continues its prompt; an answer starts on a new line
                return _whole(("" if keys[-1] == "canonical_solution" else "\n").join(map(str, parts)))
    found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
    raise DataError(
        f"{printable(where)}: no text in this record (found {printable(found)}); give 'text', or 'question' + "
        "'answer', or 'prompt' + 'canonical_solution', or chat 'messages'"
    )


def _whole(text: str) -> str:
    """The text without halves of characters, which JSON's escapes can hold and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def chat_text(record: Mapping[str, Any], tokenizer: Any, where: str) -> str:
    """A record's `messages` (and `tools`, if any) as the tokenizer's chat template writes them.

    A message has a `role` and a `content`: text, or a list of `{"type": "text", "text": ...}`; other keys are the
    template's.

    Raises:
        DataError: no template, messages of another form, or ones that the template refuses.
    """
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of at least one message, not {printable(messages)}")
    plain = []
    for index, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role:
            raise DataError(f"{where}: message {index} must be an object with a 'role' and a 'content'")
        content = message.get("content")
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(
                f"{where}: the content of message {index} must be text, or a list of parts of type 'text', not "
                f"{printable(content)}"
            )
        # Only the content is made plain; a template may use any other key.
        plain.append({**message, "content": content})
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: chat 'messages' are written out by the tokenizer's chat template, and this one has none: use "
            "the tokenizer of the model's chat version, or records of 'text'"
        )
    try:
        text: str = tokenizer.apply_chat_template(plain, tools=record.get("tools"), tokenize=False)
    except Exception as error:  # a template is a program of others
        raise DataError(f"{where}: the chat template refuses these messages ({printable(error)})") from error
    return text


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
        # When few tokens are wanted, a piece of 16 characters a token is enough; a whole book need not be encoded for
        # them.
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


def read_shared(paths: Sequence[str | Path], tokenizer: Any, max_tokens: int | None = None) -> list[list[int]]:
    """Token ids of the documents of all files; `max_tokens` is shared evenly among the files.

    Raises:
        DataError: a file cannot be read, or there are more files than tokens.
    """
    files = data_files(paths)
    if max_tokens is not None and max_tokens < 2 * len(files):
        raise DataError(f"{max_tokens} tokens are too few for {len(files)} data file(s): raise --max-tokens")
    share = None if max_tokens is None else max_tokens // len(files)
    return [ids for file in files for ids in tokenize_documents(read_file(file, tokenizer), tokenizer, share)]


def read_domains(paths: Sequence[str | Path], tokenizer: Any, tokens: int) -> dict[str, list[list[int]]]:
    """Token ids of documents by domain, in the order of the files: of each domain the first that have `tokens` tokens
    to predict in all (a document of n has n - 1; the last one is cut).

    A record of .jsonl may name its domain, `{"domain": "law", "text": ...}`; everything else is of the domain that is
    called as its file is, without its suffix, and where several files are called so by as much of their paths as tells
    them apart. A domain with fewer tokens has all of them.

    Raises:
        DataError: a file cannot be read, no document has two tokens, or there are more domains than anybody compares.
    """
    found: dict[str, list[list[int]]] = {}
    left: dict[str, int] = {}
    for path, stem in zip(files := data_files(paths), _stems(files), strict=True):

        def named(domain: str | None, stem: str = stem) -> str:
            return printable(stem if domain is None else domain)

        def wants(domain: str | None, named: Callable[[str | None], str] = named) -> bool:
            return left.get(named(domain), tokens) > 0

        for domain, text in _documents(path, tokenizer, wants):
            name = named(domain)
            for ids in tokenize_documents([text], tokenizer, left.get(name, tokens) + 1):
                if len(ids) > 1:
                    found.setdefault(name, []).append(ids)
                    left[name] = left.get(name, tokens) - (len(ids) - 1)
            if len(found) > _MOST_DOMAINS:
                raise DataError(
                    f"{printable(path)}: more than {_MOST_DOMAINS} domains: give 'domain' the name of a kind of text, "
                    "or leave it out"
                )
    if not found:
        raise DataError("nothing to decode: no document has two tokens; give more text")
    return found


def _stems(files: Sequence[Path]) -> list[str]:
    """A short name of each file, another for each where that can be."""
    names = [path.name for path in files]
    stems = [next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)) for name in names]
    for candidates in (stems, names, [f"{path.parent.name}/{path.name}" for path in files]):
        if len(set(candidates)) == len(files):
            return candidates
    return [str(path) for path in files]
