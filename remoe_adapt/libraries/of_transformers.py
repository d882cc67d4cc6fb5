"""What we rely on in transformers (and accelerate, which moves its models), row by row; see `table`."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remoe_adapt.libraries.kv_cache import (
    CONTINUOUS_BATCHING,
    cache_argument,
    cache_length,
    can_follow,
    is_counted,
    returned_cache,
)
from remoe_adapt.libraries.patching import Override
from remoe_adapt.libraries.table import hold, relied_on

_IDS = (3, 9, 4, 30)
_TOP_K, _EXPERTS, _LAYERS = 2, 8, 2


@cache
def _model_class() -> Any:
    from transformers import Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM


def _config() -> Any:
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_hidden_layers=_LAYERS, num_attention_heads=4, num_key_value_heads=2,
        num_experts=_EXPERTS, num_experts_per_tok=_TOP_K, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip


def _model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _model_class()(_config()).eval()


def _ids() -> torch.Tensor:
    return torch.tensor([_IDS])


@relied_on(
    "transformers",
    "A text model takes its KV cache as an argument that kv_cache.CACHE_NAMES knows, and returns it by such a name.",
    "libraries/kv_cache.py gating/sequences.py gating/proof.py record.py",
)
def kv_cache_names() -> None:
    """Broken without a word by 5.24, which renamed `past_key_values` and `cache_params` to `cache`."""
    model = _model()
    for part in (model, model.model):
        name = cache_argument(part.forward)
        hold(name is not None, f"{type(part).__name__}.forward takes its KV cache by none of the names we know.")
    with torch.no_grad():
        for shape in (True, False):
            output = model.model(_ids(), use_cache=True, return_dict=shape)
            made = returned_cache(output)
            hold(made is not None, f"the output (return_dict={shape}) holds no KV cache that we find.")
            hold(can_follow(made), f"the KV cache is a {type(made).__name__}, on which nothing can be hung.")


@relied_on(
    "transformers",
    "A KV cache counts its tokens, crops, reorders, selects and repeats by methods of these names; a cache for "
    "compiled steps says so and holds its length as a tensor.",
    "gating/sequences.py libraries/kv_cache.py",
    interposes="the class of a KV cache object becomes a subclass that takes the recency along (sequences.attach); "
    "lives and dies with the cache",
)
def kv_cache_methods() -> None:
    from transformers import DynamicCache, StaticCache

    for name in ("get_seq_length", "crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
        hold(callable(getattr(DynamicCache, name, None)), f"DynamicCache has no method {name!r} any more.")
    model = _model()
    with torch.no_grad():
        made = returned_cache(model(_ids(), use_cache=True))
        hold(is_counted(cache_length(made), made), "a DynamicCache tells its length by no number.")
        hold(cache_length(made) == len(_IDS), f"a DynamicCache of {len(_IDS)} tokens counts {cache_length(made)}.")
        kind = type(made)
        made.__class__ = type(kind.__name__, (kind,), {})
        made.note = "kept"
        hold(copy.deepcopy(made).note == "kept", "a deep copy of a KV cache loses what hangs on it.")
        made.crop(-2)  # to a length, as before 5.24, is refused now
        hold(cache_length(made) == 2, "crop(-2) does not take two tokens off a KV cache.")
        static = StaticCache(config=model.config, max_cache_len=16)
        hold(static.is_compileable, "a StaticCache does not say that it is for compiled steps (is_compileable).")
        hold(cache_length(static) == 0, "a StaticCache that was never used does not count 0 tokens.")
        model(_ids(), **{str(cache_argument(model.forward)): static})
        length = cache_length(static)
        hold(isinstance(length, torch.Tensor), "a StaticCache holds its length as no tensor (cumulative_length).")
        hold(int(length or 0) == len(_IDS), f"a StaticCache of {len(_IDS)} tokens counts {length}.")


@relied_on(
    "transformers",
    "generate calls prepare_inputs_for_generation before and _update_model_kwargs_for_generation after each forward, "
    "both looked up on the instance; the text model inside is called as a module, with keywords, masks and its cache.",
    "runtime/boundaries.py runtime/gate.py gating/sequences.py",
    interposes="generate, prepare_inputs_for_generation and _update_model_kwargs_for_generation of one model object "
    "(controller.close takes them off); pre- and post-forward hooks of its text model (InstalledPrior.remove)",
)
def decoding_loop() -> None:
    model, heard = _model(), []

    def around(name: str) -> Any:
        def call(original: Any, *args: Any, **kwargs: Any) -> Any:
            heard.append(name)
            return original(*args, **kwargs)

        return call

    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    overrides = [Override(model, name, around(name)) for name in names]

    def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        heard.append("text")
        taken = cache_argument(model.model.forward)
        hold(taken in kwargs, f"generate's forward hands the text model no {taken!r} as a keyword.")
        hold("attention_mask" in kwargs, "generate's forward hands the text model no attention_mask as a keyword.")
        hold("input_ids" in kwargs or args, "generate's forward hands the text model no input_ids.")

    handle = model.model.register_forward_pre_hook(hook, with_kwargs=True)
    model.generate(_ids(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    handle.remove()
    for override in overrides:
        override.undo()
    step = [names[0], "text", names[1]]
    hold(heard == step * 3, f"three steps of generate called {heard}, not {step} each.")


@relied_on(
    "transformers",
    "Continuous batching is entered by these methods alone, generate(cache_implementation='paged') among them.",
    "gating/install.py libraries/kv_cache.py",
    interposes="the three methods of a model with an ema or last prior, which raise (InstalledPrior.remove)",
)
def continuous_batching() -> None:
    model, heard = _model(), []
    for name in CONTINUOUS_BATCHING:
        hold(callable(getattr(type(model), name, None)), f"{name} is no method of a model any more.")

    def stop(*_args: Any, **_kwargs: Any) -> Any:
        heard.append("stopped")
        raise InterruptedError

    override = Override(model, CONTINUOUS_BATCHING[0], stop)
    try:
        model.generate(_ids(), cache_implementation="paged", max_new_tokens=1)
    except InterruptedError:
        pass
    finally:
        override.undo()
    hold(heard, "generate(cache_implementation='paged') does not come by generate_batch.")
    source = inspect.getsource(getattr(type(model), CONTINUOUS_BATCHING[0]))
    hold(CONTINUOUS_BATCHING[1] in source or CONTINUOUS_BATCHING[2] in source, "generate_batch begins otherwise now.")


@relied_on(
    "transformers",
    "`_can_record_outputs['router_logits']` names the router class; a router returns (logits, weights, ids) of its "
    "tokens, and its 2-D weight has a row per expert.",
    "routers/discover.py routers/families.py routers/infer.py",
)
def routers() -> None:
    model = _model()
    recorded = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    entries = [found["router_logits"] for found in recorded if "router_logits" in found]
    hold(entries, "no module names its router in `_can_record_outputs['router_logits']`.")
    gate = model.model.layers[0].mlp.gate
    kind = getattr(entries[0], "target_class", entries[0])
    hold(isinstance(gate, kind), f"`_can_record_outputs` names {kind}, the block has a {type(gate).__name__}.")
    result = gate(torch.randn(5, 32))
    hold(
        isinstance(result, tuple) and len(result) == 3, f"a router returns {type(result).__name__}, not three tensors."
    )
    shapes = [tuple(part.shape) for part in result]
    hold(shapes == [(5, _EXPERTS), (5, _TOP_K), (5, _TOP_K)], f"a router returns {shapes} for 5 tokens.")
    hold(tuple(gate.weight.shape) == (_EXPERTS, 32), "a router's weight is not [experts, hidden] any more.")


@relied_on(
    "transformers",
    "An experts module takes (hidden_states, top_k_index, top_k_weights); with experts_implementation='eager' its "
    "class's own forward, under the dispatcher, reads expert e as row e of its parameters and of nothing else.",
    "cache/experts.py cache/store.py gating/proof.py",
    names="transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS",
    interposes="the __init__ of experts classes while one checkpoint is loaded (experts_left_out, undone at its end); "
    "the class of experts modules and their parameters, which become rows of the cache (for the model's life)",
)
def experts_interface() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    hold(callable(getattr(ALL_EXPERTS_FUNCTIONS, "register", None)), "ALL_EXPERTS_FUNCTIONS takes no functions now.")
    model = _model_class()._from_config(_config(), experts_implementation="eager").eval()
    experts = model.model.layers[0].mlp.experts
    eager = inspect.unwrap(type(experts).forward)
    names = list(inspect.signature(eager).parameters)
    hold(names == ["self", "hidden_states", "top_k_index", "top_k_weights"], f"an experts forward takes {names}.")
    params = list(experts._parameters)
    hold(all(experts._parameters[name].shape[0] == _EXPERTS for name in params), "an expert is no row of its tensors.")
    hidden, ids, weights = torch.randn(1, 32), torch.tensor([[5, 1]]), torch.tensor([[0.75, 0.25]])
    expected = eager(experts, hidden, ids, weights)
    read: list[int] = []

    class Rows:
        def __init__(self, whole: torch.Tensor) -> None:
            self.whole = whole

        def __getitem__(self, expert: Any) -> torch.Tensor:
            read.append(int(expert))
            return self.whole[int(expert)]

    wholes = {name: experts._parameters[name].detach() for name in params}
    for name in params:
        delattr(experts, name)
        setattr(experts, name, Rows(wholes[name]))
    found = eager(experts, hidden, ids, weights)
    hold(torch.equal(found, expected), "the eager experts function computes otherwise on rows handed one by one.")
    hold(set(read) == {1, 5}, f"for experts 5 and 1 the eager function read rows {sorted(set(read))}.")


@relied_on(
    "transformers",
    "The conversion mapping and rename_source_key tell which keys of a checkpoint become which parameter, and a "
    "converter works on one expert.",
    "cache/store.py export/base.py",
    names="transformers.conversion_mapping.get_model_conversion_mapping "
    "transformers.core_model_loading.WeightConverter transformers.core_model_loading.WeightRenaming "
    "transformers.core_model_loading.dot_natural_key transformers.core_model_loading.rename_source_key",
)
def conversion_mapping() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    with torch.device("meta"):
        model = _model_class()(_config())
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    hold(converters, "the conversion mapping of an MoE holds no WeightConverter.")
    keys = [f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight" for expert in range(3) for part in ("up", "gate")]
    meta = model.state_dict()
    found = {
        rename_source_key(key, renamings, converters, model.base_model_prefix, meta)[0]
        for key in sorted(keys, key=dot_natural_key)
    }
    wanted = {"model.layers.0.mlp.experts.gate_up_proj"}
    hold(found == wanted, f"keys of single experts are renamed to {sorted(found)}, not to {sorted(wanted)}.")


@relied_on(
    "transformers",
    "A model saves experts one by one, loads without parameters that `_keys_to_ignore_on_load_unexpected` names, "
    "leaves modules marked `_is_hf_initialized` alone, and asks its class for save_pretrained.",
    "runtime/cached.py cache/experts.py",
    interposes="`_keys_to_ignore_on_load_unexpected` of a model's class while one checkpoint is loaded; the class of a "
    "model with an expert cache, whose save_pretrained refuses (for the model's life)",
)
def checkpoints() -> None:
    from safetensors import safe_open
    from transformers.utils import logging

    model = _model()
    cls = type(model)
    hold(hasattr(cls, "_keys_to_ignore_on_load_unexpected"), "a model class has no _keys_to_ignore_on_load_unexpected.")
    with tempfile.TemporaryDirectory() as folder:
        before = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model.save_pretrained(folder)
        finally:
            if before:
                logging.enable_progress_bar()
        with safe_open(Path(folder, "model.safetensors"), "pt") as file:
            saved = set(file.keys())
    hold("model.layers.0.mlp.experts.7.up_proj.weight" in saved, "save_pretrained does not save experts one by one.")
    hold("model.layers.0.mlp.gate.weight" in saved, "save_pretrained saves a router under another name.")


@relied_on(
    "transformers",
    "A folder with a single model.safetensors is loaded from it, whatever index lies beside it.",
    "cache/shards.py export/base.py runtime/checkpoint.py",
)
def checkpoint_files() -> None:
    from transformers.utils import logging

    model = _model()
    with tempfile.TemporaryDirectory() as folder:
        before = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model.save_pretrained(folder)
            index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
            Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
            loaded = _model_class().from_pretrained(folder)
        finally:
            if before:
                logging.enable_progress_bar()
    same = torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    hold(same, "a folder with model.safetensors and an index beside it is not loaded from the single file.")


@relied_on(
    "transformers",
    "Trainer computes its loss in compute_loss(model, inputs, return_outputs, num_items_in_batch) and its steps in "
    "training_step; it makes its optimizer in create_optimizer.",
    "training/trainer.py training/point.py",
    names="transformers.trainer_callback.PrinterCallback",
)
def trainer() -> None:
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    for name, wanted in {
        "compute_loss": {"model", "inputs", "return_outputs", "num_items_in_batch"},
        "training_step": {"model", "inputs", "num_items_in_batch"},
        "create_optimizer": set(),
        "log": {"logs"},
        "_set_signature_columns_if_needed": set(),
    }.items():
        method = getattr(Trainer, name, None)
        hold(callable(method), f"Trainer has no {name} any more.")
        taken = set(inspect.signature(method).parameters)  # type: ignore[arg-type]
        hold(wanted <= taken, f"Trainer.{name} takes {sorted(taken)}, without {sorted(wanted - taken)}.")
    hold(callable(PrinterCallback), "Trainer's PrinterCallback is gone.")


@relied_on(
    "transformers",
    "Every Trainer calls the callbacks of transformers.trainer.DEFAULT_CALLBACKS; a causal LM names its decoder "
    "`base_model`, whose output is the last hidden state, and gives its loss as `loss`.",
    "training/callback.py training/attached.py",
    interposes="forward hooks on a base and its decoder while a REMOE adapter with loss weights is on it (unload takes "
    "them off); ObjectiveCallback among Trainer's default callbacks (for the process, once such an adapter was made)",
)
def any_training_loop() -> None:
    from transformers import trainer

    hold(isinstance(getattr(trainer, "DEFAULT_CALLBACKS", None), list), "Trainer has no list DEFAULT_CALLBACKS now.")
    source = inspect.getsource(trainer.Trainer.__init__)
    hold("DEFAULT_CALLBACKS" in source, "Trainer does not call DEFAULT_CALLBACKS any more.")
    model = _model()
    hold(model.base_model is model.model, "a causal LM's base_model is not its decoder.")
    hold("last_hidden_state" in model.model(_ids()), "a decoder's output has no last_hidden_state.")
    output = model(_ids(), labels=_ids())
    hold(output.get("loss") is not None and output["loss"].dim() == 0, "a causal LM with labels gives no scalar loss.")


@relied_on(
    "transformers",
    "transformers' load_adapter is PeftAdapterMixin's, and reads the configuration through PeftConfig.from_pretrained "
    "before it injects.",
    "tuner/loading.py",
    names="transformers.integrations.peft.PeftAdapterMixin",
    interposes="PeftAdapterMixin.load_adapter undoes a load of a REMOE adapter that fails (for the process)",
)
def load_adapter() -> None:
    from transformers import PreTrainedModel
    from transformers.integrations import peft as integration

    hold(issubclass(PreTrainedModel, integration.PeftAdapterMixin), "a model is no PeftAdapterMixin any more.")
    hold("load_adapter" not in vars(PreTrainedModel), "PreTrainedModel loads adapters past PeftAdapterMixin.")
    source = inspect.getsource(integration)
    hold("PeftConfig.from_pretrained(" in source, "load_adapter does not read PeftConfig.from_pretrained any more.")


@relied_on(
    "accelerate",
    "accelerate's hooks keep the forward that they wrap as `_old_forward` of the module, and call it.",
    "gating/install.py gating/forward.py",
    interposes="the forward of every router that has a prior, on the instance; under accelerate's hooks their "
    "_old_forward (InstalledPrior.remove)",
)
def accelerate_hooks() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module = nn.Linear(2, 2)
    add_hook_to_module(module, ModelHook())
    hold("_old_forward" in vars(module), "a module under accelerate's hooks has no _old_forward.")
    vars(module)["_old_forward"] = lambda hidden: hidden + 1.0
    hold(torch.equal(module(torch.zeros(1)), torch.ones(1)), "accelerate's hooks do not call _old_forward.")
    del vars(module)["_old_forward"]
    vars(module)["_old_forward"] = type(module).forward.__get__(module)
    remove_hook_from_module(module)


@relied_on(
    "accelerate",
    "broadcast_object_list gives the list of one process to all others, and leaves it as it is where there is one.",
    "training/point.py",
    names="accelerate.utils.broadcast_object_list",
)
def broadcasts() -> None:
    from accelerate.utils import broadcast_object_list

    hold(broadcast_object_list(["kept"]) == ["kept"], "broadcast_object_list of one process changes its list.")
