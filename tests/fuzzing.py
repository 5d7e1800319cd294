"""Inputs that lie, by the hundred: each family draws what a hostile file, a damaged disk or a tired user might bring.

A case is commands in a directory of its own. Whatever they are given, they end by themselves with an exit code and, if
they fail, one message in words; they change nothing that bpf did not make, obey no control character of a name, and
tell no password. What must be refused, they refuse.
"""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from bpf.cli import app as cli
from bpf.spec.run import RunSpec
from bpf.training import checkpoint

SECONDS = 120
SMALL = "--arch 8 --activation tanh --bw-init ortho --no-batch-norm --examples-frac 0.1 --executions-per-trial 1"
TUNE = f"tune ex --dataset digits --algorithm dfa,bp {SMALL} --epochs 3 --lr 0.1,0.01 --keep-checkpoints -q"
PASSWORD = "hunter2secret"
CONTROL = "\x1b[2J\x1b]0;owned\x07\x08\r\x9b31m\u202e\x00"
_RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_BUG = re.compile(r"Traceback|This is a bug|Segmentation|Fatal Python error|Warning:")

Command = list[str]


@dataclass
class Case:
    """Commands to give in a directory that is made ready; `refused` says that the first must not succeed."""

    what: str
    commands: list[Command]
    refused: bool = False
    secret: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """What cases begin with: experiments that are finished and half-way, images, an archive."""

    root: Path


Family = Callable[[random.Random, Path, Made], Case]
FAMILIES: dict[str, Family] = {}


def family(make: Family) -> Family:
    FAMILIES[make.__name__] = make
    return make


# What is drawn from


def text(draw: random.Random) -> str:
    return draw.choice(
        [
            *(
                "",
                " ",
                "-",
                "--",
                "0",
                "-1",
                "1e999",
                "nan",
                "inf",
                "1_000",
                "0x10",
                "٣",
                "½",
                "true",
                "null",
                "~",
                "*",
                "[/]",
            ),
            *(
                "../../x",
                "/etc/passwd",
                "..",
                ".",
                "/",
                "a/b",
                "~nobody/x",
                "~",
                "NUL",
                "x" * 300,
                "x" * 5000,
                "é" * 200,
            ),
            *(
                "a\nb",
                "a\tb",
                CONTROL.replace("\0", ""),
                "[bold]x[/bold]",
                ":bug:",
                "{0}",
                "%s",
                "$HOME",
                "`id`",
                "; rm -rf x",
            ),
            *(
                "500",
                "500-500",
                "500-0",
                "99999999999999999999",
                "1.5",
                "-0.0",
                "1e-3",
                "1e30",
                "digits",
                "dfa",
                "bp",
                "tanh",
            ),
            *(
                "dfa,dfa",
                "1,1",
                ",",
                "1,,2",
                "cuda",
                "cuda:99",
                "foo",
                "folder:",
                "folder:x",
                "npz:",
                "npz:\x1b",
                "ex",
                "one.pt",
            ),
            "".join(chr(draw.randrange(1, 0x2FF)) for _ in range(draw.randrange(1, 20))),
        ]
    )


def value(draw: random.Random, depth: int = 0) -> Any:
    """Anything that YAML and JSON can say."""
    kinds = [
        lambda: text(draw),
        lambda: draw.choice(
            [None, True, False, 0, 1, -1, 2, 10**30, -(10**18), 0.5, 1e308, float("nan"), float("inf")]
        ),
        lambda: [value(draw, depth + 1) for _ in range(draw.randrange(3))],
        lambda: {text(draw): value(draw, depth + 1) for _ in range(draw.randrange(3))},
    ]
    return draw.choice(kinds[: 4 if depth < 3 else 2])()


def spoil_bytes(draw: random.Random, path: Path) -> None:
    """One bit, some bytes, or the end of a file."""
    content = bytearray(path.read_bytes())
    how = draw.randrange(4)
    if how == 0 and content:
        at = draw.randrange(8 * len(content))
        content[at // 8] ^= 1 << at % 8
    elif how == 1:
        del content[draw.randrange(len(content) + 1) :]
    elif how == 2:
        at = draw.randrange(len(content) + 1)
        content[at : at + draw.randrange(64)] = draw.randbytes(draw.randrange(64))
    else:
        content = bytearray(draw.randbytes(draw.randrange(300)))
    path.write_bytes(content)


def spoil_value(draw: random.Random, root: Any) -> Any:
    """A copy of nested values with something else, nothing or too much somewhere inside."""
    root = json.loads(json.dumps(root))
    at, holder, name = root, None, None
    while isinstance(at, dict | list) and at and (holder is None or draw.random() < 0.75):
        holder, name = at, draw.choice(list(at)) if isinstance(at, dict) else draw.randrange(len(at))
        at = holder[name]
    if holder is None:
        return value(draw)
    how = draw.randrange(4)
    if how == 0:
        del holder[name]
    elif how == 1 and isinstance(holder, dict):
        holder[text(draw)] = holder.pop(name)
    else:
        holder[name] = value(draw)
    return root


READING = (
    "status {0}",
    "status {0} --json",
    "status {0} --failed",
    "best {0}",
    "best {0} --json",
    "show {0}",
    "show {0} --json",
)
READING += (
    "export {0}",
    "export {0} --what history",
    "export {0} --what trackers --format json",
    "clean {0} --dry-run",
)
READING += ("best {0} --per lr", "report {0} --output out/page.html", "clean {0}")
WRITING = (
    "resume {0} -q",
    "resume {0} -q --retry-failed",
    f"{TUNE}",
    f"{TUNE},0.05",
    f"{TUNE.replace('--epochs 3', '--epochs 4')}",
)
WRITING += ("worker {0} -q",)


def some_commands(draw: random.Random, writing: bool = True) -> list[Command]:
    names = [draw.choice(READING), draw.choice(WRITING if writing else READING)]
    return [name.format("ex").split() for name in names]


# Families


@family
def options(draw: random.Random, work: Path, made: Made) -> Case:
    names = (
        "--dataset",
        "--algorithm",
        "--arch",
        "--activation",
        "--lr",
        "--epochs",
        "--executions",
        "--seed",
        "--dropout",
    )
    names += (
        "--batch-size",
        "--objective",
        "--val-frac",
        "--examples-frac",
        "--device",
        "--tracker",
        "--tracker-every",
        "--option",
    )
    names += (
        "--workers",
        "--max-hours",
        "--data-dir",
        "--spec",
        "--storage",
        "--experiment",
        "--checkpoints",
        "--lr-from",
    )
    names += ("--early-stopping", "--imbalance-factor", "--skew-type", "--image-size", "--notify", "--checkpoint-every")
    chosen = [draw.choice(names) for _ in range(draw.randrange(1, 3))]
    given = [
        word for name in chosen for word in ([name] if draw.random() < 0.05 else [name, text(draw).replace("\0", "")])
    ]
    start = draw.choice(["tune --dry-run", "tune --plan-only", "train --epochs 1", "tune new --dry-run"]).split()
    basic = [] if draw.random() < 0.1 else f"--dataset digits --algorithm dfa {SMALL}".split()
    return Case("options", [[*start, *basic, *given]])


@family
def words(draw: random.Random, work: Path, made: Made) -> Case:
    """Other commands, with arguments that mean nothing."""
    shutil.copytree(made.root / "done", work / "ex")
    commands = (
        "status",
        "best",
        "show",
        "clean",
        "export",
        "report",
        "tensorboard --write-only",
        "evaluate",
        "predict",
        "onnx",
    )
    commands += (
        "resume -q",
        "worker -q",
        "algorithms",
        "datasets",
        "trackers",
        "schema",
        "dashboard --port",
        "train",
        "nonsense",
    )
    more = (
        "--top",
        "--per",
        "--what",
        "--format",
        "--output",
        "--map",
        "--figures",
        "--part",
        "--image-size",
        "--device",
        "--json",
    )
    given = [draw.choice(["ex", text(draw).replace("\0", "")]) for _ in range(draw.randrange(3))]
    given += [word for _ in range(draw.randrange(3)) for word in (draw.choice(more), text(draw).replace("\0", ""))]
    return Case("words", [[*draw.choice(commands).split(), *given]])


@family
def spec_files(draw: random.Random, work: Path, made: Made) -> Case:
    spec: Any = {"dataset": "digits", "algorithm": ["dfa"], "arch": ["8"], "lr": [0.1], "epochs": 1, "trackers": []}
    spec |= {"executions_per_trial": 1, "examples_frac": 0.1, "options": {"dfa": {}}, "batch_norm": [False]}
    kind, refused = draw.choice(["yaml", "json", "toml"]), False
    how = draw.randrange(5)
    if how == 0:
        content = json.dumps(spoil_value(draw, spec))
    elif how == 1:
        kind, content, refused = "yaml", bomb(draw), True
    elif how == 2:
        field_, bad = draw.choice(
            [
                *(("trackers", False), ("trackers", 0), ("trackers", {}), ("epochs", "1_000"), ("arch", "٥٠٠")),
                *(("early_stopping", 1e30), ("arch", "100,100"), ("arch", ["8", "8"]), ("lr", [0.1, 0.1])),
                *(("lr", "1_0"), ("seed", "0x1"), ("dataset", "folder:\x1b"), ("executions_per_trial", "٣")),
            ]
        )
        content, refused = json.dumps(spec | {field_: bad}), True
    elif how == 3:
        content = yaml.safe_dump(spoil_value(draw, spec), allow_unicode=True)
    else:
        content = draw.choice(
            ["[" * 100_000, "{" * 50_000, "a: " * 5000, "- " * 10_000, '"' + "x" * 10**6, "&a [*a]", "1" * 10_000]
        )
    path = work / f"s.{kind if how != 2 else 'json'}"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    if draw.random() < 0.2:
        refused = False
        spoil_bytes(draw, path)
    return Case("a spec file", [["tune", "new", "--spec", path.name, "--dry-run"]], refused)


def bomb(draw: random.Random) -> str:
    names, width = "abcdefghij", draw.randrange(8, 12)
    lines = [f"a: &a [{','.join('1' * width)}]"]
    lines += [f"{one}: &{one} [{','.join([f'*{before}'] * width)}]" for before, one in itertools.pairwise(names)]
    return "\n".join([*lines, "dataset: digits", "algorithm: dfa"])


@family
def settings_files(draw: random.Random, work: Path, made: Made) -> Case:
    """experiment.yaml, damaged or made up."""
    shutil.copytree(made.root / draw.choice(["done", "half"]), work / "ex")
    path = work / "ex/experiment.yaml"
    content = yaml.safe_load(path.read_text())
    refused, how = False, draw.randrange(4)
    if how == 0:
        spoil_bytes(draw, path)
    elif how == 1:
        path.write_text(bomb(draw))
        refused = True
    elif how == 2:
        where = draw.choice(
            ["../outside", str(work / "outside"), "/", "", "..", "../../x", str(work / "outside/empty")]
        )
        path.write_text(yaml.safe_dump(content | {draw.choice(["files", "name", "storage", "data_dir"]): where}))
    else:
        path.write_text(yaml.safe_dump(spoil_value(draw, content), allow_unicode=True))
    return Case("experiment.yaml", some_commands(draw), refused)


@family
def rows(draw: random.Random, work: Path, made: Made) -> Case:
    """The tables of a study, changed by somebody who can."""
    shutil.copytree(made.root / draw.choice(["done", "half"]), work / "ex")
    refused = False
    with closing(sqlite3.connect(work / "ex/study.db")) as raw:
        raw.execute("PRAGMA foreign_keys = OFF")
        tables = [name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        mine = [name for name in tables if name.startswith("bpf_")]
        table = draw.choice(mine if draw.random() < 0.85 else tables)
        columns = [record[1] for record in raw.execute(f"PRAGMA table_info({table})")]
        how = draw.randrange(10)
        if how == 0:
            raw.execute(f"DELETE FROM {table}" if draw.random() < 0.5 else f"DROP TABLE {table}")
        elif how == 1:
            name = draw.choice(["../../../outside/x", "/tmp/x", "..", "a/b", CONTROL, ""])
            column = draw.choice(["key", "cohort", "name", "owner"])
            raw.execute(f"UPDATE OR IGNORE bpf_cells SET {column} = ?", (name,))
            refused = column in ("key", "name") and bool(raw.total_changes)
        elif how == 2:
            raw.execute(
                "UPDATE OR IGNORE bpf_histories SET records = ?",
                (draw.choice([zlib.compress(b"0" * 10**8), b"x", None, 5, "[1"]),),
            )
        elif how < 6:
            column = draw.choice(["settings", "axes", "params", "spec", "result", "facts"])
            table = next(name for name in mine if column in [r[1] for r in raw.execute(f"PRAGMA table_info({name})")])
            for (stored,) in raw.execute(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL LIMIT 1").fetchall():
                raw.execute(
                    f"UPDATE OR IGNORE {table} SET {column} = ?", (json.dumps(spoil_value(draw, json.loads(stored))),)
                )
        else:
            column = draw.choice(columns)
            odd = draw.choice(
                [None, "", "x", text(draw), -1, 10**18, 0.5, float("inf"), b"\x00\xff", "{}", "[1,2", "NaN", '"x"']
            )
            with suppress(sqlite3.IntegrityError):  # of a type that this column cannot have
                raw.execute(f"UPDATE OR IGNORE {table} SET {column} = ?", (odd,))
        raw.commit()
    commands = some_commands(draw) if not refused else [[draw.choice(["export", "report", "clean"]), "ex"]]
    return Case("the tables", commands, refused)


@family
def databases(draw: random.Random, work: Path, made: Made) -> Case:
    """The database as a file."""
    shutil.copytree(made.root / "done", work / "ex")
    path = work / "ex/study.db"
    if draw.random() < 0.7:
        spoil_bytes(draw, path)
    else:
        path.unlink()
        draw.choice([path.mkdir, path.touch, lambda: path.symlink_to(path), lambda: os.mkfifo(path)])()
    return Case("study.db", some_commands(draw))


def reseal(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint and give it a checksum that is right."""
    content = checkpoint.load(path, path.stem)
    change(content)
    checkpoint.save(
        path,
        content.get("cohort", path.stem),
        content["cells"],
        [RunSpec.model_validate(spec) for spec in content["specs"]],
        content["states"],
    )


@family
def checkpoints(draw: random.Random, work: Path, made: Made) -> Case:
    """Damaged or hostile: whatever it is, its cells are complete in the end."""
    source = draw.choice(["half", "done"])
    shutil.copytree(made.root / source, work / "ex")
    path = draw.choice(sorted((work / "ex/checkpoints").glob("*.pt")))

    def tensors(state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
        for name, part in state.items():
            if isinstance(part, torch.Tensor):
                yield state, name
            elif isinstance(part, dict):
                yield from tensors(part)

    def odd(content: dict[str, Any]) -> None:
        holder, name = draw.choice(list(tensors(content["states"][0])))
        tensor = holder[name]
        shapes = [
            tensor.flatten()[:0],
            tensor.flatten()[:1],
            tensor.double(),
            tensor[None],
            tensor.new_zeros(1),
            tensor.long(),
        ]
        holder[name] = draw.choice([*shapes, tensor.new_zeros(1, 70_000)]).contiguous()

    def other(content: dict[str, Any]) -> None:
        part = draw.choice(["cells", "specs", "states"])
        kept = [content[part], content["states"][0].get("stacked", [])]
        if part == "states":
            state = content["states"][0]
            state[draw.choice(["epoch", "stacked"])] = draw.choice([-1, 10**9, [0, 0], [99], []])
        else:
            kept[0].pop() if draw.random() < 0.5 else kept[0].append(kept[0][0])

    how = draw.randrange(4)
    if how < 2:
        spoil_bytes(draw, path)
    elif how == 2:
        reseal(path, odd)
    else:
        reseal(path, other)
    longer = TUNE.replace("--epochs 3", "--epochs 4")
    return Case(
        "a checkpoint", [draw.choice(["resume ex -q", longer, f"{TUNE},0.05"]).split(), ["status", "ex", "--json"]]
    )


@family
def saved_models(draw: random.Random, work: Path, made: Made) -> Case:
    shutil.copytree(made.root / "done", work / "ex")
    shutil.copytree(made.root / "images", work / "images")
    path = draw.choice(sorted((work / "ex/models").glob("*/*.safetensors")))
    before = path.read_bytes()
    spoil_bytes(draw, path)
    model = str(path.relative_to(work))
    commands = [["evaluate", model], ["predict", model, "images/a"], ["tensorboard", "ex", "--write-only"]]
    commands += [["report", "ex", "--output", "out/page.html"], ["evaluate", "ex"], ["resume", "ex", "-q"]]
    chosen = draw.choice(commands)
    return Case("a model", [chosen], refused=chosen[0] in ("evaluate", "predict") and path.read_bytes() != before)


@family
def links(draw: random.Random, work: Path, made: Made) -> Case:
    """Something of an experiment is a link: to other people's files, to itself, to nothing."""
    shutil.copytree(made.root / draw.choice(["done", "half"]), work / "ex")
    inside = [*(work / "ex").rglob("*")] + [work / "ex" / name for name in ("locks", "report", "metrics", "logs")]
    path = draw.choice(inside)
    target = draw.choice(
        [work / "outside", work / "outside/poetry.lock", path, work / "nothing", Path("/etc"), Path("..")]
    )
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    extra = [
        ["export", "ex", "--what", "metrics"],
        ["tensorboard", "ex", "--write-only"],
        ["report", "ex"],
        ["clean", "ex"],
    ]
    return Case("a link", [draw.choice(extra), *some_commands(draw)])


@family
def foreign_files(draw: random.Random, work: Path, made: Made) -> Case:
    """Files of somebody else in an experiment's directory, with names that are nearly bpf's."""
    shutil.copytree(made.root / draw.choice(["done", "half"]), work / "ex")
    names = (
        ".notes.markdown",
        ".env.template",
        "checkpoints/mine.pt",
        "models/bp/paper.safetensors",
        "locks/poetry.lock",
    )
    names += (
        "models/dfa/0123456789abcdef-copy.safetensors",
        "checkpoints/.mine.pt.0a1b2c3d",
        "study.new.db-old",
        "logs/x.json",
    )
    names += (
        "checkpoints/0123456789abcdef.pt",
        ".experiment.yaml.backup01x",
        "study.db.bak",
        "running.lock.txt",
        "models/x.safetensors",
    )
    for name in draw.sample(names, draw.randrange(1, len(names))):
        path = work / "ex" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("of somebody else\n")
    commands = [
        "clean ex",
        "clean ex --checkpoints",
        "resume ex -q",
        f"{TUNE},0.05",
        TUNE.replace("--epochs 3", "--epochs 4"),
    ]
    return Case("foreign files", [command.split() for command in draw.sample(commands, 2)])


@family
def images(draw: random.Random, work: Path, made: Made) -> Case:
    """Image folders."""
    shutil.copytree(made.root / "images", work / "images")
    paths = sorted((work / "images").rglob("*.png"))
    path = draw.choice(paths)
    refused, how = False, draw.randrange(6)
    if how == 0:
        spoil_bytes(draw, path)
    elif how == 1:
        path.unlink()
        target = draw.choice([path, work / "nothing", work / "outside"])
        path.symlink_to(target)
        refused = target.name != "outside"  # a folder is no image, whatever it is called
    elif how == 2:
        path.parent.rename(
            path.parent.with_name(draw.choice([CONTROL.replace("\0", ""), "x" * 200, "[red]", ":bug:", "a\nb"]))
        )
    elif how == 3:
        path.rename(path.with_name(f"{draw.choice([CONTROL.replace(chr(0), ''), 'é' * 100, '[red]'])}.png"))
    elif how == 4:
        (work / "images/loop").symlink_to(work / "images/loop")
    else:
        path.write_bytes(png(60_000, 60_000))
        refused = True
    name = draw.choice(
        ["folder:images"] * 8 + ["folder:~nobody/x", f"folder:{'x' * 300}", "folder:images/a", "folder:/dev"]
    )
    refused = refused and name == "folder:images"
    train = [
        "train",
        "one",
        "--dataset",
        name,
        "--algorithm",
        "bp",
        "--arch",
        "8",
        "--epochs",
        "1",
        "--examples-frac",
        "1",
        "-q",
    ]
    return Case("images", [train, ["datasets", name]], refused)


def png(width: int, height: int) -> bytes:
    """A picture that says it is huge."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + len(head).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


@family
def archives(draw: random.Random, work: Path, made: Made) -> Case:
    """npz files."""
    path = work / "a.npz"
    shutil.copy(made.root / "a.npz", path)
    refused, how = False, draw.randrange(4)
    if how == 0:
        spoil_bytes(draw, path)
    else:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        name = draw.choice(sorted(parts))
        refused = True
        if how == 1:
            header = draw.choice(
                [b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999,), }", b"{" * 9000, b"\xff" * 50]
            )
            parts[name] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\n"
        elif how == 2:
            parts[name] = draw.randbytes(100)
        else:
            del parts[name]
        with zipfile.ZipFile(
            path, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
        ) as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        if draw.random() < 0.2:
            content = bytearray(path.read_bytes())
            at = content.rfind(b"PK\x01\x02")
            content[at + 10] = 97  # a method that nobody knows
            path.write_bytes(content)
    train = "train one --dataset npz:a.npz --algorithm bp --arch 8 --epochs 1 --examples-frac 1 -q"
    return Case("an archive", [train.split(), ["datasets", "npz:a.npz"]], refused)


@family
def caches(draw: random.Random, work: Path, made: Made) -> Case:
    """The data cache: damaged entries are built anew, and give the same numbers."""
    shutil.copytree(made.root / "cached", work / "data")
    shutil.copy2(made.root / "a.npz", work / "a.npz")
    entry = next(path for path in (work / "data/bpf-cache").iterdir() if path.is_dir())
    path = draw.choice(sorted(entry.iterdir()))
    if draw.random() < 0.5:
        meta = json.loads((entry / "meta.json").read_text())
        (entry / "meta.json").write_text(
            json.dumps(draw.choice([meta | {"crc32": {}}, spoil_value(draw, meta), value(draw)]))
        )
    else:
        spoil_bytes(draw, path)
    (entry.parent / f"{entry.name}-notes").mkdir()
    (entry.parent / f"{entry.name}-notes/thesis.txt").write_text("years")
    train = "train one --dataset npz:a.npz --algorithm bp --arch 8 --epochs 1 --examples-frac 1 -q --json"
    return Case("the cache", [train.split()])


@family
def names(draw: random.Random, work: Path, made: Made) -> Case:
    """Experiments whose directories and names would command a terminal or leave their place."""
    odd = draw.choice(
        [
            CONTROL.replace("\0", ""),
            "[red]",
            ":bug:",
            "a b",
            "x" * 120,
            "é" * 60,
            "-x",
            "a\nb",
            "\u202egnp.exe",
            "%s{0}",
        ]
    )
    shutil.copytree(made.root / "done", work / odd)
    commands = [
        ["status", f"./{odd}"],
        ["best", f"./{odd}"],
        ["show", f"./{odd}"],
        ["report", f"./{odd}"],
        ["clean", f"./{odd}"],
    ]
    commands += [
        ["resume", f"./{odd}"],
        ["export", f"./{odd}", "--output", f"out/{odd}.csv"],
        ["tensorboard", f"./{odd}", "--write-only"],
    ]
    new = f"tune --dataset digits --algorithm dfa {SMALL} --epochs 1 --lr 0.1 -q".split()
    commands += [[*new, f"./{odd}2"], [*new, "new", "--experiment", draw.choice(["../../x", "..", "a/b", odd, ""])]]
    return Case("a name", draw.sample(commands, 2))


@family
def storages(draw: random.Random, work: Path, made: Made) -> Case:
    """URLs with a password, spelled in every way but the right one."""
    spelled = "".join(f"%{ord(c):02x}" if draw.random() < 0.3 else c for c in "password")
    url = draw.choice(
        [
            *(
                f"postgresql://u:{PASSWORD}@127.0.0.1:1/db",
                f"postgresql:/u:{PASSWORD}@127.0.0.1/db",
                f"postgres:u:{PASSWORD}@h/db",
            ),
            *(f"postgresql://127.0.0.1:1/db?{spelled}={PASSWORD}", f"host=127.0.0.1 port=1 {spelled}={PASSWORD}"),
            *(
                f"host=127.0.0.1 password={PASSWORD} dbname=x",
                f"mysql://u:{PASSWORD}@h/db",
                f"POSTGRESQL://u:{PASSWORD}@127.0.0.1:1/db",
            ),
            *(f"postgresql://u:{PASSWORD}@127.0.0.1:x/db", f"postgresql+psycopg2://u:{PASSWORD}@127.0.0.1:1/db"),
            *(f"postgresql://u:{PASSWORD}@[::1/db", f"postgresql//u:{PASSWORD}@h/db", f"sqlite:u:{PASSWORD}@h"),
        ]
    )
    tune = f"tune new --dataset digits --algorithm dfa {SMALL} --epochs 1 --lr 0.1 -q".split()
    refused = not url.startswith("postgresql//")
    commands = [
        [*tune, "--storage", url],
        [*tune, f"--storage={url}"],
        ["worker", "--storage", url, "-q"],
        ["status", "new", "--storage", url],
    ]
    environment = {"BPF_STORAGE": url} if draw.random() < 0.3 else {}
    return Case("a URL", [draw.choice(commands)] if not environment else [tune], refused, PASSWORD, environment)


# Making and running


def make(root: Path) -> Made:
    """What all cases begin with, in a directory of its own."""
    before = Path.cwd()
    os.chdir(root)
    try:
        for name in ("done", "half"):
            assert exit_code(TUNE.replace("tune ex", f"tune {name}") + (" --plan-only" if name == "half" else "")) == 0
        draw = np.random.default_rng(0)
        for label in ("a", "b"):
            (root / "images" / label).mkdir(parents=True)
            for number in range(6):
                Image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8)).save(
                    root / f"images/{label}/{number}.png"
                )
        labels = np.arange(20) % 2
        pixels = draw.integers(0, 255, (20, 4, 4), dtype=np.uint8)
        np.savez(root / "a.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
        once = "train cached-one --dataset npz:a.npz --algorithm bp --arch 8 --epochs 1 --examples-frac 1 -q"
        assert exit_code(f"{once} --data-dir cached") == 0
        for command in (
            "report done",
            "tensorboard done --write-only",
            "export done --what metrics",
            "clean done",
            "best done",
        ):
            assert (
                exit_code(command) == 0
            )  # so that the processes of cases, which are forked from here, have imported it
    finally:
        os.chdir(before)
    return Made(root)


def exit_code(command: str | Command) -> int:
    try:
        cli.main(command.split() if isinstance(command, str) else command)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("the command line always exits")


def problems(case: Case, work: Path) -> list[str]:
    """What is wrong with how bpf took a case; each command runs in a process of its own."""
    (work / "outside/empty").mkdir(parents=True)
    for name in ("poetry.lock", "thesis.pt", ".bashrc.original", "0123456789abcdef.lock"):
        (work / "outside" / name).write_text("years of work\n")
    precious = {
        path: path.read_bytes()
        for path in work.rglob("*")
        if path.is_file() and not path.is_symlink() and is_foreign(path)
    }
    outside = sorted(str(path) for path in (work / "outside").rglob("*"))
    found = []
    for number, command in enumerate(case.commands):
        code, output, errors = run(command, work, case.environment)
        said = f"{command!r} in {case.what}: "
        if code is None:
            found.append(f"{said}took more than {SECONDS} s")
        elif code < 0:
            found.append(f"{said}ended by {signal.Signals(-code).name}: {errors[-300:]}")
        elif code not in (0, 1, 2):
            found.append(f"{said}exit code {code}")
        elif number == 0 and case.refused and code == 0:
            found.append(f"{said}was accepted")
        if _BUG.search(output + errors):
            found.append(f"{said}{errors[-600:]}")
        if raw := _RAW.search(output + errors):
            found.append(f"{said}a raw {raw[0]!r} was printed")
        if code and not is_message(errors):
            found.append(f"{said}no message: {errors[-300:]!r}")
        if case.secret and case.secret in output + errors:
            found.append(f"{said}the password was printed")
    for path, content in precious.items():
        if not path.is_file() or path.read_bytes() != content:
            found.append(f"{case.commands!r} in {case.what}: {path.relative_to(work)} was changed")
    if sorted(str(path) for path in (work / "outside").rglob("*")) != outside:
        found.append(f"{case.commands!r} in {case.what}: something was written beside what is not bpf's")
    if case.secret:
        told = [
            p
            for p in work.rglob("*")
            if case.secret in p.name or (p.is_file() and case.secret.encode() in p.read_bytes())
        ]
        found += [f"{case.commands!r}: the password is in {path}" for path in told]
    return found


def is_foreign(path: Path) -> bool:
    return path.parent.name == "outside" or path.read_bytes() in (b"of somebody else\n", b"years")


def is_message(errors: str) -> bool:
    """One that a person can act on: bpf's own, or typer's about how the command line is written."""
    last = errors.strip()
    return (
        "Usage:" in last
        or "─ Error ─" in last
        or (last.startswith(("Error: ", "The checkpoint ")) and last.endswith((".", "?", ")", "`", "/", "…")))
        or ("Error: " in last)
    )


def run(command: Command, work: Path, environment: dict[str, str]) -> tuple[int | None, str, str]:
    """Exit code (None if it took too long), output and errors of a command, in a child of this process."""
    streams = [work.parent / f"{work.name}.{name}" for name in ("out", "err")]
    child = os.fork()
    if child == 0:
        try:
            os.chdir(work)
            os.environ.update(environment)
            for number, path in enumerate(streams, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="strict", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = exit_code(command)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException as error:  # what a shell would show
            os.write(2, f"Traceback: {type(error).__name__}: {error}".encode("utf-8", "backslashreplace"))
            code = 99
        os._exit(code)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            out, errors = (path.read_text("utf-8", "surrogateescape") for path in streams)
            return os.waitstatus_to_exitcode(status), out, errors
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, "", ""
