"""The expert cache: a model that does not fit, and what each size of memory costs.

Whatever the budget, the logits are transformers' own, bit for bit; only the reads change. The cache can be resized
while a model decodes, which is what the controller does when memory runs out.

    python examples/03_expert_cache.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remoe_adapt import load_with_expert_cache

HERE = Path(__file__).parent / "tiny_moe"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    prompt = json.loads((HERE / "demo.json").read_text(encoding="utf-8"))["prompts"][0]
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": 60, "do_sample": True, "temperature": 0.7}
    stock = AutoModelForCausalLM.from_pretrained(HERE, experts_implementation="eager").eval()
    torch.manual_seed(0)
    expected = stock.generate(**inputs, **options)

    model = load_with_expert_cache(HERE, expert_cache=1.0).eval()
    total = model.expert_cache.budget_bytes
    print("cache  MiB  hit rate  KiB read per token  ms per token  same text as transformers")
    for share in (1.0, 0.5, 0.25, 0.125):
        model.expert_cache.resize(int(share * total))
        model.expert_cache.clear()
        model.expert_cache.reset_stats()
        torch.manual_seed(0)
        begin_s = time.perf_counter()
        ids = model.generate(**inputs, **options)
        took_s, stats = time.perf_counter() - begin_s, model.expert_cache.stats()
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        print(
            f"{share:5.1%}  {share * total / (1 << 20):3.0f}  {stats['hit_rate']:8.1%}  "
            f"{stats['bytes'] / new / 1024:18.0f}  {1000 * took_s / new:12.1f}  {torch.equal(ids, expected)}"
        )


if __name__ == "__main__":
    main()
