"""A llama-server under `remoe watch`, many clients, pressure up and down, a server that is killed: one run of it."""

from __future__ import annotations

import http.client
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llama_answers import Answer, ask, prompts
from llama_child import LlamaChild

from remoe_adapt.device_profile.profile import ControllerProfile, DeviceProfile
from remoe_adapt.pressure.reading import Measure, Reading
from remoe_adapt.pressure.sensors import Sensors

CLIENTS = 4
LONGEST_S = 600.0
# A server's death is noticed by its clients so much later at most.
NOTICED_S = 0.5


class PlayedSensors(Sensors):
    """Pressure that a test sets: it is read as the share of time in which tasks stall on memory."""

    def __init__(self) -> None:
        super().__init__([])
        self.pressure = 0.0

    def read(self, now_s: float | None = None) -> Reading:
        now_s = time.monotonic() if now_s is None else now_s
        return Reading(now_s, {"psi.memory.some": Measure(self.pressure, "share", now_s)})


def quick(profile: DeviceProfile) -> DeviceProfile:
    """The profile with a policy that follows within tenths of a second: many strengths in a short test."""
    from dataclasses import replace

    fast = ControllerProfile(sample_hz=20.0, rise_s=0.05, fall_s=0.2, dwell_s=0.1, deadband=0.02, max_swaps_per_s=10.0)
    return replace(profile, controller=fast, pressure=replace(profile.pressure, psi_memory=(0.0, 1.0)))


@dataclass
class Outcome:
    """answers: (prompt, begin, end, answer); failures: (begin, end, what); kills: when; all in seconds."""

    answers: list[tuple[list[int], float, float, Answer]] = field(default_factory=list)
    failures: list[tuple[float, float, str]] = field(default_factory=list)
    kills: list[tuple[float, float]] = field(default_factory=list)

    def unexcused(self) -> list[tuple[float, float, str]]:
        """Failures of requests that were not under way when the server was killed."""
        return [
            (begin, end, what)
            for begin, end, what in self.failures
            if not any(begin <= killed <= end + NOTICED_S and end <= killed + NOTICED_S for killed, _ in self.kills)
        ]


def drive(
    server: LlamaChild,
    port: int,
    count: int,
    kills: int,
    *,
    met: Callable[[], int] | None = None,
    pressure: PlayedSensors | None = None,
    seed: int = 0,
) -> Outcome:
    """`count` answers, CLIENTS at a time, from `port`; the server is killed and started again `kills` times meanwhile.

    A request that failed is sent again until it is answered. met: how many servers were met so far; each is met before
    it is killed, and before this ends. None: not waited for, as where a proxy holds the requests until then.
    """
    outcome, numbers, lock, over = Outcome(), itertools.count(), threading.Lock(), threading.Event()
    texts = prompts(8)

    def client() -> None:
        while (number := next(numbers)) < count:
            prompt = texts[number % len(texts)]
            while not over.is_set():
                begin = time.monotonic()
                try:
                    answer = ask(port, prompt)
                except (OSError, http.client.HTTPException, RuntimeError) as error:
                    with lock:
                        outcome.failures.append((begin, time.monotonic(), f"{type(error).__name__}: {error}"))
                    time.sleep(0.05)
                    continue
                with lock:
                    outcome.answers.append((prompt, begin, time.monotonic(), answer))
                break

    def weather() -> None:
        draw = random.Random(seed)
        while pressure is not None and not over.wait(0.25):
            pressure.pressure = draw.choice([0.0, 0.0, 1.0, draw.random()])

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    mover = threading.Thread(target=weather)
    for thread in (*threads, mover):
        thread.start()
    try:
        _kill_and_start(server, outcome, count, kills, met, threads)
    finally:
        over.set()
        for thread in (*threads, mover):
            thread.join()
    return outcome


def _kill_and_start(
    server: LlamaChild,
    outcome: Outcome,
    count: int,
    kills: int,
    met: Callable[[], int] | None,
    threads: list[threading.Thread],
) -> None:
    """`kills` times, spread evenly over the answers; then waits for the last of them."""
    end = time.monotonic() + LONGEST_S
    for kill in range(1, kills + 1):
        while len(outcome.answers) < count * kill // (kills + 1) or (met and met() < kill):
            assert time.monotonic() < end, outcome.failures[-3:]
            time.sleep(0.01)
        killed = time.monotonic()
        server.kill()
        time.sleep(0.2)
        server.start()
        outcome.kills.append((killed, time.monotonic()))
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), outcome.failures[-3:]
    while met and met() <= kills:
        assert time.monotonic() < end, f"{met()} of {kills + 1} servers were met"
        time.sleep(0.01)
