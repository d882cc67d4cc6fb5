"""Model run -> Trace: hooks on the routers, prefill in overlapping windows, decode token by token.

Shapes: L routers, T tokens in call order (batch rows one after the other), K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from remoe_adapt.checkpoints import device_of, max_positions
from remoe_adapt.errors import ConfigError, TraceError
from remoe_adapt.expert_cache import expert_cache_of
from remoe_adapt.libraries import Patches, cache_keyword, hook, returned_cache
from remoe_adapt.routers import RouterRef, discover_routers
from remoe_adapt.traces import Trace

MAX_WINDOW = 1024


class Recorder:
    """Collects what every router of a model chose since the last `take`; made by `record_forward`."""

    def __init__(self, routers: Sequence[RouterRef]) -> None:
        shapes = {(ref.spec.num_experts, ref.spec.top_k) for ref in routers}
        if len(shapes) > 1:
            # A trace is one array [layers, tokens, slots], which layers of other widths do not fit into.
            listed = ", ".join(f"{k} of {e}" for e, k in sorted(shapes))
            raise TraceError(f"its layers choose differently ({listed}): one trace cannot hold them")
        self.routers = tuple(routers)
        self.num_experts, self.top_k = shapes.pop()
        self._outputs: list[list[Any]] = [[] for _ in self.routers]

    def hook(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook that keeps the output; it is read later, so that timed steps do not pay for it."""

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # No copy: a router makes a new tensor at each call, so what is kept here is never overwritten.
            self._outputs[layer].append(output)

        return keep

    def take(self) -> Tensor:
        """Chosen ids since the last call, int16 [L, T, K] on the CPU.

        Raises:
            TraceError: nothing ran, or routers saw different tokens (an encoder beside a decoder).
        """
        layers = []
        for ref, outputs in zip(self.routers, self._outputs, strict=True):
            ids = [ref.spec.read(output).ids_TK for output in outputs]
            outputs.clear()
            if not ids:
                raise TraceError(f"router {ref.name} was not called: it saw no token of this run")
            # int16 holds every expert id, and traces of long texts are mostly ids.
            layers.append(torch.cat(ids).to(torch.int16))
        lengths = sorted({len(ids_TK) for ids_TK in layers})
        # An encoder's routers see the prompt and a decoder's the answer: token t of the one is not token t of the
        # other.
        if len(lengths) > 1:
            raise TraceError(f"routers saw {lengths[0]} to {lengths[-1]} tokens of one run: one trace cannot hold them")
        return torch.stack(layers).cpu()

    def discard(self) -> None:
        """Forgets what was collected."""
        for outputs in self._outputs:
            outputs.clear()


@contextmanager
def record_forward(model: nn.Module) -> Iterator[Recorder]:
    """Collects the chosen experts of every forward inside the block, wrapped routers as their block sees them.

    Raises:
        RouterNotFoundError, UnsupportedRouterError: see `discover_routers`.
        TraceError: layers of different sizes.
    """
    recorder = Recorder(discover_routers(model))
    # The hook is on the outermost module, an adapter's wrapper for instance, because that returns what the experts
    # receive; the wrapped router alone would show the base's choice.
    with Patches() as patches:
        for layer, ref in enumerate(recorder.routers):
            patches.add(hook(ref.outermost, "forward", recorder.hook(layer)))
        yield recorder


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the training flag is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def check_seed(seed: int) -> None:
    """Raises ConfigError for what torch's generators do not take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 64:
        raise ConfigError(f"seed {seed!r} is out of range: use a whole number from 0 to {(1 << 64) - 1}")


def window_tokens(model: nn.Module, limit: int | None = None) -> int:
    """`window_length` of the model's positions."""
    return window_length(max_positions(model), limit)


def window_length(positions: int | None, limit: int | None = None) -> int:
    """Window length of the evaluation protocol: min(max positions, 1024), or `limit`, which must not be larger.

    Raises:
        ConfigError: the limit leaves fewer than 2 tokens, or is above the protocol's.
    """
    longest = min(positions or MAX_WINDOW, MAX_WINDOW)
    length = longest if limit is None else limit
    if length < 2:
        raise ConfigError(f"a window of {length} token(s) scores nothing: use at least 2")
    if length > longest:
        raise ConfigError(f"a window of {length} tokens is longer than this model's, {longest}: use at most that")
    return length


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [begin, end) of one document; those from `fresh` on belong to this window: routing is taken and targets
    are scored there. The first window owns token 0 too, which nothing predicts."""

    document: int
    begin: int
    end: int
    fresh: int

    @property
    def scored(self) -> int:
        """Targets of this window."""
        return self.end - max(self.fresh, self.begin + 1)


def windows(lengths: Sequence[int], window: int) -> list[Window]:
    """Windows of `window` tokens over documents of these lengths, stride half a window, every token owned once.

    Documents of fewer than 2 tokens have nothing to score and are left out.
    """
    result = []
    for document, length in enumerate(lengths):
        if length < 2:
            continue
        begin = fresh = 0
        while fresh < length:
            end = min(length, begin + window)
            result.append(Window(document, begin, end, fresh))
            # Half a window on: beyond a document's first window each target has at least that much context.
            begin, fresh = begin + window // 2, end
    return result


def make_trace(
    documents: Sequence[NDArray[np.int16]],
    num_experts: int,
    *,
    phase: str,
    model: str | None = None,
    text: str | None = None,
) -> Trace:
    """One trace of documents int16 [L, T_d, K], in order.

    Raises:
        TraceError: no documents.
    """
    if not documents:
        raise TraceError("nothing was recorded: give at least one document of two tokens")
    starts = np.cumsum([0] + [ids_LTK.shape[1] for ids_LTK in documents[:-1]]).tolist()
    meta = {"num_experts": num_experts, "document_starts": starts, "phase": phase, "model": model, "text": text}
    return Trace(np.concatenate(documents, axis=1), {key: value for key, value in meta.items() if value is not None})


def record_prefill(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    model_id: str | None = None,
    text: str | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> Trace:
    """Runs the model over token ids in the windows of the evaluation protocol and records every router's choice.

    Each token's routing is taken from the window that scores it. Documents of fewer than 2 tokens are left out.
    `on_tokens` hears how many tokens were done since its last call.
    """
    plan = windows([len(ids) for ids in documents], window_tokens(model))
    parts: dict[int, list[Tensor]] = {}
    with record_forward(model) as recorder, inference(model):
        for window in plan:
            ids_T = torch.tensor(documents[window.document][window.begin : window.end], device=device_of(model))
            model(input_ids=ids_T[None], use_cache=False)
            parts.setdefault(window.document, []).append(recorder.take()[:, window.fresh - window.begin :])
            if on_tokens is not None:
                on_tokens(window.end - window.fresh)
        joined = [torch.cat(part, dim=1).numpy() for part in parts.values()]
        return make_trace(joined, recorder.num_experts, phase="prefill", model=model_id, text=text)


class Decoder:
    """Feeds one sequence to a model step by step with its KV cache; batch 1."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = device_of(model)
        self._cache_name = cache_keyword(model)
        self._cache: Any = None

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after the last of these tokens, which follow those fed before.

        Raises:
            TraceError: the model keeps no cache between steps.
        """
        # The keyword is asked of the model, because transformers 5.24 renamed it and answers to the old one with a
        # warning.
        ids_BT = torch.tensor([ids], device=self._device)
        output = self._model(input_ids=ids_BT, use_cache=True, **{self._cache_name: self._cache})
        self._cache = returned_cache(output)
        if self._cache is None:
            raise TraceError(f"{type(self._model).__name__} returns no KV cache: its decode cannot be recorded")
        logits_V: Tensor = output.logits[0, -1]
        return logits_V


@contextmanager
def fit_for_decode(model: Any) -> Iterator[None]:
    """One token at a time is fastest with the batched experts function where a model has it; prefill with another."""
    before = None if expert_cache_of(model) else getattr(model.config, "_experts_implementation", None)
    if before is None or not hasattr(model, "set_experts_implementation"):
        yield
        return
    try:
        model.set_experts_implementation("batched_mm")
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def prompts_from(documents: Sequence[Sequence[int]], length: int, count: int) -> list[list[int]]:
    """Up to `count` (at least one) pieces of `length` tokens, evenly spread over the documents.

    Raises:
        ConfigError: pieces of no token.
    """
    if length < 1:
        raise ConfigError(f"a prompt of {length} tokens continues nothing: use at least 1")
    pieces = [list(ids[begin : begin + length]) for ids in documents for begin in range(0, len(ids), length)]
    # Spread evenly over the text, because neighbouring pieces are often alike.
    count = max(1, min(count, len(pieces)))
    return [pieces[number * len(pieces) // count] for number in range(count)] if pieces else []


def record_decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    model_id: str | None = None,
    text: str | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> Trace:
    """Decodes `new_tokens` after each prompt, one at a time, and records the experts of every decode step.

    Temperature 0 is greedy. Prompts are cut to their last tokens where prompt and new ones exceed the model's
    positions. An end-of-text token does not stop: every prompt gives `new_tokens` steps, one document each.

    Raises:
        ConfigError: no new tokens, more than the model has positions for, or a temperature or a seed
            out of range.
    """
    limit = max_positions(model)
    if new_tokens < 1 or (limit is not None and new_tokens >= limit):
        raise ConfigError(f"cannot decode {new_tokens} tokens: use 1 to {(limit or MAX_WINDOW) - 1}")
    if not temperature >= 0:
        raise ConfigError(f"temperature {temperature!r} is out of range: use 0 (greedy) or more")
    check_seed(seed)
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    documents = []
    with record_forward(model) as recorder, inference(model):
        for prompt in (list(prompt) for prompt in prompts):
            if not prompt:
                continue
            decoder = Decoder(model)
            # The prompt's end counts most for what follows, so its beginning is cut where there is no room.
            logits_V = decoder.feed(prompt if limit is None else prompt[-(limit - new_tokens) :])
            # The prompt's routing is prefill; this trace is of decode steps alone.
            recorder.discard()
            for _ in range(new_tokens):
                logits_V = decoder.feed([_choose(logits_V, temperature, generator)])
                if on_tokens is not None:
                    on_tokens(1)
            documents.append(recorder.take().numpy())
        return make_trace(documents, recorder.num_experts, phase="decode", model=model_id, text=text)


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = (logits_V.float() / temperature).softmax(dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
