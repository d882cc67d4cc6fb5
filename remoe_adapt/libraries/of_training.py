"""What we rely on in transformers' Trainer and adapters, and in accelerate, which places models; see `table`."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from remoe_adapt.libraries.patching import put_on
from remoe_adapt.libraries.table import hold, relied_on
from remoe_adapt.libraries.tiny import ids, tiny_model


@relied_on(
    "transformers",
    "Trainer computes its loss in compute_loss(model, inputs, return_outputs, num_items_in_batch) and its steps in "
    "training_step; it makes its optimizer in create_optimizer, and writes and reads what is trained in _save and "
    "_load_from_checkpoint.",
    "training/trainer.py training/point.py training/points.py training/validation.py",
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
        "_save": {"output_dir"},
        "_load_from_checkpoint": {"resume_from_checkpoint"},
        "_prepare_inputs": {"inputs"},
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
    "tuner/attached.py",
    interposes="forward hooks on a base and its decoder while a REMOE adapter with loss weights is on it (unload takes "
    "them off), and its attribute; ObjectiveCallback among Trainer's default callbacks (for the process, once such an "
    "adapter was made)",
    patches="tuner/attached.py:hook,put_on,append_entry",
)
def any_training_loop() -> None:
    from transformers import trainer

    hold(isinstance(getattr(trainer, "DEFAULT_CALLBACKS", None), list), "Trainer has no list DEFAULT_CALLBACKS now.")
    # The list alone is not enough: a Trainer that copied it at import would never see our callback.
    source = inspect.getsource(trainer.Trainer.__init__)
    hold("DEFAULT_CALLBACKS" in source, "Trainer does not call DEFAULT_CALLBACKS any more.")
    model = tiny_model()
    hold(model.base_model is model.model, "a causal LM's base_model is not its decoder.")
    hold("last_hidden_state" in model.model(ids()), "a decoder's output has no last_hidden_state.")
    output = model(ids(), labels=ids())
    hold(output.get("loss") is not None and output["loss"].dim() == 0, "a causal LM with labels gives no scalar loss.")


@relied_on(
    "transformers",
    "transformers' load_adapter is PeftAdapterMixin's, and reads the configuration through PeftConfig.from_pretrained "
    "before it injects.",
    "tuner/loading.py",
    names="transformers.integrations.peft.PeftAdapterMixin",
    interposes="PeftAdapterMixin.load_adapter undoes a load of a REMOE adapter that fails (for the process)",
    patches="tuner/loading.py:override",
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
    "recency/install.py gating/router_forward.py",
    interposes="the forward of every router that has a prior, on the instance; under accelerate's hooks their "
    "_old_forward (InstalledPrior.remove)",
    patches="recency/install.py:put_on",
)
def accelerate_hooks() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module = nn.Linear(2, 2)
    add_hook_to_module(module, ModelHook())
    hold("_old_forward" in vars(module), "a module under accelerate's hooks has no _old_forward.")
    # This is how a prior is put into a router that accelerate has placed on a device.
    with put_on(module, "_old_forward", lambda hidden: hidden + 1.0):
        hold(torch.equal(module(torch.zeros(1)), torch.ones(1)), "accelerate's hooks do not call _old_forward.")
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


@relied_on(
    "accelerate",
    "PartialState joins a launched group on CPUs only with cpu=True; the state has fsdp_plugin and distributed_type as "
    "attributes (set by us on CPUs), and is asked for them when a model is prepared; FSDP2 leaves ignored_modules out.",
    "training/processes.py training/sharding.py",
    names="accelerate.utils.DistributedType accelerate.utils.FullyShardedDataParallelPlugin",
)
def sharded() -> None:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp_utils

    hold("cpu" in inspect.signature(PartialState.__init__).parameters, "PartialState takes no cpu any more.")
    hold(hasattr(DistributedType, "FSDP"), "DistributedType has no FSDP any more.")
    taken = inspect.signature(FullyShardedDataParallelPlugin).parameters
    for name in ("ignored_modules", "cpu_ram_efficient_loading"):
        hold(name in taken, f"FullyShardedDataParallelPlugin takes no {name} any more.")
    hold(hasattr(Accelerator, "is_fsdp2"), "Accelerator has no is_fsdp2 any more.")
    source = inspect.getsource(fsdp_utils.fsdp2_prepare_model)
    hold("ignored_modules" in source, "fsdp2_prepare_model reads no ignored_modules any more.")
