"""Checkpoints at a URL: what is kept there, what others put there, and stores that fail."""

import getpass
import json
import os
import pickle
import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
import yaml
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem

from bpf import api
from bpf.cli import app as cli
from bpf.errors import RunError, UsageError
from bpf.experiment import bucket, directory
from bpf.experiment.bucket import Bucket, check_url, place_at
from bpf.experiment.directory import Place, open_experiment
from bpf.experiment.places import MARKER, Mark
from bpf.reading import LARGEST_TEXT
from bpf.results import summary
from bpf.spec.grid import GridSpec
from bpf.study.study import Study
from bpf.workers import files as worker_files
from bpf.workers.files import Folder, Scratch, Stored
from bpf.workers.job import Job
from bpf.workers.worker import Worker
from test_workers import Process, Troubled, outcomes, start, troubled  # noqa: F401 - fixtures
from waiting import eventually

pytestmark = pytest.mark.usefixtures("in_this_process")

GRID = ["--dataset=digits", "--algorithm=dfa", "--arch=8", "--activation=tanh", "--no-batch-norm", "--lr=0.1,0.01"]
GRID += ["--bw-init=ortho", "--epochs=6", "--executions=2", "--examples-frac=0.2", "--checkpoint-every=0"]
TWICE = (None, None)
"""The mark is read before anything is planned, and before anything is written there."""
MARK = Mark(experiment="ex", created="2026-01-01T00:00:00+00:00")
Command = Callable[..., tuple[int, str]]


class Invented(MemoryFileSystem):
    """A store in memory. Whenever a file is stored or read, a trouble comes: an error, something to call, or none."""

    protocol = "invented"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    troubles: ClassVar[Iterator[Exception | Callable[[], object] | None]] = iter(())

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("invented:/")))

    def _meet(self) -> None:
        trouble = next(self.troubles, None)
        if isinstance(trouble, Exception):
            raise trouble
        if trouble is not None:
            trouble()

    def put_file(self, *args: Any, **kwargs: Any) -> None:
        self._meet()
        super().put_file(*args, **kwargs)

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if mode == "rb":
            self._meet()
        return super().open(path, mode, *args, **kwargs)


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files, whose path is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="bpf-"))
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(worker_files, "tempfile", SimpleNamespace(gettempdir=lambda: str(path)))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Invented]]:
    """A store that can fail, empty; nobody waits between two tries."""
    fsspec.register_implementation("invented", Invented, clobber=True)
    monkeypatch.setattr("bpf.study.seam.FIRST_PAUSE", 0.0)
    yield Invented
    Invented.store.clear()
    Invented.pseudo_dirs[:] = [""]
    Invented.troubles = iter(())


@pytest.fixture
def bpf(empty_place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command in this process; returns its exit code and what it said."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            cli.main(list(arguments))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        return code, told.err or told.out

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, in_this_process: None) -> dict[str, Any]:
    """What comes out of the grid without a URL and without an interruption."""
    work = tmp_path_factory.mktemp("plain")
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", str(work / "plain"), *GRID, "--data-dir", str(work / "data"), "--quiet"])
    assert not end.value.code
    return outcomes(open_experiment(work / "plain"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder that is reached under a URL."""
    return tmp_path / "store"


def url(folder: Path) -> str:
    return f"local://{folder}"


def content(folder: Path) -> dict[str, Any]:
    """Everything in a folder: what files hold and links name, and when folders were changed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        small = path.is_file() and path.stat().st_size < LARGEST_TEXT
        held = path.read_bytes() if small and not path.is_symlink() else None
        found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, held)
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def scratches(temporary: Path) -> list[Path]:
    return [path for path in temporary.glob("bpf-scratch-*/*") if path.name != "lock"]


def interrupted(bpf: Command, where: str, number: int = 1) -> None:
    """A grid in `ex` whose process got SIGTERM while its checkpoints were stored for the `number`th time."""
    Invented.troubles = iter([*[None] * (number - 1), lambda: signal.raise_signal(signal.SIGTERM)])
    code, said = bpf("tune", "ex", *GRID, "--checkpoints", where, "--quiet")
    assert code == 130, said
    Invented.troubles = iter(())


def stored() -> dict[str, bytes]:
    return {name: file.getvalue() for name, file in Invented.store.items()}


# A grid from beginning to end


def test_a_grid_interrupted_and_resumed_is_one_without(
    bpf: Command, invented: type[Invented], temporary: Path, plain: dict[str, Any]
) -> None:
    invented().pipe_file("/shared/ex-2/COHORT.pt", b"years of work")
    interrupted(bpf, "INVENTED://shared/")
    [name] = [name for name in stored() if name.startswith("/shared/ex/") and name.endswith(".pt")]
    assert stored().keys() == {name, f"/shared/ex/{MARKER}", "/shared/ex-2/COHORT.pt"}
    assert scratches(temporary) == []
    assert yaml.safe_load(Path("ex/experiment.yaml").read_text())["checkpoints"] == "invented://shared"
    assert not any(Path("ex/checkpoints").glob("*"))
    began: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "fetch", _noting(Bucket.fetch, began))
        assert bpf("resume", "ex", "--quiet", "--checkpoint-every=0")[0] == 0
    assert began == [True]  # it went on from what was there
    assert outcomes(open_experiment(Path("ex"))) == plain
    assert stored().keys() == {f"/shared/ex/{MARKER}", "/shared/ex-2/COHORT.pt"}
    assert scratches(temporary) == []
    assert names(Path("ex/models")) == {"dfa"}


def _noting(fetch: Callable[[Bucket, Path], None], began: list[bool]) -> Callable[[Bucket, Path], None]:
    def fetched(self: Bucket, path: Path) -> None:
        fetch(self, path)
        began.append(path.exists())

    return fetched


@pytest.mark.slow
@pytest.mark.usefixtures("in_workers")
def test_worker_processes_and_what_killed_ones_leave(
    troubled: Troubled,  # noqa: F811
    start: Callable[..., Process],  # noqa: F811
    tmp_path: Path,
    store: Path,
    temporary: Path,
) -> None:
    grid = [word for word in GRID if not word.startswith("--algorithm")] + ["--algorithm=troubled", "--workers=2"]
    assert start("tune", "plain", *grid, "--quiet").end() == 0
    store.mkdir()
    (store / "thesis.pt").write_text("years of work\n")
    troubled.does(ortho="waits")
    begun = start("tune", "ex", *grid, "--checkpoints", url(store), "--quiet")
    eventually(troubled.comers)
    begun.signal(signal.SIGTERM)
    troubled.does()
    assert begun.end() == 130, begun.text
    assert scratches(temporary) == []
    kept = {name for name in names(store / "ex") if name.endswith(".pt")}
    assert names(store / "ex") == {MARKER, *kept}
    assert kept

    troubled.come.unlink()
    troubled.does(ortho="waits")
    killed = start("resume", "ex", "--quiet")
    eventually(troubled.comers)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.end()
    eventually(lambda: all(not _held(path) for path in scratches(temporary)))
    [root] = temporary.glob("bpf-scratch-*")
    assert scratches(temporary)
    (root / "thesis").mkdir()
    (root / "0123456789abcdef").mkdir()
    (root / "0123456789abcdef/thesis.txt").write_text("years of work\n")
    troubled.does()
    assert start("resume", "ex", "--quiet").end() == 0
    assert {path.name for path in scratches(temporary)} == {"thesis", "0123456789abcdef"}
    assert names(root / "0123456789abcdef") == {"thesis.txt"}
    assert outcomes(open_experiment(tmp_path / "ex")) == outcomes(open_experiment(tmp_path / "plain"))
    assert (names(store), names(store / "ex")) == ({"thesis.pt", "ex"}, {MARKER})


def _held(scratch: Path) -> bool:
    from bpf.locks import is_held

    return bool(is_held(scratch / "lock"))


def test_the_url_cannot_be_changed(bpf: Command, invented: type[Invented], store: Path) -> None:
    interrupted(bpf, "invented://shared")
    before = stored()
    for other in (url(store), "invented://shared/more"):
        told = f"its checkpoints lie at invented://shared, not {other}.\n"
        assert bpf("tune", "ex", *GRID, "--checkpoints", other) == (
            2,
            f"Error: The experiment in ex cannot be moved: {told}",
        )
    code, said = bpf("tune", "ex", *GRID, "--keep-checkpoints")
    told = "--keep-checkpoints keeps them on this machine, not at invented://shared. Leave out one of them."
    assert (code, said) == (2, f"Error: {told}\n")
    assert (stored(), store.exists()) == (before, False)
    assert bpf("tune", "plain", *GRID, "--checkpoints", url(store), "--keep-checkpoints") == (
        2,
        f"Error: {told.replace('invented://shared', url(store))}\n",
    )
    assert not Path("plain").exists()
    assert bpf("tune", "ex", *GRID, "--checkpoints", "invented://shared/", "--quiet")[0] == 0


def test_commands_that_only_look(bpf: Command, invented: type[Invented]) -> None:
    assert bpf("tune", "ex", *GRID, "--checkpoints", "invented://shared", "--dry-run")[0] == 0
    assert (stored(), Path("ex").exists()) == ({}, False)
    interrupted(bpf, "invented://shared")
    before = stored()
    assert bpf("status", "ex")[0] == 0
    code, said = bpf("show", "ex")
    assert code == 0
    assert "checkpoints invented://shared\n" in said
    fsspec.register_implementation("invented", "missing.library", clobber=True)
    assert bpf("status", "ex")[0] == 0
    assert stored() == before


def test_clean_removes_what_was_left_there(bpf: Command, invented: type[Invented]) -> None:
    interrupted(bpf, "invented://shared")
    assert bpf("clean", "ex", "--dry-run")[0] == 0
    store, root = invented(), "/shared/ex"
    left = {f"{root}/0123456789abcdef.pt": 3, f"{root}/.0123456789abcdef.pt.01234567": 4}
    kept = [f"{root}/0123456789abcdef.pt.damaged", f"{root}/thesis.pt", f"{root}/.thesis.pt.01234567"]
    for name in (*left, *kept):
        store.pipe_file(name, b"x" * left.get(name, 5))
    before = stored().keys()
    removed = api.clean(open_experiment(Path("ex")), dry_run=True)
    assert (sorted(removed["files"]), removed["bytes"]) == (sorted(f"invented:/{name}" for name in left), 7)
    assert stored().keys() == before
    assert bpf("clean", "ex")[0] == 0
    assert stored().keys() == before - left.keys()
    assert bpf("resume", "ex", "--quiet")[0] == 0
    assert stored().keys() == {f"{root}/{MARKER}", *kept}


def test_a_plan_that_workers_carry_out(bpf: Command, invented: type[Invented]) -> None:
    """A worker that comes first marks the folder, so that others know whose it is."""
    assert bpf("tune", "ex", *GRID, "--checkpoints", "invented://shared", "--plan-only")[0] == 0
    assert stored() == {}
    Invented.troubles = iter([lambda: signal.raise_signal(signal.SIGTERM)])
    assert bpf("worker", "ex", "--quiet", "--checkpoint-every=0")[0] == 130
    assert f"/shared/ex/{MARKER}" in stored()
    Invented.troubles = iter(())
    assert bpf("resume", "ex", "--quiet")[0] == 0
    assert stored().keys() == {f"/shared/ex/{MARKER}"}


def test_a_worker_goes_elsewhere_only_where_it_may(bpf: Command, invented: type[Invented], store: Path) -> None:
    assert bpf("tune", "ex", *GRID, "--plan-only")[0] == 0
    invented().pipe_file("/mine/ex/thesis", b"years of work")
    before = stored()
    code, said = bpf("worker", "ex", "--checkpoints", "invented://mine")
    assert (code, "invented://mine/ex is to hold the checkpoints of 'ex'" in said) == (2, True)
    assert stored() == before
    assert bpf("worker", "ex", "--checkpoints", url(store), "--quiet")[0] == 0
    assert names(store / "ex") == {MARKER}


def test_a_file_url_is_the_plain_folder(bpf: Command, tmp_path: Path, store: Path, temporary: Path) -> None:
    assert place_at(f"FILE://{store}") == place_at(str(store)) == store
    assert bpf("tune", "ex", *GRID, "--checkpoints", f"file://{store}", "--quiet")[0] == 0
    remembered = yaml.safe_load(Path("ex/experiment.yaml").read_text())
    assert (remembered["files"], remembered.get("checkpoints")) == (str(store / "ex"), None)
    assert names(store / "ex") >= {MARKER, "models"}
    assert not any(temporary.glob("bpf-scratch-*"))


def test_commands_that_are_suggested_name_the_url(bpf: Command) -> None:
    asked = ["--objective=val_loss", "--checkpoints=s3a://shared/bpf"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsspec, "get_filesystem_class", lambda kind: MemoryFileSystem)
        code, said = bpf("tune", "ex", *[word for word in GRID if not word.startswith("--lr=")], *asked)
    assert code == 2
    commands = [line for line in said.splitlines() if line.strip().startswith("bpf tune")]
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command)
        assert words[words.index("--checkpoints") + 1] == "s3a://shared/bpf"


# What lies there


def test_a_folder_that_cannot_be_had_is_told_before_anything_is_planned(bpf: Command, store: Path) -> None:
    """Without a URL as well: the directory would remember the folder, and no other could be chosen."""
    (store / "ex").mkdir(parents=True)
    (store / "ex/thesis").write_text("years of work\n")
    code, said = bpf("tune", "ex", *GRID, "--checkpoints", str(store), "--quiet")
    assert (code, f"{store / 'ex'} is to hold the checkpoints of 'ex', and holds something else" in said) == (2, True)
    assert not Path("ex").exists()


@pytest.mark.parametrize(
    "mark",
    [
        None,
        MARK,
        {"experiment": "ex"},
        {"experiment": "other", "created": None},
        [1],
        "[" * 100_000,
        b"\xff",
        b"",
        "huge",
        "pipe",
        "link",
        "folder",
    ],
    ids=["none", "its own", "half", "another's", "list", "deep", "binary", "empty", "huge", "pipe", "link", "folder"],
)
def test_a_folder_of_somebody_else(bpf: Command, store: Path, tmp_path: Path, mark: Any) -> None:
    folder = store / "ex"
    folder.mkdir(parents=True)
    (folder / "0123456789abcdef.pt").write_text("years of work\n")
    path = folder / MARKER
    if mark == "huge":
        with path.open("wb") as file:
            file.write(json.dumps(MARK).encode())
            file.truncate(2**30)
    elif mark == "pipe":
        os.mkfifo(path)
    elif mark == "link":
        (tmp_path / "secret").write_text("secret")
        path.symlink_to(tmp_path / "secret")
    elif mark == "folder":
        path.mkdir()
    elif isinstance(mark, bytes):
        path.write_bytes(mark)
    elif mark is not None:
        path.write_text(mark if isinstance(mark, str) else json.dumps(mark))
    before = content(store)
    code, said = bpf("tune", "ex", *GRID, "--checkpoints", url(store), "--quiet")
    assert code == 2
    held = "is to hold the checkpoints of 'ex', and holds something else. Choose another place with --checkpoints."
    ordinary = f"{MARKER} is no ordinary file, and bpf reads nothing else. Remove it."
    told = f"/{ordinary}" if mark in ("pipe", "link", "folder") else f" {held}"
    assert said == f"Error: {url(folder)}{told}\n"
    assert content(store) == before
    assert not Path("ex").exists()  # so that another place can be chosen, as the message says
    assert bpf("tune", "ex", *GRID, "--checkpoints", url(tmp_path / "another"), "--plan-only")[0] == 0


def test_only_so_much_of_a_mark_is_read(invented: type[Invented], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "LARGEST_TEXT", 200)
    there = Bucket("invented://shared", "ex")
    there.take(MARK)
    invented().pipe_file(f"/shared/ex/{MARKER}", json.dumps(MARK).encode() + b" " * 200)
    with pytest.raises(UsageError, match="holds something else"):
        there.check(MARK)


def test_a_bucket_that_is_not_there(bpf: Command, invented: type[Invented], monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store shows nothing there, as in a new folder. The directory would remember it."""
    monkeypatch.setattr(bucket, "BUCKETS", {"invented"})
    told = "there is no 'shared' in that store. Make it first, or choose another place with --checkpoints."
    assert bpf("tune", "ex", *GRID, "--checkpoints", "invented://shared/folder") == (
        2,
        f"Error: invented://shared/folder/ex: {told}\n",
    )
    assert (stored(), Path("ex").exists()) == ({}, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Invented, "info", lambda self, path: self._meet())
        Invented.troubles = iter([PermissionError("of this folder only")])
        assert not Bucket("invented://shared/folder", "ex").check(MARK)
    invented().mkdir("/shared")
    assert not Bucket("invented://shared/folder", "ex").check(MARK)


def test_an_experiment_of_the_same_name(
    bpf: Command, invented: type[Invented], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(bpf, "invented://shared")
    monkeypatch.setattr(directory, "_now", lambda: "2126-01-01T00:00:00+00:00")  # marks tell seconds apart
    before = stored()
    Path("ex").rename("first")
    code, said = bpf("tune", "ex", *GRID, "--checkpoints", "invented://shared")
    assert (code, "invented://shared/ex is to hold the checkpoints of 'ex', and holds something else" in said) == (
        2,
        True,
    )
    assert stored() == before


def test_marks(invented: type[Invented]) -> None:
    there = Bucket("invented://shared", "ex")
    assert not there.check(MARK)
    invented().pipe_file(f"/shared/ex/.{MARKER}.01234567", b"{")  # of one that was killed
    there.take(MARK)
    there.take(MARK)
    there.take(Mark(experiment="ex", created=None))  # a worker of an older study
    for other in (Mark(experiment="x", created=None), Mark(experiment="ex", created="2026-02-02")):
        with pytest.raises(UsageError, match="holds something else"):
            there.take(other)


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a::b", "a#b", "%41", "a b", "-x"])
def test_names_that_stand_for_nothing_else(invented: type[Invented], tmp_path: Path, name: str) -> None:
    """fsspec takes some characters for patterns, and others for one store inside another."""
    for where in ("invented://shared", url(tmp_path / "store")):
        there, mark = Bucket(where, name), Mark(experiment=name, created=None)
        there.take(mark)
        assert there.check(mark)
        path = tmp_path / "0123456789abcdef.pt"
        path.write_bytes(b"first")
        there.put(path)
        path.write_bytes(b"second")
        there.put(path)
        path.write_bytes(b"third")
        there.fetch(path)
        assert path.read_bytes() == b"second"
        assert there.names().keys() == {MARKER, path.name}
        assert [there.set_aside(path.name)] == [f"{path.name}.damaged"]
        there.put(path)
        assert [there.set_aside(path.name)] == [f"{path.name}.damaged-2"]
        there.fetch(path)
        assert not path.exists()
        there.remove(path.name)
    assert {key.split("/")[2] for key in stored()} == {name}
    assert names(tmp_path / "store") == {name}


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("damage", ["cut", "changed", "pickle", "empty"])
def test_a_damaged_checkpoint_is_set_aside_there(
    bpf: Command, invented: type[Invented], plain: dict[str, Any], damage: str
) -> None:
    interrupted(bpf, "invented://shared")
    [(name, whole)] = [item for item in stored().items() if item[0].endswith(".pt")]
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    damaged = {"cut": whole[:-9], "changed": changed, "pickle": pickle.dumps(Evil()), "empty": b""}[damage]
    invented().pipe_file(name, damaged)
    code, said = bpf("resume", "ex", "--quiet")
    assert code == 0
    assert f"It is kept as invented:/{name}.damaged, and its cells are trained from their start." in said
    assert stored() == {f"/shared/ex/{MARKER}": stored()[f"/shared/ex/{MARKER}"], f"{name}.damaged": damaged}
    assert outcomes(open_experiment(Path("ex"))) == plain
    assert not Path("evil").exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_checkpoint_that_is_no_file(bpf: Command, store: Path, tmp_path: Path, kind: str) -> None:
    """Neither does what a link stands for become a file there, nor does anybody wait for a pipe."""
    secret = tmp_path / "secret"
    secret.write_text("my key")
    assert bpf("tune", "ex", *GRID, "--checkpoints", url(store), "--plan-only")[0] == 0
    experiment = open_experiment(Path("ex"))
    there = Bucket(url(store), "ex")
    there.take(experiment.mark)
    with closing(experiment.open_study()) as study, study.enrolled({}) as owner:
        claim = study.claim(owner, lambda row: 100)
        assert claim is not None
        study.release(claim)
    path = store / "ex" / f"{claim.cohort}.pt"
    {"link": lambda: path.symlink_to(secret), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    code, said = bpf("resume", "ex", "--quiet")
    told = f"{url(path)} is no ordinary file, and bpf reads nothing else. Remove it."
    assert (code, said) == (2, f"Error: {told}\n")
    assert names(store / "ex") == {MARKER, path.name}
    assert summary.status(open_experiment(Path("ex")))["cells"]["running"] == 0
    path.rmdir() if kind == "folder" else path.unlink()
    assert bpf("resume", "ex", "--quiet")[0] == 0
    assert secret.read_text() == "my key"


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_of_a_server_that_shows_them_as_files(
    invented: type[Invented], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    there = Bucket("invented://shared", "ex")
    there.take(MARK)
    (tmp_path / "mark").symlink_to("secret") if kind == "link" else os.mkfifo(tmp_path / "mark")
    monkeypatch.setattr(there, "_kind", "sftp")
    monkeypatch.setattr(
        there._fs, "ftp", SimpleNamespace(lstat=lambda place: (tmp_path / "mark").lstat()), raising=False
    )
    with pytest.raises(UsageError, match="is no ordinary file"):
        there.check(MARK)


def test_a_folder_that_an_object_store_shows_as_an_empty_object(invented: type[Invented]) -> None:
    there = Bucket("invented://shared", "ex")

    def ls(path: str, detail: bool = True) -> list[dict[str, Any]]:
        return [{"name": "shared/ex/", "size": 0, "type": "file"}]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(there._fs, "ls", ls)
        there.take(MARK)
    assert there.check(MARK)


# Stores that fail


def test_a_store_that_is_away_for_a_while_is_waited_for(
    bpf: Command, invented: type[Invented], plain: dict[str, Any]
) -> None:
    interrupted(bpf, "invented://shared")
    unread, unwritten = [OSError("no route to host.\n")] * 2, [OSError("try\nlater")] * 2
    invented.troubles = iter([*TWICE, *unread, None, *unwritten])
    code, said = bpf("resume", "ex", "--quiet", "--checkpoint-every=0")
    assert code == 0
    told = "The checkpoints at invented://shared/ex cannot be reached: {}. It is tried again.\n"
    assert said == told.format("no route to host") + told.format("try later")
    assert outcomes(open_experiment(Path("ex"))) == plain


def test_what_fails_while_it_is_read_is_the_store_not_this_machine(
    invented: type[Invented], tmp_path: Path, temporary: Path
) -> None:
    there = Bucket("invented://shared", "ex")
    path = tmp_path / "0123456789abcdef.pt"
    path.write_bytes(b"whole")
    there.put(path)

    class Torn:
        def __enter__(self) -> "Torn":
            return self

        def __exit__(self, *exception: object) -> None: ...

        def read(self, size: int) -> bytes:
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(there._fs, "open", lambda place, mode: Torn())
        with pytest.raises(RunError, match=r"cannot be reached: .*Connection reset by peer"):
            there.fetch(path)
    assert names(tmp_path) == set()


def test_a_store_that_is_away_for_good(
    bpf: Command, invented: type[Invented], monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    interrupted(bpf, "invented://shared")
    before = stored()
    monkeypatch.setattr(worker_files, "PATIENCE_SECONDS", -1.0)
    told = "Error: The checkpoints at invented://shared/ex cannot be reached: PermissionError.\n"
    invented.troubles = iter([*TWICE, *[PermissionError()] * 100])
    assert bpf("resume", "ex", "--quiet", "--checkpoint-every=0") == (1, told)
    invented.troubles = iter([*TWICE, None, *[PermissionError()] * 100])
    assert bpf("resume", "ex", "--quiet", "--checkpoint-every=0") == (1, told)
    cells = summary.status(open_experiment(Path("ex")))["cells"]
    assert (cells["running"], cells["interrupted"]) == (0, 2)
    assert stored() == before  # and nothing half written is left
    assert scratches(temporary) == []
    invented.troubles = iter([PermissionError()])
    assert bpf("resume", "ex", "--quiet") == (1, told)
    invented.troubles = iter(())
    assert bpf("resume", "ex", "--quiet")[0] == 0


def test_a_store_that_cannot_be_reached_at_first(bpf: Command, store: Path) -> None:
    store.write_text("a file")
    code, said = bpf("tune", "ex", *GRID, "--checkpoints", url(store), "--quiet")
    assert code == 1
    assert said.startswith(f"Error: The checkpoints at {url(store)}/ex cannot be reached: ")
    assert not Path("ex").exists()


def test_a_connection_that_breaks_is_made_again(
    invented: type[Invented], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is kept would fail until nobody waits any more, though the store is there again."""
    there, path = Bucket("invented://shared", "ex"), tmp_path / "0123456789abcdef.pt"
    path.write_bytes(b"whole")
    made = list[Any]()

    def connect(self: Invented, **options: object) -> None:
        MemoryFileSystem.__init__(self, **options)
        made.append(self)

    monkeypatch.setattr(Invented, "__init__", connect)

    def broken(*arguments: object) -> None:
        raise OSError("Socket is closed")

    there.take(MARK)
    [first] = made
    first.put_file = broken
    with pytest.raises(RunError, match="cannot be reached: Socket is closed"):
        there.put(path)
    there.put(path)
    there.fetch(path)
    assert len(made) == 2
    assert path.read_bytes() == b"whole"


def test_a_store_that_is_away_when_a_worker_begins_is_waited_for(
    invented: type[Invented], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are connected to as soon as fsspec has them."""
    troubles = iter([OSError("Connection refused")] * 2)

    def connect(self: Invented, **options: object) -> None:
        for trouble in troubles:
            raise trouble
        MemoryFileSystem.__init__(self, **options)

    monkeypatch.setattr(Invented, "__init__", connect)
    files, said = Stored(Folder(tmp_path), Bucket("invented://shared", "ex")), list[str]()
    files.on_wait = said.append
    assert not files.checkpoint("0123456789abcdef").exists()
    assert len(said) == 2
    files.close()


def test_a_stop_while_a_store_is_waited_for(bpf: Command, invented: type[Invented]) -> None:
    interrupted(bpf, "invented://shared")
    away = OSError("no route to host")

    def stop() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise away

    invented.troubles = iter([*TWICE, away, stop, *[away] * 100])
    assert bpf("resume", "ex", "--quiet")[0] == 130
    assert summary.status(open_experiment(Path("ex")))["cells"]["interrupted"] == 2


def test_a_store_that_renames_onto_nothing(tmp_path: Path) -> None:
    there = Bucket(url(tmp_path / "store"), "ex")

    def mv(old: str, new: str) -> None:
        if Path(new).exists():
            raise FileExistsError(new)
        Path(old).rename(new)

    path = tmp_path / "0123456789abcdef.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(there._fs, "mv", mv)
        for text in ("first", "second"):
            path.write_text(text)
            there.put(path)
    assert (tmp_path / "store/ex" / path.name).read_text() == "second"
    assert names(tmp_path / "store/ex") == {path.name}


# The option


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("s4://x", "--checkpoints s4://x: there is no store called 's4'. Did you mean 's3'?"),
        ("sftpp://x/y", "--checkpoints sftpp://x/y: there is no store called 'sftpp'. Did you mean 'sftp'?"),
        (
            "qqqqqq://x",
            "--checkpoints qqqqqq://x: there is no store called 'qqqqqq'. Known: az, gs, hdfs, s3, sftp, smb.",
        ),
        ("s3:/x", "--checkpoints s3:/x: neither a URL nor a folder that is there. Did you mean s3://x?"),
        ("S3:x/y", "--checkpoints S3:x/y: neither a URL nor a folder that is there. Did you mean s3://x/y?"),
        ("file:/x", "--checkpoints file:/x: neither a URL nor a folder that is there. Did you mean file:///x?"),
        ("file://x", "--checkpoints file://x: after file:// comes a whole path. Write file:///PATH."),
        ("file://", "--checkpoints file://: after file:// comes a whole path. Write file:///PATH."),
        ("local://x", "--checkpoints local://x: after local:// comes a whole path. Write local:///PATH."),
        ("local:///", "--checkpoints local:///: no folder is named. Write local://FOLDER."),
        ("memory://", "--checkpoints memory://: no folder is named. Write memory://FOLDER."),
        ("hdfs://host", "--checkpoints hdfs://host: no folder is named. Write hdfs://HOST/FOLDER."),
        ("://x", "--checkpoints ://x: one store is to be named, as in s3://BUCKET/FOLDER."),
        (
            "simplecache::memory://x",
            "--checkpoints simplecache::memory://x: one store is to be named, as in s3://BUCKET/FOLDER.",
        ),
        (f"memory://{'x' * 300}", f"--checkpoints memory://{'x' * 300}: the path is too long."),
        ("memory://a\x1b[2J", "--checkpoints 'memory://a\\x1b[2J': a path has no control characters."),
        ("", "An argument is empty: --checkpoints needs a value, or is to be left out."),
    ],
)
def test_mistakes(bpf: Command, given: str, told: str) -> None:
    assert bpf("tune", "ex", *GRID, "--checkpoints", given) == (2, f"Error: {told}\n")
    assert bpf("worker", "ex", "--checkpoints", given) == (2, f"Error: {told}\n")
    assert names(Path()) == set()


@pytest.mark.parametrize("given", ["S3://bucket/x", "s3://bucket"])
def test_a_library_that_is_not_installed(bpf: Command, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    def missing(kind: str) -> None:
        assert kind == "s3"
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    told = f"Error: --checkpoints {given} needs another library: pip install s3fs\n"
    assert bpf("tune", "ex", *GRID, "--checkpoints", given) == (2, told)
    assert names(Path()) == set()


def test_what_is_written_as_s3_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda kind: MemoryFileSystem)
    assert check_url("S3://Bucket/Folder//") == "s3://Bucket/Folder"
    assert check_url("sftp://me@host:22/x") == "sftp://me@host:22/x"
    assert check_url("abfs://container@account.dfs.core.windows.net/x").startswith("abfs://container@account")
    for given in ("s3://", "s3:///x"):
        with pytest.raises(UsageError, match=r"no folder is named\. Write s3://BUCKET/FOLDER"):
            check_url(given)


@pytest.mark.parametrize(
    "given",
    [
        "s3://me:hunter2@bucket/x",
        "s3://me:hun/hunter2@bucket/x",
        "sftp://:hunter2@host/x",
        "s4://me:hunter2@bucket",
        "s3://me:hunter2\n@bucket",
        "s3://[me:hunter2@bucket",
        "s3:/me:hunter2@bucket",
        "simplecache::s3://me:hunter2@bucket",
        "webhdfs://host/x?password=hunter2",
    ],
)
def test_a_password_is_refused_and_not_shown(
    bpf: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    for command in (("tune", "ex", *GRID), ("worker", "ex")):
        code, said = bpf(*command, "--checkpoints", given)
        assert code == 2
        assert said.startswith("Error: The URL of --checkpoints h")
        assert "hunter2" not in said + caplog.text
    assert names(Path()) == set()


def test_a_url_in_a_file_is_checked_as_well(bpf: Command, invented: type[Invented]) -> None:
    interrupted(bpf, "invented://shared")
    path = Path("ex/experiment.yaml")
    for other, told in (
        ("s4://x", "there is no store called 's4'"),
        ("s3://me:hunter2@bucket", "holds what may be a password"),
        ("simplecache::invented://shared", "one store is to be named"),
    ):
        before = path.read_text()
        path.write_text(before.replace("checkpoints: invented://shared", f"checkpoints: {other}"))
        code, said = bpf("resume", "ex", "--quiet")
        assert (code, told in said, "hunter2" in said) == (2, True, False)
        path.write_text(before)


def test_the_help_says_what_is_to_be_given(bpf: Command) -> None:
    for command in ("tune", "worker"):
        assert "s3://BUCKET/FOLDER" in bpf(command, "--help")[1]


# Folders of a process


def test_scratch_folders(temporary: Path, tmp_path: Path) -> None:
    first, second = Scratch(), Scratch()
    root = first.path.parent
    assert root.name == f"bpf-scratch-{getpass.getuser()}"
    assert root.stat().st_mode & 0o077 == 0
    outside = tmp_path / "outside"
    (outside / "checkpoints").mkdir(parents=True)
    (outside / "checkpoints/0123456789abcdef.pt").write_text("years of work\n")
    (root / "1123456789abcdef").symlink_to(outside)
    (root / "2123456789abcdef").mkdir()
    (root / "2123456789abcdef/checkpoints").symlink_to(outside / "checkpoints")
    left = root / "3123456789abcdef"
    (left / "checkpoints").mkdir(parents=True)
    for name in ("lock", "checkpoints/a.pt", "checkpoints/.a.pt.01234567", "checkpoints/a.pt.damaged"):
        (left / name).touch()
    (root / "4123456789abcdef").mkdir()  # killed before it had its lock
    third = Scratch()
    kept = {"1123456789abcdef", "2123456789abcdef"}
    assert names(root) == {"lock", *kept, *(scratch.path.name for scratch in (first, second, third))}
    for scratch in (first, second, third):
        scratch.close()
    assert names(root) == {"lock", *kept}
    assert names(outside / "checkpoints") == {"0123456789abcdef.pt"}


def test_nobody_looks_while_a_scratch_folder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is there, and not held, for a moment, in which it would be taken for one that is left."""
    acquire = FileLock.acquire
    seen = []

    def looked(lock: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(lock.lock_file)
        if path.parent.name != path.parent.parent.name and path.parent.parent.name.startswith("bpf-scratch-"):
            other = FileLock(path.parent.parent / "lock", thread_local=False)
            with pytest.raises(TimeoutError):
                acquire(other, blocking=False)
            seen.append(path)
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", looked)
    scratch = Scratch()
    assert seen
    scratch.close()


def test_a_worker_keeps_one_checkpoint_here(invented: type[Invented], tmp_path: Path, temporary: Path) -> None:
    files = Stored(Folder(tmp_path), Bucket("invented://shared", "ex"))
    assert not any(temporary.iterdir())  # none is made before it is used
    first = files.checkpoint("0123456789abcdef", False)
    first.parent.mkdir()
    first.write_bytes(b"first")
    files.store("0123456789abcdef")
    files.checkpoint("1123456789abcdef", False)
    assert not first.exists()
    assert files.checkpoint("0123456789abcdef", True).read_bytes() == b"first"
    files.discard("0123456789abcdef")
    assert stored() == {}
    files.close()
    assert scratches(temporary) == []


def test_a_worker_that_cannot_begin_leaves_no_folder(bpf: Command, invented: type[Invented], temporary: Path) -> None:
    grid = GridSpec.model_validate({"dataset": "digits", "algorithm": ["dfa"], "lr": [0.1], "epochs": 1})
    experiment = api.open_tune(Path("ex"), grid, Path("data"), Place(checkpoints="invented://shared"))
    api.store_plan(experiment, ["bpf"])
    job = Job(experiment.database, "ex", Path("data"), experiment.files, checkpoints="invented://shared")
    with closing(Study.open(experiment.database, "ex")) as study, pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "repair", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Worker.of(job, study, lambda event: None).run()
    assert scratches(temporary) == []
