"""A broken plugin of every kind: one message that names it, its distribution and a cure, and nothing is lost."""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent, indent

import pytest

import bpf
from bpf.cli import app as cli
from bpf.errors import UsageError

pytestmark = pytest.mark.usefixtures("in_this_process")

SIGNAL = '''
import torch
from pydantic import BaseModel, Field
from bpf.algorithms import Algorithm, ProjectionRule, Step

class Broken(ProjectionRule):
    """Broken in some way."""

    equation = "t = y"
    problem_types = frozenset({"classification"})
    needs_projection = False

    def teaching_signal(self, projected, target, output_error):
        return target / target.shape[1]
'''
RULE = '''
import torch
from pydantic import Field
from bpf.algorithms import Algorithm, Step

class Broken(Algorithm):
    """Broken in some way."""

    problem_types = frozenset({"classification"})
    has_feedback = False

    def gradients(self, step):
        traces = step.forward_hidden()
        step.train_output(traces[-1].passed_on)
        for trace in traces:
            trace.layer.backward(trace, torch.ones_like(trace.output))
'''
TRACKER = '''
import torch
from bpf.trackers import Tracker

class Broken(Tracker):
    """Broken in some way."""

    def measure(self, probe):
        return {"x": torch.ones(probe.network.runs)}
'''
DATASET = '''
import numpy as np
from bpf.data.base import Arrays, Dataset

class Broken(Dataset):
    """Broken in some way."""

    shape, class_count, train_size, test_size, cached = (1, 4, 4), 2, 40, 10, False

    def present(self):
        return True

    def instructions(self):
        return "Nothing to do."

    def fingerprint(self):
        return "1"

    def read(self):
        images = np.zeros((50, 1, 4, 4), np.uint8)
        labels = np.arange(50) % 2
        return Arrays(images[:40], labels[:40], images[40:], labels[40:], ("a", "b"))
'''


def also(source: str, more: str) -> str:
    return source + "\n" + indent(dedent(more).strip(), "    ") + "\n"


def options(field: str, base: str = "Algorithm.Options") -> str:
    return also(SIGNAL, f"class Options({base}):\n    a: {field}")


def gradients(then: str) -> str:
    """A rule that does something after its gradients of a step."""
    lines = "\n    ".join(
        ["trace = step.forward_hidden()[-1]", "step.train_output(trace.passed_on)", *then.splitlines()]
    )
    return also(RULE, f"def gradients(self, step):\n    {lines}")


def prepare(then: str, more: str = "") -> str:
    return also(RULE, f"def prepare(self, network, runs):\n    {then}\n{dedent(more)}")


def logits(value: str) -> str:
    return also(RULE, f"def logits(self, network, inputs):\n    return {value}")


CURE = " Mend, update or reinstall bpf-broken, or leave 'broken' out."
REFUSED = {
    "dependency": (f"import no_such_library\n{RULE}", "loaded: ModuleNotFoundError: No module named 'no_such_library'"),
    "syntax": (f"def broken(:\n{RULE}", "loaded: SyntaxError: invalid syntax (bpf_broken.py, line 1)"),
    "raises": (f"raise RuntimeError('half installed')\n{RULE}", "loaded: RuntimeError: half installed"),
    "exits": (f"raise SystemExit(3)\n{RULE}", "loaded: SystemExit: 3"),
    "newer": (f"from bpf.algorithms import Newer\n{RULE}", "loaded: ImportError: cannot import name 'Newer' from"),
    "attribute": ("class Other: ...", "loaded: AttributeError: module 'bpf_broken' has no attribute 'Broken'"),
    "number": ("Broken = 3", "used: it is no subclass of bpf.algorithms.base.Algorithm."),
    "other class": ("class Broken: ...", "used: it is no subclass of bpf.algorithms.base.Algorithm."),
    "no gradients": (RULE.replace("def gradients", "def gradient"), "used: it lacks gradients."),
    "no signal": (SIGNAL.replace("def teaching", "def teach"), "used: it lacks teaching_signal."),
    "no method": (also(RULE, "updated = None"), "used: its updated is no method."),
    "older gradients": (RULE.replace("self, step", "self, step, network"), "gradients(self, step, network) cannot be"),
    "older prepare": (also(RULE, "def prepare(self, network): ..."), "its prepare(self, network) cannot be called"),
    "older updated": (
        also(RULE, "def updated(self): ..."),
        "as bpf 0.2.0 does, updated(self, step), so that it is for",
    ),
    "older logits": (also(RULE, "def logits(self, network): ..."), "its logits(self, network) cannot be called as"),
    "older signal": (SIGNAL.replace(", output_error)", ")"), "teaching_signal(self, projected, target) cannot be"),
    "init": (also(RULE, "def __init__(self): ..."), "its __init__(self) cannot be called as bpf"),
    "no options": (also(RULE, "class Options:\n    a = 1"), "its Options are no subclass of bpf.algorithms.Options."),
    "other options": (options("int = 1", "BaseModel"), "its Options are no subclass of bpf.algorithms.Options."),
    "no default": (options("int = Field(description='x')"), "its option a has no default that is a number or a word."),
    "no value": (options("int | None = None"), "its option a has no default that is a number or a word."),
    "list": (options("list[int] = [1]"), "its option a has no default that is a number or a word."),
    "wrong default": (options("float = Field(-1.0, gt=0)"), "its option a does not accept its own default -1.0: Input"),
    "problem": (RULE.replace('frozenset({"classification"})', '"classification"'), "its problem_types is 'classificat"),
    "no problem": (RULE.replace('{"classification"}', ""), "its problem_types is empty, so that there is nothing"),
    "unused": (
        also(RULE, "unused_parameters = frozenset({'lrr'})"),
        "its unused_parameters is frozenset({'lrr'}), and",
    ),
    "flag": (also(RULE, "layerwise = 'no'"), "its layerwise is 'no', and must be True or False."),
    "equation": (also(RULE, "equation = None"), "its equation is None, and must be a text."),
}
"""Rules that cannot be used, and a part of why."""
FAILING = {
    "init": (also(RULE, "def __init__(self, options, problem):\n    raise ValueError('bang')"), "ValueError: bang"),
    "init-exits": (also(RULE, "def __init__(self, options, problem):\n    raise SystemExit(3)"), "SystemExit: 3"),
    "prepare": (prepare("raise ValueError('bang')"), "ValueError: bang"),
    "gradients": (gradients("raise ValueError('bang')"), "ValueError: bang"),
    "exits": (gradients("raise SystemExit(3)"), "SystemExit: 3"),
    "updated": (also(RULE, "def updated(self, step):\n    raise ValueError('bang')"), "ValueError: bang"),
    "logits": (also(RULE, "def logits(self, network, inputs):\n    raise ValueError('bang')"), "ValueError: bang"),
    "newer": (prepare("network.add_newer()"), "AttributeError: 'Network' object has no attribute 'add_newer'"),
    "twice": (
        prepare("for _ in 'ab': network.add_state('own', torch.ones(len(runs)))"),
        "'own' cannot be the name of a rule's tensor",
    ),
    "taken": (
        prepare("network.add_parameter('weight.0', torch.ones(len(runs)))"),
        "'weight.0' cannot be the name of a rule's tensor",
    ),
    "runs": (prepare("network.add_state('own', torch.ones(7))"), "own is [7]: the first axis is that of the 2 runs."),
    "no-tensor": (
        prepare("network.add_state('own', [1.0])"),
        "own is list, and must be a tensor with the 2 runs first",
    ),
    "rate": (prepare("network.add_parameter('own', torch.ones(2), 'fast')"), "The rate of own is 'fast', and must be"),
    "fixed-runs": (
        prepare("network.buffers['own'] = torch.ones(7)"),
        "own is [7], and must be a tensor whose first axi",
    ),
    "weights": (
        prepare("network.parameters['weight.0'] = torch.ones(2, 3)"),
        "it replaces the tensor weight.0: change it in place",
    ),
    "shape": (
        gradients("step.network.gradients['weight.0'] = torch.ones(1, 2)"),
        "it replaces or resizes the gradient of weight.0: write into gradients['weight.0']",
    ),
    "resized": (
        gradients("step.network.gradients['weight.0'].resize_(1, 2)"),
        "it replaces or resizes the gradient of weight.0",
    ),
    "dtype": (
        gradients("g = step.network.gradients\ng['weight.0'] = g['weight.0'].double()"),
        "it replaces or resizes the gradient of weight.0",
    ),
    "no-logits": (also(RULE, "def gradients(self, step): ..."), "step.logits is NoneType, and must be a tensor [2, 64"),
    "step-logits": (gradients("step.logits = step.logits[:, :3]"), "step.logits is torch.float32 [2, 3, 10], and must"),
    "loss": (gradients("step.loss_per_example = 1.0"), "step.loss_per_example is float, and must be a tensor [2, 64]"),
    "late": (
        also(RULE, "def updated(self, step):\n    step.network.add_parameter('own', torch.ones(len(step.inputs)))"),
        "it adds or removes own in a step: tensors are added in `prepare`",
    ),
    "undeclared": (
        prepare(
            "network.buffers['own'] = torch.ones(len(runs))",
            "def updated(self, step):\n    step.network.buffers['own'] *= 2",
        ),
        "it changes the tensor own in its steps and has not declared it",
    ),
    "own-attribute": (
        prepare("self.own = torch.ones(len(runs))", "def updated(self, step):\n    self.own *= 2"),
        "it changes its own in its steps and has not declared it",
    ),
    "undeclared-late": (
        prepare(
            "self.steps, self.own = 0, torch.ones(len(runs))",
            "def updated(self, step):\n    self.steps += 1\n    if self.steps > 3:\n        self.own *= 2",
        ),
        "it changes its own in its steps and has not declared it",
    ),
    "replaced-state": (
        prepare(
            "network.add_state('own', torch.ones(len(runs)))",
            "def updated(self, step):\n    step.network.buffers['own'] = step.network.buffers['own'] * 2",
        ),
        "it replaces the tensor own: change it in place",
    ),
    "logits-shape": (logits("network.logits(inputs)[..., :3]"), "what logits gives is torch.float32 [2, 72, 3], and"),
    "logits-list": (
        logits("network.logits(inputs).tolist()"),
        "what logits gives is list, and must be a tensor [2, 72",
    ),
    "logits-integers": (logits("network.logits(inputs).long()"), "what logits gives is torch.int64 [2, 72, 10], and"),
    "logits-graph": (
        also(
            RULE,
            """
            def logits(self, network, inputs):
                with torch.enable_grad():
                    return network.logits(inputs.clone().requires_grad_())
            """,
        ),
        "what logits gives keeps the graph of its gradients: detach it",
    ),
    "logits-undeclared": (
        prepare(
            "network.add_state('own', torch.ones(len(runs), 1, 1))",
            "def logits(self, network, inputs):\n    return network.logits(inputs) * network.buffers['own']",
        ),
        "logits needs 'own', which is not in a model: add it with saved=True",
    ),
}
"""Rules that fail in training, and a part of why."""


class Site:
    """A directory on the import path with distributions in it, as pip would have left them there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, distribution: str, version: str, targets: dict[str, str], kind: str = "algorithms") -> Path:
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = "".join(f"{name} = {target}\n" for name, target in targets.items())
        (info / "entry_points.txt").write_text(f"[bpf.{kind}]\n{lines}")
        self.refresh()
        return info

    def broken(self, source: str, kind: str = "algorithms", version: str = "1.2") -> Path:
        (self.path / "bpf_broken.py").write_text(source)
        return self.add("bpf-broken", version, {"broken": "bpf_broken:Broken"}, kind)

    def refresh(self) -> None:
        """Forget what was imported from here, as a new process has."""
        for name in [n for n, module in sys.modules.items() if str(self.path) in str(getattr(module, "__file__", ""))]:
            del sys.modules[name]
        shutil.rmtree(self.path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_place: Path) -> Iterator[Site]:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    site = Site(tmp_path / "site")
    yield site
    site.refresh()


Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command: its exit code and all that it said, which is never a traceback."""

    def run(words: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            cli.main(words.split())
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        told = "".join(capsys.readouterr())
        assert "Traceback" not in told or "--failed" in words, "which shows those of the failures"
        assert "This is a bug" not in told
        return code, told

    return run


COMMON = "--arch 4 --epochs 2 --examples-frac 0.5 --device cpu -q"
GRID = f"{COMMON} --activation tanh --no-batch-norm --bw-init ortho --executions-per-trial 2 --workers 1"


@pytest.mark.parametrize("kind", REFUSED)
def test_a_rule_that_cannot_be_used_is_refused_before_anything_is_written(site: Site, said: Said, kind: str) -> None:
    source, why = REFUSED[kind]
    site.broken(source)
    for words in (
        f"train ex --dataset digits --algorithm broken {COMMON}",
        f"tune ex --dataset digits --algorithm dfa,broken {GRID}",
        "algorithms broken",
    ):
        code, told = said(words)
        assert code == 2
        assert told.startswith("Error: The algorithm 'broken' of bpf-broken 1.2 (bpf_broken:Broken) cannot be ")
        assert told.endswith(f".{CURE}\n")
        if words != "algorithms broken":  # which may know without loading it
            assert why in told
    assert not Path("ex").exists()
    code, told = said("algorithms")
    assert (code, told.count("bpf-broken 1.2"), "ll-cce " in told) == (0, 1, True)


def test_what_lacks_a_description_works_and_says_so(site: Site, said: Said) -> None:
    site.broken(RULE.replace('"""Broken in some way."""', "class Options(Algorithm.Options):\n        a: int = 1"))
    assert said(f"train ex --dataset digits --algorithm broken {COMMON}")[0] == 0
    code, told = said("algorithms broken")
    assert (code, told.partition("problems")[0]) == (
        0,
        "broken  (bpf-broken 1.2)\n\n(not described)\n\nequation      -\npaper         -\n",
    )
    assert "(not described)" in said("algorithms")[1]


def test_rules_that_fail_in_training_are_named_and_disturb_no_other(site: Site, said: Said) -> None:
    for name, (source, _) in FAILING.items():
        (site.path / f"broken_{name.replace('-', '_')}.py").write_text(source)
    site.add("bpf-broken", "1.2", {f"x-{name}": f"broken_{name.replace('-', '_')}:Broken" for name in FAILING})
    rules = ",".join(["dfa", *(f"x-{name}" for name in FAILING)])
    code, told = said(f"tune ex --dataset digits --algorithm {rules} --lr 0.01 {GRID}")
    assert code == 1
    assert told.endswith(f"Error: {len(FAILING)} cells failed: see `bpf status ex --failed`; "
                         "`bpf resume ex --retry-failed` tries again.\n")  # fmt: skip
    code, told = said("status ex --failed --json")
    failures = {one["algorithm"].removeprefix("x-"): one["error"].strip().splitlines()[-1] for one in json.loads(told)}
    assert failures.keys() == FAILING.keys()
    for name, last in failures.items():
        assert FAILING[name][1] in last
        assert last.endswith(f" (by the algorithm 'x-{name}' of bpf-broken 1.2: mend or update it)")
    [best] = json.loads(said("best ex --json")[1])
    assert best["algorithm"] == "dfa"
    assert said("report ex --output page.html")[0] == 0
    for name in FAILING:
        (site.path / f"broken_{name.replace('-', '_')}.py").write_text(SIGNAL)
    site.refresh()
    assert said("resume ex --retry-failed --workers 1 -q")[0] == 0


def test_a_single_execution_that_fails_tells_why(site: Site, said: Said) -> None:
    site.broken(FAILING["shape"][0])
    assert said(f"train ex --dataset digits --algorithm broken {COMMON}") == (
        1,
        "Error: The execution failed: ValueError: it replaces or resizes the gradient of weight.0: write into "
        "gradients['weight.0'] (by the algorithm 'broken' of bpf-broken 1.2: mend or update it)\n"
        "See `bpf status ex --failed`; `bpf resume ex --retry-failed` tries again.\n",
    )


def test_gradients_that_are_no_numbers_are_a_run_that_diverged(site: Site, said: Said) -> None:
    site.broken(gradients("for g in step.network.gradients.values(): g.fill_(float('nan'))"))
    code, told = said(f"train ex --dataset digits --algorithm broken {COMMON}")
    assert (code, "diverged after 1 epoch" in told) == (0, True)


def test_a_rule_that_fails_where_memory_is_measured_is_trained_alone(site: Site) -> None:
    """On a GPU its step is tried before cells are claimed, where nobody would tell of it."""
    from bpf.experiment.plugins import load_rules
    from bpf.spec.run import RunSpec
    from bpf.training.footprint import run_bytes

    site.broken(FAILING["init-exits"][0])
    spec = RunSpec(dataset="digits", algorithm="broken", arch="4")
    assert run_bytes(spec, load_rules(["broken"])["broken"], 64, 10, 100) == sys.maxsize


TRACKERS = {
    "class": ("class Broken: ...", 2, "cannot be used: it is no subclass of bpf.trackers.base.Tracker. Mend, update"),
    "abstract": (TRACKER.replace("measure", "measured"), 2, "cannot be used: it lacks measure. Mend, update"),
    "older": (TRACKER.replace(", probe", ""), 2, "cannot be used: its measure(self) cannot be called as bpf"),
    "init": (also(TRACKER, "def __init__(self, x): ..."), 2, "cannot be made: TypeError: "),
    "raises": (
        TRACKER.replace("return", "raise ValueError('bang')\n        return"),
        1,
        "failed: ValueError: bang. Mend",
    ),
    "exits": (TRACKER.replace("return", "raise SystemExit(3)\n        return"), 1, "failed: SystemExit: 3. Mend"),
    "list": (TRACKER.replace("torch.ones(probe.network.runs)", "[1.0]"), 1, "x is list, and must be a tensor [1]: one"),
    "runs": (TRACKER.replace("probe.network.runs", "7"), 1, "x is [7], and must be a tensor [1]: one number of each"),
    "name": (TRACKER.replace('"x"', "3"), 1, "failed: TypeError: 3 is no name. Mend, update or leave it out."),
    "changes": (
        TRACKER.replace("return", "probe.network.parameters['weight.0'].zero_()\n        return"),
        1,
        "it changes the tensor weight.0 of the networks in training. Mend",
    ),
    "other names": (
        TRACKER.replace('"x"', "str(id(probe))"),
        1,
        "measures other things than before",
    ),
}


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_broken_tracker(site: Site, said: Said, kind: str) -> None:
    source, expected, why = TRACKERS[kind]
    site.broken(source, "trackers")
    code, told = said(f"train ex --dataset digits --algorithm dfa --tracker broken {COMMON}")
    assert (code, why in told) == (expected, True), told
    assert re.match(r"Error: (The execution failed: )?The tracker 'broken' of bpf-broken 1\.2 ", told)
    assert Path("ex").exists() == (expected == 1)


OWNER = "the dataset 'broken' of bpf-broken 1.2"
DATASETS = {
    "class": ("class Broken: ...", 2, "cannot be used: it is no subclass of bpf.data.base.Dataset. Mend, update"),
    "abstract": (DATASET.replace("read", "reads"), 2, "cannot be used: it lacks read. Mend, update"),
    "older": (DATASET.replace("read(self)", "read(self, part)"), 2, "its read(self, part) cannot be called as bpf"),
    "shape": (DATASET.replace("(1, 4, 4), 2", "16, 2"), 2, "its shape is 16, and must be three whole numbers"),
    "count": (DATASET.replace("2, 40", "'two', 40"), 2, "its class_count is 'two', and must be a whole number"),
    "init": (also(DATASET, "def __init__(self, *args):\n    raise ValueError('x')"), 1, "failed: ValueError: x. Mend"),
    "fingerprint": (
        DATASET.replace('return "1"', "raise ValueError('x')").replace("False", "True"),
        1,
        "failed: ValueError: x. Mend or update it",
    ),
    "raises": (
        DATASET.replace("return Arrays", "raise ValueError('x')\n        return Arrays"),
        1,
        "ValueError: x. Mend",
    ),
    "exits": (DATASET.replace("return Arrays", "raise SystemExit(3)\n        return Arrays"), 1, "SystemExit: 3. Mend"),
    "tuple": (
        DATASET.replace("return Arrays(", "return ("),
        2,
        "reading it gives tuple; it must give bpf.data.base.Arr",
    ),
    "list": (DATASET.replace("Arrays(images[:40]", "Arrays([1]"), 2, "train_images is list; it must be a NumPy array."),
    "dtype": (DATASET.replace("np.uint8", "float"), 2, "train_images is float64 with 4 dimensions; it must be a NumPy"),
    "shapes": (
        DATASET.replace("(50, 1, 4, 4)", "(50, 1, 4, 5)"),
        2,
        "its images are [1, 4, 5], but it declares [1, 4,",
    ),
    "labels": (DATASET.replace("% 2", "% 5"), 2, "labels of 2 classes run from 0 to 1."),
    "label dtype": (DATASET.replace("% 2", "% 2.0"), 2, "train_labels is float64 [40]; it must be int64 [40], one"),
    "classes": (DATASET.replace('("a", "b")', "(1, 2)"), 2, "its classes must be a tuple of their names."),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_a_broken_data_set(site: Site, said: Said, kind: str) -> None:
    source, expected, why = DATASETS[kind]
    site.broken(source, "datasets")
    code, told = said(f"train ex --dataset broken --algorithm dfa {COMMON}")
    assert (code, why in told) == (expected, True), told
    assert OWNER in told[0].lower() + told.replace("The dataset", "the dataset")
    assert not Path("ex").exists()
    assert said("datasets")[0] == 0


def test_a_name_that_two_distributions_have(site: Site, said: Said) -> None:
    site.broken(SIGNAL)
    site.add("bpf-other", "3.0", {"broken": "bpf_broken:Broken", "dfa": "bpf_broken:Broken"})
    for words in (f"train ex --dataset digits --algorithm broken {COMMON}", "algorithms broken"):
        code, told = said(words)
        either = "(bpf-broken 1.2 and bpf-other 3.0|bpf-other 3.0 and bpf-broken 1.2)"
        assert code == 2
        assert re.fullmatch(f"Error: The algorithm 'broken' is declared by {either}. Uninstall one of them.\n", told)
    for words in (f"train ex --dataset digits --algorithm dfa {COMMON}", "algorithms dfa"):
        code, told = said(words)
        assert (code, told.partition(". U")[2]) == (2, "ninstall bpf-other 3.0.\n"), "and not bpf itself"
    assert said("algorithms")[0] == 0


def test_a_distribution_without_metadata(site: Site, said: Said) -> None:
    (site.broken("class Broken: ...") / "METADATA").unlink()
    code, told = said(f"train ex --dataset digits --algorithm broken {COMMON}")
    assert (code, "The algorithm 'broken' of a nameless distribution (bpf_broken:Broken) cannot be used" in told) == (
        2,
        True,
    )
    assert said("algorithms")[0] == 0


OWN = also(
    RULE,
    """
    class Options(Algorithm.Options):
        scale: float = Field(1.0, gt=0, le=9, description="Of the prediction.")

    def prepare(self, network, runs):
        network.add_state("own", torch.ones(len(runs), 1, 2), saved=True)

    def logits(self, network, inputs):
        return self.options.scale * network.logits(inputs) * network.buffers["own"][..., :1]
    """,
)
CHANGED = {
    "another option": (
        OWN.replace("scale", "size"),
        "Unknown option broken.scale. Known: size.",
        "Unknown option broken.scale. Known: size.",
    ),
    "another range": (
        OWN.replace("1.0, gt=0", "6.0, gt=5"),
        "broken.scale: 1.0 is not accepted: it must be greater than 5.",
        "broken.scale: 1.0 is not accepted: it must be greater than 5.",
    ),
    "one more option": (
        OWN.replace("scale: ", "more: int = 1\n        scale: "),
        "start a new experiment.",
        "",
    ),
    "another tensor": (
        OWN.replace("1, 2)", "3)").replace("[..., :1]", "[:, None, :, None]"),
        "",
        "RuntimeError: The size of tensor",
    ),
    "another name": (OWN.replace('"own"', '"other"'), "", "KeyError: 'other'"),
}


@pytest.mark.parametrize("kind", [*CHANGED, "uninstalled", "broken"])
def test_a_plugin_that_has_changed_since(site: Site, said: Said, kind: str) -> None:
    info = site.broken(OWN)
    assert said(f"tune ex --dataset digits --algorithm broken,dfa --lr 0.01 {GRID}")[0] == 0
    from PIL import Image

    Image.new("L", (8, 8)).save("image.png")
    [model] = Path("ex/models/broken").glob("*")
    kept = {path: path.read_bytes() for path in [model, Path("ex/experiment.yaml")]}
    shutil.rmtree(info)
    if kind == "uninstalled":
        site.refresh()
        resumed = predicted = "Unknown algorithm 'broken'. Known: "
        changed = "Since the last start here bpf-broken 1.2 has been uninstalled; if that is why, install what it was."
    else:
        source, resumed, predicted = CHANGED.get(kind, ("x = ", *2 * ["cannot be loaded: SyntaxError"]))
        site.broken(source, version="2.0")
        changed = "Since the last start here bpf-broken 1.2 has become 2.0; if that is why, install what it was."
    code, told = said("resume ex -q --workers 1")
    assert (code, resumed in told) == (2 if resumed else 0, True), told
    if resumed:
        assert told.endswith(f" {changed}\n")
        code, told = said(f"tune ex --dataset digits --algorithm broken,dfa --lr 0.01,0.1 {GRID}")
        assert (code, changed in told) == (2, True), told
        assert kept == {path: path.read_bytes() for path in kept}
    for words in ("status ex", "best ex", "report ex --output page.html"):
        assert said(words)[0] == 0
    for words in (f"evaluate {model}", f"predict {model} image.png"):
        code, told = said(words)
        assert (code, predicted in told) == (2 if predicted else 0, True), told
        assert "'broken'" in told or not predicted
    if predicted:
        with pytest.raises(UsageError, match=re.escape(predicted)):
            bpf.load(model)


def test_a_model_of_a_plugin_that_predicts_as_all_do_needs_no_plugin(site: Site, said: Said) -> None:
    info = site.broken(SIGNAL)
    assert said(f"train ex --dataset digits --algorithm broken {COMMON}")[0] == 0
    shutil.rmtree(info)
    site.refresh()
    [model] = Path("ex/models/broken").glob("*")
    assert said(f"evaluate {model}")[0] == 0


def test_a_checkpoint_of_another_version_is_kept_aside(site: Site, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tensor of another shape nothing of it can be gone on with; what there is of it is not lost."""
    from bpf.training.cohort import Cohort

    info, original = site.broken(OWN), Cohort.run_epoch

    def fails_later(cohort: Cohort) -> None:
        if cohort.epoch:
            raise KeyboardInterrupt
        original(cohort)

    monkeypatch.setattr(Cohort, "run_epoch", fails_later)
    command = f"tune ex --dataset digits --algorithm broken --lr 0.01 {GRID} --checkpoint-every 0"
    assert said(command)[0] == 130
    monkeypatch.setattr(Cohort, "run_epoch", original)
    [stored] = Path("ex/checkpoints").glob("*.pt")
    content = stored.read_bytes()
    shutil.rmtree(info)
    site.broken(OWN.replace("1, 2)", "1, 3)"), version="2.0")
    code, told = said(command)
    assert code == 0
    assert "It is kept as" in told
    assert content in [path.read_bytes() for path in Path("ex/checkpoints").iterdir()]
