"""The routers of one strength as a stock PEFT LoRA, for people without this package.

A full delta is a LoRA of rank E: A = delta [E, D], B = identity [E, E], alpha = rank. PEFT adds it to the weight itself
(`target_parameters`), after rounding it to the weight's dtype.
"""

from __future__ import annotations

import inspect
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from remoe_adapt.engines.base import BaseFiles, StoredRouter
from remoe_adapt.engines.files import new_folder
from remoe_adapt.engines.lora_readers import lora_readers
from remoe_adapt.engines.merged import left_out
from remoe_adapt.errors import ConfigError, UnsupportedRouterError
from remoe_adapt.family import Family
from remoe_adapt.libraries import hook
from remoe_adapt.tuner import plain_key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weight + rounded difference may round to a neighbour of the live weight. Then the floats so many places above or
# below the difference are tried, nearest first.
_STEPS = (1, -1, 2, -2)


def export_lora(
    base: str | os.PathLike[str],
    family: Family,
    strength: float,
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Write the PEFT adapter folder `out`, which `PeftModel.from_pretrained` loads on `base` without this package.

    dtype: what the base will be loaded in ("auto": as from_pretrained does). In float32 the adapted weight is the
    live one bit for bit. In half precision the delta is chosen so that weight + delta rounds to the live weight;
    `inexact` counts the weights (of `weights`) where no delta does, `max_error` is the largest miss. `engines` says
    what other engines than PEFT do with it (`lora_readers`).

    Raises ConfigError when `out` holds something or the dtype is unknown, UnsupportedRouterError for routers that would
    silently ignore PEFT's wrapper, FamilyError for the strength, WriteError for a disk that is full or read-only and
    the like, else as `BaseFiles`.
    """
    files, target = BaseFiles(base), Path(out)
    files.check(family, force=force)
    names = [name for name in files.weights if name in family.points[0].deltas]
    specs = {router.name: router.spec for router in files.routers}
    dtypes = {router.name: _dtype(dtype, files, router) for router in files.routers}
    # Before the numbers: a LoRA that PEFT never applies would be exact and without effect.
    _check_reached(files.skeleton, {name: specs[name].weight_name for name in names})
    weights = {name: files.weights[name].to(dtypes[name]) for name in names}
    live = family.live(strength, weights)
    deltas = {name: _delta(weights[name], live[name]) for name in names}
    # Counted with the very sum that PEFT will make, in the dtype that it will make it in.
    off = [(weights[name] + deltas[name].to(weights[name].dtype) != live[name]).sum().item() for name in names]
    miss = [(weights[name] + deltas[name].to(weights[name].dtype) - live[name]).abs().max().item() for name in names]

    parameters = {name: f"{name}.{specs[name].weight_name}" for name in names}
    ranks = {len(deltas[name]) for name in names}
    if len(ranks) > 1:
        raise UnsupportedRouterError(f"routers of {sorted(ranks)} experts: one stock LoRA has one rank.")
    rank = ranks.pop()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[],
        target_parameters=list(parameters.values()),
        base_model_name_or_path=family.base_id,
        task_type="CAUSAL_LM" if type(files.skeleton).__name__.endswith("ForCausalLM") else None,
    )
    # PEFT's own save_pretrained writes it so.
    config.inference_mode = True
    tensors: dict[str, Tensor] = {}
    for key in _keys(files.skeleton, config):
        module, _, kind = plain_key(key.removesuffix(".weight")).rpartition(".")
        name = next(n for n, parameter in parameters.items() if parameter.rpartition(".")[0] == module)
        tensors[key] = deltas[name] if kind == "lora_A" else torch.eye(rank)
    with new_folder(target) as draft:
        save_file(tensors, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(draft))
    return {
        "out": str(target),
        "base": family.base_id,
        "strength": strength,
        "routers": len(names),
        "rank": rank,
        "for_dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        "weights": sum(delta.numel() for delta in deltas.values()),
        "inexact": sum(off),
        "max_error": max(miss),
        "engines": lora_readers(files.config.get_text_config().model_type, rank),
        **left_out(family, strength),
    }


def _dtype(name: str, files: BaseFiles, router: StoredRouter) -> torch.dtype:
    if name != "auto" and name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown: use auto, {', '.join(DTYPES)}.")
    loaded = files.loaded_dtype(router)
    # A model that asks for fp32 routers has them in fp32 whatever the rest is loaded in.
    kept = loaded == torch.float32 and files.skeleton.dtype != loaded
    return loaded if kept else DTYPES.get(name, loaded)


def _delta(weight_ED: Tensor, live_ED: Tensor) -> Tensor:
    """fp32 delta that PEFT's `weight + delta.to(weight.dtype)` turns into the live weight, or as near as can be."""
    # In fp64 the difference of two half-precision weights is exact, so only the rounding below can miss.
    exact_ED = live_ED.double() - weight_ED.double()
    delta_ED = exact_ED.to(weight_ED.dtype)
    for step in _STEPS:
        missed_ED = weight_ED + delta_ED != live_ED
        if not missed_ED.any():
            break
        end_ED = torch.full_like(delta_ED, torch.inf if step > 0 else -torch.inf)
        tried_ED = exact_ED.to(weight_ED.dtype)
        for _ in range(abs(step)):
            tried_ED = torch.nextafter(tried_ED, end_ED)
        better_ED = missed_ED & (weight_ED + tried_ED == live_ED)
        delta_ED = torch.where(better_ED, tried_ED, delta_ED)
    return delta_ED.float()


def _check_reached(skeleton: nn.Module, weight_names: dict[str, str]) -> None:
    """PEFT changes a weight while the module that owns it is called: that must be the router or a part it calls."""
    for name, weight_name in weight_names.items():
        router, owner = skeleton.get_submodule(name), weight_name.rpartition(".")[0]
        # The weight is the router's own: PEFT's wrapper then stands in the router's place and is called for certain.
        if not owner:
            continue
        calls: list[object] = []
        rows, columns = router.get_parameter(weight_name).shape
        given = inspect.signature(router.forward).parameters.values()
        needed = [entry for entry in given if entry.default is entry.empty][1:]  # a selection bias, for instance
        with (
            hook(router.get_submodule(owner), "forward", lambda *_, calls=calls: calls.append(1)),
            # Only the call of the owner counts; what comes after it may need more than these hidden states.
            suppress(RuntimeError, TypeError, ValueError, IndexError),
            # On the meta device nothing is computed, so asking costs no time and no memory.
            torch.no_grad(),
            torch.device("meta"),
        ):
            router(torch.empty(1, 1, columns), *(torch.empty(rows) for _ in needed))
        if not calls:
            raise UnsupportedRouterError(
                f"router {name} was not seen to call its {owner}, whose weight PEFT's LoRA changes while it is called: "
                "the LoRA could be silently ignored. Use `remoe export merged`."
            )


def _keys(skeleton: nn.Module, config: LoraConfig) -> list[str]:
    """The names under which PEFT looks for the tensors of this adapter."""
    # PEFT warns of a model without weights, and that is what this one is for.
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
        return list(get_peft_model_state_dict(model))
