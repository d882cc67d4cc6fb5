"""What we rely on in PEFT and in torch's modules, row by row; see `table`."""

from __future__ import annotations

import contextlib
import enum
import inspect
from typing import Any

import torch
from torch import nn

from remoe_adapt.libraries.patching import hook, override
from remoe_adapt.libraries.table import hold, relied_on


def _small() -> Any:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "custom"}
            self.gate = nn.Linear(4, 3, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.gate(hidden)
            return logits

    return Small()


@relied_on(
    "peft",
    "PeftType is a str enum whose members are looked up in _member_map_ and _value2member_map_, and takes one more; "
    "register_peft_method fills the two mappings.",
    "tuner/__init__.py cli/doctor.py",
    names="peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING "
    "peft.utils.register_peft_method peft.utils.PeftType",
    interposes="PeftType gains the member REMOE (for the life of the process)",
    patches="tuner/__init__.py:enum_member",
)
def adapter_type() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    hold(issubclass(PeftType, str) and issubclass(PeftType, enum.Enum), "PeftType is no str enum any more.")
    for name in ("_member_names_", "_member_map_", "_value2member_map_"):
        hold(hasattr(PeftType, name), f"this Python's enum has no {name}.")
    # Absent in the command line's process until something needs PEFT, see the package's __init__.
    if "REMOE" in PeftType.__members__:
        hold(PeftType("REMOE") is PeftType["REMOE"], "PeftType('REMOE') is another object than PeftType['REMOE'].")
    wanted = {"name", "config_cls", "model_cls"}
    hold(wanted <= set(inspect.signature(register_peft_method).parameters), "register_peft_method takes other names.")
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        hold(PeftType.LORA in mapping, "PEFT's mappings from types to classes are keyed by something else.")


@relied_on(
    "peft",
    "PeftConfig.from_pretrained is one class method for all types, found on PeftConfigMixin.",
    "tuner/loading.py tuner/config.py tuner/stored.py",
    names="peft.config.PeftConfig peft.config.PeftConfigMixin peft.utils.WEIGHTS_NAME",
    interposes="PeftConfigMixin.from_json_file and from_pretrained check what a REMOE adapter's files hold; "
    "PeftModel's from_pretrained, load_adapter and create_or_update_model_card undo a failed load of one and write its "
    "card (for the process; other types are handed through)",
    patches="tuner/loading.py:override,Snapshot",
)
def config_reading() -> None:
    from peft import PeftModel
    from peft.config import PeftConfig, PeftConfigMixin

    hold(issubclass(PeftConfig, PeftConfigMixin), "PeftConfig does not derive from PeftConfigMixin any more.")
    hold("from_pretrained" not in vars(PeftConfig), "PeftConfig reads itself, past PeftConfigMixin.from_pretrained.")
    found = vars(PeftConfigMixin).get("from_pretrained")
    hold(isinstance(found, classmethod), "PeftConfigMixin.from_pretrained is no class method.")
    taken = set(inspect.signature(PeftConfigMixin.from_pretrained).parameters)
    hold({"pretrained_model_name_or_path", "subfolder"} <= taken, f"PeftConfigMixin.from_pretrained takes {taken}.")
    for owner, names in {
        PeftConfigMixin: ("from_json_file", "_split_kwargs"),
        PeftModel: ("from_pretrained", "load_adapter", "create_or_update_model_card", "_split_kwargs"),
    }.items():
        for name in names:
            hold(callable(getattr(owner, name, None)), f"{owner.__name__} has no {name} any more.")


@relied_on(
    "peft",
    "BaseTuner injects through these methods, and a tuner layer tells its state by these names.",
    "tuner/model.py tuner/layer.py tuner/targets.py tuner/combine.py tuner/mixed_batch.py tuner/peft_compat.py",
    names="peft.tuners.tuners_utils.BaseTuner peft.tuners.tuners_utils.BaseTunerLayer "
    "peft.tuners.tuners_utils.check_target_module_exists peft.tuners.tuners_utils.onload_layer "
    "peft.tuners.tuners_utils.check_adapters_to_merge peft.utils.AuxiliaryTrainingWrapper "
    "peft.utils.ModulesToSaveWrapper peft.utils.INCLUDE_LINEAR_LAYERS_SHORTHAND peft.utils.SAFETENSORS_WEIGHTS_NAME "
    "peft.utils.CONFIG_NAME peft.utils.constants.DUMMY_TARGET_MODULES",
    interposes="each adapted router module is replaced by a RemoeLayer around it (unload and release put it back, and "
    "so does an error); its __call__ skips torch's hooks while the module itself has none; a forward with one "
    "adapter per sample hooks the layers and replaces the routers' forward (undone at its end)",
    patches="tuner/model.py:replace_module,Snapshot dial/load.py:replace_module "
    "bench/controller/arms.py:replace_module tuner/mixed_batch.py:hook,put_on",
)
def tuner_layers() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        check_adapters_to_merge,
        check_target_module_exists,
        onload_layer,
    )
    from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, AuxiliaryTrainingWrapper, ModulesToSaveWrapper
    from peft.utils.constants import DUMMY_TARGET_MODULES

    for name in ("_prepare_adapter_config", "_prepare_model", "inject_adapter", "_create_and_replace", "set_adapter"):
        hold(callable(getattr(BaseTuner, name, None)), f"BaseTuner has no {name} any more.")
    for helper in (check_adapters_to_merge, check_target_module_exists, onload_layer):
        hold(callable(helper), f"{helper} cannot be called.")
    hold(issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper), "modules_to_save are wrapped by another class.")
    hold(isinstance(INCLUDE_LINEAR_LAYERS_SHORTHAND, str), "the name for all linear layers is no string.")
    hold(isinstance(DUMMY_TARGET_MODULES, str), "the name for no target at all is no string.")
    model: Any = get_peft_model(_small(), LoraConfig(target_modules=["gate"]))
    layer = model.base_model.model.gate
    hold(isinstance(layer, BaseTunerLayer), "an adapted module is no BaseTunerLayer.")
    hold(layer._disable_adapters is False and layer.merged_adapters == [], "a tuner layer keeps its state otherwise.")
    hold(layer.active_adapters == ["default"], "a tuner layer names its active adapters otherwise.")
    hold(set(layer._get_available_adapters()) == {"default"}, "a tuner layer lists its adapters otherwise.")
    with model.disable_adapter():
        hold(layer._disable_adapters is True, "disable_adapter does not switch the tuner layers off.")
    hold(layer._disable_adapters is False, "disable_adapter does not switch the tuner layers on again.")


@relied_on(
    "peft",
    "A PeftModel saves adapters under `base_model.model.` without the adapter's name, hands unknown attributes to its "
    "base, and gives the base with get_base_model.",
    "tuner/checks.py family/files.py engines/peft_lora.py dial/load.py",
    interposes="save_pretrained of a dialled model and of its base, and their attribute `controller`; enable_adapters "
    "of its router layers, and hooks of their state dicts and of the base's (controller.close takes all of them off)",
    patches="dial/guards.py:override,hook dial/controller.py:put_on",
)
def saved_names() -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    base = _small()
    # An attribute that PEFT knows nothing of, as `controller` is one.
    base.note = "kept"
    model: Any = get_peft_model(base, LoraConfig(target_modules=["gate"]))
    keys = set(get_peft_model_state_dict(model))
    wanted = {"base_model.model.gate.lora_A.weight", "base_model.model.gate.lora_B.weight"}
    hold(keys == wanted, f"an adapter is saved as {sorted(keys)}, not as {sorted(wanted)}.")
    hold(model.note == "kept" and model.get_base_model() is base, "a PeftModel does not hand on what its base has.")


@relied_on(
    "peft",
    "A LoRA on a base is a LoraLayer around each layer that it changes; with no adapter active, or disabled, that runs "
    "the base layer and nothing else; its tensors carry the adapter's name between dots.",
    "family/recovery.py training/recovery.py training/points.py",
    names="peft.tuners.lora.LoraLayer",
    interposes="the layers that a family's recovery adapters change are replaced by LoraLayers around them "
    "(FamilyRecovery.remove puts them back, and so does an error)",
    patches="family/recovery.py:replace_module",
)
def recovery_adapters() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    base = _small()
    hidden = torch.ones(1, 4)
    before = base.gate(hidden)
    model: Any = get_peft_model(base, LoraConfig(target_modules=["gate"], init_lora_weights=False), "one")
    layer = model.base_model.model.gate
    hold(isinstance(layer, LoraLayer), "a LoRA's layer is no LoraLayer.")
    hold(not torch.equal(layer(hidden), before), "an active LoRA changes nothing.")
    layer._disable_adapters = True
    hold(torch.equal(layer(hidden), before), "a disabled LoRA layer does not run its base layer as it is.")
    layer._disable_adapters, layer._active_adapter = False, []
    hold(torch.equal(layer(hidden), before), "a LoRA layer without an active adapter is not its base layer.")
    hold(all("one" in name.split(".") for name, _ in layer.named_parameters() if "lora_" in name), "names are others.")


@relied_on(
    "peft",
    "A tuner asks `_check_merge_allowed` before it merges; LoRA takes any nn.Linear or nn.Embedding, gives adapters "
    "beside a weight of bytes a floating type, and asks a module that has `W_q` for `dequantize()` where it needs the "
    "weight.",
    "expert_cache/encodings/linear.py",
    names="peft.tuners.tuners_utils.BaseTuner peft.tuners.tuners_utils.BaseTunerLayer",
    interposes="BaseTuner._check_merge_allowed refuses where an adapted module keeps its weight in codes (for the "
    "process; other models are handed through); linear and embedding modules of a model that is loaded are replaced by "
    "ones that keep codes (for the model's life)",
    patches="expert_cache/encodings/linear.py:override,replace_module",
)
def weights_in_codes() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTuner

    hold("_check_merge_allowed" in vars(BaseTuner), "BaseTuner has no _check_merge_allowed any more.")

    class Codes(nn.Linear):
        asked = 0

        def dequantize(self) -> torch.Tensor:
            self.asked += 1
            return self.weight.float()

    base = _small()
    base.gate = codes = Codes(4, 3, bias=False)
    codes.W_q = codes.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.uint8), requires_grad=False)
    # Of an adapter with DoRA, whose norms are those of the whole weight.
    model: Any = get_peft_model(base, LoraConfig(target_modules=["gate"], use_dora=True))
    hold(codes.asked, "PEFT takes the bytes of a quantised weight for its values.")
    adapter = model.base_model.model.gate.lora_A.default
    hold(adapter.weight.is_floating_point(), "an adapter gets the type of its weight's bytes.")
    asked: list[Any] = []

    def refuse(check: Any, tuner: Any) -> None:
        asked.append(tuner)
        raise InterruptedError

    with override(BaseTuner, "_check_merge_allowed", refuse):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with contextlib.suppress(InterruptedError):
                merge()
    hold(len(asked) == 2, "PEFT merges without asking _check_merge_allowed.")


@relied_on(
    "torch",
    "A module's own hooks are in _forward_hooks, _forward_pre_hooks, _backward_hooks and _backward_pre_hooks; "
    "functional_call runs it on other weights; _foreach_copy_ writes in place.",
    "tuner/layer.py dial/swap.py gating/router_forward.py",
    interposes="forward hooks of routers while they are recorded, trained, tried or exported (undone at the end); "
    "atexit and fork handlers, and mallopt, of the process (dial/, _support/)",
    patches="evaluation/record.py:hook training/trainer.py:hook engines/peft_lora.py:hook recency/proof.py:hook",
)
def modules() -> None:
    module = nn.Linear(2, 2, bias=False)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        hold(not getattr(module, name), f"a module without hooks has something in {name}.")
    hook(module, "forward", lambda *_: None)
    hold(module._forward_hooks, "a forward hook is not in _forward_hooks.")
    weight = torch.ones(2, 2)
    found = torch.func.functional_call(module, {"weight": weight}, (torch.ones(1, 2),))
    hold(torch.equal(found, torch.full((1, 2), 2.0)), "functional_call does not use the weights that it is given.")
    # A swap of strength must keep the pointer: CUDA graphs and compiled code hold it.
    live = torch.zeros(2, 2)
    pointer = live.data_ptr()
    torch._foreach_copy_([live], [weight])
    hold(torch.equal(live, weight) and live.data_ptr() == pointer, "_foreach_copy_ does not write in place.")
