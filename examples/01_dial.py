"""The dial: one model, one prompt, more and more memory pressure.

The shipped model keeps a quarter of its experts in memory. Turning the dial up makes its routers prefer experts that
the last tokens used: fewer reads from disk, a little more perplexity. Strength 0 is the base model, bit for bit.

    python examples/01_dial.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from remoe_adapt import get_remoe_model, load_with_expert_cache

HERE = Path(__file__).parent / "tiny_moe"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    # Experts stay in the checkpoint; slots for 25 % of them are in memory.
    base = load_with_expert_cache(HERE, expert_cache=0.25)
    model = get_remoe_model(base, family=HERE / "family", monitor=False)  # no sensors: this script plays their part
    prompt = json.loads((HERE / "demo.json").read_text(encoding="utf-8"))["prompts"][0]
    inputs = tokenizer(prompt, return_tensors="pt")

    print(f"prompt: {prompt}\n")
    print("pressure  strength  hit rate  KiB read per token  swaps  continuation")
    for pressure in (0.0, 0.3, 0.6, 1.0, 0.0):
        model.controller.set_pressure(pressure)  # by hand; None gives the dial back to the sensors
        base.expert_cache.clear()
        base.expert_cache.reset_stats()
        torch.manual_seed(0)
        # The swap happens at the first step of `generate`.
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7)
        status, stats = model.controller.status(), base.expert_cache.stats()
        new = ids[0, inputs["input_ids"].shape[1] :]
        print(
            f"{pressure:8.1f}  {status['strength']:8.2f}  {stats['hit_rate']:8.1%}  "
            f"{stats['bytes'] / len(new) / 1024:18.0f}  {status['swaps']:5d}  "
            f"{' '.join(str(tokenizer.decode(new)).split())[:48]}"
        )
    print("\nThe last text is the first one again: swapping back to strength 0 restores every bit of the routers.")


if __name__ == "__main__":
    main()
