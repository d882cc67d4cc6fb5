"""How far the memory of this process rises in a forward of inference, and in a training step of each mode; MiB, JSON.

Started with small malloc thresholds, so that what is freed goes back at once. Linux.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tiny_models import tiny_model
from transformers import TrainingArguments

from remoe_adapt import RemoeConfig, RemoeTrainer
from remoe_adapt.recency.install import InstalledPrior
from remoe_adapt.training.trainer import Mode

BATCH, TOKENS = 4, 512
SIZES: dict[str, Any] = {
    "vocab_size": 257, "max_position_embeddings": TOKENS, "hidden_size": 256, "num_hidden_layers": 8,
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def rise_mib(run: Callable[[], Any]) -> float:
    """Of the second run: the first makes what stays, as optimizer states and libraries' own buffers."""
    run()
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run()
    return status_mib("VmHWM") - before


def main() -> None:
    model = tiny_model("qwen2_moe", **SIZES)
    ids_BT = torch.randint(0, SIZES["vocab_size"], (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_BT]

    def infer() -> None:
        with torch.no_grad():
            model(input_ids=ids_BT, use_cache=False)

    found = {"weights": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20}
    found["inference"] = rise_mib(infer)
    tuned = get_peft_model(model, RemoeConfig(reuse_weight=1.2, kl_weight=0.5))

    def step(mode: Mode, prior: InstalledPrior | None) -> None:
        with tempfile.TemporaryDirectory() as out:
            args = TrainingArguments(
                out, max_steps=1, per_device_train_batch_size=BATCH, report_to=[], use_cpu=True, save_strategy="no",
                disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            RemoeTrainer(model=tuned, args=args, train_dataset=rows, mode=mode, prior=prior).train()  # type: ignore[arg-type]

    for mode in ("local", "end-to-end"):
        found[mode] = rise_mib(lambda mode=mode: step(mode, None))  # type: ignore[misc]
    prior = InstalledPrior(model, "cost")
    prior.set_gains(0.1)
    found["local under the rule"] = rise_mib(lambda: step("local", prior))
    json.dump(found, sys.stderr)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
