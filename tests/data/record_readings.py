"""Records `readings-squeeze.jsonl`: what sensors say in a limited group while a neighbour takes its memory.

Run as root where cgroup v1 limits memory and a v2 tree is mounted beside it: `python tests/data/record_readings.py`.
The process maps a file and touches it all the time. Calm, then the neighbour grows up to the limit and the mapped pages
go, then calm again.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from remoe_adapt.pressure.sensors import CGROUPS, Sensors, os_sensors

MIB = 1 << 20
LIMIT, MAPPED = 256 * MIB, 96 * MIB
PERIOD_S, CALM, SQUEEZED, AFTER = 0.4, 5, 12, 5
NEIGHBOUR = """
import sys, time
held = []
for _ in range(int(sys.argv[1])):
    held.append(bytearray(b"x" * (1 << 20)))
    time.sleep(0.02)
time.sleep(600)
"""


def touch(path: str, stop: threading.Event) -> None:
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        while not stop.is_set():
            pages[random.randrange(MAPPED)]


def main() -> None:
    groups = [CGROUPS / "memory" / f"remoe-record-{os.getpid()}", CGROUPS / "unified" / f"remoe-record-{os.getpid()}"]
    for group in groups:
        group.mkdir()
    (groups[0] / "memory.limit_in_bytes").write_text(str(LIMIT))
    homes = [Path(line.split(":", 2)[2].lstrip("/")) for line in Path("/proc/self/cgroup").read_text().splitlines()
             if line.split(":", 2)[1] in ("memory", "")]  # fmt: skip
    out, lines = Path(__file__).with_name("readings-squeeze.jsonl"), []
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(MAPPED))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for group in groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        stop = threading.Event()
        toucher = threading.Thread(target=touch, args=(file.name, stop))
        toucher.start()
        time.sleep(20 * PERIOD_S)
        sensors = Sensors(os_sensors())
        neighbour = None
        for step in range(CALM + SQUEEZED + AFTER):
            if step == CALM:
                used = int((groups[0] / "memory.usage_in_bytes").read_text()) - MAPPED
                grow_mib = (LIMIT - used) // MIB - 24
                neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR, str(grow_mib)])
            elif step == CALM + SQUEEZED and neighbour is not None:
                neighbour.kill()
                neighbour.wait()
            lines.append(sensors.read().to_json() + "\n")
            time.sleep(PERIOD_S)
        stop.set()
        toucher.join()
    for group, home in zip(groups, homes, strict=True):
        (group.parent / home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
    out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
