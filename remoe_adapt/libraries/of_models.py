"""What we rely on in transformers' models: routers, experts, checkpoints and how they are loaded; see `table`."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from remoe_adapt.libraries.patching import put_on
from remoe_adapt.libraries.table import hold, relied_on
from remoe_adapt.libraries.tiny import EXPERTS, TOP_K, model_class, no_bars, tiny_config, tiny_model


@relied_on(
    "transformers",
    "`_can_record_outputs['router_logits']` names the router class; a router returns (logits, weights, ids) of its "
    "tokens, and its 2-D weight has a row per expert.",
    "routers/discover.py routers/table.py routers/infer.py",
)
def routers() -> None:
    model = tiny_model()
    recorded = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    # A class, or a recorder object with a `target_class`, as versions have it.
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
    hold(shapes == [(5, EXPERTS), (5, TOP_K), (5, TOP_K)], f"a router returns {shapes} for 5 tokens.")
    hold(tuple(gate.weight.shape) == (EXPERTS, 32), "a router's weight is not [experts, hidden] any more.")


@relied_on(
    "transformers",
    "An experts module asks ALL_EXPERTS_FUNCTIONS for the function that experts_implementation names, and calls it "
    "with itself, hidden states, ids and weights; its class's own forward, under that, reads expert e as row e of its "
    "parameters and of nothing else.",
    "expert_cache/encoding.py expert_cache/experts.py expert_cache/checkpoint_store.py recency/proof.py",
    names="transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS",
    interposes="the registry of experts implementations, which gains 'remoe_cache' (for good: models that do not name "
    "it never see it); the __init__ of experts classes while one checkpoint is loaded (experts_left_out, undone at its "
    "end), which leaves the modules made by it without parameters and bound to the cache (for the model's life); their "
    "forward while an installed prior is tried (undone at once)",
    patches="expert_cache/experts.py:override,put_on recency/proof.py:put_on",
)
def experts_interface() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    asked: list[tuple[Any, ...]] = []

    def listening(*inputs: Any) -> torch.Tensor:
        asked.append(inputs)
        return torch.zeros_like(inputs[1])

    hold(callable(getattr(ALL_EXPERTS_FUNCTIONS, "register", None)), "ALL_EXPERTS_FUNCTIONS takes no functions now.")
    with put_on(ALL_EXPERTS_FUNCTIONS, "remoe_contract", listening):
        model = model_class()._from_config(tiny_config(), experts_implementation="remoe_contract").eval()
        model(input_ids=torch.tensor([[1, 2]]))
    experts = model.model.layers[0].mlp.experts
    hold(bool(asked) and asked[0][0] is experts and len(asked[0]) == 4, "experts modules do not ask the registry.")
    eager = inspect.unwrap(type(experts).forward)
    names = list(inspect.signature(eager).parameters)
    hold(names == ["self", "hidden_states", "top_k_index", "top_k_weights"], f"an experts forward takes {names}.")
    # The expert cache leaves these tensors out of memory and hands rows in their place, one expert at a time.
    params = list(experts._parameters)
    hold(all(experts._parameters[name].shape[0] == EXPERTS for name in params), "an expert is no row of its tensors.")
    hidden, ids, weights = torch.randn(1, 32), torch.tensor([[5, 1]]), torch.tensor([[0.75, 0.25]])
    expected = eager(experts, hidden, ids, weights)
    read: list[int] = []

    class Rows:
        def __init__(self, whole: torch.Tensor) -> None:
            self.whole = whole

        def __getitem__(self, expert: Any) -> torch.Tensor:
            read.append(int(expert))
            return self.whole[int(expert)]

    for name in params:
        put_on(experts, name, Rows(experts._parameters[name].detach()))
    found = eager(experts, hidden, ids, weights)
    hold(torch.equal(found, expected), "the eager experts function computes otherwise on rows handed one by one.")
    hold(set(read) == {1, 5}, f"for experts 5 and 1 the eager function read rows {sorted(set(read))}.")


@relied_on(
    "transformers",
    "The conversion mapping and rename_source_key tell which keys of a checkpoint become which parameter, and a "
    "converter works on one expert.",
    "expert_cache/checkpoint_store.py engines/base.py",
    names="transformers.conversion_mapping.get_model_conversion_mapping "
    "transformers.core_model_loading.WeightConverter transformers.core_model_loading.WeightRenaming "
    "transformers.core_model_loading.dot_natural_key transformers.core_model_loading.rename_source_key",
)
def conversion_mapping() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    # No weights are needed to ask how their keys are named.
    with torch.device("meta"):
        model = model_class()(tiny_config())
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
    # All of them become one parameter, of which the expert cache converts a row at a time.
    wanted = {"model.layers.0.mlp.experts.gate_up_proj"}
    hold(found == wanted, f"keys of single experts are renamed to {sorted(found)}, not to {sorted(wanted)}.")


@relied_on(
    "transformers",
    "A model saves experts one by one, loads without parameters that `_keys_to_ignore_on_load_unexpected` names, "
    "leaves modules marked `_is_hf_initialized` alone, and asks its class for save_pretrained.",
    "expert_cache/load.py expert_cache/experts.py",
    interposes="`_keys_to_ignore_on_load_unexpected` of a model's class while one checkpoint is loaded; the class of a "
    "model with an expert cache, whose save_pretrained refuses, and its attribute `expert_cache` (both for the model's "
    "life)",
    patches="expert_cache/load.py:class_attribute,become,put_on",
)
def checkpoints() -> None:
    from safetensors import safe_open

    model = tiny_model()
    cls = type(model)
    hold(hasattr(cls, "_keys_to_ignore_on_load_unexpected"), "a model class has no _keys_to_ignore_on_load_unexpected.")
    with tempfile.TemporaryDirectory() as folder:
        with no_bars():
            model.save_pretrained(folder)
        with safe_open(Path(folder, "model.safetensors"), "pt") as file:
            saved = set(file.keys())
    hold("model.layers.0.mlp.experts.7.up_proj.weight" in saved, "save_pretrained does not save experts one by one.")
    hold("model.layers.0.mlp.gate.weight" in saved, "save_pretrained saves a router under another name.")


@relied_on(
    "transformers",
    "A folder with a single model.safetensors is loaded from it, whatever index lies beside it.",
    "checkpoints/safetensors_files.py engines/base.py expert_cache/load.py",
)
def checkpoint_files() -> None:
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder, no_bars():
        model.save_pretrained(folder)
        # An index that names a file that is not there: following it would fail loudly.
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
        loaded = model_class().from_pretrained(folder)
    same = torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    hold(same, "a folder with model.safetensors and an index beside it is not loaded from the single file.")
