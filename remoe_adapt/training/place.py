"""Where a training runs and writes, checked before the work: the device, the folder, its free space, what fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn

from remoe_adapt.errors import ConfigError
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.untrusted import printable

# A checkpoint holds the adapter and Adam's two moments, and the one before it is removed only when it is complete:
# three sizes of an adapter, twice.
_ADAPTERS_IN_CHECKPOINTS = 6


def check_writable(out: Path) -> None:
    """Raises ConfigError when the folder, or the nearest one above it that exists, cannot be written."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if place == out and not place.is_dir():
        return  # refused by name later
    if not place.is_dir():
        raise ConfigError(f"{printable(out)} cannot be made: {printable(place)} is a file; choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{printable(out)} cannot be written: no right to write in {printable(place)}")


def check_fits(model: nn.Module, options: TrainOptions, points: int, out: Path) -> None:
    """Raises ConfigError for a rank above that of a router's weight, and for more than the free space of `out`."""
    shapes = [(router.name, *router.weight_ED.shape) for router in discover_routers(model)]
    for name, rows, columns in shapes:
        if options.rank is not None and options.rank > min(rows, columns):
            raise ConfigError(
                f"rank={options.rank}: router {name} has {rows} x {columns} weights, so a delta has rank "
                f"{min(rows, columns)} at most; use less, or no rank for full deltas"
            )
    values = sum(
        rows * columns if options.rank is None else options.rank * (rows + columns) for _, rows, columns in shapes
    )
    # fp32, whatever the base's dtype: adapters are trained and saved in it.
    needed = 4 * values * (points + _ADAPTERS_IN_CHECKPOINTS)
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"{points} adapters and a checkpoint take {needed / 2**20:.1f} MiB, {printable(place)} has "
            f"{free / 2**20:.1f} MiB free: make room, or choose another --out"
        )
