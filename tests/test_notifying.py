"""Whoever wants to know is told once, no secret is shown, and no notification that fails does any harm."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from bpf.cli import app as cli
from bpf.errors import UsageError
from bpf.results import notifying
from bpf.results.notifying import Notifier, check, hidden, shown, summarize
from bpf.study.cells import Row
from invented import finished, planned, record
from waiting import SECONDS

SUMMARY = {"experiment": "runs/mine", "event": "finished", "message": "Done: ½", "cells": {"complete": 2}}


class Handler(BaseHTTPRequestHandler):
    server: "Receiver"

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.command, self.path, self.headers["Content-Type"], content))
        if not self.server.status:
            self.server.release.wait(SECONDS)
            return
        self.send_response(self.server.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:  # what a redirected POST becomes
        self.server.received.append((self.command, self.path, "", None))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Receiver(HTTPServer):
    """Keeps what it was sent; answers with `status`, or not at all if that is 0."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[str, str, str, Any]] = []
        self.status = 200
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_is_posted_to(receiver: Receiver) -> None:
    assert Notifier([f"{receiver.url}/hook/s3cret?key=1"]).send("finished", SUMMARY) == []
    assert receiver.received == [("POST", "/hook/s3cret?key=1", "application/json", SUMMARY)]


def test_a_command_gets_it_on_its_input(tmp_path: Path) -> None:
    told, names = tmp_path / "told.json", tmp_path / "names"
    command = f"cat > '{told}' && echo \"$BPF_EVENT $BPF_EXPERIMENT\" > '{names}'"
    assert Notifier([command]).send("stopped", SUMMARY) == []
    assert json.loads(told.read_text()) == SUMMARY | {"event": "stopped"}
    assert names.read_text() == "stopped runs/mine\n"


def test_what_a_command_prints_leaves_standard_output_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert Notifier(["echo sent"]).send("finished", SUMMARY) == []
    assert capfd.readouterr() == ("", "sent\n")


def test_a_command_need_not_read_its_input() -> None:
    assert Notifier(["true"]).send("finished", SUMMARY | {"message": "x" * 1_000_000}) == []


def test_every_target_is_told_whatever_becomes_of_the_others(receiver: Receiver, tmp_path: Path) -> None:
    with socket.socket() as nobody:  # listens to nothing
        nobody.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        targets = [f"{closed}/s3cret", "exit 3", f"{receiver.url}/hook", f"touch '{tmp_path / 'told'}'"]
        assert Notifier(targets).send("failed", SUMMARY) == [
            f"The notification to {closed}/... failed: Connection refused.",
            "The notification to exit ... failed: it ended with exit code 3.",
        ]
    assert len(receiver.received) == 1
    assert (tmp_path / "told").exists()


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (500, "Internal Server Error"), (302, "Found")])
def test_an_answer_other_than_success_is_a_failure(receiver: Receiver, status: int, reason: str) -> None:
    """A redirection too: following it would lose what is sent."""
    receiver.status = status
    assert Notifier([f"{receiver.url}/s3cret"]).send("finished", SUMMARY) == [
        f"The notification to {receiver.url}/... failed: the server answered {status} {reason}."
    ]
    assert len(receiver.received) == 1


def test_a_server_that_does_not_answer_is_given_up(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.status = 0
    monkeypatch.setattr(notifying, "URL_SECONDS", 0.2)
    assert Notifier([f"{receiver.url}/s3cret"]).send("finished", SUMMARY) == [
        f"The notification to {receiver.url}/... failed: no answer within 0.2 s."
    ]


def test_a_command_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifying, "COMMAND_SECONDS", 0.2)
    assert Notifier(["exec sleep 60"]).send("finished", SUMMARY) == [
        "The notification to exec ... failed: it did not end within 0.2 s."
    ]


@pytest.mark.parametrize(
    ("target", "known"),
    [
        ("https://hooks.example.org/T0/s3cret path", "https://hooks.example.org/..."),
        ("http://[s3cret", "http:///..."),
        ("http://127.0.0.1:s3cret/", "http:///..."),
        ("http://", "http:///..."),
        ("s3cret\0", "s3cret\0"),
    ],
)
def test_a_target_that_makes_no_sense_only_warns(target: str, known: str) -> None:
    (warning,) = Notifier([target]).send("finished", SUMMARY)
    assert warning.startswith(f"The notification to {known} failed: ")
    assert "s3cret" not in warning.removeprefix(f"The notification to {known}")


@pytest.mark.parametrize(
    ("target", "known"),
    [
        ("https://hooks.slack.com/services/T0/B0/s3cret", "https://hooks.slack.com/..."),
        ("HTTPS://user:s3cret@Example.org:8443/?token=s3cret", "https://example.org:8443/..."),
        ("http://ntfy.sh", "http://ntfy.sh/..."),
        ("notify-send 'bpf s3cret'", "notify-send ..."),
        ('TOKEN=s3cret curl -H "Authorization: s3cret" https://example.org', "curl ..."),
        ("./tell", "./tell"),
        ("mail -s \"it's s3cret", "mail ..."),
        ("", ""),
    ],
)
def test_targets_are_shown_without_their_secrets(target: str, known: str) -> None:
    assert shown(target) == known


NEITHER = "is neither a http(s) URL nor a shell command."
NOT_FOUND = "is neither a URL, which begins with http:// or https://, nor a command that is found here."
REFUSED = {
    "hooks.slack.com/services/s3cret": NOT_FOUND,
    "no-such-program s3cret": NOT_FOUND,
    "./no-such-program": NOT_FOUND,
    "ftp://x/s3cret": f"ftp://... {NEITHER}",
    "mailto:s3cret@example.org": f"mailto:... {NEITHER}",
    "https:example.org/s3cret": f"https:... {NEITHER}",
    "http://": "http:///... cannot be told: the URL has no host, or none with a port.",
    "https:///s3cret": "https:///... cannot be told: the URL has no host, or none with a port.",
    "http://[s3cret": "http:///... cannot be told: the URL has no host, or none with a port.",
    "http://a.org:s3cret/": "http:///... cannot be told: the URL has no host, or none with a port.",
    "https://a.org/s3cret path": "https://a.org/... cannot be told: a URL has no spaces.",
    "https://me:s3cret@a.org/": "https://a.org/... cannot be told: "
    "a user name or a password in a URL would not be sent.",
}


@pytest.mark.parametrize(("target", "problem"), REFUSED.items())
def test_what_cannot_be_told_is_refused_at_the_start(
    target: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as refused:
        check(["true", target])
    assert str(refused.value) == f"--notify {problem}"
    known = finished(tmp_path / "known", lambda row, number: record(number, [1.0]))
    before = (known.directory / "experiment.yaml").read_bytes()
    new = [
        str(tmp_path / "new"),
        "--dataset",
        "digits",
        "--algorithm",
        "bp",
        "--arch",
        "8",
        "--data-dir",
        str(tmp_path),
    ]
    for words in (["tune", *new], ["train", *new], ["resume", str(known.directory)]):
        with pytest.raises(SystemExit) as end:
            cli.main([*words, "--notify", target, "--quiet"])
        assert (end.value.code, capsys.readouterr().err) == (2, f"Error: --notify {problem}\n")
    assert (known.directory / "experiment.yaml").read_bytes() == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "target",
    [
        *(
            "https://hooks.example.org/T0/s3cret",
            "HTTP://127.0.0.1:8080/",
            "./tell",
            "echo 'http://a.org ended'",
        ),
        *("cat >> log; echo >> log", "printf ftp://a.org/", "TOKEN=a:b tell"),
    ],
)
def test_urls_and_commands_are_accepted(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tell").write_text("#!/bin/sh\n")
    (tmp_path / "tell").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    check([target])


def test_command_lines_are_remembered_without_targets() -> None:
    command = ["bpf", "tune", "--notify", "https://a.org/s3cret", "--lr", "0.1", "--notify=mail -s s3cret", "notify"]
    assert hidden(command) == [
        "bpf",
        "tune",
        "--notify",
        "https://a.org/...",
        "--lr",
        "0.1",
        "--notify=mail ...",
        "notify",
    ]
    assert hidden(["bpf", "tune", "--notify"]) == ["bpf", "tune", "--notify"]


def test_a_summary_says_how_it_stands_and_what_is_best(tmp_path: Path) -> None:
    def invent(row: Row, number: int) -> dict[str, Any]:
        return record(number, [5.0 - row.ordinal, None] if row.params["lr"] == 0.3 else [5.0 - row.ordinal])

    experiment = finished(tmp_path / "mine", invent, algorithm=["bp", "dfa"], lr=[0.1, 0.2, 0.3])
    summary = summarize(experiment, "finished", 12.34567, "Done")
    best = summary.pop("best")
    assert summary == {
        "experiment": str(tmp_path / "mine"),
        "event": "finished",
        "message": "Done",
        "seconds": 12.346,
        "cells": {"pending": 0, "interrupted": 0, "running": 0, "complete": 4, "diverged": 2, "failed": 0},
    }
    assert {
        rule: (cell["params"]["lr"], cell["objective"]["mean"], cell["test"]["loss"]) for rule, cell in best.items()
    } == {
        **{"bp": (0.2, 4.0, 8.0), "dfa": (0.2, 1.0, 2.0)},
    }
    assert json.loads(json.dumps(best, allow_nan=False)) == best


def test_a_summary_is_there_even_if_the_study_is_not(tmp_path: Path) -> None:
    experiment = planned(tmp_path / "mine")
    (tmp_path / "mine" / "study.db").unlink()
    summary = summarize(experiment, "failed", 1.0, "The study database failed.")
    assert (summary["cells"], summary["best"], summary["message"]) == ({}, {}, "The study database failed.")
