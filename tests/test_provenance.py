"""What is recorded of versions, git, hardware and environment, and that no password gets into it."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import bpf
from bpf.experiment import provenance as module
from bpf.experiment.provenance import provenance, redacted
from bpf.registry import Plugin

IDENTITY = {
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@b.c",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@b.c",
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory, and a git that reads no settings of this machine."""
    monkeypatch.chdir(tmp_path)
    for name, value in IDENTITY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def git(*arguments, at="."):
    done = subprocess.run(["git", "-C", str(at), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def repository(at, **files):
    """A repository on branch `main`, with one commit of these files."""
    git("init", "-b", "main", str(at))
    write(at, **files)
    git("add", ".", at=at)
    git("commit", "-m", "first", "--allow-empty", at=at)
    return git("rev-parse", "HEAD", at=at)


def write(at, **files):
    for name, text in files.items():
        Path(at, f"{name}.py").write_text(text)


def fake_git(tmp_path, monkeypatch, script):
    """Replace the `git` that is found by a shell script."""
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_it_is_plain_values(place):
    repository(place, a="1")
    found = provenance([])
    assert json.loads(json.dumps(found)) == found
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert set(found) == {"versions", "git", "bpf_git", "hardware", "environment"}


def test_versions_name_the_libraries_and_the_distributions_of_plugins():
    plugins = [
        Plugin("dfa", "bpf.algorithms.dfa:X", "bpf", "0.0.0"),
        Plugin("mine", "mine:Rule", "my-rules", "1.2"),
        Plugin("hers", "her:Rule", "her-rules", "3.4"),
        Plugin("ours", "mine:Other", "my-rules", "1.2"),
    ]
    versions = provenance(plugins)["versions"]
    assert list(versions)[-2:] == ["her-rules", "my-rules"]
    assert versions["my-rules"] == "1.2"
    assert versions["bpf"] == bpf.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    import numpy
    import sqlalchemy

    assert (versions["numpy"], versions["sqlalchemy"]) == (numpy.__version__, sqlalchemy.__version__)
    assert {"torch", "torchvision", "optuna"} < set(versions)


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(module, "LIBRARIES", ("no-such-library",))
    assert provenance([])["versions"]["no-such-library"] is None


def state(root, commit, branch, changed):
    return {"root": str(root), "commit": commit, "branch": branch, "dirty": changed > 0, "changed_files": changed}


def test_a_clean_repository(place):
    commit = repository(place, a="1")
    assert provenance([])["git"] == state(place, commit, "main", 0)


def test_changed_files_are_counted_wherever_one_stands(place, monkeypatch):
    commit = repository(place, a="1", b="1", c="1", d="1")
    write(place, a="2", e="1")
    git("add", "e.py")
    git("mv", "b.py", "moved.py")
    Path("c.py").unlink()
    write(place, untracked="1")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert provenance([])["git"] == state(place, commit, "main", 4)


def test_a_file_name_with_a_line_break_is_one_file(place):
    repository(place, **{"a\n# b c": "1"})
    write(place, **{"a\n# b c": "2"})
    assert provenance([])["git"]["changed_files"] == 1


def test_a_detached_head_has_no_branch(place):
    commit = repository(place, a="1")
    git("checkout", "--detach")
    assert provenance([])["git"] == state(place, commit, None, 0)


def test_a_repository_without_commits_has_no_commit(place):
    git("init", "-b", "main")
    assert provenance([])["git"] == state(place, None, "main", 0)


def test_a_remote_is_not_recorded(place):
    repository(place, a="1")
    git("remote", "add", "origin", "https://someone:hunter2@example.com/secret.git")
    git("config", "branch.main.remote", "origin")
    git("config", "branch.main.merge", "refs/heads/main")
    assert "example.com" not in json.dumps(provenance([]))


def test_no_repository():
    assert provenance([])["git"] is None


def test_a_working_directory_that_is_gone(place, monkeypatch):
    (place / "gone").mkdir()
    monkeypatch.chdir("gone")
    (place / "gone").rmdir()
    assert provenance([])["git"] is None


def test_no_git(place, monkeypatch):
    repository(place, a="1")
    monkeypatch.setenv("PATH", str(place))
    found = provenance([])
    assert found["git"] is None
    assert found["bpf_git"] is None


@pytest.mark.parametrize("script", ["exit 3", "kill -9 $$", "printf '\\377'; exit 1"])
def test_a_git_that_fails(place, monkeypatch, script):
    fake_git(place, monkeypatch, script)
    assert provenance([])["git"] is None


def test_a_git_that_hangs(place, monkeypatch):
    fake_git(place, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(module, "GIT_SECONDS", 0.05)
    assert provenance([])["git"] is None


def checkout(place, monkeypatch, *parts):
    """A package in a directory of its own, taken for bpf's."""
    package = place.joinpath(*parts)
    package.mkdir(parents=True)
    write(package, __init__="")
    monkeypatch.setattr(module, "PACKAGE", package)
    return package


def test_the_source_tree_of_bpf(place, monkeypatch):
    package = checkout(place, monkeypatch, "source", "bpf")
    commit = repository(place / "source")
    write(package, __init__="1")
    found = provenance([])
    assert found["git"] is None
    assert found["bpf_git"] == state(place / "source", commit, "main", 1)


def test_a_hook_of_another_repository_does_not_mislead(place, monkeypatch):
    checkout(place, monkeypatch, "source", "bpf")
    commit = repository(place / "source")
    repository(place / "other", a="1")
    monkeypatch.setenv("GIT_DIR", str(place / "other" / ".git"))
    assert provenance([])["bpf_git"]["commit"] == commit


def test_an_installed_bpf_is_not_part_of_the_repository_around_it(place, monkeypatch):
    checkout(place, monkeypatch, ".venv", "bpf")
    Path(".gitignore").write_text(".venv\n")
    commit = repository(place, a="1")
    found = provenance([])
    assert found["git"]["commit"] == commit
    assert found["bpf_git"] is None


def test_the_machine(monkeypatch):
    hardware = provenance([])["hardware"]
    assert set(hardware) == {"host", "system", "cpu", "cores", "memory_gib", "gpus"}
    assert all(hardware[name] for name in ("host", "system", "cpu"))
    assert 1 <= hardware["cores"] <= os.cpu_count()
    assert hardware["memory_gib"] > 0


def fake_torch(monkeypatch, cuda):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(**cuda)))


def test_gpus_by_name(monkeypatch):
    gpus = [
        SimpleNamespace(name="A100", total_memory=40 * 2**30),
        SimpleNamespace(name="T4", total_memory=15.75 * 2**30),
    ]
    fake_torch(
        monkeypatch,
        {"is_available": lambda: True, "device_count": lambda: 2, "get_device_properties": gpus.__getitem__},
    )
    assert provenance([])["hardware"]["gpus"] == [
        {"name": "A100", "memory_gib": 40.0},
        {"name": "T4", "memory_gib": 15.8},
    ]


def test_no_gpu(monkeypatch):
    fake_torch(monkeypatch, {"is_available": lambda: False})
    assert provenance([])["hardware"]["gpus"] == []


def test_a_gpu_that_fails(monkeypatch):
    def fail():
        raise RuntimeError("CUDA error")

    fake_torch(monkeypatch, {"is_available": lambda: True, "device_count": fail})
    assert provenance([])["hardware"]["gpus"] == []


def test_nothing_heavy_is_imported():
    script = (
        "import sys; from bpf.experiment.provenance import provenance, redacted\n"
        "provenance([]); redacted(['bpf', 'a@b:c'])\n"
        "print(sorted({'torch', 'optuna', 'numpy', 'sqlalchemy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_three_variables_and_no_other(monkeypatch):
    for name in module.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert provenance([])["environment"] == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    found = provenance([])
    assert found["environment"] == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": "17"}
    assert "hunter2" not in json.dumps(found)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:hunter2@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("pg+psycopg://me:hunter2@host/db?sslmode=require", "pg+psycopg://me:***@host/db?sslmode=require"),
        ("mysql://:hunter2@host/db", "mysql://:***@host/db"),
        ("mysql://me:@host/db", "mysql://me:***@host/db"),
        ("mysql://me@server:hunter2@host/db", "mysql://me@server:***@host/db"),
        ("pg://me:hunter2%40%2F@[::1]:5432/db", "pg://me:***@[::1]:5432/db"),
        ("pg://me:hunter@2@host/db", "pg://me:***@host/db"),
        ("pg://me:@hunter2@@host/db?user=a@b", "pg://me:***@host/db?user=a@b"),
        ("pg://me:hun/ter?2#:@host/db", "pg://me:***@host/db"),
        ("pg://me:hunter@2/hunter?@host/db", "pg://me:***@host/db"),
        ("pg://me:hunter@?2@host/db", "pg://me:***@host/db"),
        ("pg://me:hunter\n2@host/db", "pg://me:***@host/db"),
        ("pg://me:hunter?password=2@host/db", "pg://me:***@host/db"),
        ("pg://us/er:hunter2@host/db", "pg://us/er:***@host/db"),
        ("pg:///db?host=h&user=me&password=hunter2", "pg:///db?host=h&user=me&password=***"),
        ("pg:///db?password=hunter%262&host=h", "pg:///db?password=***&host=h"),
        ("pg:///db?password=hunter&2&host=h", "pg:///db?password=***&host=h"),
        ("pg:///db?password=hunter@2=&host=h", "pg:///db?password=***&host=h"),
        ("pg://host/db?PASSWORD=hunter2", "pg://host/db?PASSWORD=***"),
        ("mysql://host/db?passwd=hunter2", "mysql://host/db?passwd=***"),
        (
            "pg://u:hunter2@h/d?sslpassword=hunter2&x=k&password=hunter2",
            "pg://u:***@h/d?sslpassword=***&x=k&password=***",
        ),
        ("pg://me:hunter2@host:port/db", "pg://***@host:port/db"),
        ("pg://me:hun@ter:2@host/db", "pg://***@host/db"),
        ("my-db://me:hunter2@host/db?password=hunter@2", "my-db://me:***@host/db?password=***"),
        ("pg://me:hunter?password=2@host:port/db?password=hunter@2", "pg://***@host:port/db?password=***"),
        ("://me:hunter2@host/db", "://***@host/db"),
    ],
)
def test_no_password_is_shown(url, shown):
    for before in ("", "--storage="):
        line = redacted(["bpf", "run", before + url, "--lr", "0.1"])
        assert shlex.split(line) == ["bpf", "run", before + shown, "--lr", "0.1"]
        assert "hunter" not in line
    assert "hunter" not in redacted([f"-s{url}"])


@pytest.mark.parametrize(
    "argument",
    [
        "sqlite:///study.db",
        "sqlite:////home/me@host/a:b@c/study.db",
        "postgresql://me@host:5432/db?sslmode=require&passfile=/home/me/.pgpass",
        "postgresql://host:5432/db",
        "https://example.com/a?b=c#d",
        "folder:/data/me@host",
        "dfa.scale=0.1,0.2",
        "a:b@c",
        "",
        "it's $HOME",
    ],
)
def test_everything_else_stays(argument):
    for written in (argument, f"--storage={argument}"):
        assert shlex.split(redacted(["bpf", written])) == ["bpf", written]
