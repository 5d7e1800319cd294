"""The command that begins a plugin: a package with a learning rule that installs and passes its tests."""

import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from bpf.console.screen import say
from bpf.errors import UsageError
from bpf.files import check_place, explaining
from bpf.registry import ALGORITHMS, Registry

FILES = {
    "pyproject.toml": """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$distribution"
version = "0.1.0"
description = "The learning rule $name for bpf"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["bpf>=0.2"]

[project.optional-dependencies]
test = ["pytest>=8.3"]

[project.entry-points."bpf.algorithms"]
$name = "$module.rule:$kind"

[tool.hatch.build.targets.wheel]
packages = ["$module"]
""",
    "README.md": """# $distribution

The learning rule `$name` for bpf.

    pip install -e '.[test]'
    bpf algorithms $name
    pytest
    bpf tune --dataset digits --algorithm bp,$name --epochs 10

What to write is in `$module/rule.py`: the equation, its source, and the code. docs/PLUGINS.md of bpf begins with a rule
like this one and ends with rules that have options, memory and a prediction of their own.
""",
    "$module/__init__.py": '''"""The learning rule $name for bpf."""
''',
    "$module/rule.py": '''"""The learning rule $name."""

from pydantic import Field
from torch import Tensor

from bpf.algorithms import ProjectionRule


class $kind(ProjectionRule):
    """The output error times a factor, through a fixed random matrix: a beginning, to be replaced."""

    equation = "δh_k = s e F_k^T"
    reference = "Nøkland 2016, Direct Feedback Alignment Provides Learning in Deep Neural Networks"
    problem_types = frozenset({"classification", "reconstruction"})
    needs_output_error, needs_projection = True, False

    class Options(ProjectionRule.Options):
        """Of the error."""

        scale: float = Field(1.0, gt=0, le=100, description="Factor s on the error.")

    options: Options

    def teaching_signal(self, projected: Tensor | None, target: Tensor, output_error: Tensor | None) -> Tensor:
        """t = ∂L/∂p, [runs, batch, targets], for the batch mean, of p = h F; bpf makes of it δh = t F^T."""
        assert output_error is not None
        return output_error * self.options.scale
''',
    "tests/test_rule.py": '''"""What every rule must keep, and this one's equation."""

import torch
from $module.rule import $kind

from bpf.algorithms import Problem
from bpf.testing import AlgorithmContract


class Test${kind}Contract(AlgorithmContract):
    name = "$name"


class Test${kind}ContractWithAnOption(AlgorithmContract):
    name = "$name"
    options = {"scale": 0.5}


def test_the_signal_is_its_equation() -> None:
    rule = $kind($kind.Options(scale=0.5), Problem("classification", "sigmoid"))
    error = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(rule.teaching_signal(None, torch.zeros(2, 3, 4), error), 0.5 * error)
''',
}


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the rule on the command line, such as my-rule.")],
    directory: Annotated[
        Path | None, typer.Argument(help="Where to make the package; by default bpf-NAME.", show_default=False)
    ] = None,
) -> None:
    """Begin a package with a learning rule of your own: it installs, is listed, trains and passes its tests."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 50:
        raise UsageError(f"{name!r} is no name for a rule: give lower-case words joined by hyphens, such as my-rule.")
    registry = Registry(ALGORITHMS)
    if name in registry.names():
        owner = registry.describe(name)
        raise UsageError(f"There is a rule {name} already, of {owner.distribution}. Give another name.")
    words = {"name": name, "distribution": f"bpf-{name}", "module": f"bpf_{name.replace('-', '_')}"}
    words["kind"] = "".join(word.capitalize() for word in name.split("-"))
    directory = directory or Path(words["distribution"])
    check_place(directory)
    with explaining(directory):
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(f"{directory} is there already. Give another directory, or remove it.") from None
        for place, text in FILES.items():
            path = directory / Template(place).substitute(words)
            path.parent.mkdir(exist_ok=True)
            path.write_text(Template(text).substitute(words), encoding="utf-8")
    say(f"{directory} has the rule {name} in {words['module']}/rule.py. Install it and run its tests:")
    say(f"  pip install -e '{directory}[test]' && pytest {directory}")


COMMANDS = (new_plugin,)
