"""A family: router deltas for several strengths of one base model, on disk and in memory.

On disk: `family.json` and one plain PEFT adapter folder per point; points of `remoe tune` are a recency prior alone and
have no folder. `Family.live` is the one function that turns a
strength into router weights; swapping, export and evaluation all call it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt._support import printable
from remoe_adapt.errors import ExportError, FamilyError, FingerprintMismatchError
from remoe_adapt.family.card import card_text, is_our_card
from remoe_adapt.family.deltas import read_deltas, shapes_of
from remoe_adapt.family.files import (
    FORMAT,
    check_budget,
    check_recovery,
    family_folder,
    json_text,
    placed,
    read_family_json,
    read_recency,
    recency_entry,
    usable_path,
    write_together,
)
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers import Routers, plain_name, survey_routers
from remoe_adapt.tuner import CARD_FILE, FAMILY_FILE, stays_usable


@dataclass(frozen=True, eq=False)
class FamilyPoint:
    """One operating point: strength in (0, 1], folder name, deltas [E, D] fp32 by router name, recency, certificate.

    recovery: the folder name of its recovery LoRA, a plain PEFT adapter, where it has one.
    adapter: None for a point that is a recency prior alone, whose deltas are none.
    budget: the perplexity ratio, above 1, that it was aimed at; None: it was aimed at none.
    """

    strength: float
    adapter: str | None
    deltas: Mapping[str, Tensor]
    recency: Recency | None = None
    certificate: Mapping[str, Any] | None = None
    budget: float | None = None
    recovery: str | None = None

    @property
    def name(self) -> str:
        """What to call it: its adapter's folder, or what that would be called."""
        return self.adapter or Family.adapter_name(self.strength)


@dataclass(frozen=True, eq=False)
class Control:
    """The router fine-tuned by next-token loss alone, which evaluation compares to; never on the dial."""

    adapter: str
    deltas: Mapping[str, Tensor]
    certificate: Mapping[str, Any] | None = None

    def live(self, base_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Router weights with the control's deltas, as `Family.live`."""
        return _add(self.deltas, base_weights)


class Family:
    """Operating points of one base, sorted by strength; strength 0 is the base and is not stored.

    `path` is the folder, `base_id` and `fingerprint` say which base, `points` and `control` hold the deltas. Router
    names are module paths in the base model, without PEFT's prefixes. Every method that changes a family writes
    `family.json` last and in one piece, so a folder never holds half a family.
    """

    def __init__(
        self,
        path: Path,
        base_id: str,
        fingerprint: str,
        points: tuple[FamilyPoint, ...] = (),
        control: Control | None = None,
    ) -> None:
        self.path, self.base_id, self.fingerprint = path, base_id, fingerprint
        self.points, self.control = points, control

    def __repr__(self) -> str:
        return f"Family({str(self.path)!r}, base={self.base_id!r}, strengths={list(self.strengths)})"

    # Reading

    @classmethod
    def load(cls, path_or_hub_id: str | os.PathLike[str]) -> Family:
        """Read a family folder, or download one from the Hugging Face hub (cached copies work offline).

        Raises FamilyError for a folder that is no family or names files it does not have, AdapterCorruptError for
        truncated or non-finite tensors, FingerprintMismatchError for a point that was made for another base.
        """
        path = family_folder(path_or_hub_id)
        entries = read_family_json(path)
        base = entries["base"]
        family = cls(path, base["id"], base["fingerprint"])
        for entry in entries["points"]:
            family._insert(family._point(**entry))
        if not family.points:
            raise FamilyError(f"{path / FAMILY_FILE} has no points: add one with `remoe train`.")
        if entry := entries.get("control"):
            family.control = family._control(entry["adapter"], entry.get("certificate"))
        return family

    @property
    def strengths(self) -> tuple[float, ...]:
        """Stored strengths, rising; 0 (the base) is not among them."""
        return tuple(point.strength for point in self.points)

    def point(self, strength: float) -> FamilyPoint:
        """The stored point of exactly this strength. Raises FamilyError when there is none."""
        for point in self.points:
            if point.strength == strength:
                return point
        raise FamilyError(f"{self.path} has no point of strength {strength!r}; it has {list(self.strengths)}.")

    @property
    def has_adapters(self) -> bool:
        """Its points change router weights; otherwise they are recency priors alone."""
        return any(point.deltas for point in self.points)

    def check_has_adapters(self, what: str) -> None:
        """Raises ExportError, saying that nothing can be `what` ("merged"), of points that are recency priors alone."""
        if self.points and not self.has_adapters:
            raise ExportError(
                f"family {printable(self.path)} has no adapters: its points are a recency prior alone, which is no "
                f"weight, so there is nothing to be {what}. get_remoe_model, `remoe run` and `remoe serve` (also of a "
                "GGUF) run it; `remoe train` makes adapters."
            )

    # Strength -> weights

    def deltas(self, strength: float) -> dict[str, Tensor]:
        """Deltas [E, D] fp32 at `strength`: linear between neighbouring points, from zero below the first.

        Above the last point the last point's. Raises FamilyError outside [0, 1] and for a family without points.
        """
        lower, upper, share = self._neighbours(strength)
        if upper is None:
            # At strength 0 the names are those of the first point, with deltas of 0.
            names = self.points[0].deltas
            return {n: d.clone() for n, d in lower.deltas.items()} if lower else {n: names[n] * 0.0 for n in names}
        if lower is None:
            return {name: delta_ED * share for name, delta_ED in upper.deltas.items()}
        return {name: torch.lerp(lower.deltas[name], upper.deltas[name], share) for name in upper.deltas}

    def live(self, strength: float, base_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Router weights at `strength`: cast(fp32(W) + delta), in the dtype and on the device of each W.

        base_weights: the unmodified weights [E, D] of all routers by name (`original_weights`). The result has the same
        names in the same order; routers that the family leaves alone keep their weight. Strength 0 gives the base bit
        for bit. Results never share memory with the arguments. Raises FamilyError as `deltas`, for a router that
        base_weights lacks or has in another shape, and for weights or logits that are not finite in its dtype.
        """
        is_base = self._neighbours(strength)[:2] == (None, None)  # W + 0 would turn -0.0 into 0.0
        if is_base:
            return _add({}, base_weights)
        # Before anything is multiplied out: low-rank deltas of another model could need any amount of memory.
        self._check_shapes(base_weights)
        return _add(self.deltas(strength), base_weights)

    def recency(self, strength: float) -> Recency | None:
        """Recency prior at `strength`, gains interpolated like the deltas; None for the base, or without any."""
        lower, upper, share = self._neighbours(strength)
        ends = [point.recency if point else None for point in (lower, upper if upper else lower)]
        # A point without a prior has the gain 0 in the mode of its neighbour, as the base has.
        known = ends[1] or ends[0]
        if known is None:
            return None
        low, high = (end.gains() if end else (0.0,) * len(known.gains()) for end in ends)
        # At the end itself b, since a + 1.0 * (b - a) may differ from it in the last bit.
        gains = tuple(a + share * (b - a) if share < 1.0 else b for a, b in zip(low, high, strict=True))
        return replace(known, gain=gains)

    def _neighbours(self, strength: float) -> tuple[FamilyPoint | None, FamilyPoint | None, float]:
        """(point at or below, point above, share of the way): None below for the base, None above when exact."""
        if not isinstance(strength, int | float) or not 0.0 <= strength <= 1.0:  # NaN fails too
            raise FamilyError(f"strength {strength!r} is out of range: 0 is the base router, 1 the strongest point.")
        if not self.points:
            raise FamilyError(f"{self.path} has no points yet: add one with `remoe train`.")
        lower = max((p for p in self.points if p.strength <= strength), key=lambda p: p.strength, default=None)
        upper = min((p for p in self.points if p.strength > strength), key=lambda p: p.strength, default=None)
        start = lower.strength if lower else 0.0
        # A stored point is given as it is: interpolation could round it.
        if upper is None or strength == start:
            return lower, None, 0.0
        return lower, upper, (strength - start) / (upper.strength - start)

    # Fitting a model

    def check(self, model: nn.Module, *, force: bool = False, routers: Routers | None = None) -> None:
        """Raises FingerprintMismatchError, naming both bases, when `model` is another base (unless `force`), and
        FamilyError when routers of the family are missing in it, have other shapes or would get weights or
        logits that are not finite (forced or not).

        routers: those of `model`, where they are known already.
        """
        routers = routers or survey_routers(model)
        found = routers.fingerprint
        if found != self.fingerprint and not force:
            config = getattr(model, "config", None)
            name = getattr(config, "_name_or_path", "") or type(model).__name__
            raise FingerprintMismatchError(
                f"family {self.path} was made for {printable(repr(self.base_id))} "
                f"({printable(self.fingerprint[:19])}...), this model is {name!r} "
                f"({found[:19]}...): load that base, train a family for this one (`remoe train`), or pass force=True "
                "if you know that they fit."
            )
        weights = routers.original_weights
        # First: the loop below multiplies deltas out, and those of another model could need any amount of memory.
        self._check_shapes(weights)
        for strength in self.strengths:  # between two points, weights and their norms lie between theirs
            self.live(strength, weights)

    def _check_shapes(self, weights: Mapping[str, Tensor]) -> None:
        shapes = {plain_name(name): list(weight_ED.shape) for name, weight_ED in weights.items()}
        for name, shape in shapes_of(self.points[0].deltas).items() if self.points else ():
            if shapes.get(name) != list(shape):
                has = f"has {shapes[name]} there" if name in shapes else "has no such router and no base weight for it"
                raise FamilyError(
                    f"family {self.path} changes router {printable(name)} by {list(shape)}, this model {has}: "
                    f"it fits {printable(repr(self.base_id))}."
                )

    # Writing

    @classmethod
    def create(cls, path: str | os.PathLike[str], base_id: str, fingerprint: str) -> Family:
        """A family without points; `family.json` is first written by `add_point`.

        Raises FamilyError when `path` holds a family already (load it, to add points) or is a file.
        """
        folder = usable_path(path)
        if (folder / FAMILY_FILE).exists() or (folder.exists() and not folder.is_dir()):
            raise FamilyError(f"{folder} exists already: load that family to add points to it, or choose another path.")
        return cls(folder, base_id, fingerprint)

    @staticmethod
    def adapter_name(strength: float) -> str:
        """Folder name of a point, from the digits of its strength: 0.25 -> "s025", 1 -> "s100", 0.125 -> "s0125"."""
        # Six decimals tell strengths apart that anybody would store; trailing zeros go, so that 0.25 is not s0250000.
        return "s" + f"{strength:.6f}".replace(".", "").rstrip("0").ljust(3, "0")

    def add_point(
        self,
        strength: float,
        adapter_folder: str | os.PathLike[str],
        recency: Recency | None = None,
        certificate: Mapping[str, Any] | None = None,
        *,
        recovery: str | os.PathLike[str] | None = None,
        budget: float | None = None,
    ) -> FamilyPoint:
        """Add a saved REMOE adapter as the point of `strength`, and a saved recovery LoRA beside it; folders outside
        `path` are copied into it.

        budget: as of FamilyPoint.

        Raises FamilyError for a strength outside (0, 1] or already present, for an adapter that does not match the
        other points' routers; AdapterCorruptError and FingerprintMismatchError as `load`. The family is unchanged then.
        """
        if not isinstance(strength, int | float):
            raise FamilyError(f"{self.path}: strength {strength!r} must be a number above 0 (the base) and at most 1.")
        # The order matters: copy, read what was copied, then write family.json; a failure at any step undoes the steps
        # before.
        adapter, copies = self._adopt(adapter_folder, self.adapter_name(strength))
        beside: str | None = None
        if recovery is not None:
            check_recovery(Path(recovery))
            beside = f"{self.adapter_name(strength)}-recovery"
            if Path(recovery).resolve() != (self.path / beside).resolve():
                copies = {**copies, Path(recovery): self.path / beside}
        with placed(copies), self._saved_or_restored():
            entry = recency_entry(recency) if recency else None
            point = self._point(strength, adapter, entry, certificate, beside, budget)
            self._insert(point)
        return point

    def add_points(self, points: Sequence[FamilyPoint], source: Family | None = None) -> None:
        """Add points that `remoe tune` found, all of them in one piece: a reader sees none or all.

        source: the family whose adapters they run with, in which `adapter` and `recovery` of a point are folder names;
            these folders are copied, once each, however many points share one. None: points without adapters.

        Raises FamilyError for a strength outside (0, 1] or already present, a point without a recency, with an adapter
        that no source has, a budget of 1 or less, and where some points have adapters and others not. The family is
        unchanged then.
        """
        names = {name for point in points for name in (point.adapter, point.recovery) if name is not None}
        if names and source is None:
            raise FamilyError(f"{self.path}: {sorted(names)[0]} is an adapter of no family: name the source.")
        copies = {source.path / name: self.path / name for name in sorted(names)} if source is not None else {}
        with placed(copies), self._saved_or_restored():
            for point in points:
                if point.recency is None:
                    raise FamilyError(f"{self.path}: point {point.name} has no recency prior: use add_point.")
                check_budget(point.budget, str(self.path))
                self._insert(point)

    def set_control(
        self, adapter_folder: str | os.PathLike[str], certificate: Mapping[str, Any] | None = None
    ) -> Control:
        """Store the control adapter (next-token loss alone). Raises as `add_point`."""
        adapter, copies = self._adopt(adapter_folder, "control")
        with placed(copies), self._saved_or_restored():
            self.control = control = self._control(adapter, certificate)
        return control

    def set_certificate(self, strength: float | None, certificate: Mapping[str, Any]) -> None:
        """Store what was measured at a point, or (`None`) of the control. Raises FamilyError when it does not exist."""
        with self._saved_or_restored():
            if strength is not None:
                changed = replace(self.point(strength), certificate=certificate)
                self.points = tuple(changed if point.strength == strength else point for point in self.points)
            elif self.control is not None:
                self.control = replace(self.control, certificate=certificate)
            else:
                raise FamilyError(f"{self.path} has no control adapter: store one with set_control first.")

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write `family.json` and the card, and to another folder the adapters before them. Returns the folder.

        Raises FamilyError when the other folder holds a family already, a certificate is not plain finite JSON, or the
        disk refuses; what was written by then is gone again.
        """
        target = self.path if path is None else usable_path(path)
        copies: dict[Path, Path] = {}
        # The same folder may be named in two ways, and must not be copied onto itself.
        if target.resolve() != self.path.resolve():
            Family.create(target, self.base_id, self.fingerprint)
            # The files of the adapters are copied as they are: deltas in memory may have been widened to fp32.
            held = [point.adapter for point in self.points] + [self.control.adapter if self.control else None]
            held += [point.recovery for point in self.points]
            names = [name for name in held if name is not None]
            copies = {self.path / name: target / name for name in names}
        with placed(copies):
            self._write(target)
        return target

    def _write(self, target: Path) -> None:
        entries: dict[str, Any] = {"format": FORMAT, "base": {"id": self.base_id, "fingerprint": self.fingerprint}}
        entries["points"] = [
            {
                "strength": point.strength,
                "adapter": point.adapter,
                **({"recovery": point.recovery} if point.recovery else {}),
                **({"budget": point.budget} if point.budget is not None else {}),
                **({"recency": recency_entry(point.recency)} if point.recency else {}),
                **({"certificate": dict(point.certificate)} if point.certificate is not None else {}),
            }
            for point in self.points
        ]
        if self.control:
            measured = self.control.certificate
            entries["control"] = {"adapter": self.control.adapter}
            entries["control"] |= {"certificate": dict(measured)} if measured is not None else {}
        card = {target / CARD_FILE: card_text(self)} if is_our_card(target) else {}
        # family.json comes last, as it is what makes the folder a family.
        write_together({**card, target / FAMILY_FILE: json_text(target / FAMILY_FILE, entries)})

    @contextmanager
    def _saved_or_restored(self) -> Iterator[None]:
        """Save what the block changes; when either fails, memory is as before too."""
        # Points and control are immutable, so that two references are a whole copy.
        points, control = self.points, self.control
        try:
            yield
            self._write(self.path)
        except BaseException:
            self.points, self.control = points, control
            raise

    def _adopt(self, adapter_folder: str | os.PathLike[str], name: str) -> tuple[str, dict[Path, Path]]:
        """Name below `path` of an adapter folder that is there already or is to be copied there, and that copy."""
        source = Path(adapter_folder)
        if not source.is_absolute() and len(source.parts) == 1 and (self.path / source).is_dir():
            return str(source), {}
        if source.resolve().parent == self.path.resolve():
            return source.name, {}
        read_deltas(source, self.base_id, self.fingerprint)  # refuse it before anything is copied
        return name, {source: self.path / name}

    def _point(
        self,
        strength: float,
        adapter: str | None,
        recency: Mapping[str, Any] | None = None,
        certificate: Mapping[str, Any] | None = None,
        recovery: str | None = None,
        budget: float | None = None,
    ) -> FamilyPoint:
        if recovery is not None:
            check_recovery(self.path / recovery)
        prior = read_recency(recency, str(self.path)) if recency else None
        check_budget(budget, str(self.path))
        if adapter is None and prior is None:
            raise FamilyError(f"{self.path}: a point of strength {strength!r} has neither an adapter nor a recency.")
        deltas = {} if adapter is None else read_deltas(self.path / adapter, self.base_id, self.fingerprint)
        return FamilyPoint(float(strength), adapter, deltas, prior, certificate, budget, recovery)

    def _control(self, adapter: str, certificate: Mapping[str, Any] | None) -> Control:
        return Control(adapter, read_deltas(self.path / adapter, self.base_id, self.fingerprint), certificate)

    def _insert(self, point: FamilyPoint) -> None:
        if not 0.0 < point.strength <= 1.0:
            raise FamilyError(f"{self.path}: strength {point.strength!r} must be above 0 (the base) and at most 1.")
        if point.strength in self.strengths:
            raise FamilyError(f"{self.path} has a point of strength {point.strength!r} already.")
        # The stored points agree already, so one of them stands for all.
        for other in self.points[:1]:
            shapes, known = (shapes_of(p.deltas) for p in (point, other))
            if shapes != known and not (shapes and known):
                raise FamilyError(
                    f"{self.path}: {point.name} and {other.name} differ in kind: all points have adapters, or none has."
                )
            if shapes != known:
                odd = sorted(n for n in shapes.keys() | known.keys() if shapes.get(n) != known.get(n))
                both, shown = f"{point.name} and {other.name}", printable(odd[0])
                raise FamilyError(f"{self.path}: {both} differ in which routers they change or how, first {shown}.")
        for other in (p for p in self.points if p.recency and point.recency):
            assert other.recency and point.recency
            if not other.recency.is_like(point.recency):
                raise FamilyError(
                    f"{self.path}: {point.name} and {other.name} differ in recency mode, decay, share or layers."
                )
        self.points = tuple(sorted((*self.points, point), key=lambda p: p.strength))


def original_weights(model: nn.Module) -> dict[str, Tensor]:
    """Unmodified router weights [E, D] of `model` by name in the base model, also while adapters are merged or swapped.

    The tensors are the model's own. Raises RouterNotFoundError or UnsupportedRouterError as `discover_routers`.
    """
    return survey_routers(model).original_weights


def _add(deltas: Mapping[str, Tensor], base_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """cast(fp32(W) + delta) where there is a delta, else a copy of W; fp64 weights stay fp64."""
    # A PeftModel's names have prefixes that a family's have not.
    given = {plain_name(name): tuple(weight_ED.shape) for name, weight_ED in base_weights.items()}
    if odd := [name for name, shape in shapes_of(deltas).items() if given.get(name) != shape]:
        raise FamilyError(f"{len(odd)} routers have no base weight of their shape here, first {printable(odd[0])}.")
    weights = {}
    for name, base_ED in base_weights.items():
        delta_ED, base_ED = deltas.get(plain_name(name)), base_ED.detach()
        if delta_ED is None:
            weights[name] = base_ED.clone()
        else:
            # The sum is rounded once, to the dtype of the weight; a sum in bf16 would lose small deltas.
            exact = torch.promote_types(base_ED.dtype, torch.float32)
            weights[name] = (base_ED.to(exact) + delta_ED.to(base_ED.device)).to(base_ED.dtype)
            # A delta that overflows fp16 would make every logit NaN, and a model answers nonsense without an error.
            if not stays_usable(base_ED, weights[name]):
                raise FamilyError(
                    f"the family's deltas are so large that weight or logits of router {printable(name)} are infinite "
                    f"or NaN in {base_ED.dtype}: train it again, or load the base in a wider type."
                )
    return weights
