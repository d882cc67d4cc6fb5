"""Decoding with a KV cache under the prior, on the shipped model: what must hold on every version that we admit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from remoe_adapt import get_remoe_model, recency_prior
from remoe_adapt.evaluation.record import record_decode
from remoe_adapt.traces.metrics import eor

PROMPTS = [list(range(40 * place + 5, 40 * place + 25)) for place in range(6)]
# Every way of ours into a model, in a process of its own: transformers tells a deprecation once.
EVERYTHING = """
import sys, torch, remoe_adapt
from remoe_adapt.evaluation.record import record_decode
model = remoe_adapt.get_remoe_model(sys.argv[1], family=sys.argv[1] + "/family/trained", recency="ema", monitor=False)
model.controller.set_strength(1.0)
ids = torch.arange(5, 25)[None]
model.generate(ids, max_new_tokens=4, do_sample=False)
model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False)
model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2, do_sample=False)
model.generate(ids, max_new_tokens=4, cache_implementation="static", do_sample=False, disable_compile=True)
record_decode(model, [list(range(5, 25))], 4)
cached = remoe_adapt.load_with_expert_cache(sys.argv[1], 0.5)
cached.generate(ids, max_new_tokens=4, do_sample=False)
print("done")
"""


@pytest.fixture(scope="module")
def shipped(repo_root: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(repo_root / "examples" / "tiny_moe").eval()


def decoded_eor(model: Any) -> float:
    """EOR of sampled text, a token a step with the KV cache: greedy text loops, and a loop reuses by itself."""
    return eor(record_decode(model, PROMPTS, 40, temperature=1.0))


def test_the_ema_prior_raises_the_overlap_of_cached_decoding_by_four_fifths(shipped: Any) -> None:
    base = decoded_eor(shipped)
    with recency_prior(shipped, "ema", 0.3):
        raised = decoded_eor(shipped)
    assert raised >= 1.8 * base, f"EOR {base:.3f} -> {raised:.3f}"
    assert decoded_eor(shipped) == base


def test_generate_is_one_scan_over_the_same_text(shipped: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    model = get_remoe_model(shipped, monitor=False)
    model.controller.set_strength(1.0)
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(
        model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False), cached
    )
    model.controller.close()
    model.unload()


def test_nothing_of_ours_is_deprecated(repo_root: Path) -> None:
    command = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
    # peft reads this one, not we.
    command += ["-W", "ignore:`is_gradient_checkpointing`:FutureWarning", "-c", EVERYTHING]
    done = subprocess.run(
        [*command, str(repo_root / "examples" / "tiny_moe")], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("done\n"), done.stderr[-2000:]
    assert "deprecat" not in done.stderr.lower(), done.stderr
