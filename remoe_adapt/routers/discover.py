"""Model -> routers, or a named refusal.

The generic rule: a class that a transformers model records as `router_logits`, else a module beside an experts module,
is a router; the one floating 2-D weight inside it with a row per expert is its weight.

One hash that says which base model an adapter belongs to: all base router weights in model order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt.errors import RouterError, RouterNotFoundError, UnsupportedRouterError
from remoe_adapt.routers.infer import infer_facts, returns_in_this_version
from remoe_adapt.routers.spec import RouterRef, RouterSpec, plain_name
from remoe_adapt.routers.table import Facts, Refusal, known_facts

_TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "topk",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "num_selected_experts",
)
_SCALING_NAMES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
_BASE = ".base_layer"


@dataclass(frozen=True, eq=False)
class Routers:
    """All routers of a model, in model order, found by one walk over its modules (`survey_routers`).

    refs: the usable ones. refused, foreign: (name, reason) of the others, and of those that carry another's layer.
    Whoever wraps the routers or swaps their weights may keep it; after other modules took their places it is stale.
    """

    model_name: str
    refs: tuple[RouterRef, ...]
    refused: tuple[tuple[str, str], ...]
    foreign: tuple[tuple[str, str], ...]

    def usable(self) -> tuple[RouterRef, ...]:
        """`refs`, when they are all that can be adapted; raises as `discover_routers`."""
        if self.foreign:
            name, reason = self.foreign[0]
            raise UnsupportedRouterError(
                f"{len(self.foreign)} router(s) carry another layer, first {name}: {reason}. "
                "Exclude the routers from that adapter (exclude_modules), or merge and unload it first."
            )
        if self.refs:
            return self.refs
        if self.refused:
            listing = "; ".join(sorted({reason for _, reason in self.refused}))
            raise UnsupportedRouterError(f"no usable router in {self.model_name}: {listing}.")
        raise RouterNotFoundError(
            f"{self.model_name} has no mixture-of-experts router: nothing recorded as router_logits and no module "
            "beside an experts module. Is it a dense model?"
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """The live weights [E, D] by name inside the base model; raises as `usable`."""
        return {plain_name(ref.name): ref.weight_ED for ref in self.usable()}

    @property
    def original_weights(self) -> dict[str, Tensor]:
        """The same without adapters, also while some are merged or swapped. The tensors are the model's own."""
        return {plain_name(ref.name): ref.original_weight_ED for ref in self.usable()}

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint`; hashed when it is asked for first."""
        weights = self.original_weights
        for name, weight_ED in weights.items():
            if weight_ED.is_meta:
                raise RouterError(
                    f"router {name} is on the meta device and has no values to take a fingerprint of: "
                    "load the base model's weights first."
                )
        return fingerprint_of_weights(weights.values())


def fingerprint(model: nn.Module) -> str:
    """Hash of the base router weights of `model`, which says which base an adapter belongs to.

    It is the same before and after wrapping, while adapters are merged, under any module prefix (names are not
    hashed, only order, shape and value), and in any dtype, see `fingerprint_of_weights`.

    Raises RouterNotFoundError or UnsupportedRouterError as `discover_routers`, RouterError when a weight has no values
    (meta device).
    """
    return survey_routers(model).fingerprint


def discover_routers(model: nn.Module) -> tuple[RouterRef, ...]:
    """The routers of `model` (a PeftModel too) in model order; refused ones beside usable ones are left alone.

    Raises RouterNotFoundError when there is none, UnsupportedRouterError when all are refused or when a layer of
    another kind (LoRA, a trainable copy) sits on one.
    """
    return survey_routers(model).usable()


def survey_routers(model: nn.Module) -> Routers:
    """Every router of `model`: usable, refused with a reason, or carrying a foreign layer. Raises nothing."""
    modules = dict(model.named_modules())
    recorded = _recorded(model)
    found: list[RouterRef] = []
    refused: list[tuple[str, str]] = []
    foreign: list[tuple[str, str]] = []
    for path, module in _candidates(modules, recorded):
        name, own_spec, foreign_reason = _unwrapped(path, modules)
        foreign_reason = foreign_reason or _foreign_inside(module)
        if foreign_reason is not None:
            if name not in (known for known, _ in foreign):
                foreign.append((name, foreign_reason))
            continue
        block = modules[name.rpartition(".")[0]]
        around = [type(modules[parent]).__name__ for parent in _ancestors(name)]
        if any("Attention" in kind and not kind.endswith("Layer") for kind in around):  # a layer holds experts as well
            refused.append((name, "it routes attention, not feed-forward experts"))
            continue
        spec = own_spec or _spec(module, block, _config_of(name, modules))
        if isinstance(spec, Refusal):
            refused.append((name, spec.reason))
        else:
            found.append(RouterRef(name, module, spec, block))
    return Routers(type(model).__name__, tuple(found), tuple(refused), tuple(foreign))


def _recorded(model: nn.Module) -> tuple[tuple[type[nn.Module], str], ...]:
    """(class, part of the path) that any (sub)model names in `_can_record_outputs["router_logits"]`."""
    recorded: list[tuple[type[nn.Module], str]] = []
    for module in model.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for entry in entries if isinstance(entries, (list, tuple)) else (entries,):
            target = entry if isinstance(entry, type) else getattr(entry, "target_class", None)
            where = (getattr(entry, "layer_name", None) or "").strip(".")
            if isinstance(target, type) and (target, where) not in recorded:
                recorded.append((target, where))
    return tuple(recorded)


def _is_recorded(path: str, module: nn.Module, recorded: tuple[tuple[type[nn.Module], str], ...]) -> bool:
    dotted = f".{path.replace(_BASE, '')}."
    return any(isinstance(module, target) and (not where or f".{where}." in dotted) for target, where in recorded)


def _candidates(
    modules: dict[str, nn.Module], recorded: tuple[tuple[type[nn.Module], str], ...]
) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of innermost modules that route, in model order."""
    chosen = {path for path, module in modules.items() if _is_recorded(path, module, recorded)}
    for path, module in modules.items():
        if not any("expert" in name for name, _ in module.named_children()):
            continue
        children = [_innermost(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        if chosen.isdisjoint(child_path for child_path, _ in children):
            chosen |= {child_path for child_path, child in children if _beside_experts(child_path, child, module)}
    for path, module in modules.items():
        # A recorded block that holds routers of its own is not one.
        if path in chosen and not any(other.startswith(f"{path}.") for other in chosen):
            yield path, module


def _beside_experts(path: str, module: nn.Module, block: nn.Module) -> bool:
    """Whether a child of `block` stands next to an experts container and owns one weight row per expert."""
    sizes = [_container_size(name, _innermost(name, child)[1]) for name, child in block.named_children()]
    name = path.removesuffix(_BASE).rpartition(".")[2]
    if not any(size is not None and size > 1 for size in sizes) or "expert" in name:
        return False
    return _is_shallow(module) and bool(_row_weights(module, _row_counts(module, block)))


def _is_shallow(module: nn.Module) -> bool:
    """Routers are shallow: whole attention or layer modules that happen to fit in shape are not candidates."""
    return all(isinstance(part, nn.Linear) or not len(list(part.children())) for part in module.children())


def _innermost(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        name, module = name + _BASE, inner
    return name, module


def _container_size(name: str, module: nn.Module) -> int | None:
    """How many experts this child holds, or None when it is no experts container."""
    if "expert" not in name or "shared" in name:
        return None
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module)
    stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]
    listed = [len(c) for c in module.children() if isinstance(c, nn.ModuleList)]
    counted = getattr(module, "num_experts", None)
    sizes = ([counted] if isinstance(counted, int) else []) + stacked + listed
    return sizes[0] if sizes else None


def _unwrapped(path: str, modules: dict[str, nn.Module]) -> tuple[str, RouterSpec | None, str | None]:
    """(outermost name, spec of our own wrapper if there is one, why a wrapper is foreign)."""
    spec, reason = None, None
    while path.endswith(_BASE):
        path = path.removesuffix(_BASE)
        wrapped_spec = getattr(modules[path], "spec", None)
        if isinstance(wrapped_spec, RouterSpec):
            spec = wrapped_spec
        else:
            reason = f"{type(modules[path]).__module__.removeprefix('peft.tuners.')}.{type(modules[path]).__name__}"
    copies = re.fullmatch(r"(.+)\.(?:original_module|modules_to_save\.[^.]+)", path)
    if copies:
        return copies[1], None, "it is a trainable copy (modules_to_save)"
    return path, spec, f"it is wrapped by {reason}" if reason else None


def _foreign_inside(router: nn.Module) -> str | None:
    for name, part in router.named_modules():
        if hasattr(part, "base_layer"):
            return f"its {name or 'weight'} is wrapped by {type(part).__module__.split('.')[-2]}.{type(part).__name__}"
        if hasattr(part, "parametrizations"):
            return f"its {name or 'module'} is parametrized"
    return None


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _config_of(name: str, modules: dict[str, nn.Module]) -> Any:
    return next((c for p in _ancestors(name) if (c := getattr(modules[p], "config", None)) is not None), None)


def _spec(router: nn.Module, block: nn.Module, config: Any) -> RouterSpec | Refusal:
    """All facts of one base router, or why it cannot be adapted."""
    facts = known_facts(router, block)
    if isinstance(facts, Refusal):
        return facts
    rows = _row_counts(router, block)
    weights = _row_weights(router, rows)
    if len(weights) != 1:
        held = ", ".join(f"{name} {list(p.shape)}" for name, p in router.named_parameters()) or "nothing"
        return Refusal(f"{len(weights)} of its weights have one row per expert ({sorted(rows)}); it holds {held}")
    (weight_name, weight) = weights[0]
    if not weight.is_floating_point() or weight.element_size() < 2:
        return Refusal(f"its weight is quantised ({weight.dtype})")
    if facts is None:
        facts = infer_facts(router, block, weight.shape[0])
    else:
        returns = returns_in_this_version(router, facts.returns)
        facts = returns if isinstance(returns, Refusal) else replace(facts, returns=returns)
    if isinstance(facts, Refusal):
        return facts
    num_experts = weight.shape[0] - _count(facts.shared_rows, router, block, config)
    top_k = facts.top_k or _top_k(router, block, config)
    if top_k is None:
        return Refusal("how many experts it chooses is told neither by the router, nor its block, nor the config")
    return _assemble(facts, router, block, weight_name, weight, num_experts, top_k)


def _assemble(
    facts: Facts, router: nn.Module, block: nn.Module, weight_name: str, weight: torch.Tensor, num_experts: int, k: int
) -> RouterSpec | Refusal:
    n_group = _first_int(router, ("num_group", "n_group")) or 1
    scoring, group_score = facts.scoring, facts.group_score
    if group_score is not None and n_group == 1:
        scoring = scoring.replace("_group", "_bias" if facts.bias else "")
        group_score = None
    bias = facts.bias
    owner = block if facts.bias_in_block else router
    if bias is not None and not _has_tensor(owner, bias):
        return Refusal(f"its selection bias {bias} is missing from {type(owner).__name__}")
    stem = scoring.partition("_")[0]
    return RouterSpec(
        scoring=scoring,
        num_experts=num_experts,
        top_k=k,
        hidden_size=weight.shape[1],
        weight_name=weight_name,
        num_rows=weight.shape[0],
        null_experts=_count(facts.null_experts, router, block, getattr(block, "config", None)),
        score="sqrt_softplus" if stem == "sqrt" else "sigmoid" if "sigmoid" in scoring else "softmax",
        normalize=bool(getattr(router, "norm_topk_prob", False)) if facts.normalize is None else facts.normalize,
        normalize_eps=facts.normalize_eps,
        scaling=1.0 / k if facts.divide_by_k else _scaling(router),
        weight_rule=facts.weight_rule,
        n_group=n_group if group_score else 1,
        topk_group=(_first_int(router, ("topk_group",)) or 1) if group_score else 1,
        group_score=group_score,
        group_fill=facts.group_fill,
        correction_bias_name=bias,
        correction_bias_in_block=facts.bias_in_block,
        logit_bias_name=facts.logit_bias,
        returns=facts.returns,
    )


def _row_counts(router: nn.Module, block: nn.Module) -> set[int]:
    """Row counts a router weight may have: what its attributes count as experts or classes, else its neighbours."""
    counted = {
        value
        for name, value in vars(router).items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and re.search("expert|class", name)
        and not re.search("capacity|per_tok|top|shared", name)
    }
    sizes = {_container_size(name, _innermost(name, child)[1]) for name, child in block.named_children()}
    return {value for value in counted | sizes if value is not None and value > 1}


def _row_weights(router: nn.Module, rows: set[int]) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in router.named_parameters() if p.dim() == 2 and p.shape[0] in rows]


def _count(fact: str | int, *owners: Any) -> int:
    return fact if isinstance(fact, int) else next((v for o in owners if (v := getattr(o, fact, None)) is not None), 0)


def _first_int(owner: Any, names: Any) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _top_k(router: nn.Module, block: nn.Module, config: Any) -> int | None:
    """K as the nearest owner states it: router, its config, the block, its config, the model's."""
    owners = (router, getattr(router, "config", None), block, getattr(block, "config", None), config)
    return next((k for owner in owners if (k := _first_int(owner, _TOP_K_NAMES)) is not None), None)


def _scaling(router: nn.Module) -> float:
    values = [getattr(router, name) for name in _SCALING_NAMES if getattr(router, name, None) is not None]
    return float(values[0]) if values else 1.0


def _has_tensor(owner: nn.Module, path: str) -> bool:
    holder, _, leaf = path.rpartition(".")
    try:
        return isinstance(getattr(owner.get_submodule(holder), leaf), torch.Tensor)
    except AttributeError:
        return False


_SMALLEST = 2.0**-16


def fingerprint_of_weights(weights: Iterable[Tensor]) -> str:
    """Hash of base router weights [E, D] in model order, wherever they were read: "sha256:" and 64 hex digits.

    It is the same in whichever dtype the checkpoint is loaded: values are hashed rounded to bf16, which is what loading
    in bf16 does, and magnitudes below 2**-16 as zero, because fp16 cannot hold them all. The one exception is an fp32
    checkpoint loaded in fp16: rounding twice is not rounding once.
    """
    digest = hashlib.sha256()
    for weight_ED in weights:
        digest.update(str(tuple(weight_ED.shape)).encode())
        digest.update(_canonical_bytes(weight_ED.detach()))
    return f"sha256:{digest.hexdigest()}"


def _canonical_bytes(weight_ED: Tensor) -> bytes:
    rounded_ED = weight_ED.to(torch.bfloat16)
    rounded_ED = torch.where(rounded_ED.abs() < _SMALLEST, torch.zeros_like(rounded_ED), rounded_ED)
    return rounded_ED.cpu().contiguous().view(torch.uint8).numpy().tobytes()
