"""The settings of an experiment over time: what may grow, what may change, and what makes it another experiment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpf.errors import UsageError
from bpf.experiment.grid import words
from bpf.spec.fields import build
from bpf.spec.grid import TUNABLE, GridSpec
from bpf.spec.schedules import needs_end

FREE_TO_CHANGE = frozenset({"device"})
"""Settings that say where to train, not what."""
MAY_GROW = frozenset({"epochs", "executions_per_trial"})
LISTED = 10
"""How many setups whose learning rate has changed are listed."""


def merged(old: GridSpec, new: GridSpec, directory: Path, kind: str) -> GridSpec:
    """The settings of an experiment after it was asked for once more, with `new` ones.

    Raises UsageError, showing the difference, if they are not those of `old` and more.
    """
    differences: list[str] = []
    result: dict[str, Any] = {}
    if old.rows and new.rows:
        changed = [name for name, row in new.rows.items() if old.rows.get(name, row).settings != row.settings]
        differences += [f"  rows: {name}: {_settings(old, name)} there, {_settings(new, name)} now" for name in changed]
        new = new.with_rows({**old.rows, **new.rows})
    grows = MAY_GROW - {"epochs"} if old.rows else MAY_GROW
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name, []), after.get(name, [])
        if name == "rows" and old.rows and new.rows:
            result[name] = now
        elif name == "lr_from":
            result[name] = [*was, *(rate for rate in now if rate not in was)]
            differences += _changed_rates(was, now)
        elif name in TUNABLE and set(was) <= set(now):
            result[name] = [*was, *(value for value in now if value not in was)]
        elif name == "options" and (grown := _grown_options(was, now)) is not None:
            result[name] = grown
        elif was == now or name in FREE_TO_CHANGE or (name in grows and now > was):
            result[name] = now
            if name == "epochs" and was != now and (fixed := [s for s in old.schedule if needs_end(s)]):
                differences.append(f"  epochs: {was} there, {now} now, and the schedule {fixed[0]} ends with them")
        else:
            differences.append(f"  {name}: {_show(was)} there, {_show(now)} now")
    if differences:
        lasting = any("lr_from" in line for line in differences)
        grow = "lists, epochs and executions may grow" if kind == "tune" else "epochs may grow"
        extend = f"{'A grid' if kind == 'tune' else 'An execution'} can be extended ({grow}), not changed. "
        raise UsageError(
            f"{directory} holds an experiment with other settings:\n" + "\n".join(differences) + "\n"
            f"{extend}Give another directory, or the same settings."
            + (f" `bpf resume {directory}` goes on with the learning rates there." if lasting else "")
        )
    return stored_grid(result)


def stored_grid(spec: Mapping[str, Any]) -> GridSpec:
    """A grid spec as it was written down, in `experiment.yaml` or in the database. Raises UsageError."""
    # an imbalance factor that means nothing is written, too, and a spec refuses it
    skewed = spec.get("skew_type") != ["none"]
    return build(GridSpec, {name: value for name, value in spec.items() if name != "imbalance_factor" or skewed})


def _settings(grid: GridSpec, row: str) -> str:
    return " ".join(f"{name}={_show(value)}" for name, value in grid.rows[row].settings.items())


def _changed_rates(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """A line for each setup that has another learning rate now, or none, though at most ten."""

    def by_setup(rates: list[dict[str, Any]]) -> dict[str, float]:
        return {words(rate["algorithm"], rate["params"]): rate["lr"] for rate in rates}

    after = by_setup(now)
    changed = [
        f"  lr_from: {setup}: {_show(lr)} there, {_show(after.get(setup, []))} now"
        for setup, lr in by_setup(was).items()
        if after.get(setup) != lr
    ]
    more = [f"  lr_from: ... and {len(changed) - LISTED} more setups"] if len(changed) > LISTED else []
    return changed[:LISTED] + more


def _grown_options(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any] | None:
    """The union of two rules' resolved options, or None if anything of the first is missing in the second."""
    merged = {rule: dict(options) for rule, options in now.items()}
    for rule, options in was.items():
        for option, values in options.items():
            added = now.get(rule, {}).get(option, [])
            if not set(values) <= set(added):
                return None
            merged[rule][option] = [*values, *(value for value in added if value not in values)]
    return merged


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_show, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)
