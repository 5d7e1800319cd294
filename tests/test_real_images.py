"""Real images through the public door. Needs the original files of Fashion-MNIST, where BPF_TEST_FASHION_MNIST says."""

import json
import os
import shutil
import statistics
from pathlib import Path

import pytest

from bpf.cli import app as cli
from browser import check_page

SOURCE = os.environ.get("BPF_TEST_FASHION_MNIST")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    raw = directory / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in Path(SOURCE or "").glob("*.gz"):
        shutil.copy(file, raw)
    return directory


needs_images = pytest.mark.skipif(
    SOURCE is None, reason="BPF_TEST_FASHION_MNIST does not say where the original files are"
)

pytestmark = pytest.mark.slow


@needs_images
@pytest.mark.parametrize(("rule", "most"), [("bp", 0.15), ("dfa", 0.15), ("ll-cce", 0.15), ("drtp", 0.20)])
def test_fashion_mnist_after_five_epochs(
    rule: str, most: float, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bpf(
        *("train", tmp_path / rule, "--dataset", "fmnist", "--data-dir", data_dir),
        *("--algorithm", rule, "--arch", "500-500", "--activation", "tanh", "--epochs", "5"),
        *("--examples-frac", "1", "--lr", "0.0003", "--json"),
    )
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "complete"
    assert report["test"]["error"] < most


@needs_images
def test_the_report_of_a_grid_over_five_rules(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command trains, one draws; the page is looked at in a browser, and its picture kept."""
    bpf(
        *("tune", tmp_path / "grid", "--dataset", "fmnist", "--data-dir", data_dir),
        *("--algorithm", "bp,dfa,ll-cce,ll-mse,drtp", "--arch", "64,64-32", "--activation", "tanh,relu"),
        *(
            "--no-batch-norm",
            "--bw-init",
            "ortho",
            "--lr",
            "1e-3,1e-2,3e-2",
            "--epochs",
            "4",
            "--examples-frac",
            "0.05",
        ),
        *("--tracker", "bp_cosine", "--tracker", "weight_alignment", "--quiet"),
    )
    assert "54 cells complete." in capsys.readouterr().out
    bpf("report", tmp_path / "grid", "--figures", "png")
    page, *figures = map(Path, capsys.readouterr().out.splitlines())
    assert len(figures) > 10
    for width, dark in ((1200, False), (390, True)):
        shown = check_page(page, "fashion-mnist", width, dark, tmp_path / "profile")
        assert shown.count("<section") == 12
        assert shown.count("<svg") == len(figures)
    bpf("export", tmp_path / "grid", "--what", "trackers", "--format", "json")
    trackers = json.loads(capsys.readouterr().out)
    of_dfa = [one for one in trackers if (one["algorithm"], one["activation"]) == ("dfa", "tanh")]
    for layer in ("weight_alignment/layer.1", "bp_cosine/layer.0"):
        start, end = (statistics.fmean(one[layer] for one in of_dfa if one["epoch"] == epoch) for epoch in (0, 4))
        assert abs(start) < 0.1
        assert end > 0.2


def bpf(*command: str | Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(list(map(str, command)))
    assert end.value.code in (0, None)
