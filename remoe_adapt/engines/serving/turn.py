"""One answer, computed by transformers' handlers on a model that is loaded already, at strengths that are counted.

transformers' handlers ask a manager for a model by its name, and another one for a thread to generate in. A `Turn` is
both to them for one request, and the model too: what they call is `generate` of the dialled model, within the pinned
strength, the seed, and the watch over what every token was computed at.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerateManager, Modality, get_response_template

from remoe_adapt.checkpoints import device_of, max_positions
from remoe_adapt.engines.serving.asked import Asked
from remoe_adapt.engines.serving.errors import RequestError
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation import inference, room_for_reads
from remoe_adapt.expert_cache import expert_cache_of

_STRENGTH_DIGITS = 6
HANDLERS: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletionHandler,
    "/v1/completions": CompletionHandler,
    "/v1/responses": ResponseHandler,
}


class Gone(Exception):  # noqa: N818 (no error: it ends a generation that nobody waits for)
    """The client has left, or the server ends: the answer is computed no further."""


class Loaded:
    """A dialled model and its tokenizer, as the server's turns use them.

    model: a PeftModel with `controller`.
    tokenizer: a fast one, whose pieces of text can be streamed.
    name: the id that requests name.

    Raises ConfigError for a tokenizer or a model that transformers' serving cannot use.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        if not hasattr(tokenizer, "_tokenizer"):
            raise ConfigError(f"{type(tokenizer).__name__} is no fast tokenizer, and only those stream: convert it.")
        if not hasattr(model, "generate"):
            raise ConfigError(f"{type(model.get_base_model()).__name__} generates no text: serve a causal LM.")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.controller = model.controller
        self.positions = max_positions(model.get_base_model())
        self.cache = expert_cache_of(model.get_base_model())
        self.config = _config_for(tokenizer, model.get_base_model())
        # One thread for all turns: caches of compiled steps belong to the thread that made them.
        self.manager = GenerateManager()
        self.tokens = 0


def _config_for(tokenizer: Any, base: Any) -> Any:
    """The base's configuration, or one without a type where chats of this tokenizer are not of that type's form.

    transformers knows by the type how answers begin. Where a prompt has no such beginning, as with a chat template of
    one's own, it takes all of the prompt for a part of the answer.
    """
    anchors = (get_response_template(tokenizer, base) or {}).get("start_anchor")
    if anchors is None or tokenizer.chat_template is None:
        return base.config
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "text"}], add_generation_prompt=True, tokenize=False
        )
    except Exception:  # a template that takes no such chat: requests will say why
        return base.config
    known = any(anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors))
    return base.config if known else SimpleNamespace(model_type="")


class Turn(StoppingCriteria):
    """One request's time with the model. Made and asked in the event loop; `generate` runs in the model's thread.

    begun: the first token is there, or there will be none.
    ended: the model is free again. It is set by the last `generate`, or by `close` where none is under way.
    error: of the generation.
    """

    # What handlers look for in a model manager.
    force_model = None

    def __init__(self, loaded: Loaded, asked: Asked) -> None:
        loop = asyncio.get_running_loop()
        self._loaded, self._asked, self._loop = loaded, asked, loop
        self.begun, self.ended = asyncio.Event(), asyncio.Event()
        self.error: BaseException | None = None
        self._stopped = threading.Event()
        # Generations that the handler asked for, and those that are over: one for each choice.
        self._submitted = self._over = 0
        self._closed = False
        self._strengths: Counter[float] = Counter()
        self.first_strength: float | None = None
        self._seconds = 0.0
        self._cache_before: dict[str, Any] | None = None
        self._cache_after: dict[str, Any] | None = None

    async def answer(self, request_id: str) -> Any:
        """The handler's response; a streamed one is computed while it is read."""
        handler = HANDLERS[self._asked.route](self, self)
        return await handler.handle_request(copy.deepcopy(self._asked.body), request_id)

    def stop(self, why: BaseException) -> None:
        """Compute no further than the next token; nothing once the turn has ended. In the event loop."""
        if self.ended.is_set():
            return
        if self.error is None:
            self.error = why
        self._stopped.set()

    def close(self) -> None:
        """The handler is done, or has failed: the turn ends with what is being computed, now if that is nothing."""
        self._closed = True
        if self._over == self._submitted:
            self.begun.set()
            self.ended.set()

    def figures(self) -> dict[str, Any]:
        """What `usage.remoe` says: strength (mean over the tokens), strength_min, strength_max, tokens_at (by
        strength), pinned (by the request), hit_rate and read_bytes of the expert cache meanwhile (None without one).
        """
        tokens = self.tokens
        found = sorted(self._strengths.items())
        mean = sum(strength * count for strength, count in found) / tokens if tokens else None
        grown = self._cache_grown()
        looked_up = grown.get("hits", 0) + grown.get("misses", 0)
        return {
            "strength": None if mean is None else round(mean, _STRENGTH_DIGITS),
            "strength_min": found[0][0] if found else None,
            "strength_max": found[-1][0] if found else None,
            "tokens_at": {f"{strength:g}": count for strength, count in found},
            "pinned": self._asked.strength is not None,
            "hit_rate": grown["hits"] / looked_up if looked_up else None,
            "read_bytes": grown.get("bytes"),
        }

    @property
    def tokens(self) -> int:
        """So many were computed."""
        return sum(self._strengths.values())

    @property
    def seconds(self) -> float:
        """That the model was in use; 0 before the end."""
        return self._seconds

    # What handlers ask of a model manager: the model that is here, whatever it is called.

    def process_model_name(self, _model: str) -> str:
        """The id in answers."""
        return self._loaded.name

    def load_model_and_processor(self, *_names: Any, **_options: Any) -> tuple[Turn, Any]:
        """This turn, which generates and is the model to them, and the tokenizer."""
        return self, self._loaded.tokenizer

    @staticmethod
    def get_model_modality(*_args: Any, **_options: Any) -> Modality:
        """Text."""
        return Modality.LLM

    # What they ask of a generation state, and of its manager.

    _compile = False

    def use_continuous_batching(self, *_args: Any) -> bool:
        """Never: sequences of one batch would share a strength that one of them has pinned."""
        return False

    def get_manager(self, *_args: Any, **_options: Any) -> _Manager:
        """The model's thread."""
        return _Manager(self._loaded.manager, self._submit)

    def _submit(self) -> None:
        self._submitted += 1

    # What they ask of a model.

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return device_of(self._loaded.model)

    @property
    def config(self) -> Any:
        """By which they choose how to take reasoning and calls of tools out of an answer."""
        return self._loaded.config

    @property
    def generation_config(self) -> Any:
        """The base's, of which they make a copy."""
        return self._loaded.model.get_base_model().generation_config

    def generate(self, **inputs: Any) -> Any:
        """In the model's thread: `generate` of the dialled model, within all that this request asks for."""
        began_s = time.perf_counter()
        try:
            self._check_stopped()
            with ExitStack() as within:
                self._enter(within, inputs)
                return self._loaded.model.generate(**inputs, stopping_criteria=StoppingCriteriaList([self]))
        except BaseException as error:
            # The first reason counts: `Gone` is what a stop makes of the generation.
            self.error = self.error or error
            raise
        finally:
            self._seconds += time.perf_counter() - began_s
            self._cache_after = self._cache_now()
            self._tell(self.begun.set)
            # Counted first and asked then, as `close` does it the other way round: one of them sees the other.
            self._over += 1
            if self.error is not None or self._closed or self._over >= self._asked.choices:
                self._tell(self.ended.set)

    def _enter(self, within: ExitStack, inputs: dict[str, Any]) -> None:
        loaded, asked = self._loaded, self._asked
        # Some tokenizers add it for encoders, and a causal LM refuses an argument that it does not know.
        inputs.pop("token_type_ids", None)
        self._fit(inputs["input_ids"].shape[-1], inputs["generation_config"])
        within.enter_context(inference(loaded.model))
        within.enter_context(room_for_reads(loaded.cache))
        if asked.seed is not None:
            # Forked, so that one client's seed does not make the next one's random numbers.
            device = self.device
            devices = [device] if device.type == "cuda" else []
            within.enter_context(torch.random.fork_rng(devices=devices))
            # Choices of one seed are others, and the same ones again at the next request.
            torch.manual_seed(asked.seed + self._over)
        if asked.strength is not None:
            reason = f"strength {asked.strength:g} is pinned by a request"
            within.enter_context(loaded.controller.hold(asked.strength, reason))
        if self._over == 0:
            self._cache_before = self._cache_now()

    def _fit(self, prompt_tokens: int, settings: Any) -> None:
        """No more tokens than there are positions; the handler reads its settings again for the finish reason."""
        if not prompt_tokens:
            raise RequestError("the prompt has no token", code="invalid_prompt")
        limit = self._loaded.positions
        if limit is not None:
            if prompt_tokens >= limit:
                raise RequestError(
                    f"the prompt has {prompt_tokens} tokens, the model {limit} positions: send less",
                    code="context_length_exceeded",
                )
            settings.max_new_tokens = min(settings.max_new_tokens, limit - prompt_tokens)
        if self._asked.temperature is not None:
            # transformers takes a temperature and goes on greedily where the model's own settings say so.
            settings.do_sample = self._asked.temperature > 0
            # Greedy steps know no temperature, and one of 0 is refused or warned of.
            settings.temperature = self._asked.temperature or 1.0

    def __call__(self, input_ids: Tensor, scores: Any, **_more: Any) -> Tensor:
        """After each token: counts it at the strength of its forward, which no swap can have changed before the next
        one begins."""
        strength = round(float(self._loaded.controller.strength), _STRENGTH_DIGITS)
        self._strengths[strength] += 1
        self._loaded.tokens += 1
        if self.first_strength is None:
            self.first_strength = strength
            self._tell(self.begun.set)
        self._check_stopped()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise Gone

    def _cache_now(self) -> dict[str, Any] | None:
        return None if self._loaded.cache is None else self._loaded.cache.stats(layers=False)

    def _cache_grown(self) -> dict[str, int]:
        # Not what the cache says now, once this turn is over: the next one may have begun.
        before, after = self._cache_before, self._cache_after or self._cache_now()
        if before is None or after is None:
            return {}
        return {name: after[name] - before[name] for name in ("hits", "misses", "bytes")}

    def _tell(self, callback: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback)


class _Manager:
    """The model's thread for one turn, which then knows that `generate` will be called, and waits for its end."""

    def __init__(self, manager: Any, submitted: Callable[[], None]) -> None:
        self._manager, self._submitted = manager, submitted

    def init_cb(self, *_args: Any) -> None:
        """Nothing, as of all managers without continuous batching."""

    def generate_streaming(self, *args: Any, **options: Any) -> Any:
        """See transformers' BaseGenerateManager."""
        streaming = self._manager.generate_streaming(*args, **options)
        self._submitted()
        return streaming

    async def generate_non_streaming(self, *args: Any, **options: Any) -> Any:
        """See transformers' BaseGenerateManager."""
        self._submitted()
        return await self._manager.generate_non_streaming(*args, **options)
