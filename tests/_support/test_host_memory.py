"""The allocator keeps freed blocks inside the context only: seen in the page faults of a fresh process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from contextlib import nullcontext
from remoe_adapt._support.host_memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with {context}:
    faults()
    inside = faults()
print(inside, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_faults_inside_and_outside() -> None:
    for context, kept in (("freed_memory_kept()", True), ('freed_memory_kept("cuda")', False)):
        script = FAULTS.format(context=context)
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        inside, outside = map(int, run.stdout.split())
        assert inside * 4 < outside if kept else inside * 2 > outside
