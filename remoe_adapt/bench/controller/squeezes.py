"""How often the kernel kills an arm of `remoe bench controller` over many squeezes, while it decodes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from remoe_adapt.bench.controller.arms import bench_profile, kinds
from remoe_adapt.bench.controller.process import ArmProcess, DiedError, Setup

# Seconds that memory is held, and the longest that the cache may take to be whole again.
_HOLD_S, _LONGEST_S = 1.0, 30.0
# Free memory differs a little from squeeze to squeeze, so a budget need not come back to the byte.
_WHOLE = 0.95


def count_kills(setup: Setup, squeezes: int) -> dict[str, Any]:
    """For "adaptive" and "fixed_budget": `squeezes` made, `oom_kills`, and the `least_budget_bytes` of the cache.

    Each squeeze finds the cache whole: after one it grows and fills again, or, after a kill, the arm starts again.
    """
    return {name: _count(name, setup, squeezes) for name in ("adaptive", "fixed_budget")}


def _count(name: str, setup: Setup, squeezes: int) -> dict[str, Any]:
    least: float | None = None
    with ExitStack() as undo:
        arm = ArmProcess(f"{name}-kills", kinds(())[name], setup, undo)
        arm.start()
        arm.ask("resume")
        for _ in range(squeezes):
            try:
                arm.squeeze()
                answer = arm.ask("decode", seconds=arm.take_bytes / setup.take_bytes_per_s + _HOLD_S)
                held = arm.relax()
                assert held >= 0.99 * arm.take_bytes - (2 << 20), "the squeezer has not taken what it should"
                least = min(answer["steps"]["budget_bytes"] + ([] if least is None else [least]))
                _grow_again(arm)
            except DiedError:
                arm.start()
                arm.ask("resume")
        return {"squeezes": squeezes, "oom_kills": arm.group.kills(), "least_budget_bytes": least}


def _grow_again(arm: ArmProcess) -> None:
    recovery_s = bench_profile().recovery_s
    waited_s, whole = 0.0, _WHOLE * arm.facts["budget_bytes"]
    while waited_s < max(recovery_s, _LONGEST_S):
        answer = arm.ask("decode", seconds=1.0)
        waited_s += answer["seconds"]
        if answer["steps"]["budget_bytes"][-1] >= whole:
            break
    arm.ask("fill")
