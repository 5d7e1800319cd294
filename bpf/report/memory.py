"""How much memory one training step of a saved network needs."""

import math

from bpf.errors import RunError
from bpf.experiment.directory import Experiment
from bpf.experiment.grid import check_run
from bpf.experiment.places import model_path
from bpf.experiment.plugins import load_rules
from bpf.results import models
from bpf.study.cells import Row
from bpf.training.footprint import Footprint, footprint


def of_cell(experiment: Experiment, row: Row) -> Footprint:
    """What a step of a cell's training takes on a CPU, as its saved model describes it.

    Raises UsageError if its model is not there or cannot be read, and BpfError if its rule is not, or is another now.
    """
    model = models.read(model_path(experiment.files / "models", row.rule, row.key))
    rule, spec = load_rules([row.rule])[row.rule], model.spec
    inputs, classes = math.prod(model.shape), len(model.classes)
    check_run(spec, rule)
    try:
        return footprint(spec, rule, inputs, inputs if spec.problem_type == "reconstruction" else classes)
    except Exception as error:  # a report is no place for what a rule does
        raise RunError(f"A step of {row.rule} failed: {type(error).__name__}: {error}") from error
