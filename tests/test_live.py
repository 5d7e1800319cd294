"""What a person sees while a grid is trained: live rows in a terminal, lines elsewhere."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from bpf.console import progress as console
from bpf.console.progress import LiveProgress
from bpf.results.summary import Outset
from bpf.words import sparkline
from bpf.workers.events import Began, Ended, GivenUp, Left, Trained, Trouble

OUTSET = Outset("val_loss", total=8, open=7, cost=70.0, best={"bp": 0.5}, varying=frozenset({"lr"}))
BEGAN = Began("dfa", "500-500", "tanh", cells=2, runs=6, epoch=0, epochs=10, cost=20.0)

Screen = Callable[..., io.StringIO]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Standard error as a terminal of 80 columns or as a file; returns what is written to it."""

    def make(terminal: bool, kind: str = "xterm") -> io.StringIO:
        written = io.StringIO()
        environment = {"TERM": kind, "COLUMNS": "80", "LINES": "30"}
        shown = Console(file=written, force_terminal=terminal, width=80, highlight=False, _environ=environment)
        monkeypatch.setattr(console, "err", shown)
        return written

    return make


def ended(number: int, rule: str = "dfa", state: str = "complete", value: float | None = 0.25) -> Ended:
    return Ended(f"key-{number}", f"name-{number}", rule, {"lr": 0.1, "arch": "500-500"}, state, value, 10.0)


def rows(progress: LiveProgress) -> list[str]:
    """The live view as it stands now, row by row."""
    view = io.StringIO()
    Console(file=view, width=80, color_system=None).print(progress._live.renderable)
    return [line.rstrip() for line in view.getvalue().splitlines()]


def test_rows_fit_into_a_narrow_terminal(screen: Screen) -> None:
    screen(True)
    with LiveProgress(OUTSET) as progress:
        progress(1, BEGAN)
        for epoch in range(1, 10):
            progress(1, Trained(epoch, 12345.6, 1 / epoch))
        for number, rule in enumerate(("dfa", "drtp", "ll-cce", "ll-mse")):
            progress(2, ended(number, rule, value=0.1 + number))
        progress(2, ended(5, state="diverged", value=None))
        cells, worker, best = rows(progress)
    assert "6/8" in cells
    assert cells.endswith(" left, 1 diverged")
    assert "9/10 dfa 500-500 tanh, 2 cells █" in worker
    assert worker.endswith("▁ 12,346 examples/s")
    assert best == "best val_loss 0.1 by dfa, 0.5 by bp, 1.1 by drtp, 2.1 by ll-cce, 3.1 by ll-mse"


def test_a_last_word_of_a_worker_that_was_given_up_changes_nothing(screen: Screen) -> None:
    screen(True)
    with LiveProgress(OUTSET) as progress:
        progress(1, BEGAN)
        progress(1, Left("crashed", "its process or its node was lost"))
        before = rows(progress)
        progress(1, Trained(3, 12345.6, 0.5))
        assert rows(progress) == before


def test_of_many_workers_some_have_a_bar(screen: Screen) -> None:
    screen(True)
    with LiveProgress(OUTSET) as progress:
        for worker in range(1, 1001):
            progress(worker, BEGAN)
            progress(worker, Trained(5, 100.0, None))
        cells, *bars, more, best = rows(progress)
        assert cells.endswith(" left, 100,000 examples/s")
        assert [bar.split()[1] for bar in bars] == list("12345678")
        assert all(bar.endswith("5/10 dfa 500-500 tanh, 2 cells 100 examples/s") for bar in bars)
        assert (more, best) == ("and 992 more workers", "best val_loss 0.5 by bp")

        progress(3, BEGAN)  # its next cohort
        progress(5, GivenUp())
        progress(7, Left("done"))
        cells, *bars, more, best = rows(progress)
        assert cells.endswith(" left, 99,700 examples/s")
        assert [bar.split()[1] for bar in bars] == ["1", "2", "3", "4", "6", "8", "9", "10"]
        assert more == "and 990 more workers"

        for worker in range(9, 1001):
            progress(worker, Left("done"))
        cells, *bars, best = rows(progress)
        assert [bar.split()[1] for bar in bars] == ["1", "2", "3", "4", "6", "8"]
        assert len(progress._tasks) == 7
        for worker in (2, 3, 4, 6, 8):
            progress(worker, GivenUp())
        cells, bar, best = rows(progress)
        assert cells.endswith(" left")
        assert bar.endswith(" 100 examples/s")


@pytest.mark.parametrize(("terminal", "kind"), [(False, "xterm"), (True, "dumb")])
def test_lines_where_rows_cannot_be_drawn(
    screen: Screen, terminal: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", -1.0)
    written = screen(terminal, kind)
    with LiveProgress(OUTSET) as progress:
        progress(1, BEGAN)
        progress(1, ended(1))
        progress(1, ended(2, state="diverged", value=None))
    first, second = written.getvalue().splitlines()
    assert first.startswith("2/8 name-1: dfa lr=0.1: val_loss 0.25 (")
    assert first.endswith("best val_loss 0.25 by dfa)")
    assert second.startswith("3/8 name-2: dfa lr=0.1: diverged (")


def test_quiet_shows_troubles_only(screen: Screen) -> None:
    for terminal in (True, False):
        written = screen(terminal)
        with LiveProgress(OUTSET, quiet=True) as progress:
            progress(1, BEGAN)
            progress(1, Trained(1, 10.0, 0.5))
            for _ in range(2):
                progress(1, Trouble("the disk is full"))
            progress(1, ended(1))
        assert written.getvalue().count("the disk is full") == 1
        assert "name-1" not in written.getvalue()
        assert "━" not in written.getvalue()


def test_verbose_has_a_line_for_each_cell(screen: Screen) -> None:
    written = screen(True)
    with LiveProgress(OUTSET, verbose=True) as progress:
        progress(1, BEGAN)
        for number in range(3):
            progress(1, ended(number))
    assert [f"name-{number}" in written.getvalue() for number in range(3)] == [True] * 3


def test_what_is_finished_already_says_so(screen: Screen) -> None:
    finished = Outset("loss", 8, 0, 0.0, {"bp": 0.5}, frozenset())
    written = screen(False)
    with LiveProgress(finished):
        pass
    assert written.getvalue() == "Nothing is left to train.\n"
    with LiveProgress(finished, quiet=True):
        pass
    assert written.getvalue() == "Nothing is left to train.\n"


@pytest.mark.parametrize(
    ("values", "curve"),
    [([], ""), ([1.0], ""), ([2.0, 1.0], "█▁"), ([1.0, 1.0], "▁▁"), ([float(n) for n in range(16)], "▁▂▃▄▅▆▇█")],
)
def test_curves(values: list[float], curve: str) -> None:
    assert sparkline(values) == curve
