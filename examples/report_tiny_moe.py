"""Measure the shipped model and write its README: quality, a trigram baseline, routing that matters.

    python examples/report_tiny_moe.py --data ../shared/data --model examples/tiny_moe

Bits per byte follow the protocol of `remoe eval`. The trigram model is an interpolated Kneser-Ney one over the
same tokenizer and training text, every document of it. The routing test gives every token of a layer the same K
experts, those it uses most, and reports what that costs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from train_tiny_moe import DOMAINS, documents, stdlib_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from remoe_adapt.evaluation.evaluate import evaluate
from remoe_adapt.evaluation.record import record_forward
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.texts import read_file, tokenize_documents

HELD_OUT = {
    "wikitext2_valid": "wikitext2_valid.txt.gz",
    "gsm8k_test": "gsm8k_test.jsonl.gz",
    "humaneval": "humaneval.jsonl.gz",
}

TEMPLATE = """# tiny_moe

A small Mixture-of-Experts language model with real, trained routing, on which demo, tests and benchmarks run.
It is a measuring instrument, not an assistant.

| | |
|---|---|
| architecture | Qwen2-MoE: {layers} layers, hidden {hidden}; per layer {experts} and a shared one (inner {shared}) |
| parameters | {parameters_m:.1f} M, stored as bf16 |
| tokenizer | byte-level BPE, {vocabulary} entries |
| context | {positions} tokens |
| trained on | {tokens_m:.1f} M tokens in {steps} steps: books, technical prose, mathematics, encyclopaedia, Python |
| load-balancing loss | {aux} |
| made by | `examples/train_tiny_moe.py`, {minutes:.0f} minutes of one CPU core ([log](training_log.jsonl)) |
| recipe | {recipe} |

Held-out text, {tokens} tokens a domain, measured in fp32 by `python examples/report_tiny_moe.py --data ../shared/data`.
CE is in nats per token. The trigram model is interpolated Kneser-Ney on all the training text. "Constant experts" gives
every token of a layer the same {top_k} experts, the ones it uses most there: what routing is worth.

| text | bits per byte | CE | trigram CE | EOR | load entropy | perplexity with constant experts |
|---|---|---|---|---|---|---|
{rows}

The `python_stdlib` row is source of these modules of the running interpreter, which training never saw:
{modules}.

Sampled at temperature 0.7, top-p 0.9, seed 0 (the first line or so is the prompt):

{samples}

`family/` holds the router adapters trained on it; see the README of the repository.
"""


class Trigram:
    """Interpolated Kneser-Ney with one discount per order; counts are sorted uint64 keys, so no table of V^3."""

    discount = 0.75

    def __init__(self, stream: NDArray[np.int64], vocabulary: int) -> None:
        self.v = vocabulary
        a, b, c = stream[:-2], stream[1:-1], stream[2:]
        self.tri, self.tri_n = np.unique((a * vocabulary + b) * vocabulary + c, return_counts=True)
        self.context, first = np.unique(self.tri // vocabulary, return_index=True)
        self.context_n = np.add.reduceat(self.tri_n, first)
        self.context_types = np.diff(np.append(first, len(self.tri)))
        # lower orders count the distinct words before: continuation counts
        self.bi, self.bi_n = np.unique(self.tri % (vocabulary * vocabulary), return_counts=True)
        self.word, first = np.unique(self.bi // vocabulary, return_index=True)
        self.word_n = np.add.reduceat(self.bi_n, first)
        self.word_types = np.diff(np.append(first, len(self.bi)))
        self.uni = np.bincount((self.bi % vocabulary).astype(np.int64), minlength=vocabulary) + 0.5
        self.uni = self.uni / self.uni.sum()

    @staticmethod
    def _look_up(keys: NDArray[Any], values: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.float64]:
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0).astype(np.float64)

    def nats(self, ids: list[int]) -> float:
        """Sum of -log p over the tokens after the first two."""
        x = np.asarray(ids, dtype=np.int64)
        a, b, c = x[:-2], x[1:-1], x[2:]
        word_n = self._look_up(self.word, self.word_n, b)
        bi = self._look_up(self.bi, self.bi_n, b * self.v + c)
        seen = np.maximum(word_n, 1)
        rest = np.where(word_n > 0, self.discount * self._look_up(self.word, self.word_types, b) / seen, 1.0)
        p = np.maximum(bi - self.discount, 0) / seen + rest * self.uni[c]
        context_n = self._look_up(self.context, self.context_n, a * self.v + b)
        tri = self._look_up(self.tri, self.tri_n, (a * self.v + b) * self.v + c)
        seen = np.maximum(context_n, 1)
        types = self._look_up(self.context, self.context_types, a * self.v + b)
        p = np.maximum(tri - self.discount, 0) / seen + np.where(context_n > 0, self.discount * types / seen, 1.0) * p
        return float(-np.log(p).sum())


@contextmanager
def constant_experts(model: Any, docs: list[list[int]]) -> Iterator[None]:
    """Every token of a layer goes to the K experts this layer uses most on `docs`, weighted by its own scores."""
    routers = discover_routers(model)
    with record_forward(model) as recorder, torch.no_grad():
        for ids in docs[:20]:
            model(input_ids=torch.tensor([ids[:512]]), use_cache=False)
        ids_LTK = recorder.take().long()
    handles = []
    for ref, ids_TK in zip(routers, ids_LTK, strict=True):
        chosen_K = ids_TK.flatten().bincount(minlength=ref.spec.num_experts).topk(ref.spec.top_k).indices

        def replace(_m: Any, _i: Any, output: Any, ref: Any = ref, chosen_K: torch.Tensor = chosen_K) -> Any:
            logits, weights, ids = output
            same = chosen_K.expand_as(ids)
            new = ref.spec.expert_weights(logits.reshape(-1, ref.spec.num_experts), same.reshape(-1, ref.spec.top_k))
            return logits, new.to(weights.dtype).view_as(weights), same

        handles.append(ref.module.register_forward_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and heldout/")
    parser.add_argument("--model", type=Path, default=Path("examples/tiny_moe"))
    parser.add_argument("--tokens", type=int, default=40_000, help="held-out tokens per domain")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    facts = json.loads((args.model / "demo.json").read_text(encoding="utf8"))

    held_out = {
        name: tokenize_documents(read_file(args.data / "heldout" / file), tokenizer, args.tokens)
        for name, file in HELD_OUT.items()
    }
    stdlib = tuple(facts["heldout_stdlib"])
    held_out["python_stdlib"] = tokenize_documents(stdlib_documents(stdlib), tokenizer, args.tokens)

    encode = tokenizer.backend_tokenizer.encode_batch
    stream: list[int] = []
    for domain in DOMAINS:
        for encoded in encode(list(documents(args.data / "train", domain)), add_special_tokens=False):
            stream += [*encoded.ids, tokenizer.eos_token_id]
    trigram = Trigram(np.asarray(stream, dtype=np.int64), len(tokenizer))

    rows, result = [], {}
    for name, docs in held_out.items():
        scored_bytes = sum(len(str(tokenizer.decode(ids[1:])).encode("utf8")) for ids in docs)
        base = evaluate(model, docs)["base"]
        tokens = sum(len(ids) - 1 for ids in docs)
        trigram_ce = sum(map(trigram.nats, docs)) / sum(max(0, len(ids) - 2) for ids in docs)
        with constant_experts(model, docs):
            constant = evaluate(model, docs)["base"]
        bpb = base["ce"] * tokens / scored_bytes / math.log(2)
        result[name] = {
            "bits_per_byte": bpb, "ce": base["ce"], "trigram_ce": trigram_ce, "eor": base["eor"],
            "load_entropy": base["load_entropy"], "constant_top_k_ppl_ratio": math.exp(constant["ce"] - base["ce"]),
        }  # fmt: skip
        r = result[name]
        rows.append(
            f"| {name} | {bpb:.3f} | {r['ce']:.3f} | {trigram_ce:.3f} | {r['eor']:.3f} | {r['load_entropy']:.3f} "
            f"| {r['constant_top_k_ppl_ratio']:.2f}x |"
        )
        print(rows[-1], flush=True)

    samples = []
    for prompt in facts["prompts"][:4]:
        ids = tokenizer(prompt, return_tensors="pt")
        torch.manual_seed(0)
        out = model.generate(**ids, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9)
        samples.append("```text\n" + str(tokenizer.decode(out[0])).strip() + "\n```")
    total = sum(p.numel() for p in model.parameters())
    config = model.config
    experts = (
        f"{config.num_experts} routed experts (top-{config.num_experts_per_tok}, inner {config.moe_intermediate_size})"
    )
    text = TEMPLATE.format(
        layers=config.num_hidden_layers, hidden=config.hidden_size, experts=experts, top_k=config.num_experts_per_tok,
        shared=config.shared_expert_intermediate_size, parameters_m=total / 1e6, vocabulary=len(tokenizer),
        positions=config.max_position_embeddings, tokens_m=facts["tokens_seen"] / 1e6, steps=facts["steps"],
        aux=config.router_aux_loss_coef, minutes=facts["minutes"], recipe=facts["recipe"],
        tokens=args.tokens, rows="\n".join(rows),
        modules=", ".join(f"`{name}`" for name in stdlib), samples="\n".join(samples),
    )  # fmt: skip
    (args.model / "README.md").write_text(text, encoding="utf8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
