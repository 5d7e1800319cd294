"""optuna-dashboard shows the study over HTTP, to this machine, until it is interrupted."""

import json
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from bpf.errors import UsageError
from bpf.experiment.directory import Experiment, Place
from bpf.results import dashboard
from bpf.study.cells import Row
from bpf.study.database import Database
from invented import finished, planned, record
from waiting import SECONDS

pytest.importorskip("optuna_dashboard")

GRID: dict[str, Any] = {"algorithm": ["bp", "dfa"], "lr": [0.1, 0.2]}


def invent(row: Row, number: int) -> dict[str, Any]:
    return record(number, [2.0, row.ordinal + 1.0])


@contextmanager
def served(experiment: Experiment) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The dashboard in a process of its own, as `bpf dashboard` has it, and its address."""
    script = """
        from pathlib import Path
        from bpf.results import dashboard
        from bpf.study.database import Database
        from bpf.experiment.directory import open_experiment
        from bpf.experiment.directory import Place
        directory, storage = Path(input()), input()
        experiment = open_experiment(directory, Place(Database.at(storage) if storage else None))
        dashboard.serve(experiment, 0, lambda url: print(url, flush=True))
        print("ended", flush=True)
    """
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], text=True, **pipes)
    storage = "" if experiment.is_here else experiment.database.url.render_as_string(hide_password=False)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{experiment.directory}\n{storage}\n")
        process.stdin.flush()
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def fetched(address: str, path: str) -> Any:
    with urllib.request.urlopen(address.replace("/dashboard", path)) as answer:
        return json.load(answer)


def check_strangers(address: str, study: int) -> None:
    """Requests from pages of others delete nothing; those of the page itself, also through a tunnel, are answered."""
    host = address.removeprefix("http://").removesuffix("/dashboard")
    port = host.rpartition(":")[2]
    strangers: list[dict[str, str]] = [
        {"Host": f"evil.example:{port}"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": f"192.168.0.1:{port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": f"https://{host}"},
        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
    ]
    for headers in strangers:
        for method, path in (("DELETE", f"/api/studies/{study}"), ("GET", "/api/studies")):
            asked = urllib.request.Request(address.replace("/dashboard", path), headers=headers, method=method)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(asked)
            assert refused.value.code == 403
            refused.value.close()
    for headers in ({"Host": "localhost:9999"}, {"Host": "[::1]"}, {"Origin": f"http://{host}"}):
        asked = urllib.request.Request(address.replace("/dashboard", "/api/studies"), headers=headers)
        with urllib.request.urlopen(asked) as answer:
            assert len(json.load(answer)["study_summaries"]) == 2


def check(experiment: Experiment) -> str:
    """Look at the dashboard, interrupt it, and return what it has said meanwhile."""
    with served(experiment) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        studies = fetched(address, "/api/studies")["study_summaries"]
        assert [study["study_name"] for study in studies] == ["mine/bp", "mine/dfa"]
        trials = fetched(address, f"/api/studies/{studies[1]['study_id']}")["trials"]
        assert [(trial["state"], trial["values"]) for trial in trials] == [("Complete", [2.0]), ("Complete", [2.0])]
        lrs = [param["param_external_value"] for trial in trials for param in trial["params"] if param["name"] == "lr"]
        assert lrs == ["0.1", "0.2"]
        with urllib.request.urlopen(address) as page:
            assert b"<title>" in page.read()
        check_strangers(address, studies[0]["study_id"])
        command = Path(f"/proc/{process.pid}/cmdline")
        assert not command.exists() or b"postgresql" not in command.read_bytes()
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, said) == (0, "ended\n")
        return errors


def test_a_study_in_a_file_is_shown_until_it_is_interrupted(tmp_path: Path) -> None:
    assert check(finished(tmp_path / "mine", invent, **GRID)) == ""


@pytest.mark.slow
def test_a_study_on_a_server_is_shown(tmp_path: Path, postgres_url: str) -> None:
    place = Place(Database.at(postgres_url))
    password = sa.make_url(postgres_url).password
    errors = check(finished(tmp_path / "mine", invent, place, **GRID))
    assert password is not None
    assert password not in errors


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError) as refused:
            dashboard.serve(planned(tmp_path / "mine"), port)
    assert str(refused.value) == (
        f"The port {port} cannot be used: Address already in use. Give another one with --port."
    )


def test_a_study_that_is_missing_is_refused(tmp_path: Path) -> None:
    experiment = finished(tmp_path / "mine", invent)
    (tmp_path / "mine" / "models").mkdir()
    (tmp_path / "mine" / "models" / "dfa").touch()
    (tmp_path / "mine" / "study.db").unlink()
    with pytest.raises(UsageError, match=r"study\.db is missing, and with it the results of "):
        dashboard.serve(experiment, 0)


def test_without_optuna_dashboard_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(UsageError) as refused:
        dashboard.serve(planned(tmp_path / "mine"))
    assert str(refused.value) == "The dashboard needs optuna-dashboard: pip install 'bpf[dashboard]'"
