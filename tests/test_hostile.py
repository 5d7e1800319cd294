"""What others can put in bpf's way, one thing at a time; tests/test_fuzz.py draws many more."""

import itertools
import os
import shutil
import sqlite3
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.table import Table

from bpf import locks
from bpf.cli import app as cli
from bpf.console import screen
from bpf.errors import BpfError, Damaged, UsageError
from bpf.experiment import places, provenance
from bpf.experiment.directory import Experiment, open_experiment
from bpf.reading import check_name, json_of, yaml_of
from bpf.study import owner as owners
from bpf.study import stored
from bpf.study.database import Database
from bpf.study.owner import Owner
from bpf.study.view import StudyView
from invented import finished, planned, record

pytestmark = pytest.mark.usefixtures("in_this_process")

FOREIGN = "years of work\n"


@pytest.fixture
def ex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """Two finished cells, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return finished(tmp_path / "ex", lambda row, number: record(number, [0.5, row.params["lr"], 0.4]), lr=(0.1, 0.2))


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Somebody's folder, which stays as it is."""
    folder = tmp_path / "outside"
    for name in ("poetry.lock", "0123456789abcdef.lock", "checkpoints/thesis.pt", ".bashrc.original"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FOREIGN)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    yield folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def said(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    """Exit code, and what was printed to standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(list(command))
    return int(end.value.code or 0), capsys.readouterr().err


# Links and folders


@pytest.mark.parametrize(
    "part", ["locks", "checkpoints", "models", "running.lock", "study.db", "tensorboard", "report"]
)
@pytest.mark.parametrize("command", ["clean", "resume", "status"])
def test_links_are_not_followed(
    ex: Experiment, outside: Path, capsys: pytest.CaptureFixture[str], part: str, command: str
) -> None:
    path = ex.directory / part
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "poetry.lock" if "." in part else outside)
    code, told = said(capsys, command, "ex")
    assert (code, told.partition(",")[0]) == (2, f"Error: ex/{part} is a link")


def test_files_that_are_said_to_lie_elsewhere(
    ex: Experiment, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """experiment.yaml names a folder of somebody else: nothing is written or removed there."""
    path = ex.directory / "experiment.yaml"
    path.write_text(path.read_text().replace("files: null", f"files: {outside}"))
    assert said(capsys, "clean", "ex", "--checkpoints") == (0, "")
    code, told = said(capsys, "tune", "ex", *GRID, "--lr", "0.1,0.2,0.3", "-q")
    assert code == 2
    assert "is to hold the checkpoints of 'ex', and holds something else" in told


def test_a_folder_for_checkpoints_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mark = places.Mark(experiment="ex", created="2026-01-01T00:00:00+00:00")
    places.take(tmp_path / "shared/ex", None, mark)
    assert json_of((tmp_path / "shared/ex" / places.MARKER).read_text()) == mark
    places.take(tmp_path / "shared/ex", None, mark)
    places.take(tmp_path / "shared/ex", None, places.Mark(experiment="ex", created=None))  # a worker of an older study
    for other in (places.Mark(experiment="x", created=None), places.Mark(experiment="ex", created="2026-02-02")):
        assert not places.belongs(tmp_path / "shared/ex", None, other)
        with pytest.raises(UsageError, match="holds something else"):
            places.take(tmp_path / "shared/ex", None, other)


def test_a_folder_of_bpf_0_2_becomes_the_experiments(tmp_path: Path) -> None:
    (tmp_path / "old/checkpoints").mkdir(parents=True)
    (tmp_path / "old/models").mkdir()
    mark = places.Mark(experiment="old", created="2026-01-01")
    assert not places.belongs(tmp_path / "old", None, mark)
    places.take(tmp_path / "old", None, mark)
    assert places.belongs(tmp_path / "old", None, mark)


GRID = ["--dataset", "digits", "--algorithm", "dfa", "--arch", "8", "--activation", "tanh", "--no-batch-norm"]
GRID += ["--bw-init", "ortho", "--epochs", "3", "--executions", "1", "--data-dir", "data"]


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "a\\b", "x" * 201, "a\x1bb", "a\nb"])
def test_names_that_are_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told = said(capsys, "tune", "new", *GRID, "--lr", "0.1", "--experiment", name, "-q")
    assert code == 2
    assert told.startswith("Error: The experiment cannot be called ")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="a name has"):
        check_name(name)


# The study


def changed(experiment: Experiment, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(experiment.directory / "study.db")) as raw:
        raw.execute(statement, values)
        raw.commit()


@pytest.mark.parametrize("column", ["key", "cohort", "name"])
@pytest.mark.parametrize("command", ["resume", "best", "clean", "report", "tensorboard"])
def test_paths_in_the_study(
    ex: Experiment, outside: Path, capsys: pytest.CaptureFixture[str], column: str, command: str
) -> None:
    """A cell that is called ../outside/x: whoever opens it writes nothing there."""
    changed(ex, f"UPDATE bpf_cells SET {column} = '../../outside/' || ordinal")
    code, told = said(capsys, command, "ex", *(["--write-only"] if command == "tensorboard" else []))
    assert code == 1
    last = told.splitlines()[-1]
    assert last.startswith(f"Error: {ex.directory}/study.db is damaged: ")
    assert last.endswith("Put back a copy of it, or start anew elsewhere.")


DAMAGE = {
    "a state": ("UPDATE bpf_cells SET state = 'ready'", "state"),
    "a value": ("UPDATE bpf_cells SET value = 'low'", "value"),
    "no value": ("UPDATE bpf_cells SET value = NULL", "has no value"),
    "params and spec": (
        "UPDATE bpf_cells SET params = replace(params, '0.2', '0.5')",
        "has lr 0.5, and in its spec 0.2",
    ),
    "another value": ("UPDATE bpf_cells SET value = 0.001", "is not the mean of its executions"),
    "a status": ("UPDATE bpf_cells SET result = replace(result, '\"complete\"', '\"diverged\"')", "other executions"),
    "no scores": ("UPDATE bpf_cells SET result = replace(result, '\"loss\": 0', '\"lost\": 0')", "loss"),
    "control characters": ("UPDATE bpf_cells SET params = replace(params, '\"lr\"', '\"lr\\u001b\"')", "control"),
    "a late epoch": (
        "UPDATE bpf_cells SET result = replace(result, '\"best_epoch\": ', '\"best_epoch\": 9')",
        "has no value",
    ),
    "params": ("UPDATE bpf_cells SET params = '[1]'", "params"),
    "other params": ("UPDATE bpf_cells SET params = '{}' WHERE ordinal = 0", "has other parameters"),
    "no JSON": ("UPDATE bpf_cells SET result = '{'", "JSON"),
    "a result": ("UPDATE bpf_cells SET result = '{\"executions\": 5}'", "executions"),
    "no executions": ("UPDATE bpf_cells SET result = '{\"executions\": []}'", "has no value"),
    "settings": ("UPDATE bpf_experiment SET settings = '{\"spec\": []}'", "spec"),
    "a rule": ("UPDATE bpf_cells SET rule = '../x'", "rule"),
    "a count": ("UPDATE bpf_cells SET attempt = 'many'", "attempt"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_study_that_is_damaged(ex: Experiment, capsys: pytest.CaptureFixture[str], case: str) -> None:
    statement, what = DAMAGE[case]
    changed(ex, statement)
    code, told = said(capsys, "status" if case == "a rule" else "export", "ex")
    assert code == 1
    assert told.startswith(f"Error: {ex.directory}/study.db is damaged: ")
    assert what in told


def test_histories_that_are_damaged(ex: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"x", b"", 5, "[]", b"x\x9c\x03\x00"):
        changed(ex, "UPDATE bpf_histories SET records = ?", content)
        code, told = said(capsys, "export", "ex", "--what", "history")
        assert (code, "is damaged: " in told) == (1, True)


def test_a_journal_that_names_somebodys_file(ex: Experiment, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SQLite removes the super-journal that a rollback journal names when it has rolled it back."""
    database, victim = ex.directory / "study.db", str(outside / "poetry.lock").encode()
    page = int.from_bytes(database.read_bytes()[16:18], "big")
    mark = bytes.fromhex("d9d505f920a163d7")
    head = mark + struct.pack(">IIIII", 0, 0, database.stat().st_size // page, 512, page)
    tail = struct.pack(">I", 2**30 // page + 1) + victim + struct.pack(">II", len(victim), sum(victim)) + mark
    (ex.directory / "study.db-journal").write_bytes(head.ljust(512, b"\0") + tail)
    for command in ("status", "clean", "resume"):
        code, told = said(capsys, command, "ex")
        assert (code, "study.db-journal is damaged: it names another file" in told) == (1, True)


def test_what_is_no_table(ex: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    changed(ex, "ALTER TABLE bpf_experiment RENAME TO x")
    changed(
        ex,
        "CREATE VIEW bpf_experiment AS WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "
        "SELECT 'ex' AS name, 2 AS schema_version, settings FROM x, c WHERE n < 0",
    )
    assert said(capsys, "status", "ex")[0] == 1


def test_owners_that_are_called_like_files(ex: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell whose owner is `poetry`: its lock is none of bpf's, and stays."""
    precious = ex.directory / "locks/poetry.lock"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text(FOREIGN)
    changed(ex, "UPDATE bpf_cells SET state = 'running', owner = 'poetry'")
    said(capsys, "resume", "ex", "-q")
    assert precious.read_text() == FOREIGN


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="only where there are pipes")
def test_pipes_are_not_waited_for(ex: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ex.directory / "checkpoints").mkdir()
    os.mkfifo(ex.directory / "checkpoints/0123456789abcdef.pt")
    assert said(capsys, "clean", "ex")[0] == 0
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        os.mkfifo(tmp_path / "images" / name / "x.png")
    code, told = said(capsys, "train", "one", "--dataset", "folder:images", "--algorithm", "bp", "-q")
    assert (code, "cannot be read" in told) == (2, True)
    os.mkfifo(tmp_path / "s.yaml")
    assert said(capsys, "tune", "--spec", "s.yaml")[0] == 2


def test_links_below_the_folders_are_seen(ex: Experiment, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ex.directory / "models").mkdir(exist_ok=True)
    (ex.directory / "models/dfa").symlink_to(outside)
    code, told = said(capsys, "resume", "ex", "-q")
    assert (code, "ex/models/dfa is a link" in told) == (2, True)


def test_git_runs_nothing_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a directory that was unpacked from somewhere can ask git to run programs."""
    repository = tmp_path / "unpacked"
    repository.mkdir()
    monkeypatch.chdir(repository)

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], check=True, capture_output=True)

    git("init", "-q")
    Path("a.txt").write_text("1")
    git("add", ".")
    git("commit", "-qm", "x")
    ran = tmp_path / "ran"
    for name in ("core.fsmonitor", "filter.x.clean", "filter.x.process", "filter.X y.smudge", "diff.external"):
        git("config", name, f"touch {ran}; cat")
    Path(".gitattributes").write_text("*.txt filter=x diff=x\n")
    Path("a.txt").write_text("2")
    told = provenance.provenance([])["git"]
    assert told is not None
    assert told["dirty"]
    assert not ran.exists()


def test_a_history_that_explodes(monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    monkeypatch.setattr(stored, "LARGEST_HISTORY", 1000)
    assert stored.unpacked(zlib.compress(b"[" + b"1," * 400 + b"1]")) == [1] * 401
    with pytest.raises(stored.Damage, match="too large"):
        stored.unpacked(zlib.compress(b"[" + b"1," * 600 + b"1]"))


def test_a_lock_is_looked_for_where_it_belongs(ex: Experiment, outside: Path, tmp_path: Path) -> None:
    """The database names somebody's file as the lock of a worker: it is not opened, which would empty it."""
    with closing(ex.open_study()) as study, Owner(study.locks) as owner:
        with study._transaction() as connection:
            owners.enroll(connection, ex.name, owner)
        changed(ex, "UPDATE bpf_owners SET lock = ?", str(outside / "poetry.lock"))
        assert [worker["token"] for worker in study.workers()] == [owner.token]


def test_locks_between_users_are_private(tmp_path: Path) -> None:
    made = locks.private(tmp_path / "bpf-locks-me")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o755)
    assert locks.private(made).stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(made)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(UsageError, match="is not a directory of yours"):
            locks.private(tmp_path / name)


def test_locks_of_somebody_else_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks.private(tmp_path / "locks")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UsageError, match="Set TMPDIR"):
        locks.private(tmp_path / "locks")


def test_a_foreign_database_gets_no_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(sqlite3.connect(tmp_path / "firefox.sqlite")) as raw:
        raw.execute("CREATE TABLE studies (id INTEGER, patient TEXT)")
        raw.commit()
    before = (tmp_path / "firefox.sqlite").read_bytes()
    code, told = said(capsys, "tune", "new", *GRID, "--lr", "0.1", "--storage", "sqlite:///firefox.sqlite", "-q")
    assert (code, "is a database of something else" in told) == (2, True)
    assert (tmp_path / "firefox.sqlite").read_bytes() == before


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:/u:secret@h/db",
        "postgresql//u:secret@h/db",
        "postgres:secret",
        "host=h password=secret",
        "HOST = h",
        "sqlite:x",
        "https:x",
    ],
)
def test_what_is_meant_as_a_url_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as raised:
        Database.at(url)
    assert "secret" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["password", "pass%77ord", "%70assword", "PassWord", "sslpassword", "ssl%70assword"])
def test_passwords_are_hidden_however_they_are_spelled(name: str) -> None:
    told = provenance.redacted(["bpf", "tune", "--storage", f"postgresql://u@h/db?{name}=secret&connect_timeout=3"])
    assert "secret" not in told
    assert "connect_timeout=3" in told
    assert "secret" not in Database.at(f"postgresql://u@h/db?{name}=secret").public


# Terminals and texts


def test_control_characters_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a\x1b[2J\x07\x9b\u202eb\udcff"
    screen.say(odd)
    screen.tell(odd)
    table = Table()
    table.add_column(odd)
    table.add_row("[/red]:bug:")
    screen.out.print(table)
    out, errors = capsys.readouterr()
    assert errors == "a\\x1b[2J\\x9b\\u202eb\\udcff\n"  # rich leaves the bell out
    assert out.startswith(errors)
    assert "[/red]:bug:" in out
    assert "\x1b" not in out + errors
    assert screen.one_line("a\nb\tc") == "a\\nb\\tc"


def test_yaml_that_explodes() -> None:
    names = "abcdefghi"
    lines = ["a: &a [1,1,1,1,1,1,1,1,1]"]
    lines += [f"{one}: &{one} [{','.join(9 * [f'*{before}'])}]" for before, one in itertools.pairwise(names)]
    with pytest.raises(ValueError, match="aliases stand for too many values"):
        yaml_of("\n".join(lines))
    with pytest.raises(ValueError, match="an alias stands inside what it names"):
        yaml_of("a: &a [*a]")
    with pytest.raises(ValueError, match="nested too deeply"):
        yaml_of("[" * 20_000)
    with pytest.raises(ValueError, match="a number is too long"):
        yaml_of("junk: 1" + ":59" * 1000)
    assert yaml_of("a: &a {x: 1}\nb: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}
    assert yaml_of("") is None


def test_settings_that_are_damaged_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = planned(tmp_path / "ex")
    changed(experiment, "UPDATE bpf_experiment SET settings = '{}'")
    with StudyView.open(experiment.database) as study, pytest.raises(Damaged, match="does not say what 'ex' is"):
        study.varying()
    with pytest.raises(BpfError):
        open_experiment(tmp_path / "ex").plan()
