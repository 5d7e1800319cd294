"""The commands of the README and the guide, and the spec files in `examples/` do what they say, on small data."""

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import originals
from bpf.cli import app as cli
from bpf.experiment.directory import open_experiment
from bpf.results import summary

ROOT = Path(__file__).parent.parent
PAGES = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/GUIDE.md"))
COMMANDS = list(dict.fromkeys(command.strip() for command in re.findall(r"^\$ (bpf [^#\n]*)", PAGES, re.MULTILINE)))
EXAMPLES = [path for path in sorted((ROOT / "examples").iterdir()) if f"examples/{path.name}" not in " ".join(COMMANDS)]
"""Those that no command of the pages names."""
SMALL = {"--epochs": "1", "--arch": "6", "--lr": "0.001", "--executions-per-trial": "1", "--examples-frac": "1"}

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST, Fashion-MNIST and CIFAR-10 in their original formats, with few images."""
    return originals.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _place(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BPF_DATA_DIR", str(data_dir))
    originals.believe(monkeypatch)


def run(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    assert end.value.code == 0


def shortened(arguments: Sequence[str], spec: dict[str, Any] | None = None) -> list[str]:
    """The same command with a small grid; what a command or spec fixes stays, but for its size."""
    given = {argument for argument in arguments if argument.startswith("--")}
    options = [word for name, value in SMALL.items() if name not in given for word in (name, value)]
    return [*arguments, *options, "--quiet"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] == "tune"])
def test_tune_commands_of_the_pages_run(command: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arguments = shlex.split(command.replace(" examples/", f" {ROOT}/examples/"))[1:]
    if "runs/demo" in arguments:  # the first that a reader gives
        request.getfixturevalue("in_workers")
    if "--dry-run" in arguments:
        run(arguments)
        assert not (tmp_path / "runs").exists()
        return
    run(shortened(arguments))
    [directory] = (tmp_path / "runs").iterdir()
    rows = summary.rows(open_experiment(directory))
    assert {row.state for row in rows} <= {"complete", "diverged"}
    fixed = dict(itertools.pairwise(arguments))
    assert {row.spec["problem_type"] for row in rows} == {fixed.get("--problem-type", "classification")}
    if "--spec" not in fixed:
        assert {row.rule for row in rows} == set(fixed["--algorithm"].split(","))


def test_the_guides_two_phases(tmp_path: Path) -> None:
    size = [word for option, value in SMALL.items() if option != "--lr" for word in (option, value)]
    for name, rates in (("learning-rates", ["--lr", "0.001,0.01"]), ("dropout", [])):
        assert f"bpf tune --spec examples/{name}.yaml" in COMMANDS
        run(["tune", "--spec", str(ROOT / "examples" / f"{name}.yaml"), *size, *rates, "--quiet"])
    rows = summary.rows(open_experiment(tmp_path / "runs" / "fmnist-bp+dfa-val_loss"))
    assert {row.spec["lr"] for row in rows} <= {0.001, 0.01}
    assert "lr" not in rows[0].params
    assert len({row.params["dropout"] for row in rows}) > 1


def test_other_commands_of_the_pages_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [shlex.split(c)[1:] for c in COMMANDS if c.split()[1] not in ("tune", "resume")]
    known = {"status", "best", "train", "report", "export", "show", "clean", "algorithms", "datasets", "reproduce"}
    assert {arguments[0] for arguments in others} == known
    others.sort(key=lambda arguments: arguments[0] != "train")  # status and best need an experiment
    for arguments in others:
        run(arguments)
        assert capsys.readouterr().out


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    arguments = ["tune", str(tmp_path / "grid"), "--spec", str(example)]
    if example.name == "own-images.toml":
        arguments += ["--dataset", f"folder:{own_images(tmp_path / 'images')}"]
    run(shortened(arguments))
    rows = summary.rows(open_experiment(tmp_path / "grid"))
    assert rows
    assert {row.state for row in rows} <= {"complete", "diverged"}


def test_the_readmes_rule_is_a_rule() -> None:
    from bpf.algorithms import ProjectionRule

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    [code] = [block for block in blocks if "ProjectionRule" in block]
    assert len(code.strip().splitlines()) == 5
    names: dict[str, Any] = {"ProjectionRule": ProjectionRule}
    exec(code, names)
    import torch

    error, target = torch.tensor([[[0.5, -2.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2)
    signal = names["SignDFA"](None, None).teaching_signal(None, target, error)
    assert torch.equal(signal, torch.tensor([[[0.5, -0.5], [0.0, 0.5]]]))


def own_images(directory: Path) -> Path:
    rng = np.random.default_rng(1)
    for part, count in (("train", 6), ("test", 2)):
        for kind in ("cat", "dog"):
            (directory / part / kind).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / part / kind / f"{i}.jpg")
    return directory
