"""A family of your own: two strengths trained on text of yours, measured, and put at the dial.

A few steps are a taste; the shipped family took a quarter of an hour of the same function (`remoe train`).

    python examples/04_train_family.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from remoe_adapt import get_remoe_model
from remoe_adapt.evaluation.evaluate import evaluate
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.run import train_family

HERE = Path(__file__).parent / "tiny_moe"
OPTIONS = TrainOptions(steps=16, batch=4, length=96, distill_share=0.7)


def standard_library(*names: str) -> list[str]:
    """Source text of modules: something that every Python has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in names]


def main(folder: Path) -> None:
    data = folder / "text.jsonl"
    rows = [json.dumps({"text": text}) for text in standard_library("argparse", "ast", "inspect", "pathlib", "typing")]
    data.write_text("\n".join(rows), encoding="utf-8")
    # A family, a folder: one plain PEFT adapter for each strength, and family.json.
    family = train_family(HERE, [data], [0.5, 1.0], folder / "family", options=OPTIONS, control=False, progress=False)

    model = AutoModelForCausalLM.from_pretrained(HERE).eval()
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    held_out = [tokenizer(text[:1500])["input_ids"] for text in standard_library("textwrap", "heapq", "difflib")]
    found = evaluate(model, held_out, family=family, policies=["lru"], caches=[0.25])
    print("strength  perplexity to the base's  experts shared with the token before  hit rate at 25 %")
    for row in (found["base"], *found["points"]):
        print(f"{row['strength']:8.1f}  {row['ppl_ratio']:24.4f}  {row['eor']:35.1%}  {row['lru@0.25']:16.1%}")

    dialled = get_remoe_model(model, family=family, monitor=False)
    dialled.controller.set_strength(0.75)  # between two points the dial interpolates
    dialled.controller.step()
    print(f"\n{family.path} is at the dial: strength {dialled.controller.strength}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))
