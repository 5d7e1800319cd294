"""Plugins: listed without importing them, loaded one by one, and a broken one harms nobody."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from bpf.errors import UsageError
from bpf.registry import ALGORITHMS, DATASETS, TRACKERS, Registry

CORE = Path(__file__).parents[1] / "bpf"
RULE = '''
from bpf.algorithms import ProjectionRule

class Echo(ProjectionRule):
    """Echo: the target is the signal.

    More about it.
    """

    equation = "t = y"
    reference = ("Nobody 2026, "
                 "Echoes")
    problem_types = frozenset({"classification"})
    unused_parameters = frozenset()
    layerwise = True
    computed = len("not a literal")
'''


class Site:
    """A directory on the import path with distributions in it, as pip would have left them there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, distribution: str, entry_points: dict[str, str], files: dict[str, str], group: str = ALGORITHMS):
        info = self.path / f"{distribution}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = "".join(f"{name} = {target}\n" for name, target in entry_points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        for name, text in files.items():
            file = self.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def registry(self, group: str = ALGORITHMS) -> Registry:
        return Registry(group, self.entry_points)

    def entry_points(self, group: str) -> Iterator[metadata.EntryPoint]:
        for distribution in metadata.distributions(path=[str(self.path)]):
            yield from (e for e in distribution.entry_points if e.group == group)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Site(tmp_path)
    for module in set(sys.modules) - before:
        places = [str(getattr(sys.modules[module], name, "")) for name in ("__file__", "__path__")]
        if any(str(tmp_path) in place for place in places):
            del sys.modules[module]


def refusal(registry: Registry, name: str) -> str:
    with pytest.raises(UsageError) as raised:
        registry.load(name)
    return str(raised.value)


def test_a_plugin_is_described_from_its_source_and_loaded_on_demand(site):
    site.add("bpf-echo", {"echo": "bpf_echo.rules:Echo"}, {"bpf_echo/__init__.py": "", "bpf_echo/rules.py": RULE})
    registry = site.registry()
    assert registry.names() == ["echo"]
    (plugin,) = registry.plugins()
    assert (plugin.name, plugin.target, plugin.distribution, plugin.version, plugin.summary, plugin.problem) == (
        "echo",
        "bpf_echo.rules:Echo",
        "bpf-echo",
        "1.2",
        "Echo: the target is the signal",
        "",
    )
    assert dict(plugin.attributes) == {
        "equation": "t = y",
        "reference": "Nobody 2026, Echoes",
        "problem_types": {"classification"},
        "unused_parameters": (),
        "layerwise": True,
    }
    assert plugin.attribute("needs_projection", "as inherited") == "as inherited"
    assert not {"bpf_echo", "bpf_echo.rules"} & set(sys.modules)
    assert registry.load("echo") is sys.modules["bpf_echo.rules"].Echo


def test_listing_imports_no_plugin_and_no_heavy_library():
    script = (
        "import sys\n"
        "from bpf.registry import Registry, ALGORITHMS, DATASETS, TRACKERS\n"
        "for group in ALGORITHMS, DATASETS, TRACKERS:\n"
        "    assert len(Registry(group).plugins()) >= 3\n"
        "heavy = {'torch', 'optuna', 'torchvision', 'numpy', 'bpf.algorithms', 'bpf.data', 'bpf.trackers'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("group", [ALGORITHMS, DATASETS, TRACKERS])
def test_what_is_installed_here_works(group):
    for plugin in Registry(group).plugins():
        assert plugin.problem == ""
        assert plugin.summary


@pytest.mark.parametrize(
    ("target", "init", "module"),
    [
        ("bpf_echo:Echo", "from bpf_echo.rules import Echo", "bpf_echo/rules.py"),
        ("bpf_echo:Echo", "from .rules import Echo", "bpf_echo/rules.py"),
        ("bpf_echo:Rule", "from .deep.rules import Echo as Rule", "bpf_echo/deep/rules.py"),
        ("bpf_echo.deep:Echo", "", "bpf_echo/deep/__init__.py"),
        ("bpf_echo.front:Echo", "", "bpf_echo/rules.py"),
    ],
)
def test_a_class_is_found_where_a_package_imports_it_from(site, target, init, module):
    front = {"bpf_echo/front.py": "from .rules import Echo"}
    site.add("bpf-echo", {"echo": target}, {"bpf_echo/__init__.py": init, **front, module: RULE})
    plugin = site.registry().describe("echo")
    assert (plugin.summary, plugin.problem) == ("Echo: the target is the signal", "")
    assert "bpf_echo" not in sys.modules
    assert site.registry().load("echo").__name__ == "Echo"


@pytest.mark.parametrize(
    "source",
    [
        f"{RULE}\nRule = Echo",
        f"{RULE}\ndef __getattr__(name):\n    return Echo",
        f"if True:\n    class Rule:\n{'        pass'}",
        "from bpf_star.other import *",
    ],
    ids=["assigned", "getattr", "conditional", "star"],
)
def test_what_the_source_does_not_tell_is_no_problem(site, source):
    site.add("bpf-star", {"rule": "bpf_star:Rule"}, {"bpf_star/__init__.py": source, "bpf_star/other.py": "Rule = int"})
    assert site.registry().describe("rule").problem == ""
    assert isinstance(site.registry().load("rule"), type)


def test_circular_imports_end(site):
    files = {"bpf_ring/__init__.py": "from bpf_ring.a import Rule", "bpf_ring/a.py": "from bpf_ring import Rule"}
    site.add("bpf-ring", {"ring": "bpf_ring:Rule"}, files)
    assert site.registry().describe("ring").summary == ""
    assert refusal(site.registry(), "ring").startswith(
        "The algorithm 'ring' of bpf-ring 1.2 (bpf_ring:Rule) cannot be loaded: ImportError: "
    )


BROKEN = {
    "gone": ("bpf_gone.rules:Rule", {}, "module bpf_gone.rules is not installed"),
    "no-file": ("bpf_nofile.rules:Rule", {"bpf_nofile/__init__.py": ""}, "module bpf_nofile.rules is not installed"),
    "typo": ("bpf_typo:Rule", {"bpf_typo.py": "class Rool: pass"}, "bpf_typo defines no class Rule"),
    "needy": (
        "bpf_needy:Rule",
        {"bpf_needy.py": "import no_such_library.sub\nclass Rule: pass"},
        "needs the module no_such_library, which is not installed",
    ),
    "syntax": (
        "bpf_syntax:Rule",
        {"bpf_syntax.py": "class Rule\n"},
        "bpf_syntax.py cannot be read: expected ':' (<unknown>, line 1)",
    ),
    "shapeless": (
        "bpf_shapeless",
        {"bpf_shapeless.py": ""},
        "its entry point 'bpf_shapeless' is not of the form module:Class",
    ),
    "odd": ("bpf odd:Rule", {}, "its entry point 'bpf odd:Rule' is not of the form module:Class"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_listed_with_its_reason_beside_the_others(site, name):
    target, files, reason = BROKEN[name]
    site.add(f"bpf-{name}", {name: target}, files)
    site.add("bpf-echo", {"echo": "bpf_echo:Echo"}, {"bpf_echo.py": RULE})
    problems = {plugin.name: plugin.problem for plugin in site.registry().plugins()}
    assert problems == {name: reason, "echo": ""}
    if name != "shapeless":
        assert refusal(site.registry(), name).startswith(
            f"The algorithm '{name}' of bpf-{name} 1.2 ({target}) cannot be loaded: "
        )
    assert site.registry().load("echo").equation == "t = y"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise RuntimeError('no licence key')", "RuntimeError: no licence key"),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("def f():\n    import no_such_library\nf()", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("Rule: int", "AttributeError: module 'bpf_bang' has no attribute 'Rule'"),
    ],
)
def test_a_plugin_that_raises_when_imported_is_named_with_the_cause(site, source, cause):
    site.add("bpf-bang", {"bang": "bpf_bang:Rule"}, {"bpf_bang.py": f"{source}\nif False:\n    Rule = 0\n"})
    site.add("bpf-echo", {"echo": "bpf_echo:Echo"}, {"bpf_echo.py": RULE})
    registry = site.registry()
    assert [plugin.name for plugin in registry.plugins()] == ["bang", "echo"]
    assert refusal(registry, "bang") == (
        f"The algorithm 'bang' of bpf-bang 1.2 (bpf_bang:Rule) cannot be loaded: {cause}. "
        "Mend, update or reinstall bpf-bang, or leave 'bang' out."
    )
    assert registry.load("echo").equation == "t = y"


@pytest.mark.parametrize("group", [ALGORITHMS, DATASETS, TRACKERS])
def test_an_unknown_name_is_answered_with_the_nearest_or_all(site, group):
    files = {"bpf_echo.py": "class Echo: pass"}
    site.add("bpf-echo", {"echo": "bpf_echo:Echo", "delay": "bpf_echo:Echo"}, files, group)
    kind = {ALGORITHMS: "algorithm", DATASETS: "dataset", TRACKERS: "tracker"}[group]
    registry = site.registry(group)
    assert refusal(registry, "ecko") == f"Unknown {kind} 'ecko'. Did you mean 'echo'?"
    assert refusal(registry, "zzz") == f"Unknown {kind} 'zzz'. Known: delay, echo."
    with pytest.raises(UsageError, match=f"^Unknown {kind} 'ecko'. Did you mean 'echo'\\?$"):
        registry.describe("ecko")
    assert refusal(Registry(group, lambda _: []), "echo") == f"Unknown {kind} 'echo'."


def test_a_name_of_two_distributions_is_refused_and_both_are_named(site):
    site.add("bpf-echo", {"echo": "bpf_echo:Echo"}, {"bpf_echo.py": RULE})
    site.add("other-echo", {"echo": "other_echo:Echo", "own": "other_echo:Echo"}, {"other_echo.py": RULE})
    registry = site.registry()
    message = refusal(registry, "echo")
    either = r"(bpf-echo 1\.2 and other-echo 1\.2|other-echo 1\.2 and bpf-echo 1\.2)"
    assert re.fullmatch(f"The algorithm 'echo' is declared by {either}. Uninstall one of them.", message)
    assert re.fullmatch(f"declared by {either}; uninstall one of them", registry.describe("echo").problem)
    assert registry.describe("own").problem == ""
    assert registry.load("own").equation == "t = y"
    assert "bpf_echo" not in sys.modules


def test_a_distribution_that_is_found_twice_is_no_duplicate(site):
    site.add("bpf-echo", {"echo": "bpf_echo:Echo"}, {"bpf_echo.py": RULE})
    registry = Registry(ALGORITHMS, lambda group: [*site.entry_points(group), *site.entry_points(group)])
    assert registry.describe("echo").problem == ""
    assert registry.load("echo").equation == "t = y"


def names_of_rules(source: str, names: set[str]) -> set[str]:
    """String constants in a module's code that are just a rule's name, and modules of rules that it imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in names:
            found.add(node.value)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bpf.algorithms."):
            found.add(node.module)
    return found


def test_the_core_names_no_learning_rule():
    names = set(Registry(ALGORITHMS).names())
    assert {"bp", "dfa", "drtp", "ll-cce", "ll-mse"} <= names
    named = {
        str(file.relative_to(CORE)): found
        for file in sorted(CORE.rglob("*.py"))
        if file.parent.name != "algorithms" and (found := names_of_rules(file.read_text(encoding="utf-8"), names))
    }
    assert named == {
        "trackers/alignment.py": {"bpf.algorithms.bp"},  # its control is backpropagation by definition
        "report/drawing.py": {"bp", "dfa", "drtp", "ll-cce", "ll-mse"},  # the same colours in every figure
    }


@pytest.mark.parametrize(
    "source",
    [
        'if rule == "dfa": pass',
        'match rule:\n    case "dfa":\n        pass',
        'local = rule in ("bp", "dfa")',
        'table = {"dfa": 1}',
        "from bpf.algorithms.dfa import DirectFeedbackAlignment",
    ],
)
def test_a_branch_on_a_rules_name_would_be_found(source):
    assert names_of_rules(source, {"dfa"})
    assert not names_of_rules('help = "Learning rule: bp, dfa, or a plugin\'s."', {"dfa"})
