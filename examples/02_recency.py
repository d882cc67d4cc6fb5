"""The recency prior: expert reuse without any training.

Experts that the last tokens used get a bonus when experts are ranked; their weights stay as they are. A small gain buys
many hits for little perplexity, and with the gain at 0 the model is the base again.

    python examples/02_recency.py
"""

from __future__ import annotations

import inspect
import math
import textwrap
from pathlib import Path

import torch
from transformers import AutoTokenizer

from remoe_adapt import load_with_expert_cache, recency_prior

HERE = Path(__file__).parent / "tiny_moe"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model = load_with_expert_cache(HERE, expert_cache=0.25).eval()
    # The model was trained on Python's standard library, but never saw this module.
    ids = tokenizer(inspect.getsource(textwrap)[:900], return_tensors="pt")["input_ids"]

    base_loss = None
    print("gain  perplexity to the base's  hit rate of a cache for 25 % of the experts")
    for gain in (0.0, 0.1, 0.2, 0.3):
        with recency_prior(model, "ema", gain), torch.no_grad():
            loss = model(ids, labels=ids).loss.item()
            model.expert_cache.clear()
            model.expert_cache.reset_stats()
            torch.manual_seed(0)
            model.generate(ids[:, :40], max_new_tokens=80, do_sample=True)
        base_loss = loss if base_loss is None else base_loss
        hit_rate = model.expert_cache.stats()["hit_rate"]
        print(f"{gain:4.1f}  {math.exp(loss - base_loss):24.4f}  {hit_rate:.1%}")
    print("\nTo keep a gain: get_remoe_model(model, recency='ema', recency_gain=0.2), with a family or without.")


if __name__ == "__main__":
    main()
