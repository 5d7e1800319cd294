"""`bpf new-plugin`: what it makes installs, passes its own tests and trains; what is there stays as it is."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from bpf.cli import app as cli


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(["new-plugin", *arguments])
    return end.value.code or 0


def test_a_package_of_its_own(empty_place, capsys):
    assert run("my-rule2") == 0
    assert capsys.readouterr().out == (
        "bpf-my-rule2 has the rule my-rule2 in bpf_my_rule2/rule.py. Install it and run its tests:\n"
        "  pip install -e 'bpf-my-rule2[test]' && pytest bpf-my-rule2\n"
    )
    found = {str(path.relative_to(empty_place)) for path in empty_place.rglob("*") if path.is_file()}
    module = {f"bpf-my-rule2/bpf_my_rule2/{name}.py" for name in ("__init__", "rule")}
    assert found == module | {f"bpf-my-rule2/{name}" for name in ("pyproject.toml", "README.md", "tests/test_rule.py")}
    project = tomllib.loads((empty_place / "bpf-my-rule2/pyproject.toml").read_text())["project"]
    assert project["entry-points"]["bpf.algorithms"] == {"my-rule2": "bpf_my_rule2.rule:MyRule2"}
    assert not re.search(r"\$\w|\$\{", "".join(path.read_text() for path in empty_place.rglob("*") if path.is_file()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["My_Rule"], "'My_Rule' is no name for a rule: give lower-case words joined by hyphens, such as my-rule."),
        (["../x"], "'../x' is no name for a rule: give lower-case words joined by hyphens, such as my-rule."),
        (["a" * 51], f"'{'a' * 51}' is no name for a rule: give lower-case words joined by hyphens, such as my-rule."),
        (["dfa"], "There is a rule dfa already, of bpf. Give another name."),
        (["mine", "there"], "there is there already. Give another directory, or remove it."),
        (["mine", "file/x"], "file/x cannot be written: Not a directory. Choose another directory."),
    ],
)
def test_mistakes(arguments, message, empty_place, capsys):
    (empty_place / "there").mkdir()
    (empty_place / "file").touch()
    before = sorted(empty_place.rglob("*"))
    assert run(*arguments) == 2
    assert capsys.readouterr().err == f"Error: {message}\n"
    assert sorted(empty_place.rglob("*")) == before


@pytest.mark.slow
def test_what_it_makes_passes_its_tests_and_trains(empty_place):
    assert run("my-rule", "here") == 0
    root = empty_place / "here"
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    info = root / "bpf_my_rule-0.1.0.dist-info"  # as pip would write it
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bpf-my-rule\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {t}\n" for n, t in points.items()) for group, points in declared.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    environment = os.environ | {"PYTHONPATH": str(root)}
    tune = "tune grid --dataset digits --algorithm bp,my-rule --arch 8 --activation tanh --lr 0.01 --epochs 2 --quiet"
    for command in (["-m", "pytest", "-q", str(root)], ["-m", "bpf", *tune.split()], ["-m", "bpf", "algorithms"]):
        ran = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "my-rule" in ran.stdout
