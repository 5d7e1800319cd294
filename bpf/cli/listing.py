"""Commands that list what there is: `algorithms`, `trackers`, `datasets`, `schema`."""

from pathlib import Path
from typing import Annotated

import typer

from bpf.cli.arguments import AsJson, DataDir, print_json
from bpf.console.screen import say
from bpf.registry import ALGORITHMS, TRACKERS, Registry
from bpf.spec.fields import json_schema
from bpf.spec.grid import GridSpec
from bpf.spec.run import RunSpec


def algorithms(
    name: Annotated[
        str | None, typer.Argument(help="A learning rule, for its equation and options.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the learning rules, or describe one."""
    from bpf.console import plugins

    if name is None:
        _list_plugins(ALGORITHMS, as_json)
    else:
        description = plugins.describe_algorithm(name)
        print_json(description) if as_json else say(plugins.algorithm_text(description))


def trackers(as_json: AsJson = False) -> None:
    """List the trackers: what can be measured during training."""
    _list_plugins(TRACKERS, as_json)


def datasets(
    name: Annotated[str | None, typer.Argument(help="A data set, for what to put where.", show_default=False)] = None,
    data_dir: DataDir = Path("data"),
    as_json: AsJson = False,
) -> None:
    """List the data sets and whether they are on disk, or describe one."""
    from bpf.console import plugins

    infos = plugins.datasets(data_dir) if name is None else [plugins.dataset(name, data_dir)]
    if as_json:
        print_json([plugins.dataset_json(info) for info in infos] if name is None else plugins.dataset_json(infos[0]))
    else:
        say(plugins.datasets_text(infos) if name is None else plugins.dataset_text(infos[0]))


def schema(
    run: Annotated[bool, typer.Option("--run", help="The schema of a single execution instead of a grid's.")] = False,
) -> None:
    """Print the JSON schema of spec files."""
    print_json(json_schema(RunSpec if run else GridSpec))


def _list_plugins(group: str, as_json: bool) -> None:
    from bpf.console import plugins

    found = Registry(group).plugins()
    print_json(plugins.plugins_json(found)) if as_json else say(plugins.plugins_text(found))


COMMANDS = (algorithms, trackers, datasets, schema)
