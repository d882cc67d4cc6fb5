"""How a llama-server is spoken to: calls with JSON, strength as scales of its LoRAs, and probes of its prompt caches.

The server has one LoRA loaded for each operating point. `Family.live` is linear between neighbouring points; so are
scales, and adapters add up: between the points p < q the strength s is p at (q - s) / (q - p) and q at
(s - p) / (q - p); below the first point it is that point at s / p.

No call of the server says which of its prompt caches are on, so it is asked for completions, whose timings tell.
"""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from remoe_adapt._support import parse_json, printable
from remoe_adapt.errors import ConfigError, ServerDownError, ServerError

# The server answers these calls between two decode steps, which may be slow on a thrashing machine.
TIMEOUT_S = 30.0
# /props holds the chat template, /lora-adapters all paths: far less than this.
MAX_ANSWER_BYTES = 16 << 20
_PIECE_BYTES = 64 << 10
_LOADING = 503
# The server keeps scales in fp32, so that what it answers is not what was sent to all digits.
_SAME = 1e-5
# A server may have hundreds of adapters loaded, and a message should fit on a screen: it names so many.
_SHOWN = 20
# A prompt of so many random words is new to any server.
_WORDS = 12

# POST with a body -> the JSON answer.
Post = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens; prefix: its --api-prefix, "" without one."""

    host: str
    port: int
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """From "http://host:port" or "host:port". Raises ConfigError for anything else, https included."""
        try:
            parts = urlsplit(url if "//" in url else f"//{url}")
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")
            parts.path.encode("ascii")
        except ValueError as error:
            raise ConfigError(f"{url!r} is not an address ({error}): write http://127.0.0.1:8080.") from error
        odd = parts.query or parts.fragment or parts.username or " " in parts.path or not parts.path.isprintable()
        if parts.scheme not in ("", "http") or not host or not port or odd:
            raise ConfigError(f"{url!r} is not an address: write http://127.0.0.1:8080 (plain http, with the port).")
        return cls(host, port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.prefix}"


def call(
    address: Address, path: str, body: Any = None, *, api_key: str | None = None, timeout_s: float = TIMEOUT_S
) -> Any:
    """The JSON answer of GET `path`, or of POST where there is a body.

    timeout_s: of the whole call, whatever the server does. Raises ServerDownError when the server does not answer in it
    or is loading its model, ServerError when it refuses, or answers more than MAX_ANSWER_BYTES or no JSON; ConfigError
    for a key that no header can hold.
    """
    where = f"{address}{path}"
    headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    sent = None if body is None else json.dumps(body).encode()
    if sent is not None:
        headers["Content-Type"] = "application/json"
    status, text = _exchange(address, "GET" if sent is None else "POST", path, sent, headers, timeout_s)
    found = parse_json(text, f"what {where} answers, with status {status} (is it a llama-server?),", ServerError)
    # llama-server answers 503 until its model is loaded: that is a server to wait for, not a broken one.
    if status == _LOADING:
        raise ServerDownError(f"{address}: {_message(found)}")
    if status != http.client.OK:
        hint = " (give its key with --api-key)" if status == http.client.UNAUTHORIZED else ""
        raise ServerError(f"{where} answers {status}: {_message(found)}{hint}")
    return found


def fetched(address: Address, path: str, *, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """The text of GET `path`. Raises as `call`."""
    headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    status, text = _exchange(address, "GET", path, None, headers, timeout_s)
    if status != http.client.OK:
        raise ServerError(f"{address}{path} answers {status}.")
    return text.decode("utf-8", "replace")


def _exchange(
    address: Address, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float
) -> tuple[int, bytes]:
    """Status and body of the answer."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    late = threading.Event()
    # A daemon, so that an interpreter that ends does not wait for a server.
    timer = threading.Timer(timeout_s, lambda: _cut(sock, late))
    timer.daemon = True
    try:
        connection.connect()
        sock = connection.sock
        # A time limit of the socket starts again with every byte: a server that drips would never meet it.
        timer.start()
        connection.request(method, address.prefix + path, body, headers)
        text = bytearray()
        with connection.getresponse() as answer:
            while piece := answer.read1(_PIECE_BYTES):
                text += piece
                if len(text) > MAX_ANSWER_BYTES:
                    raise ServerError(
                        f"{address}{path} answers more than {MAX_ANSWER_BYTES >> 20} MiB: is it a llama-server?"
                    )
            if late.is_set() or answer.length or not text:
                raise http.client.IncompleteRead(b"", answer.length)
        return answer.status, bytes(text)
    except (OSError, http.client.HTTPException) as error:
        why = f"not within {timeout_s:g} s" if late.is_set() else printable(error) or type(error).__name__
        raise ServerDownError(f"{address} does not answer ({why})") from error
    except UnicodeError as error:
        raise ConfigError("the --api-key has characters that no header can hold: give the server's key.") from error
    except ValueError as error:
        if str(error).startswith("Invalid header"):
            raise ConfigError("the --api-key has a line break in it: give the server's key.") from error
        raise ServerError(f"{address}{path} answers no HTTP ({printable(error)}): is it a llama-server?") from error
    finally:
        timer.cancel()
        connection.close()


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # closed just now
        sock.shutdown(socket.SHUT_RDWR)


def _message(found: Any) -> str:
    error = found.get("error") if isinstance(found, dict) else None
    return printable(error.get("message", error) if isinstance(error, dict) else found)


@dataclass(frozen=True, slots=True)
class LoadedLora:
    """One of the server's adapters, as GET /lora-adapters lists it."""

    id: int
    path: str
    scale: float


def loaded_loras(answer: Any) -> list[LoadedLora]:
    """The server's adapters. Raises ServerError for an answer of another form."""
    try:
        return [LoadedLora(int(one["id"]), str(one["path"]), float(one["scale"])) for one in answer]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ServerError(f"/lora-adapters answers {printable(answer)}: is it a llama-server?") from error


@dataclass(frozen=True, slots=True)
class ScaleMap:
    """points: (strength, adapter id), rising; others: scales of adapters that are not of the family, left as they are.

    Every list of scales names every adapter: the server sets those that are left out to 0, and a request whose list is
    empty counts as one without a list (its prompt cache is not cleared then).
    """

    points: tuple[tuple[float, int], ...]
    others: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(
        cls, loras: Sequence[LoadedLora], strengths: Sequence[float], recognise: Callable[[str], float | None]
    ) -> ScaleMap:
        """From the server's adapters. recognise: an adapter's path -> its strength, None: not of the family.

        Raises ServerError when a point is not loaded, or loaded twice.
        """
        found: dict[float, int] = {}
        others = []
        for lora in loras:
            strength = recognise(lora.path)
            if strength is None:
                others.append((lora.id, lora.scale))
            elif strength in found:
                raise ServerError(f"the server has strength {strength:g} loaded twice: give each --lora once.")
            else:
                found[strength] = lora.id
        missing = [strength for strength in strengths if strength not in found]
        if missing:
            has = ", ".join(printable(lora.path) for lora in loras[:_SHOWN]) or "none"
            raise ServerError(
                f"the server lacks the LoRA of strength {', '.join(f'{s:g}' for s in missing)} (it has: {has}): export "
                "them with `remoe export gguf-lora` and start it with --lora FILE for each."
            )
        return cls(tuple(sorted(found.items())), tuple(others))

    def scales(self, strength: float) -> dict[int, float]:
        """Scale by adapter id, of all adapters, at a strength in [0, 1]; above the last point the last point's."""
        scales = dict(self.others) | {number: 0.0 for _, number in self.points}
        above = bisect_left(self.points, strength, key=lambda point: point[0])
        if above == len(self.points):
            scales[self.points[-1][1]] = 1.0
            return scales
        lower, below_id = self.points[above - 1] if above else (0.0, None)
        upper, above_id = self.points[above]
        share = (strength - lower) / (upper - lower)
        scales[above_id] = share
        if below_id is not None:
            scales[below_id] = 1.0 - share
        return scales

    def as_list(self, strength: float, others: Mapping[int, float] | None = None) -> list[dict[str, float]]:
        """What POST /lora-adapters and a request's `lora` take; others: a request's own scales, ours excepted."""
        family_ids = {number for _, number in self.points}
        scales = self.scales(strength)
        scales |= {number: scale for number, scale in (others or {}).items() if number not in family_ids}
        return [{"id": number, "scale": scale} for number, scale in sorted(scales.items())]

    def strength_of(self, loras: Sequence[LoadedLora]) -> float | None:
        """The strength whose scales these are; None when they are of no strength."""
        present = {lora.id: lora.scale for lora in loras}
        active = [(strength, present[number]) for strength, number in self.points if abs(present[number]) > _SAME]
        guess = sum(strength * scale for strength, scale in active)
        return guess if 0.0 <= guess <= 1.0 and self.matches(loras, guess) else None

    def matches(self, loras: Sequence[LoadedLora], strength: float) -> bool:
        """Whether the family's scales are those of `strength`."""
        present = {lora.id: lora.scale for lora in loras}
        wanted = self.scales(strength)
        return all(abs(present[number] - wanted[number]) <= _SAME for _, number in self.points)


def reuses_prompts(post: Post, slots: int) -> bool:
    """Whether a request that says nothing about caches may start from what an earlier one left behind.

    Measured with llama.cpp 0.6-dev (random prompts, 4 clients, scales that change): where it may, answers after POST
    /lora-adapters are of mixed scales (136 of 160 wrong); with `--no-cache-prompt` none, with any --cache-ram.
    """
    # Whichever way slots are chosen, one of them gets the same prompt twice. No slot is named, for with a RAM prompt
    # cache that spoils what other slots are generating (34 of 200 answers, at constant scales).
    prompt = _prompt()
    return any(_reused(post, prompt, {}) > 0 for _ in range(slots + 1))


def restores_other_scales(post: Post, slots: int, scales: ScaleMap) -> bool:
    """Whether a request may start from a state that was computed at other scales, although it names its own.

    Measured as above, with `lora` in every request: the RAM prompt cache restores another scale's state (18 of 160
    answers wrong); with `--cache-ram 0`, or `cache_prompt: false` in every request, none.
    """
    # More prompts than slots push each other out of them; where they go on living outside (--cache-ram), the first
    # answer at another strength finds some of its prompt known already.
    prompts = [_prompt() for _ in range(slots + 1)]
    for prompt in prompts:
        _reused(post, prompt, {"lora": scales.as_list(0.0), "cache_prompt": True})
    strongest = scales.points[-1][0]
    return any(
        _reused(post, prompt, {"lora": scales.as_list(strongest), "cache_prompt": True}) > 0 for prompt in prompts
    )


def _prompt() -> str:
    """Never seen before, and unlike any other from its first token on."""
    return " ".join(secrets.token_hex(2) for _ in range(_WORDS))


def _reused(post: Post, prompt: str, more: dict[str, Any]) -> int:
    """Tokens of the prompt that the server had not to compute, a common start of text aside."""
    answer = post("/completion", {"prompt": prompt, "n_predict": 1, "temperature": 0, **more})
    try:
        reused = int(answer["tokens_evaluated"]) - int(answer["timings"]["prompt_n"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ServerError(f"/completion answers without timings ({printable(error)}): is it a llama-server?") from error
    return reused if reused > 1 else 0
