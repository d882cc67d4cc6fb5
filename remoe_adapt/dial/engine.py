"""What a serving engine is to the dial: whoever computes the tokens, wherever that is.

| engine | where | a target takes effect | by |
|---|---|---|---|
| transformers | this process | at the next step | `staging.Staging` |
| llama-server | HTTP | at the next request, or the server's next batch | `llamacpp.server.LlamaServer` |
| recency prior | a library preloaded into any llama.cpp | at the next batch | `llamacpp.prior_engine.PriorEngine` |
| mapped file | the page cache under any llama.cpp | at once, in the midst of a token | `llamacpp.live.LlamaFile` |

To add one: write a class with these members (nothing is inherited), give it to whoever has the clock (`Controller` for
an engine in this process, `Watch` for one outside, which may start from `llamacpp.outside.OutsideEngine`), add its row
above and its maker to `ENGINES` of tests/dial/test_engine.py, whose tests then hold for it. It need not be fast: only
`post` runs where the sensors are read.
"""

from __future__ import annotations

from typing import Any, Protocol

from remoe_adapt.dial.events import SENSORS, Target
from remoe_adapt.pressure import Decision


class Engine(Protocol):
    """Any thread may call anything but `sync` and `close`, which belong to one.

    name: in status and messages.
    takes_effect: when a posted strength counts, in words.
    met: how many processes of the engine were met so far; more than before means a restart.
    swaps: how often its strength was set.
    """

    @property
    def name(self) -> str: ...

    @property
    def takes_effect(self) -> str: ...

    @property
    def met(self) -> int: ...

    @property
    def swaps(self) -> int: ...

    @property
    def points(self) -> tuple[float, ...]:
        """Strengths that were trained, rising; the engine takes any between 0 (the base) and 1."""
        ...

    @property
    def target(self) -> float:
        """The strength posted last; before the first, the one that the engine was found at."""
        ...

    def post(self, target: Target) -> None:
        """Want this strength; never waits for a token. The latest post wins, an equal one changes the reason alone.

        Raises ConfigError for a strength that is no number in [0, 1]; DialError after `close`, where a hand posts. What
        the sensors post is dropped then, for their sample may have been under way.
        """
        ...

    def sync(self) -> bool:
        """Bring the target about as far as this thread can; True when the engine is there, or will be by itself.

        Raises ServerError for an engine that cannot be driven, ServerDownError where it does not answer.
        """
        ...

    def status(self) -> dict[str, Any]:
        """JSON-ready. Every engine has: engine (name), strength (live; None: not known), target, ready (it can be
        turned now), met, swaps, swap_ms (the last one; None: not measured), points, closed. What else it can count
        stands beside these."""
        ...

    def close(self, keep: bool = False) -> float | None:
        """Let go: back to the base, or with `keep` as it is. The strength it is left at, None: it could not be asked.
        Closing again does nothing, and says the same."""
        ...


def turn(engine: Engine, decision: Decision) -> None:
    """Have an engine do what the policy decided."""
    if decision.changed or decision.strength == engine.target:  # else another post came between
        engine.post(Target(decision.strength, decision.pressure, decision.reason, SENSORS))
