"""A family: router deltas for several strengths of one base model, on disk and in memory.

On disk: `family.json` and one plain PEFT adapter folder per point. `Family.live` is the one function that turns a
strength into router weights; swapping, export and evaluation all call it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt.errors import FamilyError, FingerprintMismatchError
from remoe_adapt.family_files import (
    FAMILY_FILE,
    FORMAT,
    Recency,
    family_folder,
    read_deltas,
    read_family_json,
    write_json,
)
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.routers.fingerprint import fingerprint as fingerprint_of

__all__ = ["Control", "Family", "FamilyPoint", "Recency", "original_weights"]


@dataclass(frozen=True, eq=False)
class FamilyPoint:
    """One operating point: strength in (0, 1], folder name, deltas [E, D] fp32 by router name, recency, certificate."""

    strength: float
    adapter: str
    deltas: Mapping[str, Tensor]
    recency: Recency | None = None
    certificate: Mapping[str, Any] | None = None


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

    # Strength -> weights

    def deltas(self, strength: float) -> dict[str, Tensor]:
        """Deltas [E, D] fp32 at `strength`: linear between neighbouring points, from zero below the first.

        Above the last point the last point's. Raises FamilyError outside [0, 1] and for a family without points.
        """
        lower, upper, share = self._neighbours(strength)
        if upper is None:
            names = self.points[0].deltas
            return {n: d.clone() for n, d in lower.deltas.items()} if lower else {n: names[n] * 0.0 for n in names}
        if lower is None:
            return {name: delta_ED * share for name, delta_ED in upper.deltas.items()}
        return {name: torch.lerp(lower.deltas[name], upper.deltas[name], share) for name in upper.deltas}

    def live(self, strength: float, base_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Router weights at `strength`: cast(fp32(W) + delta), in the dtype and on the device of each W.

        base_weights: the unmodified weights [E, D] of all routers by name (`original_weights`). The result has the same
        names in the same order; routers that the family leaves alone keep their weight. Strength 0 gives the base bit
        for bit. Results never share memory with the arguments. Raises FamilyError as `deltas`, and for a router that
        base_weights lacks.
        """
        is_base = self._neighbours(strength)[:2] == (None, None)  # W + 0 would turn -0.0 into 0.0
        return _add({} if is_base else self.deltas(strength), base_weights)

    def recency(self, strength: float) -> Recency | None:
        """Recency prior at `strength`, gains interpolated like the deltas; None for the base, or without any."""
        lower, upper, share = self._neighbours(strength)
        ends = [point.recency if point else None for point in (lower, upper if upper else lower)]
        known = ends[1] or ends[0]
        if known is None:
            return None
        low, high = (end.gain_per_layer if end else (0.0,) * len(known.gain_per_layer) for end in ends)
        gains = tuple(a + share * (b - a) if share < 1.0 else b for a, b in zip(low, high, strict=True))
        return replace(known, gain_per_layer=gains)

    def _neighbours(self, strength: float) -> tuple[FamilyPoint | None, FamilyPoint | None, float]:
        """(point at or below, point above, share of the way): None below for the base, None above when exact."""
        if not 0.0 <= strength <= 1.0:  # NaN fails too
            raise FamilyError(f"strength {strength!r} is out of range: 0 is the base router, 1 the strongest point.")
        if not self.points:
            raise FamilyError(f"{self.path} has no points yet: add one with `remoe train`.")
        lower = max((p for p in self.points if p.strength <= strength), key=lambda p: p.strength, default=None)
        upper = min((p for p in self.points if p.strength > strength), key=lambda p: p.strength, default=None)
        start = lower.strength if lower else 0.0
        if upper is None or strength == start:
            return lower, None, 0.0
        return lower, upper, (strength - start) / (upper.strength - start)

    # Fitting a model

    def check(self, model: nn.Module, *, force: bool = False) -> None:
        """Raises FingerprintMismatchError, naming both bases, when `model` is another base (unless `force`), and
        FamilyError when routers of the family are missing in it or have other shapes (forced or not)."""
        found = fingerprint_of(model)
        if found != self.fingerprint and not force:
            config = getattr(model, "config", None)
            name = getattr(config, "_name_or_path", "") or type(model).__name__
            raise FingerprintMismatchError(
                f"family {self.path} was made for {self.base_id!r} ({self.fingerprint[:19]}...), this model is "
                f"{name!r} ({found[:19]}...): load that base, train a family for this one (`remoe train`), or pass "
                "force=True if you know that they fit."
            )
        shapes = {name: tuple(weight_ED.shape) for name, weight_ED in original_weights(model).items()}
        for name, delta_ED in self.points[0].deltas.items() if self.points else ():
            if shapes.get(name) != tuple(delta_ED.shape):
                has = f"has {list(shapes[name])} there" if name in shapes else "has no such router"
                raise FamilyError(
                    f"family {self.path} changes router {name} by {list(delta_ED.shape)}, this model {has}: "
                    f"it fits {self.base_id!r}."
                )

    # Writing

    @classmethod
    def create(cls, path: str | os.PathLike[str], base_id: str, fingerprint: str) -> Family:
        """A family without points; `family.json` is first written by `add_point`.

        Raises FamilyError when `path` holds a family already (load it, to add points) or is a file.
        """
        folder = Path(path)
        if (folder / FAMILY_FILE).exists() or (folder.exists() and not folder.is_dir()):
            raise FamilyError(f"{folder} exists already: load that family to add points to it, or choose another path.")
        return cls(folder, base_id, fingerprint)

    @staticmethod
    def adapter_name(strength: float) -> str:
        """Folder name of a point, from the digits of its strength: 0.25 -> "s025", 1 -> "s100", 0.125 -> "s0125"."""
        return "s" + f"{strength:.6f}".replace(".", "").rstrip("0").ljust(3, "0")

    def add_point(
        self,
        strength: float,
        adapter_folder: str | os.PathLike[str],
        recency: Recency | None = None,
        certificate: Mapping[str, Any] | None = None,
    ) -> FamilyPoint:
        """Add a saved REMOE adapter as the point of `strength`; a folder outside `path` is copied into it.

        Raises FamilyError for a strength outside (0, 1] or already present, for an adapter that does not match the
        other points' routers; AdapterCorruptError and FingerprintMismatchError as `load`. The family is unchanged then.
        """
        before = self.points
        adapter = self._adopt(adapter_folder, self.adapter_name(strength))
        point = self._point(strength, adapter, asdict(recency) if recency else None, certificate)
        self._insert(point)
        self._save_or_restore(before, self.control)
        return point

    def set_control(
        self, adapter_folder: str | os.PathLike[str], certificate: Mapping[str, Any] | None = None
    ) -> Control:
        """Store the control adapter (next-token loss alone). Raises as `add_point`."""
        before = self.control
        self.control = self._control(self._adopt(adapter_folder, "control"), certificate)
        self._save_or_restore(self.points, before)
        return self.control

    def set_certificate(self, strength: float | None, certificate: Mapping[str, Any]) -> None:
        """Store what was measured at a point, or (`None`) of the control. Raises FamilyError when it does not exist."""
        points, control = self.points, self.control
        if strength is not None:
            changed = replace(self.point(strength), certificate=certificate)
            self.points = tuple(changed if point.strength == strength else point for point in points)
        elif control is not None:
            self.control = replace(control, certificate=certificate)
        else:
            raise FamilyError(f"{self.path} has no control adapter: store one with set_control first.")
        self._save_or_restore(points, control)

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write `family.json`, and to another folder the adapters before it. Returns the folder.

        Raises FamilyError when the other folder holds a family already, or a certificate is not plain finite JSON.
        """
        target = self.path if path is None else Path(path)
        if target.resolve() != self.path.resolve():
            Family.create(target, self.base_id, self.fingerprint)
            names = [point.adapter for point in self.points] + ([self.control.adapter] if self.control else [])
            for name in names:
                shutil.copytree(self.path / name, target / name, dirs_exist_ok=True)
        entries: dict[str, Any] = {"format": FORMAT, "base": {"id": self.base_id, "fingerprint": self.fingerprint}}
        entries["points"] = [
            {
                "strength": point.strength,
                "adapter": point.adapter,
                **({"recency": asdict(point.recency)} if point.recency else {}),
                **({"certificate": dict(point.certificate)} if point.certificate is not None else {}),
            }
            for point in self.points
        ]
        if self.control:
            measured = self.control.certificate
            entries["control"] = {"adapter": self.control.adapter}
            entries["control"] |= {"certificate": dict(measured)} if measured is not None else {}
        write_json(target / FAMILY_FILE, entries)
        return target

    def _save_or_restore(self, points: tuple[FamilyPoint, ...], control: Control | None) -> None:
        """Save; when that fails, memory is as before too."""
        try:
            self.save()
        except BaseException:
            self.points, self.control = points, control
            raise

    def _adopt(self, adapter_folder: str | os.PathLike[str], name: str) -> str:
        """Name below `path` of an adapter folder that is there already or is copied there."""
        source = Path(adapter_folder)
        if not source.is_absolute() and len(source.parts) == 1 and (self.path / source).is_dir():
            return str(source)
        if source.resolve().parent == self.path.resolve():
            return source.name
        read_deltas(source, self.base_id, self.fingerprint)  # refuse it before anything is copied
        shutil.copytree(source, self.path / name, dirs_exist_ok=True)
        return name

    def _point(
        self,
        strength: float,
        adapter: str,
        recency: Mapping[str, Any] | None = None,
        certificate: Mapping[str, Any] | None = None,
    ) -> FamilyPoint:
        prior = Recency.read(recency, str(self.path)) if recency else None
        deltas = read_deltas(self.path / adapter, self.base_id, self.fingerprint)
        return FamilyPoint(float(strength), adapter, deltas, prior, certificate)

    def _control(self, adapter: str, certificate: Mapping[str, Any] | None) -> Control:
        return Control(adapter, read_deltas(self.path / adapter, self.base_id, self.fingerprint), certificate)

    def _insert(self, point: FamilyPoint) -> None:
        if not 0.0 < point.strength <= 1.0:
            raise FamilyError(f"{self.path}: strength {point.strength!r} must be above 0 (the base) and at most 1.")
        if point.strength in self.strengths:
            raise FamilyError(f"{self.path} has a point of strength {point.strength!r} already.")
        for other in self.points[:1]:
            shapes, known = ({n: tuple(d.shape) for n, d in p.deltas.items()} for p in (point, other))
            if shapes != known:
                odd = sorted(n for n in shapes.keys() | known.keys() if shapes.get(n) != known.get(n))
                both = f"{point.adapter} and {other.adapter}"
                raise FamilyError(f"{self.path}: {both} differ in which routers they change or how, first {odd[0]}.")
        for other in (p for p in self.points if p.recency and point.recency):
            assert other.recency and point.recency
            if not other.recency.blends_with(point.recency):
                raise FamilyError(f"{self.path}: {point.adapter} and {other.adapter} differ in recency mode or layers.")
        self.points = tuple(sorted((*self.points, point), key=lambda p: p.strength))


def original_weights(model: nn.Module) -> dict[str, Tensor]:
    """Unmodified router weights [E, D] of `model` by name in the base model, also while adapters are merged or swapped.

    The tensors are the model's own. Raises RouterNotFoundError or UnsupportedRouterError as `discover_routers`.
    """
    weights = {}
    for router in discover_routers(model):
        kept = getattr(model.get_submodule(router.name), "original_weight_ED", None)
        weights[_plain(router.name)] = kept if isinstance(kept, Tensor) else router.weight_ED
    return weights


def _plain(router_name: str) -> str:
    return router_name.removeprefix("_orig_mod.").removeprefix("base_model.model.").removeprefix("_orig_mod.")


def _add(deltas: Mapping[str, Tensor], base_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """cast(fp32(W) + delta) where there is a delta, else a copy of W; fp64 weights stay fp64."""
    if missing := [name for name in deltas if name not in {_plain(given) for given in base_weights}]:
        raise FamilyError(f"{len(missing)} routers of the family have no base weight here, first {missing[0]}.")
    weights = {}
    for name, base_ED in base_weights.items():
        delta_ED, base_ED = deltas.get(_plain(name)), base_ED.detach()
        if delta_ED is None:
            weights[name] = base_ED.clone()
        else:
            exact = torch.promote_types(base_ED.dtype, torch.float32)
            weights[name] = (base_ED.to(exact) + delta_ED.to(base_ED.device)).to(base_ED.dtype)
    return weights
