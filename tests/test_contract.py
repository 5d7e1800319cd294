"""The contract suite: every installed rule keeps it, wrong rules break it, and the guide's code is run."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import BaseModel, Field

from bpf.algorithms import Algorithm, Options, ProjectionRule, squared_error
from bpf.algorithms.bp import Backpropagation
from bpf.algorithms.dfa import DirectFeedbackAlignment
from bpf.algorithms.drtp import DirectRandomTargetProjection
from bpf.registry import ALGORITHMS, Registry
from bpf.testing import AlgorithmContract

ROOT = Path(__file__).parents[1]
CHECKS = [name for name in vars(AlgorithmContract) if name.startswith("test_")]
INSTALLED = Registry(ALGORITHMS)
OWN = [name for name in INSTALLED.names() if INSTALLED.describe(name).distribution == "bpf"]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("rule", OWN)
def test_own_rules_keep_the_contract(rule, check):
    contract = type("Contract", (AlgorithmContract,), {"name": rule})
    getattr(contract(), check)()


def test_rules_of_the_plugins_have_contract_tests_of_their_own():
    """They run with these, so once is enough."""
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "plugins").glob("*/tests/test_*.py")]
    tested = re.findall(r'^class \w+\(AlgorithmContract\):\n    name = "(.+)"$', "\n".join(tests), flags=re.M)
    declared = [path.read_text(encoding="utf-8") for path in (ROOT / "plugins").glob("*/pyproject.toml")]
    tables = [tomllib.loads(text)["project"]["entry-points"].get("bpf.algorithms", {}) for text in declared]
    assert len(OWN) == 5
    assert set(tested) == {name for table in tables for name in table} != set()


def failures(kind: type[Algorithm], checks: list[str] = CHECKS[1:], frozen: bool = False) -> dict[str, str]:
    """The checks that a rule fails, each with its message; not the listing, as the rule is not installed."""

    class Contract(AlgorithmContract):
        def rule(self) -> type[Algorithm]:
            return kind

    Contract.frozen = frozen
    failed = {}
    for check in checks:
        try:
            getattr(Contract(), check)()
        except Exception as error:  # a rule that raises fails the check, too
            failed[check] = str(error)
    return failed


class Right(DirectFeedbackAlignment):
    """DFA by another name."""


def test_a_right_rule_passes_all_checks_but_the_listing():
    assert CHECKS[0] == "test_is_listed_without_being_imported"
    assert len(CHECKS) > 12
    assert failures(Right) == {}


class SumInsteadOfMean(Right):
    """Hidden gradients are sums over the batch."""

    def teaching_signal(self, projected, target, output_error):
        return output_error * target.shape[1]


class ChangesTheTarget(Right):
    """Subtracts in place."""

    def teaching_signal(self, projected, target, output_error):
        return target.sub_(output_error).mul_(1 / target.shape[1])


class ReadsTheGlobalGenerator(Right):
    """Draws its feedback anew in every step."""

    def teaching_signal(self, projected, target, output_error):
        return output_error * torch.rand(output_error.shape, dtype=output_error.dtype)


class ForgetsABiasGradient(Right):
    """Leaves the first bias gradient as it was."""

    def gradients(self, step):
        bias = step.network.layers[0].bias_gradient
        before = None if bias is None else bias.clone()
        super().gradients(step)
        if bias is not None:
            bias.copy_(before)


class ReplacesAGradient(Right):
    """Puts a new tensor where the optimizer's was."""

    def gradients(self, step):
        super().gradients(step)
        step.network.gradients["weight.0"] = step.network.gradients["weight.0"].clone()


class HiddenLayersNeverLearn(Right):
    """A signal of zeros."""

    def teaching_signal(self, projected, target, output_error):
        return torch.zeros_like(target)


class ReportsNothing(Right):
    """Sets no logits."""

    def gradients(self, step):
        super().gradients(step)
        del step.logits


class IgnoresDropout(Right):
    """Passes the activations on as they are."""

    def gradients(self, step):
        step.draw_mask = lambda *shape: None
        super().gradients(step)


class KeepsTensorsInTheRule(Right):
    """The runs' feedback is in the rule, where no run can leave."""

    def prepare(self, network, runs):
        self.own = torch.arange(1, len(runs) + 1)[:, None, None].to(torch.float64)

    def teaching_signal(self, projected, target, output_error):
        return (output_error * self.own).to(target.dtype)


class ReadsValues(Right):
    """Decides by a value of the batch."""

    def gradients(self, step):
        super().gradients(step)
        if step.logits.max() > 1e9:
            raise OverflowError


class CountsItsSteps(Right):
    """Would do something else in the hundredth step."""

    steps = 0

    def gradients(self, step):
        self.steps += 1
        super().gradients(step)


class SaysThatItCannotBeRecorded(ReadsValues):
    """Decides by a value of the batch, and says so."""

    capturable = False


class MixesTheRuns(Right):
    """Every run learns from the mean of all runs' errors."""

    def teaching_signal(self, projected, target, output_error):
        return output_error.mean(0, keepdim=True).expand_as(output_error)


class Remembers(Right):
    """A running mean of the error, kept in the rule."""

    def teaching_signal(self, projected, target, output_error):
        self.size = 0.9 * getattr(self, "size", 1.0) + 0.1 * float(output_error.abs().sum())
        return output_error * self.size


class UpdatesTheStatisticsTwice(Right):
    """A second forward pass moves batch norm's running statistics."""

    def gradients(self, step):
        super().gradients(step)
        step.network.layers[0].forward(step.inputs)


class ChangesTheWeights(Right):
    """Learns by itself."""

    def gradients(self, step):
        super().gradients(step)
        step.network.layers[0].weight.mul_(0.99)


class IsNotLayerwise(Right):
    """Calls itself layerwise, though it waits for the output error."""

    layerwise = True


class ForgetsToSayLearned(DirectRandomTargetProjection):
    """Calls itself layerwise, and never calls `learned`."""

    def _learn(self, step, trace, output_error):
        trace.layer.backward(trace, trace.layer.feed_back(step.target / step.target.shape[1]))


class UnusedParameterIsNotDeclared(Backpropagation):
    """Backpropagation that has forgotten that it has no feedback."""

    unused_parameters: ClassVar[frozenset[str]] = frozenset()


class UsedParameterIsDeclaredUnused(Right):
    """DFA that says that its feedback means nothing."""

    unused_parameters = frozenset({"bw_init"})


class NoSuchParameter(Right):
    """Names a parameter that the grid has not."""

    unused_parameters = frozenset({"feedback"})


class SolvesNothing(Right):
    """No problem types."""

    problem_types: ClassVar[frozenset[str]] = frozenset()


class SaysNothing(Right):
    equation = ""


class LooseOptions(Right):
    """Options that can be changed."""

    class Options(BaseModel):
        pass


class MuteOption(Right):
    """An option without help."""

    class Options(Options):
        scale: float = 1.0


class BadDefault(Right):
    """A default that its own range refuses."""

    class Options(Options):
        scale: float = Field(0.0, gt=0, description="Scale.")


class GuessesForEver(Right):
    """Gradients of the batch mean, of full size, in the wrong direction."""

    def gradients(self, step):
        super().gradients(step)
        for gradient in step.network.gradients.values():
            gradient.neg_()


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (SumInsteadOfMean, "test_gradients_are_of_the_batch_mean", "not a gradient of the batch mean (a sum?"),
        (ChangesTheTarget, "test_changes_gradients_only", "the rule changes target"),
        (ReadsTheGlobalGenerator, "test_randomness_comes_from_the_seed", "the rule uses a global random generator"),
        (ForgetsABiasGradient, "test_every_gradient_is_written_and_finite", "the gradient of bias.0 is not written"),
        (ReplacesAGradient, "test_every_gradient_is_written_and_finite", "write into gradients['weight.0']"),
        (HiddenLayersNeverLearn, "test_hidden_layers_learn", "the gradient of weight.0 is zero"),
        (ReportsNothing, "test_reports_the_forward_pass", "step.logits is not set"),
        (IgnoresDropout, "test_reports_the_forward_pass", "step.logits are not those of a forward pass"),
        (ReadsValues, "test_its_steps_can_be_recorded", "a step reads values back, by _local_scalar_dense"),
        (CountsItsSteps, "test_its_steps_can_be_recorded", "a step changes its steps by Python"),
        (KeepsTensorsInTheRule, "test_runs_can_leave", "keep per-run tensors in network.buffers"),
        (MixesTheRuns, "test_a_cohort_is_its_runs", "a run's numbers depend on what it is stacked with"),
        (Remembers, "test_has_no_undeclared_memory", "gradients depend on batches seen before"),
        (UpdatesTheStatisticsTwice, "test_changes_gradients_only", "running statistics of one forward pass"),
        (ChangesTheWeights, "test_changes_gradients_only", "the rule changes weight.0"),
        (IsNotLayerwise, "test_layerwise_rules_are_local", "so the rule is not layerwise"),
        (ForgetsToSayLearned, "test_layerwise_rules_are_local", "step.learned is called for []"),
        (ForgetsToSayLearned, "test_layerwise_updates_give_the_same_numbers", "updates during the forward pass"),
        (
            UnusedParameterIsNotDeclared,
            "test_feedback_initialisation_means_what_is_declared",
            "bw_init makes no difference: name it in unused_parameters",
        ),
        (
            UsedParameterIsDeclaredUnused,
            "test_feedback_initialisation_means_what_is_declared",
            "bw_init makes a difference, but is in unused_parameters",
        ),
        (NoSuchParameter, "test_declares_what_it_is", "unused_parameters names ['feedback'], which the grid has not"),
        (SolvesNothing, "test_declares_what_it_is", "problem_types must be some of"),
        (SaysNothing, "test_declares_what_it_is", "it must not be empty or inherited"),
        (LooseOptions, "test_options_can_be_shown_and_searched", "derive Options from bpf.algorithms.Options"),
        (MuteOption, "test_options_can_be_shown_and_searched", "option scale has no description"),
        (BadDefault, "test_options_can_be_shown_and_searched", "the defaults must be accepted themselves"),
        (GuessesForEver, "test_trains_on_digits", "the loss does not fall"),
    ],
)
def test_a_wrong_rule_breaks_the_contract(kind, check, message):
    assert message in failures(kind, [check]).get(check, "it passed")


def test_a_rule_may_say_that_it_cannot_be_recorded():
    assert failures(SaysThatItCannotBeRecorded, ["test_its_steps_can_be_recorded"]) == {}


def test_a_rule_that_is_said_to_be_frozen_must_be():
    assert failures(HiddenLayersNeverLearn, frozen=True).keys() == {
        "test_feedback_initialisation_means_what_is_declared"
    }
    moves = failures(Right, ["test_hidden_layers_learn"], frozen=True)
    assert "though the contract says frozen" in moves["test_hidden_layers_learn"]


def test_a_rule_that_only_reconstructs_is_checked_on_that():
    class Reconstructs(ProjectionRule):
        """Local squared error, for autoencoders alone."""

        equation, reference = "t = ∂/∂p mean (tanh(p) - y)²", "this test"
        problem_types = frozenset({"reconstruction"})
        layerwise = True

        def teaching_signal(self, projected, target, output_error):
            return squared_error("tanh")(projected, target)[1]

    assert failures(Reconstructs) == {}


def blocks(language: str) -> list[str]:
    guide = (ROOT / "docs" / "PLUGINS.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", guide, flags=re.M | re.S)


@pytest.fixture(scope="module")
def guide(tmp_path_factory) -> Path:
    """The guide's package, installed in a directory of its own: its files, and the metadata that pip would write."""
    directory = tmp_path_factory.mktemp("guide")
    for block in blocks("python"):
        name, _, source = block.removeprefix("# ").partition("\n")
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    tables = re.findall(r'\[project\.entry-points\."(.+?)"\]\n((?:.+ = .+\n)+)', "".join(blocks("toml")))
    declared = "".join(f"[{group}]\n{lines}\n".replace('"', "") for group, lines in tables)
    metadata = directory / "bpf_example-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bpf-example\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(declared)
    return directory


def run(guide: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(guide), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=guide, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guides_blocks_are_all_known():
    text = (ROOT / "docs" / "PLUGINS.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^```\w", text, flags=re.M)) == sum(map(len, map(blocks, ["python", "toml", "console"])))
    first = next(block for block in blocks("python") if "ProjectionRule" in block)
    body = first.partition("class ")[2].partition("\n\n\n")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 10


@pytest.mark.slow
def test_the_guides_contract_tests_pass(guide):
    assert " passed" in run(guide, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")


@pytest.mark.slow
def test_the_guides_commands_work(guide):
    commands = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    bpf = str(Path(sys.executable).with_name("bpf"))
    ours = [command.split() for command in commands if command.startswith("bpf ")]
    outputs = [run(guide, bpf, *words[1:]) for words in ours]
    assert [words[1] for words in ours] == ["algorithms", "train", "tune", "report"]
    assert "bpf-example 0.1.0" in outputs[0]
    assert "scale" in outputs[0]
    assert "test" in outputs[1]
