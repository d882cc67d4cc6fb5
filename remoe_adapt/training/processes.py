"""The processes of a distributed run: how many there are, and what each of them computes on."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

from remoe_adapt._support import say_once
from remoe_adapt.errors import ConfigError

# What the launchers set in every process that they start: accelerate and torchrun the first, MPIs the others.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def join_processes(device: str | torch.device | None = None) -> PartialState:
    """The group of processes that this one was launched in; alone where it was not.

    device: where the base is, or is asked for; None: a GPU if there is one. On a CPU the processes talk over gloo.

    Raises ConfigError where a launcher started several processes that do not find each other: each would train by
    itself, and all would write to one folder.
    """
    asked = next((int(value) for name in _SIZES if (value := os.environ.get(name, "")).isdigit()), 1)
    # By its name: one that is no device is refused, in one line, where the base is put there.
    on_cpu = not torch.accelerator.is_available() if device is None else str(device).startswith("cpu")
    # accelerate looks for a launched group on a CPU only where it is told so.
    state = PartialState(cpu=True) if on_cpu and asked > 1 else PartialState()
    if state.num_processes != asked and asked > 1:
        raise ConfigError(
            f"{asked} processes were launched, but this one finds {state.num_processes}: nothing in the process may "
            "ask accelerate for its state before, and a base on the CPU needs device='cpu'."
        )
    if asked == 1 and "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        say_once(
            "accelerate launch --cpu starts one process, whatever --num_processes says, unless it has an "
            "--mpirun_hostfile: this run is of one. For several on CPUs: accelerate launch --multi_gpu, or torchrun."
        )
    return state
