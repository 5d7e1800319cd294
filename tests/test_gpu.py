"""On a CUDA device: the numbers of the CPU, and of itself, however steps are run, stopped, killed and placed.

`make gpu` runs these where there is one. Elsewhere they are skipped, and `test_steps.py` covers the same code with CUDA
replaced.
"""

import io
import json
import signal
from pathlib import Path

import pytest
import torch

import bpf
from bpf.cli import app as cli
from bpf.data import cache
from bpf.data.cache import Data
from bpf.experiment.directory import open_experiment
from bpf.experiment.plugins import load_rules
from bpf.nn.device import kernels_on
from bpf.nn.randomness import Clock, Draws
from bpf.results import summary
from bpf.spec.run import RunSpec
from bpf.training import capture, footprint, hardware
from bpf.training.cohort import Cohort
from chaos import Command, outcomes
from test_steps import EVERYTHING, OPTIMIZERS, RULES, Counts, ReadsValues

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here: `make gpu` needs one"),
]
GPU = torch.device("cuda", 0)
ACTIVATIONS = ("tanh", "sigmoid", "relu", "lrelu", "swish", "gelu", "elu")
GRID = [
    *("--dataset", "digits", "--algorithm", "bp,drtp,ll-cce", "--arch", "12,9-7", "--activation", "tanh"),
    *("--batch-norm", "--bw-init", "ortho", "--lr", "0.001,0.01", "--epochs", "6", "--examples-frac", "1"),
    *("--objective", "val_loss", "--dropout", "0.2", "--executions-per-trial", "2", "--checkpoint-every", "0"),
    *("--quiet", "--workers", "1", "--device", "cuda"),
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return cache.load("digits", tmp_path_factory.mktemp("data"))


def specs(rule: str, runs: int = 5, **changes: object) -> list[RunSpec]:
    small = {"dataset": "digits", "arch": "24-16", "epochs": 6, "examples_frac": 0.5, "objective": "val_loss"}
    one = small | {"algorithm": rule, "batch_size": 50, "allow_unstable": True} | changes
    return [RunSpec.model_validate(one | {"lr": 1e-3 * (1 + run % 2), "seed": run // 2}) for run in range(runs)]


def cohort(several: list[RunSpec], data: Data, device: torch.device, **options: object) -> Cohort:
    rule = several[0].algorithm
    return Cohort(several, load_rules([rule])[rule], data.to(device), device=device, **options)  # type: ignore[arg-type]


def trained(several: list[RunSpec], data: Data, device: torch.device, **options: object) -> Cohort:
    found = cohort(several, data, device, **options)
    while not found.done:
        found.run_epoch()
    return found


def numbers(done: Cohort) -> list[object]:
    """What came out of each run, to the last bit."""
    found = []
    for run, record in enumerate(done.records):
        state = {n: t.numpy().tobytes() for n, t in done.best_network(run).items()} if record.test else {}
        found.append((record.status, record.history, record.test, state))
    return found


def assert_close(ours: Cohort, theirs: Cohort, tolerance: float) -> None:
    for run, (one, other) in enumerate(zip(ours.records, theirs.records, strict=True)):
        assert (one.status, one.epochs, one.best_epoch) == (other.status, other.epochs, other.best_epoch)
        for name, values in other.history.items():
            assert one.history[name] == pytest.approx(values, rel=tolerance, abs=tolerance)
        for name, tensor in theirs.best_network(run).items():
            torch.testing.assert_close(ours.best_network(run)[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rules_are_those_of_the_cpu(rule: str, batch_norm: bool, digits: Data) -> None:
    several = specs(rule, **EVERYTHING | {"batch_norm": batch_norm})
    ours, theirs = (trained(several, digits, device, dtype=torch.float64) for device in (GPU, torch.device("cpu")))
    assert_close(ours, theirs, 1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_the_cpu(activation: str, digits: Data) -> None:
    if activation not in RunSpec.model_json_schema()["properties"]["activation"]["enum"]:
        pytest.skip(f"there is no {activation}")
    several = specs("dfa", activation=activation)
    ours, theirs = (trained(several, digits, device, dtype=torch.float64) for device in (GPU, torch.device("cpu")))
    assert_close(ours, theirs, 1e-7)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_are_those_of_the_cpu(optimizer: str, layerwise: bool, digits: Data) -> None:
    several = specs("ll-cce", optimizer=optimizer, weight_decay=0.01)
    ours, theirs = (
        trained(several, digits, device, dtype=torch.float64, layerwise=layerwise)
        for device in (GPU, torch.device("cpu"))
    )
    assert_close(ours, theirs, 1e-7)


@pytest.mark.parametrize(
    "problem", [{"problem_type": "reconstruction"}, {"output_loss": "bce"}, {"output_loss": "mse"}]
)
def test_problems_are_those_of_the_cpu(problem: dict[str, str], digits: Data) -> None:
    several = specs("dfa", **problem)
    ours, theirs = (trained(several, digits, device, dtype=torch.float64) for device in (GPU, torch.device("cpu")))
    assert_close(ours, theirs, 1e-7)


def test_runs_that_leave_at_different_epochs(digits: Data) -> None:
    several = specs("dfa", runs=8, epochs=30, early_stopping=2, optimizer="sgd", batch_norm=True)
    several = [spec.model_copy(update={"lr": 0.003 * 3 ** (run % 5)}) for run, spec in enumerate(several)]
    ours, theirs = (trained(several, digits, device, dtype=torch.float64) for device in (GPU, torch.device("cpu")))
    assert len({record.epochs for record in ours.records}) > 2
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"batch_size": 10_000}], ids=["plain", "everything", "one batch"])
@pytest.mark.parametrize("rule", RULES)
def test_recorded_steps_are_called_ones_bit_for_bit(
    rule: str, changes: dict[str, object], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    several, said = specs(rule, **changes), list[str]()
    recorded = cohort(several, digits, GPU, notice=said.append)
    for _ in range(4):
        recorded.run_epoch()
    assert recorded._recorder._graphs, "nothing was recorded"
    assert said == []
    while not recorded.done:
        recorded.run_epoch()
    monkeypatch.setenv(capture.OFF, "1")
    assert numbers(recorded) == numbers(trained(several, digits, GPU))


def test_twice_is_the_same(digits: Data) -> None:
    several = specs("dfa", **EVERYTHING)
    assert numbers(trained(several, digits, GPU)) == numbers(trained(several, digits, GPU))


def test_from_each_epoch_it_goes_on_bit_for_bit(digits: Data) -> None:
    several, states = specs("ll-mse", **EVERYTHING), []
    whole = cohort(several, digits, GPU)
    while not whole.done:
        file = io.BytesIO()
        torch.save(whole.state(), file)
        states.append(file)
        whole.run_epoch()
    for file in states:
        file.seek(0)
        resumed = cohort(several, digits, GPU)
        resumed.load(torch.load(file, map_location="cpu", weights_only=True))
        while not resumed.done:
            resumed.run_epoch()
        assert numbers(resumed) == numbers(whole)


def test_a_grid_that_is_killed_and_resumed_is_the_undisturbed_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", str(tmp_path / "undisturbed"), *GRID])
    assert not end.value.code
    directory = tmp_path / "grid"
    for place in ("bpf.training.checkpoint:save", "bpf.nn.optim:StackedOptimizer.step"):
        with Command(tmp_path / place.replace(":", "-"), "tune", str(directory), *GRID) as command:
            command.until("stored")
            command.arm({f"worker after {place}": 2})
            command.until("killed")
            command.kill(command.process.pid)
            assert command.wait() == -signal.SIGKILL
    with pytest.raises(SystemExit) as end:
        cli.main(["resume", str(directory), "--device", "cuda:0", "--quiet"])
    assert not end.value.code
    assert outcomes(directory) == outcomes(tmp_path / "undisturbed")


@pytest.mark.usefixtures("in_this_process")
def test_out_of_memory_fewer_runs_are_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "GPU_SHARE", 1000.0)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + 700 * 2**20) / total, GPU)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main(
                f"tune {tmp_path}/grid --dataset digits --algorithm bp --arch 1500-1500 --epochs 2 --lr "
                "1e-5,2e-5,3e-5,4e-5,5e-5,6e-5,7e-5,8e-5,9e-5,1e-4,2e-4,3e-4,4e-4,5e-4,6e-4,7e-4 --executions 4 "
                "--activation tanh --device cuda --workers 1".split()
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert not end.value.code
    rows = summary.rows(open_experiment(tmp_path / "grid"))
    assert {(row.state, row.cause) for row in rows} == {("complete", "memory")}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_devices_by_every_spelling(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = "--dataset digits --algorithm dfa --arch 8 --activation tanh --bw-init ortho --epochs 1 --workers 1"
    for command in (
        f"train one --dataset digits --algorithm dfa --arch 8 --epochs 2 --device {device}",
        f"tune grid {grid} --lr 0.01 --device {device}",
        f"tune grid {grid} --lr 0.01,0.1 --device {device}",
        f"resume grid --device {device}",
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([*command.split(), "--quiet"])
        assert not end.value.code, command
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["best", "grid", "--json"])
    assert json.loads(capsys.readouterr().out)


def test_models_are_used_on_the_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(f"train {tmp_path}/one --dataset digits --algorithm dfa --arch 16 --epochs 2 --quiet".split())
    [path] = (tmp_path / "one").rglob("*.safetensors")
    model, images = bpf.load(path), torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    expected = model(images)
    torch.testing.assert_close(model.to(GPU)(images.to(GPU)).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_kernels_draw_the_bits_of_the_cpu() -> None:
    found = []
    for device in (GPU, torch.device("cpu")):
        clock = Clock(device)
        clock.begin(3)
        clock.tick()
        draws = Draws([1, 2, 1], clock, torch.float32)
        thresholds = torch.tensor([-(2**31), 0, 2**30], dtype=torch.int32, device=device)
        scales = torch.tensor([1.0, 2.0, 4.0], device=device)
        found.append((draws.uniform("noise", 64, 501).cpu(), draws.kept("x", (64, 501), thresholds, scales).cpu()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    if kernels_on(GPU) is None:
        pytest.fail("Triton's kernels cannot be used here: torch's operations were tested in their place")


@pytest.mark.parametrize("rule", [Counts, ReadsValues])
def test_a_rule_that_cannot_be_recorded_is_called_and_named(rule: type, digits: Data) -> None:
    said: list[str] = []
    several = specs("dfa")
    ours = Cohort(several, rule, digits.to(GPU), device=GPU, notice=said.append)
    while not ours.done:
        ours.run_epoch()
    [text] = said
    assert text.startswith("The steps of the rule dfa are not recorded as CUDA graphs and take longer: it ")
    assert numbers(ours) == numbers(trained(several, digits, GPU))


@pytest.mark.parametrize("rule", ["bp", "dfa", "drtp", "ll-cce"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2, "batch_norm": True}, {"batch_size": 1024}], ids=str)
def test_memory_is_the_predicted(rule: str, changes: dict[str, object], digits: Data) -> None:
    several = specs(rule, runs=48, arch="1000-1000-1000", epochs=5, **changes)
    data = digits.to(GPU)
    trained(several[:1], digits, GPU)  # what libraries take once
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    one = Cohort(several, load_rules([rule])[rule], data, device=GPU)
    for _ in range(4):
        one.run_epoch()
    taken = torch.cuda.max_memory_allocated(GPU) - before
    predicted = 48 * footprint.run_bytes(several[0], load_rules([rule])[rule], 64, 10, len(digits.train_labels))
    assert predicted == pytest.approx(taken, rel=0.15)


def test_precision_is_as_asked_for(digits: Data) -> None:
    if torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip("this card has no TF32")
    several, found = specs("bp", arch="512-512", batch_size=256), []
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            found.append(numbers(trained(several, digits, GPU)))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found[0] == found[2] != found[1]
