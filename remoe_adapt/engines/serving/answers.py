"""An answer of transformers' handlers on its way to the client: its strength in `usage.remoe`, cut at its stop texts.

Both are done on what goes over the wire, JSON and server-sent events, which OpenAI's protocol fixes; the handlers'
inner ways differ between versions of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_DONE = "data: [DONE]\n\n"


class StopCutter:
    """Takes pieces of a text; gives on what can no longer be part of a stop text, and nothing from the first one on."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.cut = tuple(stops), "", False

    def feed(self, piece: str) -> str:
        """What may be shown now."""
        if self.cut:
            return ""
        text = self._held + piece
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.cut, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def joined(bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whole answers to one request as one with all of their choices; the prompt counts once, as OpenAI counts it."""
    first = bodies[0]
    for number, body in enumerate(bodies[1:], 1):
        first["choices"] += [{**choice, "index": number} for choice in body["choices"]]
        for name in ("completion_tokens", "total_tokens"):
            first["usage"][name] += body["usage"]["completion_tokens"]
    return first


def finished(body: dict[str, Any], remoe: dict[str, Any], stops: Sequence[str]) -> dict[str, Any]:
    """A whole answer with `usage.remoe`, its texts cut at the first stop text."""
    body.setdefault("usage", {})["remoe"] = remoe
    for choice in body.get("choices", ()) if stops else ():
        owner, name = _text_of(choice)
        if owner is not None and isinstance(owner.get(name), str):
            cutter = StopCutter(stops)
            owner[name] = cutter.feed(owner[name]) + cutter.rest()
            if cutter.cut:
                choice["finish_reason"] = "stop"
    return body


class Events:
    """The events of one streamed answer, on their way.

    remoe: what is known of the answer's strength; asked when the usage comes by.
    failure: the error to tell instead of the handlers' own words; None: there was none.
    stops: texts at which the answer ends.
    done: end as chat and completions do, with `[DONE]`.
    """

    def __init__(
        self,
        remoe: Callable[[], dict[str, Any]],
        failure: Callable[[], dict[str, Any] | None],
        stops: Sequence[str],
        done: bool,
    ) -> None:
        self._remoe, self._failure, self._done = remoe, failure, done
        self._cutter = StopCutter(stops) if stops else None
        self._broken = False

    def passed_on(self, piece: str) -> str:
        """What goes to the client of one piece, which holds whole events."""
        return "".join(self._event(event) for event in _split(piece))

    def end(self) -> str:
        """What follows the last piece."""
        return "" if self._broken or not self._done else _DONE

    def _event(self, event: str) -> str:
        if event.startswith('data: {"error"'):
            # Said by hand there, without escaping what a message may hold.
            self._broken = True
            return _sse(self._failure() or {"error": {"message": "the model failed", "type": "server_error"}})
        if self._cutter is None and '"usage"' not in event:
            return event
        fields = json.loads(event.removeprefix("data: "))
        for owner in (fields, fields.get("response")):
            if isinstance(owner, dict) and isinstance(owner.get("usage"), dict):
                owner["usage"]["remoe"] = self._remoe()
        if self._cutter is not None:
            for choice in fields.get("choices", ()):
                self._cut(choice, self._cutter)
        return _sse(fields)

    def _cut(self, choice: dict[str, Any], cutter: StopCutter) -> None:
        owner, name = _text_of(choice)
        if owner is None:
            return
        if isinstance(owner.get(name), str):
            owner[name] = cutter.feed(owner[name])
        if choice.get("finish_reason"):
            if rest := cutter.rest():
                owner[name] = owner.get(name, "") + rest
            if cutter.cut and choice["finish_reason"] == "length":
                choice["finish_reason"] = "stop"


def _text_of(choice: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Where the text of a choice is: in itself, in its message or in its delta."""
    for key in ("delta", "message"):
        if isinstance(choice.get(key), dict):
            return choice[key], "content"
    return (choice, "text") if "text" in choice else (None, "")


def _split(piece: str) -> Iterator[str]:
    while piece:
        event, mark, piece = piece.partition("\n\n")
        yield event + mark


def _sse(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
