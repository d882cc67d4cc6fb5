"""What a request asks for, read within bounds and checked before anything is computed.

transformers' handlers drop fields that they do not know what to do with, and answer as if nothing had been asked; a
client would take one choice for the three that it wanted. What would change the answer and cannot be had is refused
here; what changes nothing is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from remoe_adapt._support import parse_json
from remoe_adapt.engines.serving.errors import RequestError

HEADER = "x-remoe-strength"
# A body that has not come by then is given up.
_BODY_S = 30.0
_MAX_STOPS, _MAX_STOP_CHARACTERS = 4, 200
# Choices are computed one after another, while everybody else waits.
_MAX_CHOICES = 8
# Fields that change nothing of an answer of ours.
_DROPPED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
    "stream_options", "prediction", "include", "truncation", "verbosity",
}  # fmt: skip
# Field -> values that ask for nothing beyond what is offered.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,), "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,),
    "presence_penalty": (0,), "modalities": (["text"],), "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},), "tool_choice": ("auto", "none"), "background": (False,), "audio": (),
    "functions": (), "function_call": (), "web_search_options": (), "reasoning_effort": (), "previous_response_id": (),
    "max_tool_calls": (), "generation_config": (), "conversation": (),
}  # fmt: skip
# Field -> least, most, and whether it is a whole number.
_NUMBERS: Mapping[str, tuple[float, float, bool]] = {
    "temperature": (0, 2, False), "top_p": (0, 1, False), "frequency_penalty": (-0.99, 2, False),
    "max_tokens": (1, 1 << 31, True), "max_completion_tokens": (1, 1 << 31, True),
    "max_output_tokens": (1, 1 << 31, True), "n": (1, _MAX_CHOICES, True), "seed": (-(1 << 63), (1 << 63) - 1, True),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for tokens.

    route: "/v1/chat/completions", "/v1/completions" or "/v1/responses".
    body: for transformers' handler, without what is done here.
    stream: the answer is wanted piece by piece.
    strength: that the answer must be computed at; None: wherever the dial is.
    seed: of sampling; None: any.
    temperature: that was asked for; None: as the model's own settings have it.
    stop: texts at which the answer ends, none of which is part of it.
    choices: so many answers are wanted, each computed for itself.
    """

    route: str
    body: dict[str, Any]
    stream: bool
    strength: float | None
    seed: int | None
    temperature: float | None
    stop: tuple[str, ...]
    choices: int = 1


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The whole body. Raises RequestError for one that is too long, comes too slowly, or is not declared as JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Also what keeps web pages of others out: a browser asks the server first before it sends this type there.
        raise RequestError("send JSON, with Content-Type: application/json", 415)
    too_long = RequestError(f"the body is longer than {most_bytes} bytes: send less, or raise --max-body", 413)
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > most_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > most_bytes:
                    raise too_long
    except TimeoutError:
        raise RequestError(f"the body did not come within {_BODY_S:g} s", 408) from None
    except ClientDisconnect as error:
        raise ConnectionError("the client went while it sent its request") from error
    return bytes(body)


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError."""
    fields = parse_json(body, "the body", RequestError)
    if not isinstance(fields, dict):
        raise RequestError("the body is no JSON object")
    return fields


def read_request(
    route: str, fields: dict[str, Any], headers: Mapping[str, str], is_ours: Callable[[str], bool], model: str
) -> Asked:
    """What a body and its headers ask for.

    is_ours: whether an id names this server's model, which is `model`. Raises RequestError, also for another model.
    """
    body = {name: value for name, value in fields.items() if value is not None and name not in _DROPPED}
    named = body.pop("model", model)
    if not isinstance(named, str) or not is_ours(named):
        raise RequestError(
            f"this server has the model {model!r}, not {named!r}", 404, param="model", code="model_not_found"
        )
    strength = _strength(body.pop("remoe", None), headers.get(HEADER))
    for name, allowed in _ONLY.items():
        if name in body and body.pop(name) not in allowed:
            only = f": only {' or '.join(map(repr, allowed))}" if allowed else ""
            raise RequestError(f"{name} is not offered by this server{only}", param=name, code="unsupported_value")
    for name, (least, most, whole) in _NUMBERS.items():
        if name in body and not _is_number(body[name], least, most, whole):
            kind = "a whole number" if whole else "a number"
            raise RequestError(f"{name} must be {kind} from {least:g} to {most:g}, not {body[name]!r}", param=name)
    if "max_completion_tokens" in body:
        # transformers takes it from 5.23 on; the older name means the same in all versions.
        body["max_tokens"] = body.pop("max_completion_tokens")
    stream = body.pop("stream", False)
    if not isinstance(stream, bool):
        raise RequestError(f"stream must be true or false, not {stream!r}", param="stream")
    choices = body.pop("n", 1)
    if choices > 1 and (stream or route == "/v1/responses"):
        where = "in a stream" if stream else "for responses"
        raise RequestError(f"n is not offered {where}: only 1", param="n", code="unsupported_value")
    if body.get("top_p") == 0:
        raise RequestError("top_p must be above 0", param="top_p")
    stop = _stops(body.pop("stop", ()))
    if stop:
        body["stop"] = list(stop)
    _check_texts(route, body)
    # transformers seeds where the request arrives, which would be in the midst of somebody else's answer.
    seed = body.pop("seed", None)
    # Always said, for transformers' Responses stream where nobody says otherwise.
    body |= {"model": model, "stream": stream}
    return Asked(route, body, stream, strength, seed, body.get("temperature"), stop, choices)


def _strength(field: Any, header: str | None) -> float | None:
    if field is not None and (not isinstance(field, dict) or field.keys() != {"strength"}):
        raise RequestError('remoe must be an object as {"strength": 0.5}', param="remoe")
    found = []
    if field is not None:
        found.append(field["strength"])
    if header is not None:
        try:
            found.append(float(header))
        except ValueError:
            found.append(header)
    for value in found:
        if not _is_number(value, 0, 1, False):
            raise RequestError(
                f"strength {value!r} is out of range: a number from 0 (the base) to 1 (the strongest point)",
                param="remoe.strength",
            )
    if len(set(found)) > 1:
        raise RequestError(f"the body wants strength {found[0]}, the header {found[1]}", param="remoe.strength")
    return float(found[0]) if found else None


def _is_number(value: Any, least: float, most: float, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    good = isinstance(stops, list | tuple) and len(stops) <= _MAX_STOPS
    if not good or not all(isinstance(one, str) and 0 < len(one) <= _MAX_STOP_CHARACTERS for one in stops):
        raise RequestError(
            f"stop must be a text or up to {_MAX_STOPS} of them, each of 1 to {_MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(stops)


def _check_texts(route: str, body: Mapping[str, Any]) -> None:
    if route == "/v1/completions":
        if not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise RequestError("prompt must be a text that is not empty", param="prompt")
        return
    name = "messages" if route == "/v1/chat/completions" else "input"
    messages = body.get(name)
    if name == "input" and isinstance(messages, str) and messages:
        return
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise RequestError(f"{name} must be a list of messages that is not empty", param=name)
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        # Items of the Responses API may be calls and their outputs, which have a type and no role.
        if not isinstance(message.get("role"), str) and (name == "messages" or "type" not in message):
            raise RequestError(f"{where} has no role", param=where)
        parts = message.get("content") or ()
        if isinstance(parts, str):
            continue
        texts = isinstance(parts, list | tuple) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) and "text" in str(part.get("type"))
            for part in parts
        )
        if not texts:
            # They would be left out without a word, and the answer be one to another question.
            raise RequestError(f"{where}: this server takes texts alone as content", param=where)
