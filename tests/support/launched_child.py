"""One of the processes of a launched run: trains as `remoe train` does, from options in a file, and says what it saw.

The report of each process: how many there are, and how many of the base's parameters, and of its own, were sharded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.points import PointsTrainer
from remoe_adapt.training.run import train_family


def main(request: Path) -> None:
    asked = json.loads(request.read_text())
    seen: dict[str, Any] = {}
    step = PointsTrainer.training_step

    def watched(self: PointsTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        sharded = {name for name, value in self.model.named_parameters() if isinstance(value, DTensor)}
        trained = {name for point in self.points for name in point.parameters}
        seen.update(
            processes=self.accelerator.num_processes, sharded=len(sharded), trained_sharded=len(sharded & trained)
        )
        return step(self, *args, **kwargs)

    PointsTrainer.training_step = watched  # type: ignore[method-assign]
    dtype = asked.get("dtype")
    family = train_family(
        asked["base"], [asked["data"]], asked["strengths"], asked["out"], options=TrainOptions(**asked["options"]),
        progress=False, dtype=None if dtype is None else getattr(torch, dtype), **asked.get("more", {}),
    )  # fmt: skip
    seen["points"] = list(family.strengths)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    Path(f"{request}.{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
