"""Steps over static memory, and their recording with CUDA replaced: what a graph may hold, and what cannot be."""

import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch

from bpf.algorithms.dfa import DirectFeedbackAlignment
from bpf.data import cache
from bpf.experiment.plugins import load_rules
from bpf.nn import optim, philox
from bpf.nn.layer import Structure
from bpf.nn.network import Network
from bpf.nn.optim import StackedOptimizer
from bpf.nn.randomness import Draws, generator
from bpf.spec.run import RunSpec
from bpf.testing.bench import ReadsBack
from bpf.training import capture, footprint, hardware
from bpf.training.capture import Recorder
from bpf.training.cohort import Cohort

CPU = torch.device("cpu")
EVERYTHING = {"dropout": 0.3, "rotation": 20, "brightness": 0.3, "batch_norm": True, "weight_decay": 0.01}
EVERYTHING |= {"flip": 0.5, "crop": 2, "input_dropout": 0.2}
RULES = (
    *("bp", "dfa", "drtp", "ll-cce", "ll-mse", "fa", "sdfa", "shallow", "pepita", "sign-symmetry", "kp", "dkp"),
    *("pred", "predsim", "pc", "fw-dtp", "ff", "fg-a"),
)
OPTIMIZERS = ("adam", "adamw", "rmsprop", "sgd", "nag")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return cache.load("digits", tmp_path_factory.mktemp("data"))


def specs(rule="dfa", runs=3, **changes):
    small = {"dataset": "digits", "arch": "24-16", "epochs": 9, "examples_frac": 0.2, "objective": "val_loss"}
    one = small | {"algorithm": rule, "batch_size": 50} | changes
    return [RunSpec.model_validate(one | {"lr": 1e-3 * (1 + run), "seed": run // 2}) for run in range(runs)]


def cohort_of(rule, data, **changes):
    return Cohort(specs(rule, **changes), load_rules([rule])[rule], data)


def as_on_cuda(monkeypatch):
    """Take the ways of a CUDA device without kernels, on a CPU: torch's operations and the device's clock only."""
    monkeypatch.setattr(optim, "_fused", optim._stacked)
    monkeypatch.setattr(
        Draws, "_words", lambda draws, purpose, count: philox.words(draws._key(purpose), draws._clock.now, count)
    )


def places(cohort):
    """Where everything lies that a step may change."""
    steps, network = cohort._steps, cohort._network
    tensors = [*network.parameters.values(), *network.gradients.values(), *network.buffers.values()]
    tensors += [tensor for state in cohort._optimizer.state().values() for n, tensor in state.items() if n != "step"]
    tensors += [*cohort._optimizer._steps, steps._totals, steps._order, steps._rest, steps._clock.now]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize(
    ("rule", "optimizer"), [*((rule, "adam") for rule in RULES), *(("dfa", other) for other in OPTIMIZERS[1:])]
)
def test_a_step_reads_nothing_back_and_leaves_nothing_new(rule, optimizer, digits, monkeypatch):
    as_on_cuda(monkeypatch)
    cohort = cohort_of(rule, digits, optimizer=optimizer, **EVERYTHING)
    cohort.run_epoch()  # what is made at first use is made
    before, steps = places(cohort), cohort._steps
    with torch.no_grad():
        steps._clock.begin(1)
        steps._shuffle(1)
        strict = ReadsBack()
        with footprint._Meter() as meter, strict:
            steps._whole_step()
            steps._last_step()
            for batch in (cohort._validation._whole_batch, cohort._validation._last_batch):
                if batch.__name__ == "_last_batch" or cohort._validation._whole:
                    batch()
    assert strict.found == set()
    assert places(cohort) == before
    assert meter._now == 0, "something that a step has made outlives it"


def test_the_watch_over_steps_sees_what_it_should():
    mask = torch.tensor([True, False])
    for read in (lambda: mask.any().item(), mask.nonzero, lambda: torch.ones(2)[mask], lambda: bool(mask[0])):
        strict = ReadsBack()
        with strict:
            read()
        assert strict.found


@pytest.mark.parametrize("rule", ["dfa", "drtp", "bp"])
def test_the_ways_of_a_device_give_the_numbers_of_the_processor(rule, digits, monkeypatch):
    def losses():
        cohort = Cohort(specs(rule, **EVERYTHING), load_rules([rule])[rule], digits, dtype=torch.float64)
        for _ in range(3):
            cohort.run_epoch()
        return [record.history["val_loss"] for record in cohort.records]

    expected = losses()
    as_on_cuda(monkeypatch)
    for ours, theirs in zip(losses(), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


# Optimizers with a rate for each run


RATES, DECAYS = [0.1, 0.01, 0.01, 0.3], [0.0, 0.1, 0.2, 0.0]


def trained(name, momentum, dtype, layerwise=False):
    network = Network.build(Structure(6, (5, 4), 3), range(4), ["ortho"] * 4, dtype)
    optimizer = StackedOptimizer(name, network, RATES, DECAYS, momentum, layerwise)
    for step in range(5):
        for parameter, gradient in network.gradients.items():
            gradient.normal_(generator=generator(step, parameter))
        for layer in range(3 if layerwise else 1):
            optimizer.step(layer)
    return network.parameters, optimizer.state()


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(("name", "momentum"), [*((name, 0.9) for name in OPTIMIZERS), ("sgd", 0.0), ("nag", 0.0)])
def test_torchs_operations_are_the_fused_ones(name, momentum, layerwise, monkeypatch):
    expected, known = trained(name, momentum, torch.float64)
    monkeypatch.setattr(optim, "_fused", optim._stacked)
    ours, state = trained(name, momentum, torch.float64, layerwise)
    for parameter, tensor in expected.items():
        torch.testing.assert_close(ours[parameter], tensor, rtol=1e-12, atol=1e-14)
        assert state[parameter].keys() == known[parameter].keys()
        for one in state[parameter]:
            torch.testing.assert_close(state[parameter][one], known[parameter][one], rtol=1e-12, atol=1e-14)


INTERPRETED = """
import torch
from bpf.nn import kernels, optim
from test_steps import OPTIMIZERS, trained

for name, momentum in [*((name, 0.9) for name in OPTIMIZERS), ("sgd", 0.0), ("nag", 0.0)]:
    for dtype, precision in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        fused = optim._fused
        expected, _ = trained(name, momentum, dtype)
        optim._fused, optim.kernels_on = optim._stacked, lambda device: kernels
        ours, _ = trained(name, momentum, dtype)
        optim._fused = fused
        for parameter, tensor in expected.items():
            torch.testing.assert_close(ours[parameter], tensor, rtol=precision, atol=precision)
"""


def test_the_kernels_are_the_fused_operators():
    """By Triton's interpreter, on this processor."""
    pytest.importorskip("triton", reason="Triton is not on this system")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])  # noqa: PTH120
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_optimizer_imports_torchs_compiler():
    script = (
        "import sys, torch\nfrom test_steps import OPTIMIZERS, trained\n"
        "for name in OPTIMIZERS:\n    trained(name, 0.9, torch.float32)\n"
        "assert 'torch._dynamo' not in sys.modules and 'triton' not in sys.modules\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])  # noqa: PTH120
    environment = os.environ | {"PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


# Recording, with CUDA replaced


class Graph:
    """A graph that holds the function run while it is captured; a capture itself changes nothing."""

    recording: "Graph | None" = None
    captured = 0

    def __init__(self):
        self.function = None

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        Graph.recording = self

    def capture_end(self):
        Graph.recording = None
        Graph.captured += 1

    def replay(self):
        self.function()


class Stream:
    device = CPU

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def cuda(monkeypatch):
    """Enough of CUDA for a recorder, on which a capture runs nothing and a replay runs what was captured."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: warnings.catch_warnings())
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.delenv(capture.OFF, raising=False)
    Graph.captured = 0


def recorder(said, **options):
    return Recorder(torch.device("cuda:0"), "the rule new", said.append, **options)


def counting(calls):
    """A function that a graph can hold: captured, it does nothing but remember itself."""

    def function():
        if Graph.recording is not None:
            Graph.recording.function = lambda: calls.append("replayed")
        else:
            calls.append("called")

    return function


def test_a_function_is_called_twice_and_then_recorded_and_replayed(cuda):
    said, calls = [], []
    record = recorder(said)
    with record.stream():
        for _ in range(5):
            record.run("step", counting(calls))
        record.run("another", counting(calls))
    assert calls == ["called", "called", "replayed", "replayed", "replayed", "called"]
    assert (Graph.captured, said) == (1, [])


@pytest.mark.parametrize("why", ["variable", "rule", "cpu"])
def test_where_nothing_is_recorded_everything_is_called(why, cuda, monkeypatch):
    said, calls = [], []
    if why == "variable":
        monkeypatch.setenv(capture.OFF, "1")
    record = Recorder(CPU, "it", said.append) if why == "cpu" else recorder(said, able=why != "rule")
    with record.stream():
        for _ in range(5):
            record.run("step", counting(calls))
    assert calls == ["called"] * 5
    assert (Graph.captured, said) == (0, [])


def test_a_rule_that_waits_for_the_gpu_is_called_and_named_once(cuda):
    said, calls = [], []

    def waits():
        calls.append("called")
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)

    record = recorder(said)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            record.run("step", waits)
    [text] = said
    assert text.startswith(
        "The steps of the rule new are not recorded as CUDA graphs and take longer: it waits for the GPU in " + __file__
    )
    assert (len(calls), Graph.captured) == (5, 0)


def test_other_warnings_get_through(cuda):
    def warns():
        warnings.warn("mind the gap", stacklevel=1)

    record = recorder([])
    for _ in range(2):
        with pytest.warns(UserWarning, match="mind the gap"):
            record.run("step", warns)


class Counts(DirectFeedbackAlignment):
    """Decides by a counter of Python, which a recording would not move."""

    def gradients(self, step):
        self.count = getattr(self, "count", 0) + 1
        super().gradients(step)


class Remembers(DirectFeedbackAlignment):
    """Makes something at first use."""

    def gradients(self, step):
        if not hasattr(self, "seen"):
            self.seen = torch.zeros(1)
        super().gradients(step)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Counts, "it changes its count by Python, which a recording would not"),
        (Remembers, None),
    ],
)
def test_a_rule_that_a_recording_would_make_wrong_is_noticed(rule, reason, cuda, digits, monkeypatch):
    said = []
    cohort = Cohort(specs(), rule, digits, notice=said.append)
    cohort._recorder = cohort._steps._recorder = recorder(said)
    monkeypatch.setattr(Recorder, "_record", lambda self, name, function: function())
    for _ in range(2):
        cohort.run_epoch()
    where = "The steps of the rule new are not recorded as CUDA graphs and take longer: "
    assert said == ([f"{where}{reason}."] if reason else [])


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen capturing"), torch.OutOfMemoryError("no")]
)
def test_a_capture_that_fails(error, cuda):
    said, calls = [], []

    def fails():
        if Graph.recording is not None:
            raise error
        calls.append("called")

    record = recorder(said)
    for _ in range(2):
        record.run("step", fails)
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            record.run("step", fails)
        return
    record.run("step", fails)
    record.run("step", fails)
    assert calls == ["called"] * 4
    assert said == [
        "The steps of the rule new are not recorded as CUDA graphs and take longer: operation not permitted."
    ]


def test_a_cohort_hands_its_trouble_on(cuda, digits):
    said = []
    cohort = Cohort(specs(), Counts, digits, notice=said.append)
    cohort._recorder._give_up("it may not")
    assert said == ["The steps of the rule dfa are not recorded as CUDA graphs and take longer: it may not."]


# Devices by every spelling, with CUDA replaced


@pytest.fixture
def three_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


SPELLINGS = {
    "auto": ["cuda:0", "cuda:1", "cuda:2"],
    "cuda": ["cuda:0"],
    "cuda:0": ["cuda:0"],
    "cuda:2": ["cuda:2"],
    "cuda,cuda:1": ["cuda:0", "cuda:1"],
    "cuda:2,cuda:0": ["cuda:2", "cuda:0"],
    "cpu": ["cpu"],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_device_is_one_that_can_be_chosen(spelling, three_gpus, monkeypatch):
    monkeypatch.setattr(hardware, "cores", lambda: 1)
    assert RunSpec.model_validate(specs()[0].model_dump() | {"device": spelling}).device == spelling
    found = hardware.devices(spelling, None)
    assert found == SPELLINGS[spelling]
    assert hardware.devices(spelling, 2) == list(itertools.islice(itertools.cycle(found), 2))
    threads = torch.get_num_threads()
    for name in found:  # as a worker does with the name that it is given
        device = hardware.choose_device(name)
        assert (device.type == "cpu") or device.index is not None
        hardware.settle(device)
        torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
    assert three_gpus == [torch.device(name) for name in found if name != "cpu"]


def test_one_device_is_chosen_with_its_index(three_gpus):
    for spelling in ("auto", "cuda", "cuda:0"):
        assert hardware.choose_device(spelling) == torch.device("cuda", 0)


def test_precision_is_that_of_the_spec_and_put_back_by_measurements(digits):
    threads, before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        hardware.settle(CPU, "high")
        assert torch.get_float32_matmul_precision() == "high"
        hardware.settle(CPU)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(before)


# Memory


@pytest.mark.parametrize("rule", RULES)
def test_what_a_step_takes_is_the_same_where_nothing_is_computed(rule):
    kind = load_rules([rule])[rule]
    for changes in ({}, {"batch_norm": True, "dropout": 0.3}, {"optimizer": "sgd", "input_dropout": 0.2}):
        [spec] = specs(rule, runs=1, **changes)
        there, here = (footprint.footprint(spec, kind, 64, 10, device) for device in ("meta", "cpu"))
        assert (there.parameters, there.kept, there.state) == (here.parameters, here.kept, here.state)
        assert there.step == pytest.approx(here.step, rel=0.05)  # optimizers have another way on each device


@pytest.mark.parametrize("rule", ["bp", "drtp"])
def test_memory_of_a_cohort_is_that_of_its_runs(rule, digits):
    """What a cohort of several runs has alive at most in an epoch, beside the images, against the prediction."""
    changes = {"arch": "300-300", "dropout": 0.2, "input_dropout": 0.2, "batch_size": 200}
    kind, several = load_rules([rule])[rule], specs(rule, runs=4, **changes)
    predicted = 4 * footprint.run_bytes(several[0], kind, 64, 10, 258)
    with footprint._Meter() as meter:
        cohort = Cohort(several, kind, digits)
        cohort.run_epoch()
        built = meter.peak
    assert predicted == pytest.approx(built, rel=0.15)


class ReadsValues(DirectFeedbackAlignment):
    """Cannot be taken where there are no values."""

    def gradients(self, step):
        super().gradients(step)
        step.logits.sum().item()


def test_a_rule_that_needs_its_numbers_is_measured_by_computing(digits):
    [spec] = specs(runs=1)
    assert footprint.run_bytes(spec, ReadsValues, 64, 10, 100) == footprint.run_bytes(
        spec, DirectFeedbackAlignment, 64, 10, 100
    )


def test_a_cohort_on_a_gpu_is_what_its_memory_holds(monkeypatch):
    class Card:
        total_memory = 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    [spec], kind = specs(runs=1, arch="500-500"), DirectFeedbackAlignment

    def cells(sharers=1, executions=3, examples=1000):
        return hardware.cohort_cells(spec, kind, executions, 784, 10, examples, torch.device("cuda:0"), sharers)

    each = footprint.run_bytes(spec, kind, 784, 10, 1000)
    assert cells() == int((Card.total_memory - 784_000) * hardware.GPU_SHARE) // each // 3
    assert cells(sharers=2) < cells()
    assert cells(sharers=10**6) == 1
    Card.total_memory = 2**50
    assert cells(executions=1) == hardware.MAX_RUNS_GPU
