"""The checks that every learning rule passes."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bpf.algorithms import Algorithm, Layer, Options
from bpf.data.cache import load
from bpf.nn.activations import ACTIVATIONS
from bpf.registry import ALGORITHMS, Registry
from bpf.spec.fields import choices
from bpf.spec.grid import TUNABLE
from bpf.spec.run import RunSpec
from bpf.testing.bench import (
    RUNS,
    WIDTHS,
    Bench,
    Case,
    ReadsBack,
    close,
    explained,
    global_generators,
    running,
    same,
)
from bpf.training.capture import changed, held
from bpf.training.cohort import Cohort

GUESSING = 0.8
"""Wrong digits, as a fraction, that a rule must stay below; guessing gives 0.9."""


class AlgorithmContract:
    """The checks; subclass it as a pytest class with the rule's `name`.

    `options` are given to the rule, in place of their defaults. `frozen` says that the rule leaves hidden layers
    as they are: their gradients must then be zero, where otherwise none may be.
    """

    name: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    frozen: ClassVar[bool] = False

    def rule(self) -> type[Algorithm]:
        """The class behind the entry point; a test of a class that is not installed overrides it."""
        kind = Registry(ALGORITHMS).load(self.name)
        assert isinstance(kind, type), f"{kind} is not a class"
        assert issubclass(kind, Algorithm), f"{kind} is not a bpf.algorithms.Algorithm"
        return kind

    def test_is_listed_without_being_imported(self) -> None:
        plugin, kind = Registry(ALGORITHMS).describe(self.name), self.rule()
        assert not plugin.problem, f"`bpf algorithms` shows it as broken: {plugin.problem}"
        summary = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
        assert plugin.summary == summary, f"listed as {plugin.summary!r}, but its docstring begins {summary!r}"
        assert set(plugin.attribute("problem_types", ())) == kind.problem_types, (
            "write problem_types as a literal frozenset in the class itself: listings read the source"
        )

    def test_declares_what_it_is(self) -> None:
        kind = self.rule()
        assert (kind.__dict__.get("__doc__") or "").partition("\n")[0].strip(), (
            "the docstring's first line is what listings show: it must not be empty or inherited"
        )
        for attribute in ("equation", "reference"):
            text = getattr(kind, attribute)
            assert len(str(text).splitlines()) == 1, f"{attribute} must be one line of text"
        for attribute in ("needs_bounded_activation", "has_feedback", "layerwise", "capturable"):
            assert isinstance(getattr(kind, attribute), bool), f"{attribute} must be True or False"
        known = set(choices("problem_type"))
        assert set() < kind.problem_types <= known, f"problem_types must be some of {sorted(known)}"
        unknown = set(kind.unused_parameters) - set(TUNABLE)
        assert not unknown, f"unused_parameters names {sorted(unknown)}, which the grid has not"

    def test_options_can_be_shown_and_searched(self) -> None:
        model = self.rule().Options
        assert issubclass(model, Options), "derive Options from bpf.algorithms.Options, which is frozen"
        assert model.model_config.get("frozen"), "Options must stay frozen"
        for name, field in model.model_fields.items():
            assert field.description, f"option {name} has no description; it is the help text"
            assert not field.is_required(), f"option {name} has no default"
            assert isinstance(field.default, bool | int | float | str), f"option {name} must be a number or a word"
        with explained("the defaults must be accepted themselves"):
            model.model_validate(model().model_dump(mode="json"))

    def test_every_gradient_is_written_and_finite(self) -> None:
        for case in self._all_cases():
            bench = self.bench(case)
            before = dict(bench.network.gradients)
            bench.run()
            for name, gradient in before.items():
                assert bench.network.gradients[name] is gradient, (
                    f"{case}: write into gradients[{name!r}], do not replace it: the optimizer holds that tensor"
                )
                assert gradient.shape == bench.network.parameters[name].shape, f"{case}: {name} was resized"
                assert gradient.isfinite().all(), f"{case}: the gradient of {name} is not written, or not finite"

    def test_hidden_layers_learn(self) -> None:
        for case in self._all_cases():
            bench = self.bench(case)
            for name, gradient in bench.gradients().items():
                if name in bench.network.owned:
                    continue
                kind, _, layer = name.partition(".")
                moves = gradient.flatten(1).abs().sum(1) > 0
                if int(layer) == len(WIDTHS) or case.batch == 1:
                    continue
                if self.frozen:
                    assert not moves.any(), f"{case}: {name} has a gradient, though the contract says frozen"
                elif kind == "weight":
                    assert moves.all(), f"{case}: the gradient of {name} is zero"

    def test_reports_the_forward_pass(self) -> None:
        for case in self._all_cases():
            bench = self.bench(case)
            logits, _ = bench.clean_pass()
            step = bench.run()
            assert hasattr(step, "logits"), "step.logits is not set; step.train_output or step.output_error sets it"
            assert close(step.logits, logits), (
                f"{case}: step.logits are not those of a forward pass of the inputs (by step.forward, for dropout)"
            )
            loss = step.loss(logits, bench.target)[0]
            assert close(step.loss_per_example, loss), f"{case}: step.loss_per_example is not the loss of step.logits"

    def test_gradients_are_of_the_batch_mean(self) -> None:
        """A batch with every example twice has the same mean gradient, with batch norm too."""
        for case in self._structures():
            bench = self.bench(case)
            twice = replace(bench, inputs=bench.inputs.repeat(1, 2, 1), target=bench.target.repeat(1, 2, 1))
            same(
                bench.gradients(),
                twice.gradients(),
                f"{case}: not a gradient of the batch mean (a sum? or random numbers of another origin than the step?)",
            )

    def test_a_cohort_is_its_runs(self) -> None:
        for case in self._structures():
            together = self.bench(case).gradients()
            for i, run in enumerate(RUNS):
                alone = Bench.make(self.rule(), self.options, case, [run]).gradients()
                part = {name: gradient[i : i + 1] for name, gradient in together.items()}
                same(part, alone, f"{case}: a run's numbers depend on what it is stacked with")

    def test_runs_can_leave(self) -> None:
        for case in self._structures():
            bench, index = self.bench(case), torch.tensor([2, 0])
            inputs, target = bench.inputs[index], bench.target[index]
            seeds, network = (bench.seeds[2], bench.seeds[0]), bench.network.select(index)
            fewer = replace(bench, network=network, inputs=inputs, target=target, seeds=seeds)
            part = {name: gradient[index] for name, gradient in bench.gradients().items()}
            with explained(f"{case}: keep per-run tensors in network.buffers, not in the rule"):
                same(part, fewer.gradients(), f"{case}: numbers change when a run leaves")

    def test_has_no_undeclared_memory(self) -> None:
        """But what it declares: trackers ask the same rule for gradients of other batches, in between."""
        for case in self._structures():
            bench = self.bench(case)
            states = bench.states()
            first = bench.gradients()
            replace(bench, inputs=bench.inputs[:, :3] + 0.1, target=bench.target[:, :3]).run()
            bench.restore(states)
            same(first, bench.gradients(), f"{case}: gradients depend on batches seen before")

    def test_randomness_comes_from_the_seed(self) -> None:
        for case in self._structures():
            results = []
            for seed in (1, 2):
                with global_generators(seed) as state:
                    before = state()
                    results.append(self.bench(case).gradients())
                    assert state() == before, f"{case}: the rule uses a global random generator; use random_feedback"
            assert all(torch.equal(results[0][name], results[1][name]) for name in results[0]), (
                f"{case}: equal seeds give unequal numbers"
            )

    def test_its_steps_can_be_recorded(self) -> None:
        """CUDA records a step and replays it: it must be the same operations every time, on the same tensors."""
        if not self.rule().capturable:
            return
        otherwise = "CUDA cannot record it; if it must, declare capturable = False"
        for case in self._structures():
            bench = self.bench(case)
            bench.run()
            before = held(bench.rule, bench.network)
            with torch.no_grad(), ReadsBack() as reads:
                bench.rule.gradients(bench.step())
            by = ", ".join(sorted(reads.found))
            assert not reads.found, f"{case}: a step reads values back, by {by}: {otherwise}"
            replaced = changed(before, held(bench.rule, bench.network))
            assert not replaced, f"{case}: a step changes {', '.join(replaced)} by Python: {otherwise}"

    def test_changes_gradients_only(self) -> None:
        for case in self._structures():
            bench = self.bench(case)
            _, expected = bench.clean_pass()
            named = {**bench.network.parameters, "inputs": bench.inputs, "target": bench.target}
            before = {name: tensor.clone() for name, tensor in named.items()}
            expected = {name: tensor.clone() for name, tensor in expected.items()}
            bench.run()
            for name, tensor in named.items():
                assert torch.equal(tensor, before[name]), f"{case}: the rule changes {name}"
            for name, tensor in bench.network.buffers.items():
                if name in bench.network.owned:
                    continue
                why = "has not the running statistics of one forward pass" if name in running(bench) else "changes"
                assert close(tensor, expected[name]), f"{case}: buffer {name} {why}"

    def test_feedback_initialisation_means_what_is_declared(self) -> None:
        used = "bw_init" not in self.rule().unused_parameters
        for problem_type in sorted(self.rule().problem_types):
            case = Case(problem_type)
            results = [
                Bench.make(self.rule(), self.options, case, [(3, init)]).gradients()["weight.0"]
                for init in ("ortho", "lecun")
            ]
            differs = not torch.equal(*results)
            assert differs == used, (
                "bw_init makes no difference: name it in unused_parameters, or the grid trains everything twice"
                if used
                else "bw_init makes a difference, but is in unused_parameters"
            )

    def test_layerwise_rules_are_local(self) -> None:
        """Weights of later layers do not matter, and `learned` comes in order, when the gradient stands."""
        if not self.rule().layerwise:
            return
        for case in self._structures():
            bench = self.bench(case)
            step, learned = bench.step(), dict[int, Tensor]()

            def note(layer: Layer, learned: dict[int, Tensor] = learned) -> None:
                learned[layer.index] = layer.weight_gradient.clone()

            step.learned = note
            bench.rule.gradients(step)
            assert list(learned) == list(range(len(WIDTHS))), f"{case}: step.learned is called for {list(learned)}"
            for k, gradient in learned.items():
                assert torch.equal(gradient, bench.network.gradients[f"weight.{k}"]), (
                    f"{case}: the gradient of layer {k} changes after step.learned"
                )
            for k in reversed(learned):
                for later in bench.network.layers[k + 1 :]:
                    later.weight.mul_(-2)
                assert torch.equal(learned[k], bench.gradients()[f"weight.{k}"]), (
                    f"{case}: layer {k} depends on later layers, so the rule is not layerwise"
                )

    def test_layerwise_updates_give_the_same_numbers(self) -> None:
        if not self.rule().layerwise:
            return
        for problem_type in sorted(self.rule().problem_types):
            ends = []
            for layerwise in (False, True):
                cohort = self._cohort(problem_type, epochs=1, dtype=torch.float64, layerwise=layerwise)
                cohort.run_epoch()
                ends.append(cohort.records[0].history["loss"])
            assert ends[0] == ends[1], f"{problem_type}: {ends[1]} with updates during the forward pass, else {ends[0]}"

    def test_trains_on_digits(self) -> None:
        for problem_type in sorted(self.rule().problem_types):
            cohort = self._cohort(problem_type, epochs=10)
            while not cohort.done:
                cohort.run_epoch()
            record = cohort.records[0]
            assert record.status == "complete", f"{problem_type}: the run {record.status}"
            losses = record.history["loss"]
            assert losses[-1] < losses[0], f"{problem_type}: the loss does not fall: {losses}"
            if problem_type == "classification":
                assert record.test is not None
                error = record.test["error"] or 0.0
                assert error < GUESSING, f"the test error is {error}, about that of guessing"

    def bench(self, case: Case) -> Bench:
        """The rule with networks and a batch; a rule whose own forward pass is another overrides it."""
        return Bench.make(self.rule(), self.options, case)

    def _structures(self) -> Iterator[Case]:
        for problem_type in sorted(self.rule().problem_types):
            for batch_norm in (False, True):
                yield Case(problem_type, batch_norm=batch_norm)
                yield Case(problem_type, "gelu", batch_norm=batch_norm, use_bias=False, dropout=True)

    def _all_cases(self) -> Iterator[Case]:
        for problem_type in sorted(self.rule().problem_types):
            for activation in ACTIVATIONS:
                for batch_norm in (False, True):
                    for use_bias in (False, True):
                        yield Case(problem_type, activation, batch_norm, use_bias)
            losses = ("ce", "bce", "mse") if problem_type == "classification" else ("mse",)
            yield from (Case(problem_type, loss=loss, dropout=True) for loss in losses)
            yield from (Case(problem_type, batch_norm=batch_norm, batch=1) for batch_norm in (False, True))

    def _cohort(
        self, problem_type: str, epochs: int, dtype: torch.dtype = torch.float32, layerwise: bool = False
    ) -> Cohort:
        name = self.name or "rule"
        spec = RunSpec.model_validate(
            {
                "dataset": "digits",
                "algorithm": name,
                "problem_type": problem_type,
                "arch": "100-100",
                "epochs": epochs,
                "lr": 0.003,
                "batch_size": 32,
                "examples_frac": 1,
                "options": {name: dict(self.options)},
            }
        )
        data = load(spec.dataset, Path())
        return Cohort([spec], self.rule(), data, dtype=dtype, layerwise=layerwise)
