"""What we rely on in transformers where it decodes: KV caches and the loops of `generate`; see `table`."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from remoe_adapt.libraries.kv_cache import (
    CONTINUOUS_BATCHING,
    cache_argument,
    cache_length,
    can_carry_state,
    is_counted,
    returned_cache,
)
from remoe_adapt.libraries.patching import Patches, become, hook, override
from remoe_adapt.libraries.table import hold, relied_on
from remoe_adapt.libraries.tiny import IDS, ids, tiny_model


@relied_on(
    "transformers",
    "A text model takes its KV cache as an argument that kv_cache.CACHE_NAMES knows, and returns it by such a name.",
    "libraries/kv_cache.py recency/sequences.py recency/proof.py evaluation/record.py",
)
def kv_cache_names() -> None:
    """Broken without a word by 5.24, which renamed `past_key_values` and `cache_params` to `cache`."""
    model = tiny_model()
    for part in (model, model.model):
        name = cache_argument(part.forward)
        hold(name is not None, f"{type(part).__name__}.forward takes its KV cache by none of the names we know.")
    with torch.no_grad():
        for shape in (True, False):
            output = model.model(ids(), use_cache=True, return_dict=shape)
            made = returned_cache(output)
            hold(made is not None, f"the output (return_dict={shape}) holds no KV cache that we find.")
            hold(can_carry_state(made), f"the KV cache is a {type(made).__name__}, on which nothing can be hung.")


@relied_on(
    "transformers",
    "A KV cache counts its tokens, crops, reorders, selects and repeats by methods of these names; a cache for "
    "compiled steps says so and holds its length as a tensor.",
    "recency/sequences.py libraries/kv_cache.py",
    interposes="the class of a KV cache object becomes a subclass that takes the recency along (sequences.attach), "
    "which hangs on the object; both live and die with the cache",
    patches="recency/sequences.py:become,carry",
)
def kv_cache_methods() -> None:
    from transformers import DynamicCache, StaticCache

    for name in ("get_seq_length", "crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
        hold(callable(getattr(DynamicCache, name, None)), f"DynamicCache has no method {name!r} any more.")
    model = tiny_model()
    with torch.no_grad():
        made = returned_cache(model(ids(), use_cache=True))
        hold(is_counted(cache_length(made), made), "a DynamicCache tells its length by no number.")
        hold(cache_length(made) == len(IDS), f"a DynamicCache of {len(IDS)} tokens counts {cache_length(made)}.")
        # This is what sequences.attach does, so that crop and reorder reach the recency as well.
        become(made, type("Mixin", (), {}))
        made.note = "kept"
        hold(copy.deepcopy(made).note == "kept", "a deep copy of a KV cache loses what hangs on it.")
        made.crop(-2)  # to a length, as before 5.24, is refused now
        hold(cache_length(made) == 2, "crop(-2) does not take two tokens off a KV cache.")
        static = StaticCache(config=model.config, max_cache_len=16)
        hold(static.is_compileable, "a StaticCache does not say that it is for compiled steps (is_compileable).")
        hold(cache_length(static) == 0, "a StaticCache that was never used does not count 0 tokens.")
        model(ids(), **{str(cache_argument(model.forward)): static})
        length = cache_length(static)
        hold(isinstance(length, torch.Tensor), "a StaticCache holds its length as no tensor (cumulative_length).")
        hold(int(length or 0) == len(IDS), f"a StaticCache of {len(IDS)} tokens counts {length}.")


@relied_on(
    "transformers",
    "generate calls prepare_inputs_for_generation before and _update_model_kwargs_for_generation after each forward, "
    "both looked up on the instance; the text model inside is called as a module, with keywords, masks and its cache.",
    "dial/steps.py recency/sequences.py",
    interposes="generate, prepare_inputs_for_generation and _update_model_kwargs_for_generation of one model object "
    "(controller.close takes them off); pre- and post-forward hooks of its text model (InstalledPrior.remove)",
    patches="dial/steps.py:override recency/sequences.py:hook",
)
def decoding_loop() -> None:
    model, called = tiny_model(), []

    def around(name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return original(*args, **kwargs)

    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")

    def on_text(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        called.append("text")
        taken = cache_argument(model.model.forward)
        hold(taken in kwargs, f"generate's forward hands the text model no {taken!r} as a keyword.")
        hold("attention_mask" in kwargs, "generate's forward hands the text model no attention_mask as a keyword.")
        hold("input_ids" in kwargs or args, "generate's forward hands the text model no input_ids.")

    with Patches(*(override(model, name, partial(around, name)) for name in names)) as patches:
        patches.add(hook(model.model, "forward_pre", on_text, with_kwargs=True))
        model.generate(ids(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    # The order is what counts: a swap must fall between the forwards of two tokens.
    step = [names[0], "text", names[1]]
    hold(called == step * 3, f"three steps of generate called {called}, not {step} each.")


@relied_on(
    "transformers",
    "Continuous batching is entered by these methods alone, generate(cache_implementation='paged') among them.",
    "recency/install.py libraries/kv_cache.py",
    interposes="the three methods of a model with an ema or last prior, which raise (InstalledPrior.remove)",
    patches="recency/install.py:override",
)
def continuous_batching() -> None:
    model, called = tiny_model(), []
    for name in CONTINUOUS_BATCHING:
        hold(callable(getattr(type(model), name, None)), f"{name} is no method of a model any more.")

    def stop(*_args: Any, **_kwargs: Any) -> Any:
        called.append("stopped")
        raise InterruptedError

    with override(model, CONTINUOUS_BATCHING[0], stop), suppress(InterruptedError):
        model.generate(ids(), cache_implementation="paged", max_new_tokens=1)
    hold(called, "generate(cache_implementation='paged') does not come by generate_batch.")
    source = inspect.getsource(getattr(type(model), CONTINUOUS_BATCHING[0]))
    hold(CONTINUOUS_BATCHING[1] in source or CONTINUOUS_BATCHING[2] in source, "generate_batch begins otherwise now.")
