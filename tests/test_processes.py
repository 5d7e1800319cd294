"""How worker processes start: from any directory, from any script, and without leaving anything behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bpf import api
from bpf.cli import app as cli
from bpf.experiment.directory import open_experiment
from bpf.results import summary
from bpf.workers import processes
from waiting import SECONDS, eventually

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; from bpf.cli.app import main; main(sys.argv[1:])"
GRID = {"dataset": "digits", "algorithm": "dfa", "arch": "8", "activation": "tanh", "batch_norm": False}
GRID |= {"lr": 0.01, "bw_init": "ortho", "epochs": 1, "executions_per_trial": 1, "examples_frac": 0.2}


def python(work: Path, *arguments: str, script: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a directory, with this bpf installed; a script can come from its standard input."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BPF_", "PYTHON"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=work,
        env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
        input=script,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        start_new_session=True,
    )


def options(grid: dict[str, Any]) -> list[str]:
    texts = {name.replace("_", "-"): value for name, value in grid.items()}
    return [f"--{name}={value}" if value is not False else f"--no-{name}" for name, value in texts.items()]


def states(directory: Path) -> list[str]:
    return [row.state for row in summary.rows(open_experiment(directory))]


@pytest.mark.slow
@pytest.mark.parametrize("names", [["bpf"], ["statistics", "random", "queue", "selectors", "socket"]])
def test_what_lies_in_the_current_directory_is_not_imported(names: list[str], tmp_path: Path) -> None:
    """As for any command: Python puts only the directory of its script first."""
    here, program = tmp_path / "here", tmp_path / "bin" / "bpf"
    for file in (program, *(here / name / "__init__.py" for name in names)):
        file.parent.mkdir(parents=True)
        file.write_text(PROGRAM if file == program else "raise RuntimeError('the wrong module')\n")
    ended = python(here, str(program), "tune", "grid", *options(GRID), "--quiet")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert states(here / "grid") == ["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["script", "standard input"])
def test_a_script_needs_no_guard(source: str, tmp_path: Path) -> None:
    script = f"""
        import bpf

        print("once")
        experiment = bpf.tune({GRID!r}, "runs/mine", quiet=True)
        print(experiment.best_model("dfa").exists())
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    ended = python(tmp_path, "-", script=path.read_text()) if source != "script" else python(tmp_path, str(path))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "once\nTrue\n", "")


@pytest.mark.slow
def test_a_rule_beside_a_script_need_not_be_installed(tmp_path: Path) -> None:
    info = tmp_path / "code" / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bpf.algorithms]\nmine = mine:Mine\n")
    (tmp_path / "code" / "mine.py").write_text(
        "from bpf.algorithms.dfa import DirectFeedbackAlignment\n\n\n"
        'class Mine(DirectFeedbackAlignment):\n    """My own."""\n'
    )
    (tmp_path / "code" / "script.py").write_text(
        f"import bpf\n\nbpf.tune({GRID | {'algorithm': 'mine'}!r}, 'grid', quiet=True)\n"
    )
    ended = python(tmp_path, "code/script.py")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert states(tmp_path / "grid") == ["complete"]


STARTING = """
    import multiprocessing, os, sys
    from bpf.workers import processes

    processes.METHOD, processes.PRELOADED = sys.argv[1], ("ours",)
    sys.path.insert(0, "code")
    import ours

    os.environ["SET_LATER"] = "yes"
    mine, theirs = multiprocessing.Pipe()
    process = processes.start(ours.tell, theirs, name="one")
    told = mine.recv()
    process.join()
    print(told["path"] == [entry or os.getcwd() for entry in sys.path], told["environment"] == dict(os.environ))
    print(told["name"], process.exitcode, sys.modules["__main__"].__dict__ is globals(), told["imported here"])
"""
OURS = """
    import os, sys
    from multiprocessing import current_process

    IMPORTED_BY = os.getpid()


    def tell(connection):
        here = {"path": sys.path, "environment": dict(os.environ), "name": current_process().name}
        connection.send(here | {"imported here": IMPORTED_BY == os.getpid()})
"""


@pytest.mark.parametrize("method", sorted({"forkserver", "spawn"} & {*multiprocessing.get_all_start_methods()}))
@pytest.mark.parametrize("source", ["script", "standard input"])
def test_a_process_has_the_import_path_and_the_environment_of_the_one_that_starts_it(
    method: str, source: str, tmp_path: Path
) -> None:
    """And the server process, if there is one, has the import path as well: it is there that modules are imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "ours.py").write_text(textwrap.dedent(OURS))
    (tmp_path / "script.py").write_text(textwrap.dedent(STARTING))
    script = None if source == "script" else (tmp_path / "script.py").read_text()
    ended = python(tmp_path, "script.py" if script is None else "-", method, script=script)
    assert (ended.stdout, ended.stderr) == (f"True True\none 0 True {method == 'spawn'}\n", "")


# What is left behind


def processes_of(session: int) -> list[int]:
    """The processes of a session that live."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(of) == session and state not in "ZX":
            found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("imports", "end", "code"),
    [
        ("import time; time.sleep(1000)", "raise UsageError('It was a mistake.')", 2),
        ("import time; time.sleep(0.5)", "os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
    ids=["mistake", "killed"],
)
def test_nothing_stays_behind_when_the_command_ends_before_any_worker(
    imports: str, end: str, code: int, tmp_path: Path
) -> None:
    """After a mistake at once, whatever the server process still imports; after a kill as soon as it has."""
    (tmp_path / "slow.py").write_text(imports)
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\nfrom bpf.cli import app as cli, training\nfrom bpf.workers import processes\n"
        "from bpf.errors import UsageError\n\n"
        f"def opened(*_):\n    {end}\n\n"
        "processes.PRELOADED, training.place_of = ('slow',), opened\ncli.main(sys.argv[1:])\n"
    )
    with (tmp_path / "said").open("w+") as said:
        command = subprocess.Popen(
            [sys.executable, "program.py", "tune", "grid", *options(GRID)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            assert command.wait(SECONDS) == code
            eventually(lambda: processes_of(command.pid) == [])
        finally:
            for pid in processes_of(command.pid):
                os.kill(pid, signal.SIGKILL)
        said.seek(0)
        assert said.read() == ("Error: It was a mistake.\n" if code == 2 else "")


INTERRUPTED = """
import os, signal
from multiprocessing import forkserver
from bpf.workers import processes

processes.PRELOADED = ("slow",)
processes.warm_up()
os.kill(forkserver._forkserver._forkserver_pid, signal.SIGINT)
started = processes.start(os.getpid, name="one")
started.join(600)
print(started.exitcode)
"""


@pytest.mark.skipif(processes.METHOD != "forkserver", reason="the system has no fork server")
def test_an_interrupt_during_the_imports_leaves_the_server_alone(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches every process."""
    (tmp_path / "slow.py").write_text("import time; time.sleep(2)")
    ended = python(tmp_path, script=INTERRUPTED, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "0\n")


AT_ONCE = """
import os, pickle, sys, threading, time
from bpf.workers import processes

def mine(): pass

processes.PRELOADED = ()  # which takes long, and plays no part
main, before = sys.modules["__main__"], dict(os.environ)
threads = [threading.Thread(target=lambda: processes.start(time.sleep, 0, name="one").join()) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sys.modules["__main__"] is main and dict(os.environ) == before
print(pickle.loads(pickle.dumps(mine)) is mine)
"""


def test_threads_that_start_processes_at_once_leave_the_program_as_it_was(tmp_path: Path) -> None:
    ended = python(tmp_path, script=AT_ONCE)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "True\n")


# When imports begin


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs a command that trains nothing; returns how often it let workers' imports begin."""
    monkeypatch.chdir(tmp_path)
    calls: list[int] = []
    monkeypatch.setattr(processes, "warm_up", lambda: calls.append(1))
    monkeypatch.setattr(api, "run", lambda *arguments: sys.exit())

    def run(*arguments: str) -> int:
        calls.clear()
        with suppress(SystemExit):
            cli.main([*arguments])
        return len(calls)

    return run


def test_imports_begin_early_for_a_grid_that_will_be_trained_and_for_nothing_else(
    warmed: Callable[..., int],
) -> None:
    grid = options(GRID)
    assert warmed("tune", "grid", *grid, "--dry-run") == 0
    assert warmed("tune", "grid", *grid, "--lr", "-1") == 0
    assert warmed("tune", "grid", *grid, "--plan-only") == 0
    assert warmed("tune", "grid", *grid) == 1
    assert warmed("resume", "grid") == 1
    assert warmed("resume", "nowhere") == 0
    assert warmed("train", "single", "--dataset", "digits", "--algorithm", "dfa") == 0
