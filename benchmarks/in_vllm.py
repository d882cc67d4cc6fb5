"""One model in vLLM, told what to score by a line of JSON on stdin; run by `other_engines.py` in vLLM's own Python.

Nothing of this project is imported: what is seen here is what a user of vLLM gets. One process holds one model, and
prints one line of JSON to the file it is told.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def log_probabilities(llm: Any, ids: list[int], lora: Any) -> list[float]:
    """Of each token after the first, given those before it (nats)."""
    sampling = _vllm().SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    [answer] = llm.generate({"prompt_token_ids": ids}, sampling, lora_request=lora, use_tqdm=False)
    return [found[token].logprob for token, found in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]


def _vllm() -> Any:
    # Imported after the settings of `main` are in the environment, which vLLM reads while it is imported.
    import vllm

    return vllm


def _experts_without_lora() -> None:
    """With LoRAs vLLM computes experts by a Triton kernel that can add theirs, and there is none for a CPU.

    The only stand-in here: experts are computed as without LoRAs. Routers and their LoRAs are vLLM's own code.
    """
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    made = FusedMoEConfig.__init__
    FusedMoEConfig.__init__ = lambda self, *args, **options: made(self, *args, **{**options, "is_lora_enabled": False})


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Key `model`: log-probabilities without a LoRA; `lora`: with it; `error`: what vLLM said instead, and where."""
    vllm = _vllm()
    found: dict[str, Any] = {"vllm": vllm.__version__}
    options: dict[str, Any] = {}
    if request.get("lora"):
        _experts_without_lora()
        options = {
            "enable_lora": True, "max_lora_rank": request["max_lora_rank"], "max_loras": 1,
            "lora_target_modules": request["lora_target_modules"],
        }  # fmt: skip
    at = "load"
    try:
        llm = vllm.LLM(
            model=request["model"], dtype=request["dtype"], enforce_eager=True, max_model_len=request["tokens"],
            skip_tokenizer_init=True, max_num_seqs=1, **options,
        )  # fmt: skip
        at = "model"
        found["model"] = log_probabilities(llm, request["ids"], None)
        if request.get("lora"):
            from vllm.lora.request import LoRARequest

            at = "lora"
            found["lora"] = log_probabilities(llm, request["ids"], LoRARequest("remoe", 1, request["lora"]))
    except Exception as error:  # whatever it is, it is what the user would have seen
        found |= {"failed_at": at, "error": f"{type(error).__name__}: {error}"[:600]}
    return found


if __name__ == "__main__":
    settings = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    os.environ.update(settings)
    out = Path(sys.argv[1])
    out.write_text(json.dumps(main(json.loads(sys.stdin.read()))), encoding="utf-8")
