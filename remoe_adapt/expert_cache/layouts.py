"""What a slot holds of an expert, and how a layer is computed with slots.

Three layouts: the parameters as the model has them (`ParamsLayout`); the stored tensors of a quantised checkpoint as
they are, dequantised on use by transformers' own conversion (`StoredLayout`, the exact arithmetic); and ggml blocks
that ggml's kernels compute with (`BlocksLayout`, the fast arithmetic on a CPU).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache.encoding import Encoding, eagerly, has_graph
from remoe_adapt.expert_cache.places import Places
from remoe_adapt.expert_cache.plan import Plan
from remoe_adapt.expert_cache.types import Slot

# For types alone, because experts.py imports this file.
if TYPE_CHECKING:
    from remoe_adapt.expert_cache.experts import ChosenExperts

# What the arithmetic on plain numbers is called.
FLOATS_NAME = "float"


class Layout(abc.ABC):
    """What slots hold; made from the plan of a checkpoint.

    name: as `status()` shows it.
    is_exact: results are those of the parameters that `from_pretrained` loads, bit for bit.
    """

    name: str
    is_exact: bool
    # It computes with slots that are there while others are under way to a device.
    is_early: bool = False
    # Where the parts of every slot lie; None: in each slot as the files happen to have them.
    places: Places | None = None

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def probe(self) -> None:
        """Find out what the files hold, before anything else is asked; raises UncacheableError for what is odd."""
        return

    def place(self, device: torch.device | None) -> None:
        """Have the same places in all slots of a layer from now on, in memory that is pinned for this GPU, if any."""
        self.places = Places([self.parts(at) for at in range(len(self.plan.layers))], self.plan.num_experts, device)

    @property
    def holds(self) -> str:
        """What a slot is of an expert: "params", the parameters of the model; "stored", the tensors of the files;
        "own", what `filled` makes of these."""
        return "own"

    @property
    def workspace_bytes(self) -> int:
        """Memory beside the slots for weights that are dequantised, of one expert at a time."""
        return 0

    @abc.abstractmethod
    def parts(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one slot of this layer, by name, on the meta device."""

    @abc.abstractmethod
    def filled(self, layer: int, stored: Mapping[str, Tensor]) -> Slot:
        """The slot of an expert whose stored tensors are these; it may hold these very tensors."""

    def packed(self, layer: int, parts: Mapping[str, Tensor]) -> Slot:
        """The slot of an expert whose parts a pack has in its own way; the layout has places."""
        assert self.places is not None
        return self.places.copied(layer, parts)

    @abc.abstractmethod
    def weight(self, layer: int, slot: Slot, param: str) -> Tensor:
        """A parameter of the expert in a slot, as the model has it."""

    @abc.abstractmethod
    def compute(
        self,
        layer: int,
        module: nn.Module,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        chosen: ChosenExperts,
    ) -> Tensor:
        """What the module's forward returns, computed on the slots of `chosen`."""


class ParamsLayout(Layout):
    """The parameters of an encoding, which computes with them."""

    is_exact = True

    def __init__(self, plan: Plan, encoding: Encoding) -> None:
        super().__init__(plan)
        self.name, self._encoding = encoding.method or FLOATS_NAME, encoding

    @property
    def holds(self) -> str:
        return "params"

    def parts(self, layer: int) -> dict[str, Tensor]:
        return self.plan.likes[layer]

    def filled(self, layer: int, stored: Mapping[str, Tensor]) -> Slot:
        return stored

    def weight(self, layer: int, slot: Slot, param: str) -> Tensor:
        return slot[param]

    def compute(
        self,
        layer: int,
        module: nn.Module,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        chosen: ChosenExperts,
    ) -> Tensor:
        return self._encoding.arithmetic(module, hidden_TD, ids_TK, weights_TK, chosen)


class _Decoded:
    """Stands for a parameter [E, ...]: row e is made of the slot of expert e, for as long as it is used."""

    __slots__ = ("_chosen", "_layer", "_layout", "_param")

    def __init__(self, layout: Layout, layer: int, param: str, chosen: ChosenExperts) -> None:
        self._layout, self._layer, self._param, self._chosen = layout, layer, param, chosen

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        number = int(expert)
        with torch.no_grad():
            weight = self._layout.weight(self._layer, self._chosen.slot(number), self._param)
        # Backward makes the weight anew: kept by the graph, all weights of a step would be in memory.
        self._chosen.note_made(number, self._param, weight)
        return weight


def needs_weights(module: nn.Module, hidden_TD: Tensor, weights_TK: Tensor) -> bool:
    """Whether a layer is computed with dequantised weights, whatever kernels there are: a gradient is asked for.

    In training all forwards are alike: a checkpointed one runs without a graph first, and then again with one.
    """
    return module.training or has_graph(hidden_TD, weights_TK)


class CodedLayout(Layout):
    """What layouts of codes share: the exact arithmetic, by weights that are dequantised when they are used."""

    @property
    def workspace_bytes(self) -> int:
        return max(sum(like.nbytes for like in likes.values()) for likes in self.plan.likes)

    def compute(
        self,
        layer: int,
        module: nn.Module,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        chosen: ChosenExperts,
    ) -> Tensor:
        rows: dict[str, Any] = {param: _Decoded(self, layer, param, chosen) for param in self.plan.likes[layer]}
        return eagerly(module, hidden_TD, ids_TK, weights_TK, rows)


class StoredLayout(CodedLayout):
    """The stored tensors as they are; transformers' own conversion dequantises them, one expert at a time."""

    is_exact = True

    def __init__(self, plan: Plan, method: str) -> None:
        super().__init__(plan)
        self.name = method
        self._groups = [{param: group for group in groups for param in group.params} for groups in plan.groups]

    @property
    def holds(self) -> str:
        return "stored"

    def parts(self, layer: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group in self.plan.groups[layer]:
            found |= group.on_meta() if group.is_coded else {p: self.plan.likes[layer][p] for p in group.params}
        return found

    def filled(self, layer: int, stored: Mapping[str, Tensor]) -> Slot:
        return stored

    def weight(self, layer: int, slot: Slot, param: str) -> Tensor:
        group, like = self._groups[layer][param], self.plan.likes[layer][param]
        if not group.is_coded:
            return slot[param]
        made = self.plan.converted(group, slot)[param]
        if made.shape != like.shape:
            raise UncacheableError(
                f"{self.plan.where}: {self.plan.layers[layer]}.{param} is {list(made.shape)} once dequantised, the "
                f"model has {list(like.shape)}: is it this model's folder?"
            )
        return made.to(like.dtype)
