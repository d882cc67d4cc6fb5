"""`remoe profiles`: the device profiles that are there, one of them, and what is wrong in a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report, rows
from remoe_adapt.cli.app import command, profiles_app
from remoe_adapt.cli.options import CommandResult


@command(profiles_app, "list", rows.of_profiles)
def list_all(csv: opt.Csv = None, as_json: opt.Json = False) -> CommandResult:
    """Every profile found, shipped and of the user."""
    from remoe_adapt.device_profile import list_profiles, read_profile

    rows: dict[str, dict[str, Any]] = {}
    for name, path in list_profiles().items():
        profile, faults = read_profile(path)
        rows[name] = {"file": str(path), "faults": len(faults)} | ({} if profile is None else profile.as_keys())
    return {"profiles": rows}, [report.profile_table(rows)]


@command(profiles_app, "show")
def show(name: opt.ProfileName, as_json: opt.Json = False) -> CommandResult:
    """One profile, as it is understood."""
    from remoe_adapt.device_profile import load_profile

    result = load_profile(name).as_keys()
    return result, [report.figures_table(f"profile {result['name']}", result)]


@command(profiles_app, "check")
def check(names: opt.ProfileNames = None, as_json: opt.Json = False) -> CommandResult:
    """All faults of profiles, each with file, line and key; exit status 1 when there is one."""
    from remoe_adapt.device_profile import check_profile, list_profiles, load_profile

    known = list_profiles()
    for name in names or ():
        # A bare name that is neither a profile nor a file: the loader knows which ones are like it.
        if name not in known and name == Path(name).stem and not Path(name).exists():
            load_profile(name)  # a name: says which it may have meant
    paths = [known.get(name, Path(name)) for name in names] if names else list(known.values())
    faults = [fault for path in paths for fault in check_profile(path)]
    result = {"ok": not faults, "checked": [str(path) for path in paths], "faults": [asdict(f) for f in faults]}
    return result, [*(Text(str(fault)) for fault in faults), f"{len(paths)} checked, {len(faults)} fault(s)"]
