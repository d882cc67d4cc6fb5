"""A machine whose memory the test sets, and a monitor that ticks when the test says so."""

from __future__ import annotations

from peft import PeftModel

from remoe_adapt.pressure.reading import Measure, Reading

GIB = float(1 << 30)


class Machine:
    """Stands for the sensors: memory as the test says, on the test's clock."""

    name = "memory"

    def __init__(self) -> None:
        self.free_bytes = 4 * GIB

    def read(self, now_s: float) -> Reading:
        sizes = {"memory.available": self.free_bytes, "memory.total": 8 * GIB}
        return Reading(now_s, {name: Measure(size, "B", now_s) for name, size in sizes.items()})

    def close(self) -> None:
        """It holds nothing."""


def under(model: PeftModel) -> Machine:
    """Let this machine be what the model's monitor reads, besides the model's own cache."""
    machine = Machine()
    sensors = model.controller._monitor._governor.sensors
    sensors.sensors = (machine, *(sensor for sensor in sensors.sensors if sensor.name == "cache"))
    return machine


def tick_for(model: PeftModel, begin_s: float, seconds: float) -> float:
    end_s = begin_s + seconds
    while begin_s < end_s:
        model.controller.tick(begin_s)
        begin_s += 0.2
    return begin_s


def live(model: PeftModel) -> float:
    """The strength after the next step of a loop: the monitor itself never swaps."""
    model.controller.step()
    return float(model.controller.strength)
