"""What the listing commands say of installed plugins. Imports neither torch nor optuna until one is described."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bpf.data.cache import DatasetInfo, available, describe
from bpf.registry import ALGORITHMS, DATASETS, Plugin, Registry


def plugins_json(plugins: Sequence[Plugin]) -> list[dict[str, Any]]:
    return [
        {
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "summary": plugin.summary,
            "problem_types": _problem_types(plugin),
            "problem": plugin.problem,
        }
        for plugin in plugins
    ]


def plugins_text(plugins: Sequence[Plugin]) -> str:
    """One plugin a block: name and distribution, then its summary, or why it is broken."""
    lines = []
    for plugin in plugins:
        problems = ", ".join(_problem_types(plugin))
        owner = f"{plugin.distribution} {plugin.version}".strip()
        lines.append(f"{plugin.name:<17} {owner}{f'  ({problems})' if problems else ''}")
        lines += _indented(f"broken: {plugin.problem}" if plugin.problem else plugin.summary or "(not described)")
    return "\n".join(lines) or "No plugin is installed."


def _problem_types(plugin: Plugin) -> list[str]:
    given = plugin.attribute("problem_types", ())
    return sorted(map(str, given)) if isinstance(given, set | tuple | list) else []


def describe_algorithm(name: str) -> dict[str, Any]:
    """Everything a rule says of itself; this imports it."""
    from bpf.experiment.plugins import load_rules

    registry = Registry(ALGORITHMS)
    plugin = registry.describe(name)
    if plugin.problem:
        registry.load(name)  # which may say more
        raise registry.refusal(name, plugin.problem)
    rule = load_rules([name])[name]
    return {
        "name": name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "summary": (rule.__dict__.get("__doc__") or "").partition("\n")[0],
        "equation": rule.equation,
        "reference": rule.reference,
        "problem_types": sorted(rule.problem_types),
        "needs_bounded_activation": rule.needs_bounded_activation,
        "unused_parameters": sorted(rule.unused_parameters),
        "options": rule.Options.model_json_schema().get("properties", {}),
    }


def algorithm_text(rule: dict[str, Any]) -> str:
    lines = [
        f"{rule['name']}  ({rule['distribution']} {rule['version']})",
        "",
        rule["summary"] or "(not described)",
        "",
    ]
    lines += [f"equation      {rule['equation'] or '-'}", f"paper         {rule['reference'] or '-'}"]
    lines.append(f"problems      {', '.join(rule['problem_types'])}")
    if rule["needs_bounded_activation"]:
        lines.append("activations   tanh, sigmoid (others need --allow-unstable)")
    if rule["unused_parameters"]:
        lines.append(f"without       {', '.join(rule['unused_parameters'])}")
    if not rule["options"]:
        lines.append("options       none")
    for name, option in rule["options"].items():
        limits = [f"{word} {option[key]}" for key, word in _LIMITS.items() if key in option]
        about = [option.get("description", ""), *limits, f"default {option.get('default')}"]
        lines.append(f"--option {rule['name']}.{name}=VALUE")
        lines += _indented(", ".join(part.rstrip(".") for part in about if part))
    return "\n".join(lines)


_LIMITS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "enum": "one of",
}


def datasets(data_dir: Path) -> list[DatasetInfo]:
    return available(Registry(DATASETS), data_dir)


def dataset(name: str, data_dir: Path) -> DatasetInfo:
    return describe(name, data_dir)


def dataset_json(info: DatasetInfo) -> dict[str, Any]:
    return asdict(info)


def datasets_text(infos: Sequence[DatasetInfo]) -> str:
    lines = []
    for info in infos:
        if info.problem:
            state = "broken"
        elif info.takes_source:
            state = "your own"
        else:
            state = "on disk" if info.on_disk else "not here"
        lines.append(f"{info.name:<11} {state:<10}{_size(info)}".rstrip())
        lines += _indented(f"broken: {info.problem}" if info.problem else info.summary)
    return "\n".join(lines)


def dataset_text(info: DatasetInfo) -> str:
    if info.problem:
        return f"{info.name}  broken: {info.problem}"
    lines = [f"{info.name}  ({info.distribution} {info.version})", "", info.summary]
    if _size(info):
        lines.append(_size(info))
    lines.append("on disk" if info.on_disk else "not on disk")
    return "\n".join([*lines, "", info.instructions]).rstrip()


def _size(info: DatasetInfo) -> str:
    if info.shape is None or info.train_size is None:
        return ""
    channels, height, width = info.shape
    shape = f"{width}x{height}{' grey' if channels == 1 else ' colour'}"
    return f"{info.train_size:,} + {info.test_size:,} images, {shape}, {info.class_count} classes"


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="    ")
