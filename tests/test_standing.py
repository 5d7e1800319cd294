"""How far an experiment is, as another terminal sees it: what workers note, what is believed of it, and a start."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from bpf.cluster.desk import Desk
from bpf.cluster.remote import Line, Pulse, RemoteStudy
from bpf.console import tables
from bpf.data.cache import load
from bpf.errors import RunError, UsageError
from bpf.experiment.directory import Experiment, prepare
from bpf.experiment.grid import resolve_options
from bpf.experiment.plugins import load_rules
from bpf.interrupts import Interrupted
from bpf.locks import is_held
from bpf.results import summary
from bpf.spec.grid import GridSpec
from bpf.study import owner as owners
from bpf.study import study as study_module
from bpf.study.database import Database
from bpf.study.holder import Holder, Progress
from bpf.study.owner import Owner
from bpf.workers import worker as worker_module
from bpf.workers.events import Event, Trained
from bpf.workers.files import Folder
from bpf.workers.job import Job, Terms
from bpf.workers.stopping import Stop
from bpf.workers.worker import Worker
from waiting import eventually

AT = Progress(
    rule="dfa",
    arch="8",
    activation="tanh",
    cells=1,
    executions=2,
    began=0,
    epoch=3,
    epochs=4,
    speed=1234.5,
    seconds=30.0,
    cost=100.0,
)


def prepared(directory: Path, **changed: Any) -> Experiment:
    fields = {"dataset": "digits", "algorithm": "dfa", "arch": "8", "activation": "tanh", "batch_norm": False}
    fields |= {"bw_init": "ortho", "lr": [0.01], "epochs": 4, "executions_per_trial": 2, "examples_frac": 0.2}
    grid = GridSpec.model_validate(fields | changed)
    return prepare(directory, "tune", resolve_options(grid, load_rules(grid.algorithm)), directory)


def planned(directory: Path, **changed: Any) -> Experiment:
    experiment = prepared(directory, **changed)
    directory.mkdir()
    experiment.save(["bpf", "tune"])
    experiment.plan()[0].close()
    return experiment


@contextmanager
def at_work(experiment: Experiment) -> Iterator[tuple[study_module.Study, Owner]]:
    """A worker that has claimed the first cell."""
    with closing(experiment.open_study()) as study, Owner(study.locks, {"host": "here", "device": "cpu"}) as owner:
        assert study.claim(owner, lambda row: 1)
        yield study, owner


def shown(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    tables.show_status(summary.status(experiment))
    return capsys.readouterr().out.splitlines()


# What workers note


def test_a_worker_notes_how_far_its_cohort_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = planned(tmp_path / "grid", lr=[0.01, 0.001])
    monkeypatch.setattr(worker_module, "NOTE_SECONDS", 0.0)
    seen: list[dict[str, Any]] = []

    def tell(event: Event) -> None:
        if isinstance(event, Trained):  # it is noted after it has been told
            seen.append(summary.status(experiment))

    with closing(experiment.open_study()) as study:
        job = Job(experiment.database, experiment.name, experiment.data_dir, experiment.files, Terms("cpu"))
        Worker.of(job, study, tell, data=load("digits", tmp_path)).run()
    said = [status["workers"][0]["progress"] for status in seen]
    assert [progress["epoch"] for progress in said] == [0, 1, 2, 3]
    what = {"rule": "dfa", "arch": "8", "activation": "tanh", "cells": 2, "executions": 4, "epochs": 4}
    assert all(progress.items() >= what.items() for progress in said)
    assert said[0]["speed"] == 0 < said[1]["speed"]
    assert seen[0]["eta_seconds"] is None
    assert all(status["eta_seconds"] > 0 for status in seen[1:])
    assert [(status["cells"]["complete"], status["starting"]) for status in seen] == [(0, None)] * 4
    status = summary.status(experiment)
    assert (status["workers"], status["eta_seconds"], status["starting"]) == ([], 0.0, None)


@pytest.mark.parametrize(("least", "epochs"), [(1000.0, [0]), (0.0, [0, 1])])
def test_the_first_epoch_is_noted_if_it_was_long(
    least: float, epochs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = planned(tmp_path / "grid")
    noted: list[int] = []
    monkeypatch.setattr(study_module.Study, "note", lambda study, owner, at: noted.append(at.epoch))
    monkeypatch.setattr(worker_module, "LONG_EPOCH_SECONDS", least)
    with closing(experiment.open_study()) as study:
        job = Job(experiment.database, experiment.name, experiment.data_dir, experiment.files, Terms("cpu"))
        Worker.of(job, study, lambda event: None).run()
    assert noted == epochs


def test_a_note_neither_waits_nor_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = planned(tmp_path / "grid")
    waits: list[float] = []
    connect = sqlite3.connect

    def connecting(*where: Any, **options: Any) -> sqlite3.Connection:
        if str(where[0]).startswith("file:"):
            waits.append(options["timeout"])
        return connect(*where, **options)

    with at_work(experiment) as (study, owner):
        monkeypatch.setattr(study_module.sqlite3, "connect", connecting)
        with closing(connect(experiment.directory / "study.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            study.note(owner, AT)
        assert summary.status(experiment)["workers"][0]["progress"] is None
        study.note(owner, AT)
        assert summary.status(experiment)["workers"][0]["progress"]["epoch"] == 3
        study.retire(owner)
        before = facts(experiment)
        study.note(owner, AT.after(4, 1.0, 1.0))  # as one that was declared dead
        assert facts(experiment) == before
        for path in (tmp_path / "grid").glob("study.db*"):
            path.unlink()
        study.note(owner, AT)
        assert set(waits) == {0}
        assert not list((tmp_path / "grid").glob("study.db*"))


def facts(experiment: Experiment) -> Any:
    with closing(sqlite3.connect(experiment.directory / "study.db")) as connection:
        return connection.execute("SELECT facts FROM bpf_owners").fetchall()


@pytest.mark.slow
def test_on_a_server_it_is_noted_with_the_lease(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = replace(prepared(tmp_path / "grid"), database=Database.at(postgres_url))
    (tmp_path / "grid").mkdir()
    experiment.save(["bpf", "tune"])
    experiment.plan()[0].close()
    monkeypatch.setattr(owners, "RENEW_SECONDS", 0.05)
    with at_work(experiment) as (study, owner), study.renewing(owner):
        study.note(owner, AT)
        eventually(lambda: summary.status(experiment)["workers"][0]["progress"])


# What is believed of it


def test_the_time_left_is_that_of_running_cells_at_their_own_pace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three cells of equal work: one is at epoch 3 of 4 after 30 s, so two others take 40 s each."""
    experiment = planned(tmp_path / "grid", lr=[0.1, 0.01, 0.001])
    with at_work(experiment) as (study, owner):
        (cost, *_) = (row.cost for row in study.rows())
        study.note(owner, AT.model_copy(update={"cost": cost}))
        assert summary.status(experiment)["eta_seconds"] == pytest.approx(10 + 2 * 40)
        assert shown(experiment, capsys)[1:] == [
            f"worker on here, process {summary.status(experiment)['workers'][0]['pid']}, cpu: dfa 8 tanh, 1 cell, "
            "2 executions stacked: epoch 3 of 4, 1,234 examples/s",
            "0 s of training in finished cells, about 2 min left",
            "1 worker at work, 1,234 examples/s",
        ]


GOOD = AT.model_dump()
HOSTILE = [
    "not JSON",
    "[" * 100_000,
    *map(
        json.dumps,
        [
            None,
            [],
            "text",
            {"at": GOOD | {"rule": "\x1b[31mred"}},
            {"at": GOOD | {"epochs": 0}},
            {"at": GOOD | {"epoch": "3"}},
            {"at": GOOD | {"cells": True}},
            {"at": GOOD | {"speed": float("nan")}},
            {"at": GOOD | {"speed": 1e300}},
            {"at": GOOD | {"seconds": -1.0}},
            {"at": GOOD | {"executions": 10**30}},
            {"at": {}},
            {"at": [GOOD]},
        ],
    ),
]


@pytest.mark.parametrize("said", HOSTILE, ids=range(len(HOSTILE)))
def test_what_does_not_fit_is_ignored(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = planned(tmp_path / "grid")
    with at_work(experiment):
        with closing(sqlite3.connect(experiment.directory / "study.db", isolation_level=None)) as other:
            other.execute("UPDATE bpf_owners SET facts = ?", (said,))
        status = summary.status(experiment)
        assert (status["workers"][0]["progress"], status["eta_seconds"]) == (None, None)
        [worker] = [line for line in shown(experiment, capsys) if line.startswith("worker")]
        assert worker.endswith(", ?")


def test_a_worker_whose_record_is_damaged_is_left_out(tmp_path: Path) -> None:
    experiment = planned(tmp_path / "grid")
    with at_work(experiment):
        with closing(sqlite3.connect(experiment.directory / "study.db", isolation_level=None)) as other:
            other.execute("UPDATE bpf_owners SET pid = 'none'")
        status = summary.status(experiment)
        assert (status["workers"], status["cells"]["running"]) == ([], 1)


def test_what_fits_is_kept_beside_what_does_not(tmp_path: Path) -> None:
    experiment = planned(tmp_path / "grid")
    with at_work(experiment):
        with closing(sqlite3.connect(experiment.directory / "study.db", isolation_level=None)) as other:
            said = {"host": "there", "device": ["cpu"], "torch": "\x07", "new": 1, "at": GOOD | {"new": 1}}
            said |= {"node": "\x1b[2J", "dashboard": "http://there", "spent": "7"}
            other.execute("UPDATE bpf_owners SET facts = ?", (json.dumps(said),))
        status = summary.status(experiment)
        [worker] = status["workers"]
        assert set(worker) == {"pid", "host", "since", "progress"}
        assert worker["progress"] == AT.as_json()
        assert status["nodes"] == [{"name": "there", "workers": 1, "devices": [], "throughput": 1234.5}]
        assert (status["dashboard"], status["device_hours"]) == (None, None)


# What it has cost


def test_workers_share_the_time_of_a_gpu_and_have_a_core_of_their_own(tmp_path: Path) -> None:
    experiment = planned(tmp_path / "grid")
    with closing(experiment.open_study()) as study:
        job = Job(experiment.database, experiment.name, experiment.data_dir, experiment.files, Terms("cpu", sharers=4))
        worker = Worker.of(job, study, lambda event: None)
        worker.holder = holder = Holder("token")
        holder._began -= 1000
        worker._reckon()
        assert holder.facts["spent"] == pytest.approx(1000, abs=50)
        worker._device = torch.device("cuda:0")
        worker._reckon()
        assert holder.facts["spent"] == pytest.approx(250, abs=12)
        holder.begin_anew("other")
        assert "spent" not in holder.facts
        worker._reckon()
        assert holder.facts["spent"] < 50


@pytest.mark.parametrize("stops", [False, True])
def test_a_worker_notes_what_it_has_cost_until_it_ends(stops: bool, tmp_path: Path) -> None:
    experiment, stop = planned(tmp_path / "grid"), Stop()

    def tell(event: Event) -> None:
        if isinstance(event, Trained):
            worker.holder._began -= 100  # each epoch took so much longer
            if stops:
                stop.request()

    with closing(experiment.open_study()) as study:
        job = Job(experiment.database, experiment.name, experiment.data_dir, experiment.files, Terms("cpu"))
        worker = Worker.of(job, study, tell, stop)
        if stops:
            with pytest.raises(Interrupted):
                worker.run()
        else:
            worker.run()
        assert study.workers() == []
        assert study.spent() == pytest.approx(100 if stops else 400, abs=60)
    assert summary.status(experiment)["device_hours"] == pytest.approx(study_spent(experiment) / 3600, abs=1e-6)


def study_spent(experiment: Experiment) -> float:
    with closing(experiment.read_study()) as study:
        return study.spent() or 0.0


def test_the_cost_is_that_of_all_workers_dead_or_alive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = planned(tmp_path / "grid", lr=[0.1, 0.01, 0.001])
    assert summary.status(experiment)["device_hours"] is None
    assert shown(experiment, capsys)[-1] == "no worker at work"
    with closing(experiment.open_study()) as study:
        for hours, ends in ((1.0, "is killed"), (2.0, "retires"), (0.5, "is killed"), (3.25, "retires")):
            with Owner(study.locks, {"host": "here"}) as owner:
                assert study.claim(owner, lambda row: 1)
                owner.facts = owner.facts | {"spent": 3600 * hours}
                if ends == "retires":
                    study.retire(owner)
                else:
                    study.note(owner, AT)
            study.repair()
        assert study.spent() == 3600 * 6.75
    assert shown(experiment, capsys)[-1] == "no worker at work, 6.75 device-hours so far"


SENSELESS = [
    "not JSON",
    "[" * 100_000,
    "9" * 10_000,
    '{"spent": NaN}',
    '{"spent": Infinity}',
    f'{{"spent": {"9" * 5000}}}',
    *(json.dumps({"spent": said}) for said in (None, -1.0, "7", True, [7], {"spent": 7}, 10**30, 1e300)),
    *map(json.dumps, (None, 7, [], "text", {})),
]


def test_a_cost_that_makes_no_sense_is_not_counted(tmp_path: Path) -> None:
    experiment = planned(tmp_path / "grid")
    with closing(sqlite3.connect(experiment.directory / "study.db", isolation_level=None)) as other:
        for number, said in enumerate([*SENSELESS, '{"spent": 1.5}', '{"spent": 2}', '{"spent": 0}']):
            values = (experiment.name, f"token-{number}", "elsewhere", 1, "", said, 1.0, 0.0)
            other.execute("INSERT INTO bpf_owners VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        assert study_spent(experiment) == 3.5
        other.execute(
            "DELETE FROM bpf_owners WHERE facts IN (?, ?, ?)", ('{"spent": 1.5}', '{"spent": 2}', '{"spent": 0}')
        )
        assert summary.status(experiment)["device_hours"] is None


def test_what_workers_at_the_desk_have_cost_comes_to_the_study(tmp_path: Path) -> None:
    experiment = planned(tmp_path / "grid", lr=[0.1, 0.01])
    with closing(experiment.open_study()) as study:
        desk = Desk(study, Folder(experiment.files), lambda seat, event: None)
        remote = RemoteStudy(Line(desk.answer, patience=0.0), "1-1")
        with remote.enrolled({"host": "here", "node": "10.0.0.5"}) as holder:
            assert remote.claim(holder, lambda row: 1)
            assert study.spent() is None
            holder.facts = holder.facts | {"spent": 10.0}
            remote.note(holder, AT)
            pulse = Pulse(Line(desk.answer, patience=0.0), {"seat": "1-1", "node": "n", "where": "here"}, Stop())
            pulse.holder = lambda: holder
            pulse.close()  # its last report
            assert study.spent() == 10
            desk.leave("1-1")  # it is taken for dead, and comes anew
            assert remote.claim(holder, lambda row: 1)
            assert "spent" not in holder.facts
            holder.facts = holder.facts | {"spent": 20.0}
        assert study.spent() == 30

        def break_off() -> None:
            with remote.enrolled({"host": "here"}) as holder:
                assert remote.claim(holder, lambda row: 1)
                holder.facts = holder.facts | {"spent": 40.0}
                raise RunError("broken")

        with pytest.raises(RunError, match="broken"):
            break_off()
        assert study.spent() == 70
        desk.close()


# Many workers


@contextmanager
def all_at_work(experiment: Experiment, said: list[dict[str, Any]]) -> Iterator[None]:
    """A worker for each of the facts."""
    with closing(experiment.open_study()) as study, ExitStack() as owners:
        for facts in said:
            owner = owners.enter_context(Owner(study.locks))
            owner.facts = facts
            assert study.claim(owner, lambda row: 1)
        yield


def working(node: str | None, device: str, speed: float, **more: Any) -> dict[str, Any]:
    return {"host": "a", "node": node, "device": device, "at": GOOD | {"speed": speed}, **more}


def test_several_nodes_have_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = planned(tmp_path / "grid", lr=[0.1, 0.01, 0.001, 0.2])
    said = [
        working("10.0.0.5", "cuda:1", 1000.0, dashboard="10.0.0.4:8265", spent=7200.0),
        working("10.0.0.4", "cpu", 20.5),
        working("10.0.0.5", "cuda:0", 300.0, dashboard="\x1b[2J:1"),
        {"at": None, "spent": 36_000.0},
    ]
    with all_at_work(experiment, said):
        status = summary.status(experiment)
        assert status["nodes"] == [
            {"name": "10.0.0.4", "workers": 1, "devices": ["cpu"], "throughput": 20.5},
            {"name": "10.0.0.5", "workers": 2, "devices": ["cuda:0", "cuda:1"], "throughput": 1300.0},
            {"name": None, "workers": 1, "devices": [], "throughput": 0},
        ]
        assert [worker.get("node") for worker in status["workers"]].count("10.0.0.5") == 2
        assert (status["throughput"], status["dashboard"], status["device_hours"]) == (1320.5, "10.0.0.4:8265", 12.0)
        lines = shown(experiment, capsys)
    assert [*lines[1:6], lines[-1]] == [
        "node 10.0.0.4: 1 worker, cpu, 20 examples/s",
        "node 10.0.0.5: 2 workers, cuda:0, cuda:1, 1,300 examples/s",
        "node ?: 1 worker",
        f"each worker: bpf status {experiment.directory} --json",
        "Ray's dashboard: http://10.0.0.4:8265",
        "4 workers at work, 1,320 examples/s, 12.0 device-hours so far",
    ]


@pytest.mark.parametrize("workers", [8, 9])
def test_many_workers_of_a_node_have_one_line(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = planned(tmp_path / "grid", lr=[0.001 * (n + 1) for n in range(9)])
    with all_at_work(experiment, [working(None, "cpu", 100.0) for _ in range(workers)]):
        lines = shown(experiment, capsys)[1:]
        if workers == 8:
            assert [line[:16] for line in lines[:8]] == ["worker on a, pro"] * 8
        else:
            assert lines[0] == "node a: 9 workers, cpu, 900 examples/s"
            assert lines[1] == f"each worker: bpf status {experiment.directory} --json"
        assert lines[-1] == f"{workers} workers at work, {workers}00 examples/s"


# A start


def test_a_start_is_told_until_there_is_a_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = prepared(tmp_path / "grid")
    cut_short = "Nothing is planned in .* yet, as its start was cut short"
    with experiment.running():
        experiment.save(["bpf", "tune"])
        status = summary.status(experiment)
        assert (status["cells"]["total"], status["workers"], status["eta_seconds"]) == (0, [], None)
        assert status["starting"].endswith("+00:00")
        [line] = shown(experiment, capsys)
        assert line.startswith(f"{experiment.directory}: starting for ")
        assert line.endswith(" s, nothing is planned yet")
        with pytest.raises(UsageError, match="is starting: nothing is planned in it yet"):
            summary.best(experiment)
    with pytest.raises(UsageError, match=cut_short):
        summary.status(experiment)
    with experiment.running():
        experiment.plan()[0].close()
        assert summary.status(experiment)["starting"]
        assert any(line.endswith(", no worker is there yet") for line in shown(experiment, capsys))
        with at_work(experiment):
            assert summary.status(experiment)["starting"] is None
    assert summary.status(experiment)["starting"] is None


def test_since_when_it_starts_is_when_the_directory_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it was taken before, and looked at meanwhile."""
    experiment = planned(tmp_path / "grid")
    with experiment.running():
        pass
    os.utime(tmp_path / "grid" / "running.lock", (1.0, 1.0))
    before = time.time()
    with experiment.running():
        assert is_held(tmp_path / "grid" / "running.lock")
        since = experiment.held_since()
        assert since is not None
        assert before - 1 < since


def test_who_only_looks_does_not_hinder_a_start(tmp_path: Path) -> None:
    experiment = planned(tmp_path / "grid")
    probe = FileLock(tmp_path / "grid" / "running.lock", thread_local=False)
    probe.acquire()
    timer = threading.Timer(0.2, probe.release)
    timer.start()
    with experiment.running():
        timer.join()
