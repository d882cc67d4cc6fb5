"""Train the small Mixture-of-Experts model that ships in ``examples/tiny_moe``.

    python examples/train_tiny_moe.py --data ../shared/data/train --out examples/tiny_moe --minutes 90

A Qwen2-MoE-type model (64 routed experts, top-6, one shared expert per layer) with a byte-level BPE tokenizer, trained
from scratch on books, technical prose, mathematics, encyclopaedia and Python. The schedule follows the clock, so the
same script serves a laptop and an H200: ``--minutes`` is the only budget. After a stop, ``--resume`` goes on from the
last snapshot. ``examples/report_tiny_moe.py`` measures the result and writes its README.

The modules named in ``HELDOUT_STDLIB`` and the prompts in ``PROMPTS`` never enter training: `remoe demo` and the tests
decode and score them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

HELDOUT_STDLIB = (
    "textwrap", "difflib", "heapq", "statistics", "fractions", "shlex", "calendar", "configparser", "sched",
    "graphlib", "bisect", "cmd", "colorsys", "fileinput", "filecmp", "glob", "netrc", "queue", "string", "timeit",
)  # fmt: skip
PROMPTS = (
    "The old lighthouse keeper climbed the stairs every evening, and when the lamp was lit he would",
    "A farmer has 12 baskets with 8 apples in each. He sells 30 apples and gives away 6. How many apples are left?",
    "This document proposes a new built-in function for the standard library. The motivation is that",
    'def moving_average(values, window):\n    """Return the mean of each run of `window` values."""\n',
    "The river rises in the northern hills and flows south through three counties before it reaches the sea .",
    "Definition. A relation R on a set X is an equivalence relation if it is reflexive, symmetric and",
    '"I never said that," she answered, turning from the window; "but if you had asked me,',
    "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)
# share of training tokens by domain: books 10 : technical 10 : maths 7.5 as the data's README asks, and two small ones
DOMAINS: dict[str, tuple[float, tuple[str, ...]]] = {
    "books": (10.0, ("books.jsonl.gz",)),
    "technical": (10.0, ("peps.jsonl.gz", "rust_rfcs.jsonl.gz")),
    "gsm8k": (4.5, ("gsm8k_train.jsonl.gz",)),
    "openlogic": (3.0, ("openlogic.jsonl.gz",)),
    "wikitext": (5.0, ("wikitext2_train_part.txt.gz",)),
    "python": (8.0, ()),
}
VOCAB, EOS, AUX_WEIGHT = 4096, "<|endoftext|>", 0.01


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a .jsonl.gz (`text`, or `question` + `answer`) or .txt.gz file; one wiki article is one document."""
    with gzip.open(path, "rt", encoding="utf8", newline="\n") as f:
        if path.name.endswith(".txt.gz"):
            yield from (a for a in f.read().split("\n \n = ") if a.strip())
            return
        for line in f:
            row = json.loads(line)
            yield row["text"] if "text" in row else row["question"] + "\n" + row["answer"]


def stdlib_documents(names: tuple[str, ...] | None = None) -> Iterator[str]:
    """Source files of the running interpreter's standard library: `names` only, or everything but the held-out ones."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(relative.parts):
            continue
        held_out = relative.parts[0].removesuffix(".py") in HELDOUT_STDLIB
        if (names is None and held_out) or (names is not None and str(relative).removesuffix(".py") not in names):
            continue
        text = path.read_text(encoding="utf8", errors="ignore")
        if text.strip():
            yield text


def documents(data: Path, domain: str) -> Iterator[str]:
    for name in DOMAINS[domain][1]:
        yield from read_documents(data / name)
    if domain == "python":
        yield from stdlib_documents()


def train_tokenizer(data: Path, out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a sample of every domain, in proportion to its share of training."""

    def sample() -> Iterator[str]:
        total = sum(share for share, _ in DOMAINS.values())
        for domain, (share, _) in DOMAINS.items():
            texts = list(documents(data, domain))
            random.Random(0).shuffle(texts)
            left = int(16e6 * share / total)
            for text in texts:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        sample(),
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=EOS, model_max_length=512)
    tokenizer.save_pretrained(out)
    return tokenizer


def tokenised(data: Path, tokenizer: PreTrainedTokenizerFast, cache: Path) -> dict[str, np.ndarray]:
    """One uint16 token stream a domain, documents in a fixed random order, each ended by EOS; kept in `cache`."""
    streams = {}
    for domain in DOMAINS:
        path = cache / f"{domain}.npy"
        if not path.exists():
            texts = list(documents(data, domain))
            random.Random(1).shuffle(texts)
            encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            eos = tokenizer.eos_token_id
            np.save(path, np.concatenate([np.array([*e.ids, eos], dtype=np.uint16) for e in encoded]))
        streams[domain] = np.load(path, mmap_mode="r")
    return streams


def batches(streams: dict[str, np.ndarray], batch: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [batch, length] windows; the domain of each row is drawn by its share."""
    rng = np.random.default_rng(seed)
    names = list(streams)
    shares = np.array([DOMAINS[n][0] for n in names])
    while True:
        rows = []
        for name in rng.choice(names, size=batch, p=shares / shares.sum()):
            stream = streams[str(name)]
            start = int(rng.integers(0, len(stream) - length))
            rows.append(stream[start : start + length].astype(np.int64))
        yield torch.from_numpy(np.stack(rows))


def shipped_model(common: dict[str, Any]) -> PreTrainedModel:
    """Qwen2-MoE: 64 routed experts, top-6, weights that sum to 1, and a shared expert with a gate."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **common, num_hidden_layers=5, num_key_value_heads=3, num_experts=64, num_experts_per_tok=6,
            moe_intermediate_size=48, shared_expert_intermediate_size=96, intermediate_size=384, norm_topk_prob=True,
        )
    )  # fmt: skip


def deepseek_v2_model(common: dict[str, Any]) -> PreTrainedModel:
    """DeepSeek-V2: a dense first layer, latent attention, 64 routed experts, top-6, plain weights, 2 shared experts."""
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **common, num_hidden_layers=5, first_k_dense_replace=1, num_key_value_heads=6, n_routed_experts=64,
            num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=48, intermediate_size=384,
            norm_topk_prob=False, routed_scaling_factor=1.0, topk_method="greedy", n_group=1, topk_group=1,
            q_lora_rank=None, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
        )
    )  # fmt: skip


def olmoe_model(common: dict[str, Any]) -> PreTrainedModel:
    """OLMoE: 64 routed experts, top-8, plain weights, no shared expert, normalised queries and keys."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            **common, num_hidden_layers=4, num_key_value_heads=6, num_experts=64, num_experts_per_tok=8,
            intermediate_size=48, norm_topk_prob=False,
        )
    )  # fmt: skip


# The first one ships; `benchmarks/frontier.py` measures on all of them.
ARCHITECTURES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "qwen2_moe": shipped_model,
    "deepseek_v2": deepseek_v2_model,
    "olmoe": olmoe_model,
}


def build_model(architecture: str, eos: int) -> PreTrainedModel:
    """A new model of that kind, at the shipped one's width and vocabulary."""
    common = {
        "vocab_size": VOCAB, "hidden_size": 192, "num_attention_heads": 6, "router_aux_loss_coef": AUX_WEIGHT,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.03, "eos_token_id": eos,
        "pad_token_id": eos, "bos_token_id": None, "use_cache": True,
    }  # fmt: skip
    if architecture == "deepseek_v2":
        del common["router_aux_loss_coef"]  # it has no such option
    return ARCHITECTURES[architecture](common)


def load_balancing(logits: Iterable[torch.Tensor], top_k: int) -> torch.Tensor:
    """Mean over routers of E * sum_e (share of look-ups of e) * (mean probability of e): Switch Transformer, eq. 4-6,
    with K choices a token. Of router logits [T, E] each; DeepSeek-V2 has no such loss of its own."""
    losses = []
    for logits_TE in logits:
        p_TE = logits_TE.reshape(-1, logits_TE.shape[-1]).float().softmax(dim=-1)
        used_E = torch.zeros_like(p_TE).scatter_(-1, p_TE.topk(top_k, dim=-1).indices, 1.0).mean(dim=0)
        losses.append(p_TE.shape[-1] * (used_E * p_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def keep_freed_memory() -> None:
    """Start again with glibc told to reuse freed buffers and use huge pages: 1.3x faster training on a CPU."""
    if sys.platform == "linux" and "MALLOC_TOP_PAD_" not in os.environ:
        tuned = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000",
                 "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **tuned})


def cross_entropy(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats; the logsumexp form, because `F.cross_entropy` is 20x slower on this CPU."""
    logits = logits_BTV[:, :-1].float()
    peak = logits.detach().amax(-1, keepdim=True)
    log_z = (logits - peak).exp().sum(-1).log() + peak[..., 0]
    return (log_z - logits.gather(-1, ids_BT[:, 1:, None])[..., 0]).mean()


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 2 % of the run, constant to 55 %, then 1 - sqrt decay to zero (WSD: arXiv:2405.18392)."""
    if progress < 0.02:
        return peak * max(progress, 2e-4) / 0.02
    return peak if progress < 0.55 else peak * (1 - math.sqrt((progress - 0.55) / 0.45))


def snapshot(path: Path, **state: object) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training files")
    parser.add_argument("--out", type=Path, default=Path("examples/tiny_moe"))
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen2_moe", help="the first one ships")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to use; none: one is trained")
    parser.add_argument("--work", type=Path, default=Path("build/tiny_moe"), help="token cache and snapshots")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_flush_denormal(True)  # denormals after the first updates slow a CPU step tenfold
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    made = args.out if (args.out / "tokenizer.json").exists() and args.resume else args.tokenizer
    if made is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(made)
    else:
        tokenizer = train_tokenizer(args.data, args.out)
    streams = tokenised(args.data, tokenizer, args.work)
    print({name: len(s) for name, s in streams.items()}, flush=True)

    model = build_model(args.architecture, tokenizer.eos_token_id).to(args.device)
    model.set_experts_implementation("grouped_mm")
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), eps=1e-10, fused=True,
    )  # fmt: skip
    step, tokens, spent_s, mean_ce = 0, 0, 0.0, math.nan
    latest = args.work / "snapshot.pt"
    if args.resume and latest.exists():
        state = torch.load(latest, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, spent_s = state["step"], state.get("tokens", 0), state["spent_s"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    data = batches(streams, args.batch, args.length + 1, seed=step + args.seed)
    total_s, last, saved_s = args.minutes * 60, time.perf_counter(), spent_s
    model.train()
    progress = tqdm(total=round(total_s), initial=round(spent_s), unit="s", mininterval=30)
    with progress as bar, (args.work / "log.jsonl").open("a", encoding="utf8") as log:
        while spent_s < total_s:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spent_s / total_s, args.lr)
            ids = next(data).to(args.device)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                out = model(input_ids=ids, output_router_logits=True, use_cache=False)
            ce = cross_entropy(out.logits, ids)
            aux = getattr(out, "aux_loss", None)
            if aux is None:  # DeepSeek-V2 returns none
                aux = load_balancing(out.router_logits, model.config.num_experts_per_tok)
            (ce + AUX_WEIGHT * aux).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean_ce = ce.item() if math.isnan(mean_ce) else 0.98 * mean_ce + 0.02 * ce.item()
            step += 1
            tokens += args.batch * args.length
            now = time.perf_counter()
            spent_s, last = spent_s + now - last, now
            bar.update(round(spent_s) - bar.n)
            if step % 25 == 0:
                row = {"step": step, "s": round(spent_s), "tokens": tokens,
                       "ce": round(mean_ce, 4), "aux": round(aux.item(), 4)}  # fmt: skip
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(row, refresh=False)
            if spent_s - saved_s > 300:
                state = {"step": step, "tokens": tokens, "spent_s": spent_s}
                snapshot(latest, model=model.state_dict(), optimizer=optimizer.state_dict(), **state)
                saved_s = spent_s

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    facts = {"tokens_seen": tokens, "steps": step, "minutes": args.minutes,
             "recipe": f"batches of {args.batch} x {args.length} tokens, peak learning rate {args.lr:g}",
             "heldout_stdlib": HELDOUT_STDLIB, "prompts": PROMPTS}  # fmt: skip
    (args.out / "demo.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
