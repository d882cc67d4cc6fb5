"""FSDP2: accelerate shards the base over the processes, and what is trained stays whole on each of them.

Deltas and recovery LoRAs are small, and every point's gradients are reduced by hand anyway (`PointsTrainer`). So they
are kept out of the sharded groups, and Trainer has nothing sharded to optimise, save or load.
"""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from remoe_adapt.errors import ConfigError
from remoe_adapt.tuner import RemoeLayer

_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def is_sharded() -> bool:
    """Whether accelerate was launched with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_sharded(base_is_loaded: bool, has_expert_cache: bool, passes_share_base: bool) -> None:
    """Raises ConfigError for what a sharded run cannot do; to be called before the base is loaded."""
    if os.environ.get("FSDP_VERSION") != "2":
        raise ConfigError("FSDP version 1 is not supported: launch with --fsdp_version 2 (fsdp_version: 2).")
    faults = {
        "the base is a model already, and it would be left sharded: give its folder or hub id": base_is_loaded,
        "an expert cache keeps experts out of the model, so there is nothing to shard: leave one of them out":
            has_expert_cache,
        "next_steps trains twice on one base, as reference='control' does, and FSDP2 shards it once: leave both out":
            passes_share_base,
    }  # fmt: skip
    for fault, found in faults.items():
        if found:
            raise ConfigError(f"FSDP: {fault}.")
    # Processes other than the first would load no values, and each measures its routers before anything is sharded.
    os.environ[_EFFICIENT_LOADING] = "false"


def keep_trained_whole(accelerator: Accelerator, model: nn.Module) -> None:
    """When accelerate shards `model`, routers and trainable parameters stay whole; on CPUs it is made to shard."""
    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        # AcceleratorState takes the plugin on GPUs and the like alone, and would replicate a base on CPUs unasked.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    plugin = state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False
    plugin.ignored_modules = [
        module
        for module in model.modules()
        # The routers' own weights too: terms are computed, and layers learn locally, when nothing is gathered.
        if isinstance(module, RemoeLayer) or any(p.requires_grad for p in module.parameters(recurse=False))
    ]
