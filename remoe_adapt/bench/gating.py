"""`remoe bench gating`: the gate, with product and as a scan, against its definition and against plain copying.

On a GPU a call is timed inside a CUDA graph of many calls (caches warm, no launch from the host in between), as the
published gates are: microseconds a call, medians over replays.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.bench.gating_cpu import TOP_K, cpu_rows, held_to, timed_row
from remoe_adapt.gating import PriorStep, kernel_rule, spec_text, topk_gating
from remoe_adapt.routers import RouterSpec

Row = dict[str, Any]
Call = Callable[[], object]
_DECAY = 0.7
# One token, microseconds: the best published gate without a prior takes 1.83 / 2.36 / 2.90 (SGLang on an H200).
_GATE_BARS_US = {128: 2.0, 256: 2.6, 512: 3.2}
_ROUTE_BAR, _SCAN_BAR = 0.6, 1 / 50
_TWIN = "torch.compile of the definition"


def run_gating(calls: int = 400, on_row: Callable[[Row], object] | None = None) -> dict[str, Any]:
    """Key `rows`; `skipped` maps a device, or a family on one, to the reason why it has none.

    `calls` are timed on the CPU for each row; `on_row` hears of rows as they are done.
    """
    why = no_gpu()
    skipped = {} if why is None else {"cuda": why}
    rows: list[Row] = []
    for row in itertools.chain(cpu_rows(calls), gpu_rows()):
        if "skipped" in row:
            skipped[f"cpu, {row['family']}"] = row["skipped"]
            continue
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return {"rows": rows, "skipped": skipped}


def no_gpu() -> str | None:
    """Why there are no GPU rows; None where there are."""
    if not torch.cuda.is_available():
        return "no CUDA device is there"
    try:
        import remoe_adapt.triton_kernels.gate  # noqa: F401
    except ImportError as error:
        return f"the kernels cannot be imported: {error}"
    return None


def gpu_rows() -> Iterator[Row]:
    """Rows of all GPU measurements, one by one as they are done; none without a CUDA device (see `no_gpu`)."""
    if no_gpu() is not None:
        return
    torch.manual_seed(0)
    with torch.inference_mode():
        yield from _one_token()
        yield from _route()
        yield from _many_tokens()
        yield from _scan()


def _one_token() -> Iterator[Row]:
    """One token, logits in, with a prior that moves on, and without."""
    from remoe_adapt.triton_kernels.gate import launch_gate

    for experts, bar_us in _GATE_BARS_US.items():
        for name, spec in _specs(experts).items():
            for dtype in (torch.float32, torch.bfloat16):
                logits_TE = torch.randn(1, experts, device="cuda", dtype=dtype)
                bias_E, rule = torch.randn(experts, device="cuda") * 0.1, kernel_rule(spec_text(spec))
                for mode in ("ema", None):
                    prior = _prior(experts) if mode else None
                    args = (prior.recency_BE, prior.gain, prior.decay) if prior else (None, None, None)
                    out = _outputs(1)
                    us = graph_us(functools.partial(launch_gate, logits_TE, TOP_K, rule, bias_E, *args, out=out))
                    twin_us = None
                    if dtype == torch.float32:
                        twin_us = graph_us(_compiled(spec, logits_TE, bias_E, _prior(experts) if mode else None))
                    row = _row("gate", name, dtype, 1, experts, None, mode, us, _TWIN, twin_us)
                    yield row | (held_to("us", us, bar_us) if mode and name == "softmax" else {})


def _route() -> Iterator[Row]:
    """One token, hidden state in: product and gate in one launch, against two, and against the compiled definition."""
    from remoe_adapt.triton_kernels.route import launch_route

    dtype = torch.bfloat16
    for experts in (64, 128, 256):
        for columns in (2048, 4096):
            spec = _specs(experts)["softmax"]
            rule, prior, out = kernel_rule(spec_text(spec)), _prior(experts), _outputs(1)
            hidden_TD = torch.randn(1, columns, device="cuda", dtype=dtype)
            weight_ED = torch.randn(experts, columns, device="cuda", dtype=dtype) * columns**-0.5
            args = (prior.recency_BE, prior.gain, prior.decay)
            logits_TE = torch.empty(1, experts, device="cuda", dtype=dtype)
            us = graph_us(
                functools.partial(
                    launch_route, hidden_TD, weight_ED, None, TOP_K, rule, dtype, None, *args, out=(logits_TE, *out)
                )
            )

            two_launches = functools.partial(_linear_and_gate, hidden_TD, weight_ED, rule, *args, out)
            compiled = _compiled(spec, hidden_TD, None, _prior(experts), weight_ED)
            for baseline, call in (("F.linear + own gate", two_launches), (f"F.linear + {_TWIN}", compiled)):
                row = _row("route", "softmax", dtype, 1, experts, columns, "ema", us, baseline, graph_us(call))
                yield row | held_to("ratio", row["ratio"], _ROUTE_BAR)


def _linear_and_gate(
    hidden_TD: Tensor, weight_ED: Tensor, rule: Any, recency_BE: Tensor, gain: Tensor, decay: float | None, out: Any
) -> None:
    from remoe_adapt.triton_kernels.gate import launch_gate

    launch_gate(F.linear(hidden_TD, weight_ED), TOP_K, rule, None, recency_BE, gain, decay, out=out)


def _many_tokens() -> Iterator[Row]:
    """Prefill without a prior, against copying as many bytes as the gate reads and writes; below some ten thousand
    tokens a launch takes longer than the bytes, so there is no bar."""
    from remoe_adapt.triton_kernels.gate import launch_gate

    gibibyte = torch.empty(2**28, device="cuda")
    # A GiB and not the logits: those fit into the caches of the device, which are faster than its memory.
    bytes_per_us = 2**31 / graph_us(functools.partial(torch.empty_like(gibibyte).copy_, gibibyte), calls=4)
    del gibibyte
    for tokens in (4096, 16384, 65536):
        for experts in (64, 128, 256):
            for dtype in (torch.float32, torch.bfloat16):
                spec = _specs(experts)["softmax"]
                logits_TE = torch.randn(tokens, experts, device="cuda", dtype=dtype)
                call = functools.partial(
                    launch_gate, logits_TE, TOP_K, kernel_rule(spec_text(spec)), out=_outputs(tokens)
                )
                us = graph_us(call, calls=20)
                size = logits_TE.nbytes + tokens * TOP_K * (4 + 8)
                source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
                same_us = graph_us(functools.partial(torch.empty_like(source).copy_, source), calls=20)
                for baseline, baseline_us in (
                    ("copy of as many bytes", same_us),
                    ("bandwidth of a copy of 1 GiB", size / bytes_per_us),
                ):
                    yield _row("many tokens", "softmax", dtype, tokens, experts, None, None, us, baseline, baseline_us)


def _scan(sequences: int = 8, steps: int = 4096, experts: int = 128) -> Iterator[Row]:
    """Whole sequences under a prior, against the definition, which runs them token by token."""
    from remoe_adapt.triton_kernels.scan import launch_scan

    spec = _specs(experts)["softmax"]
    tokens = sequences * steps
    logits_TE = torch.randn(tokens, experts, device="cuda")
    prior = _prior(experts, sequences)
    call = functools.partial(
        launch_scan, logits_TE, TOP_K, kernel_rule(spec_text(spec)), None, prior.recency_BE, prior.gain, _DECAY,
        out=_outputs(tokens),
    )  # fmt: skip
    us = graph_us(call, calls=1)
    topk_gating(logits_TE[: sequences * 8], TOP_K, spec, prior)  # warm
    eager_us = _device_us(lambda: topk_gating(logits_TE, TOP_K, spec, prior))
    row = _row("scan", "softmax", torch.float32, tokens, experts, None, "ema", us, "the definition, eager", eager_us)
    yield row | held_to("ratio", row["ratio"], _SCAN_BAR) | {"ns_per_token": us * 1e3 / tokens}


def graph_us(call: Call, calls: int = 100, replays: int = 30) -> float:
    """Microseconds a call takes on the device, in a graph of `calls` of them; median over replays."""
    for _ in range(3):  # compiles, and fills what calls keep
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    # The first replays run while the clocks of the device still rise.
    times = [_device_us(graph.replay) / calls for _ in range(replays + 3)][3:]
    return float(statistics.median(times))


def _device_us(call: Call) -> float:
    """Microseconds between two events on the device, which the host's launches do not lengthen."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) * 1e3)


def _specs(experts: int) -> dict[str, RouterSpec]:
    """A plain and a costly router: softmax renormalised; biased sigmoid with groups."""
    common = {"num_experts": experts, "top_k": TOP_K, "hidden_size": 1, "weight_name": "weight", "num_rows": experts}
    grouped = {"n_group": 8, "topk_group": 4, "group_score": "top2", "normalize_eps": 1e-20, "scaling": 2.5}
    return {
        "softmax": RouterSpec(scoring="softmax", normalize=True, **common),  # type: ignore[arg-type]
        "sigmoid_group": RouterSpec(scoring="sigmoid_group", score="sigmoid", normalize=True, **common, **grouped),  # type: ignore[arg-type]
    }


def _prior(experts: int, sequences: int = 1) -> PriorStep:
    return PriorStep(torch.zeros(sequences, experts, device="cuda"), torch.tensor(0.2, device="cuda"), _DECAY)


def _outputs(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.empty(tokens, TOP_K, device="cuda"), torch.empty(tokens, TOP_K, device="cuda", dtype=torch.int64)


def _compiled(
    spec: RouterSpec, input: Tensor, bias_E: Tensor | None, prior: PriorStep | None, weight_ED: Tensor | None = None
) -> Call:
    """The definition through torch.compile; with a weight, the product before it in the same graph."""

    def gate(input: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = input if weight_ED is None else F.linear(input, weight_ED)
        return topk_gating(logits_TE, TOP_K, spec, prior, bias_E=bias_E)

    # What was compiled for other shapes counts towards dynamo's limit, beyond which it runs eagerly.
    torch._dynamo.reset()
    return functools.partial(torch.compile(gate, fullgraph=True, dynamic=False), input)


def _row(*values: Any) -> Row:
    """`timed_row` on this machine's GPU."""
    return timed_row(*values, device=torch.cuda.get_device_name())
