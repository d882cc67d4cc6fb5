"""RemoeConfig: which routers an adapter changes, how, for which base, and the objective it was trained with."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft.config import PeftConfig
from peft.utils import PeftType

from remoe_adapt._support import printable, say_once
from remoe_adapt.errors import ConfigError
from remoe_adapt.routers import Routers
from remoe_adapt.tuner.checks import KINDS, PREFIX
from remoe_adapt.tuner.patterns import check_pattern
from remoe_adapt.tuner.stored import StoredAdapter

_WEIGHTS = ("reuse_weight", "kl_weight", "smooth_weight", "lag_weight", "ws_weight")
_OBJECTIVE = (*_WEIGHTS, "distill_share")
_TEXTS = ("base_fingerprint", "base_model_name_or_path", "revision")
_SWITCHES = ("init_weights", "allow_other_base", "inference_mode")
# Names, not expressions: PEFT puts them into expressions of its own.
_NAME = re.compile(r"[\w.-]+")
_MAX_NAMES, _MAX_LETTERS, _MAX_LAYER, _MAX_RANK = 1024, 1000, 1 << 20, 1 << 20


# Optional/Union in field types: argument parsers of the PEFT world read them.
@dataclass
class RemoeConfig(PeftConfig):
    """Configuration of a REMOE adapter: one delta per router, added to its weight [E, D].

    With `target_modules=None` every router of the model is adapted. Training reads the objective's weights (all >= 0,
    0 = term off) from here, so that the saved adapter says how it was made.

    Raises ConfigError for a field of the wrong type, a rank below 1, a weight that is negative or not finite, a bad
    regular expression, `layers_to_transform` beside one in `target_modules`, and for names in `modules_to_save` that
    could also mean tensors of this adapter.
    """

    target_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None,
        metadata={"help": "Router modules to adapt: names or suffixes, or one regular expression. None: all routers."},
    )
    exclude_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "Router modules to leave alone: names or suffixes, or one regular expression."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "Indices of the decoder layers whose routers are adapted. None: all."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "Name of the layer list, only with layers_to_transform and an unusual name."}
    )
    rank: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "None: a full delta [E, D]. r: low-rank, B [E, r] times A [r, D]."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: zero delta, the base exactly. False: random deltas (for tests)."}
    )
    modules_to_save: Optional[list[str]] = field(  # noqa: UP045
        default=None, metadata={"help": "Modules besides the routers that are trained and saved in full."}
    )
    reuse_weight: float = field(default=0.0, metadata={"help": "Weight of the expert-reuse loss."})
    kl_weight: float = field(default=0.0, metadata={"help": "Weight of the KL to the base router."})
    smooth_weight: float = field(default=0.0, metadata={"help": "Weight of the symmetric KL to the previous token."})
    lag_weight: float = field(default=0.0, metadata={"help": "Weight of the symmetric KL over several lags."})
    ws_weight: float = field(default=0.0, metadata={"help": "Weight of the working-set entropy."})
    distill_share: float = field(
        default=0.0, metadata={"help": "Share of the next-token target that is the base model's own distribution."}
    )
    base_fingerprint: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "Fingerprint of the base's routers. Filled in when the adapter is created."}
    )
    allow_other_base: bool = field(
        default=False, metadata={"help": "Load onto a base with another fingerprint. Never saved."}
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError) as error:  # of a task_type that PEFT does not know
            raise ConfigError(printable(error)) from error
        self.peft_type = PeftType("REMOE")
        self._check_types()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                check_pattern(name, value)
        # `type(...) is int`: True is an int to isinstance, and a file may hold it.
        if self.rank is not None and (type(self.rank) is not int or not 1 <= self.rank <= _MAX_RANK):
            raise ConfigError(f"rank={printable(repr(self.rank))}: use None for full deltas, or a whole number >= 1.")
        for name in _WEIGHTS:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name}={value!r}: a loss weight is a finite number >= 0 (0 switches it off).")
        if not isinstance(self.distill_share, (int, float)) or not 0 <= self.distill_share <= 1:
            raise ConfigError(f"distill_share={self.distill_share!r}: a share between 0 (the text) and 1 (the base).")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError("layers_to_transform needs target_modules=None or a list of names, not an expression.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern has no effect without layers_to_transform.")
        # The file beside this configuration; None when it was not read from a folder.
        self.stored: StoredAdapter | None = None
        # What the user had written in fields that a model has filled in.
        self._filled: dict[str, Any] = {}
        # The weights that acted in the training of this process; None: it trained nothing.
        self._acted: frozenset[str] | None = None
        # The routers of the model it is about to be put on, while `wrap_or_inject` knows them: PEFT passes no more on.
        self.surveyed: Routers | None = None

    @property
    def loss_weights(self) -> dict[str, float]:
        """The objective's weights above 0, by name."""
        return {name: getattr(self, name) for name in _OBJECTIVE if getattr(self, name)}

    def note_training(self, acted: Iterable[str]) -> None:
        """The adapter took a step of training, in which these of its `loss_weights` acted."""
        self._acted = frozenset(acted) | (self._acted or frozenset())

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's; weights that did not act in a training of this process are saved as 0, and that is said once."""
        idle = [] if self._acted is None else [name for name in self.loss_weights if name not in self._acted]
        if not idle:
            super().save_pretrained(save_directory, **kwargs)
            return
        say_once(
            f"{', '.join(f'{name}={getattr(self, name):g}' for name in idle)} of RemoeConfig did not act in the "
            "training of this adapter, so the saved configuration says 0: train with RemoeTrainer (or "
            "RemoeTrainerMixin before your trainer's class)"
        )
        written = copy.copy(self)
        for name in idle:
            setattr(written, name, 0.0)
        written._acted = None
        written.save_pretrained(save_directory, **kwargs)

    def _check_types(self) -> None:
        """A configuration may come from a file of others: every field is what the code after this takes it for."""
        for name in _TEXTS:
            if not isinstance(getattr(self, name), (str, os.PathLike, type(None))):
                raise ConfigError(f"{name}={printable(repr(getattr(self, name)))}: use text, or leave it out.")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={printable(repr(getattr(self, name)))}: use true or false.")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            names = [value] if isinstance(value, str) and name != "modules_to_save" else value
            if names is None:
                continue
            plain = isinstance(names, (list, tuple, set, frozenset)) and len(names) <= _MAX_NAMES
            if not plain or not all(isinstance(one, str) and 0 < len(one) <= _MAX_LETTERS for one in names):
                raise ConfigError(
                    f"{name}={printable(repr(value))}: use a list of at most {_MAX_NAMES} names of modules, each of at "
                    f"most {_MAX_LETTERS} letters."
                )
            odd = [one for one in names if not _NAME.fullmatch(one)]
            if odd and name in ("modules_to_save", "layers_pattern"):
                raise ConfigError(f"{name}: {printable(repr(odd[0]))} is no name of a module.")
        for name in self.modules_to_save or ():
            if PREFIX in name or any(ending.endswith(name) for ending in (*KINDS, "base_layer")):
                raise ConfigError(
                    f"modules_to_save: {name!r} could mean tensors of the adapter itself ({', '.join(KINDS)}), which "
                    "would be saved so that nothing can load them: give the module's whole name, or rename it."
                )
        layers = self.layers_to_transform
        indices = [layers] if isinstance(layers, int) else [] if layers is None else layers
        whole = isinstance(indices, (list, tuple)) and len(indices) <= _MAX_NAMES
        if not whole or any(type(index) is not int or not 0 <= index < _MAX_LAYER for index in indices):
            raise ConfigError(f"layers_to_transform={printable(repr(layers))}: use indices of layers, from 0.")

    def to_dict(self) -> dict[str, Any]:
        """All fields but the permission `allow_other_base`, which is the loader's and not the adapter's."""
        values: dict[str, Any] = super().to_dict()
        del values["allow_other_base"]
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}

    @property
    def is_filled(self) -> bool:
        """Whether a model has written fields of this object (targets or fingerprint)."""
        return bool(self._filled)

    def fill(self, **values: Any) -> None:
        """Write what a model decides about fields the user left open, or gave by an expression."""
        for name, value in values.items():
            self._filled.setdefault(name, getattr(self, name))
            setattr(self, name, value)

    def unfilled(self) -> RemoeConfig:
        """A copy as the user wrote it, for another model: what an earlier model filled in is open again."""
        config = copy.copy(self)
        for name, written in self._filled.items():
            setattr(config, name, written)
        # The copy keeps notes of its own: what it is filled with next must not show in the original.
        config._filled = {}
        config._acted = config.surveyed = None
        return config
