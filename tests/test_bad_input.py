"""A user's mistake gives one clear message and exit code 2, and changes nothing; a failure loses nothing."""

import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from errno import ENOSPC
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import bpf.data.fetching
from bpf.cli import app as cli
from bpf.experiment.directory import open_experiment
from bpf.spec.run import RunSpec
from bpf.study import patience
from bpf.study.owner import Owner
from bpf.training import checkpoint
from bpf.workers import worker
from bpf.workers.supervisor import Supervisor
from remembering import stop_after_an_epoch

pytestmark = pytest.mark.usefixtures("in_this_process")

TRAIN = "train --dataset digits --algorithm dfa"
TUNE = "tune --dataset digits --algorithm dfa"
SMALL = "--arch 8 --activation tanh --bw-init ortho --no-batch-norm --examples-frac 0.1 --executions-per-trial 1"
GRID = f"{TUNE} ex {SMALL} --epochs 3 --lr 0.1,0.01 -q"
RUN = f"{TRAIN} one --arch 8 --examples-frac 0.1 --epochs 1 -q"
INSTALLED = ", ".join(sorted({point.name for point in metadata.entry_points(group="bpf.algorithms")}))
DATASETS = ", ".join(sorted({point.name for point in metadata.entry_points(group="bpf.datasets")}))
ABOUT_DATASET = (
    "Data set: digits, mnist, fmnist, kmnist, cifar10, cifar100, caltech256, eurosat, folder:PATH, npz:PATH, or a "
    "plugin's (see `bpf datasets`)."
)
ABOUT_ALGORITHM = "Learning rule: bp, dfa, drtp, ll-cce, ll-mse, or a plugin's (see `bpf algorithms`)."
ARCH = "give the hidden layers' units joined by hyphens, such as 500-500-1000-500."
DEVICES = "give auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or mps."
UNITS = "a layer has 1 to 65536 units, and there are at most 100 layers."
DROPOUT = (
    "dropout with objective loss: dropout regularises, and a training objective cannot see that, so it would have no "
    "effect but to make the objective worse. Use objective val_loss or val_error, leave dropout out, or fix one rate "
    "and keep the last epoch's network (keep last)."
)
SKEW = (
    "imbalance_factor without skew: skew_type is none, so the factor would have no effect. "
    "Give skew_type long_tailed, step or all, or leave imbalance_factor out."
)
NOT_RECONSTRUCTION = (
    "algorithm {0} with problem_type reconstruction: {0} only does classification. "
    "Use problem_type classification, or another rule (see `bpf algorithms`)."
)
UNBOUNDED = (
    "algorithm drtp with activation relu: drtp diverges with an activation that is not bounded. "
    "Use activation sigmoid or tanh, or --allow-unstable to try it all the same."
)
LAYOUT = "Put images into PATH/train/CLASS and PATH/test/CLASS, or into PATH/CLASS to have them split 80/20."
SAVE = (
    "Save uint8 images and whole-number labels with "
    "numpy.savez(PATH, train_images=, train_labels=, test_images=, test_labels=)."
)
NO_EXPERIMENT = "There is no experiment in runs. Start one with `bpf tune`, or name its directory."
EXTEND = (
    "A grid can be extended (lists, epochs and executions may grow), not changed. "
    "Give another directory, or the same settings."
)
STORAGES = "give a path, sqlite:///PATH or postgresql://USER@HOST/DATABASE."


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Bpf = Callable[[str], Outcome]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with no network."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("BPF_DEBUG", "BPF_DATA_DIR", "BPF_CACHE_DIR", "BPF_STORAGE"):
        monkeypatch.delenv(name, raising=False)

    def unreachable(*address: Any, **options: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    return directory


@pytest.fixture
def bpf_(capsys: pytest.CaptureFixture[str]) -> Bpf:
    def run(command: str) -> Outcome:
        capsys.readouterr()
        return Outcome(exit_code(command), *capsys.readouterr())

    return run


def exit_code(command: str) -> int:
    try:
        cli.main(shlex.split(command))
    except SystemExit as exit_:
        return int(exit_.code or 0)
    raise AssertionError("the command line always exits")


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below `root` with its content."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refused(bpf_: Bpf, command: str, message: str, code: int = 2) -> None:
    """The command says exactly this, prints no result and changes nothing."""
    before = tree(Path.cwd())
    assert bpf_(command) == Outcome(code, "", f"Error: {message}\n")
    assert tree(Path.cwd()) == before


# Options


OPTIONS = {
    "train --algorithm dfa": f"--dataset is missing: {ABOUT_DATASET}",
    "tune --dataset digits": f"--algorithm is missing: {ABOUT_ALGORITHM}",
    "tune": f"--dataset is missing: {ABOUT_DATASET}\n--algorithm is missing: {ABOUT_ALGORITHM}",
    "train --dataset digits --algorithm dfaa": "Unknown algorithm 'dfaa'. Did you mean 'dfa'?",
    "tune --dataset digits --algorithm bp,xyz": f"Unknown algorithm 'xyz'. Known: {INSTALLED}.",
    "train --dataset digit --algorithm dfa": "Unknown dataset 'digit'. Did you mean 'digits'?",
    "tune --dataset zzz --algorithm dfa": f"Unknown dataset 'zzz'. Known: {DATASETS}.",
    f"{TRAIN} --tracker bp_cosin": "Unknown tracker 'bp_cosin'. Did you mean 'bp_cosine'?",
    f"{TUNE} --tracker bp_cosin --dry-run": "Unknown tracker 'bp_cosin'. Did you mean 'bp_cosine'?",
    f"{TRAIN} --activation tahn": "--activation: 'tahn' is not one of the choices. Did you mean 'tanh'?",
    f"{TUNE} --activation tanh,rely": "--activation: 'rely' is not one of the choices. Did you mean 'relu'?",
    f"{TRAIN} --optimizer adm": "--optimizer: 'adm' is not one of the choices. Did you mean 'adam'?",
    f"{TRAIN} --objective los": "--objective: 'los' is not one of the choices. Did you mean 'loss'?",
    f"{TRAIN} --problem-type classify": "--problem-type: 'classify' is not one of the choices. "
    "Did you mean 'classification'?",
    f"{TRAIN} --bw-init x": "--bw-init: 'x' is not one of the choices. "
    "Known: frenkel, lecun, nokland, ortho, principled.",
    f"{TRAIN} --skew-type long": "--skew-type: 'long' is not one of the choices. Did you mean 'long_tailed'?",
    f"{TRAIN} --scaler std": "--scaler: 'std' is not accepted: give standard, zero_one, identity, or MEANS/DEVIATIONS "
    "of the pixels in 0..255, such as 33.3/78.6 or 125,123,114/63,62,67.",
    f"{TRAIN} --output-loss cee": "--output-loss: 'cee' is not one of the choices. Did you mean 'ce'?",
    f"{TRAIN} --lr abc": "--lr: 'abc' is not accepted: it must be a valid number, unable to parse string as a number.",
    f"{TUNE} --lr 0.1,abc": "--lr: 'abc' is not accepted: it must be a valid number, "
    "unable to parse string as a number.",
    f"{TRAIN} --epochs 1.5": "--epochs: '1.5' is not accepted: it must be a valid integer, "
    "unable to parse string as an integer.",
    f"{TRAIN} --lr 0": "--lr: '0' is not accepted: it must be greater than 0.",
    f"{TRAIN} --lr 11": "--lr: '11' is not accepted: it must be less than or equal to 10.",
    f"{TRAIN} --lr nan": "--lr: 'nan' is not accepted: it must be a finite number.",
    f"{TRAIN} --dropout 1": "--dropout: '1' is not accepted: it must be less than 1.",
    f"{TRAIN} --epochs 0": "--epochs: '0' is not accepted: it must be greater than or equal to 1.",
    f"{TRAIN} --batch-size 0": "--batch-size: '0' is not accepted: it must be greater than or equal to 1.",
    f"{TRAIN} --val-frac 1": "--val-frac: '1' is not accepted: it must be less than 1.",
    f"{TRAIN} --examples-frac 1.5": "--examples-frac: '1.5' is not accepted: it must be less than or equal to 1.",
    f"{TRAIN} --weight-decay -1": "--weight-decay: '-1' is not accepted: it must be greater than or equal to 0.",
    f"{TRAIN} --seed -1": "--seed: '-1' is not accepted: it must be greater than or equal to 0.",
    f"{TUNE} --executions-per-trial 0": "--executions-per-trial: '0' is not accepted: "
    "it must be greater than or equal to 1.",
    f"{TRAIN} --lr abc --batch-size 0": "--lr: 'abc' is not accepted: it must be a valid number, "
    "unable to parse string as a number.\n"
    "--batch-size: '0' is not accepted: it must be greater than or equal to 1.",
    f"{TRAIN} --examples-frac 0.001": "examples_frac 0.001 of 1437 training examples is 1, fewer than the 10 classes; "
    "use at least 0.007.",
    f"{TRAIN} --arch abc": f"--arch: 'abc' is not accepted: {ARCH}",
    f"{TRAIN} --arch=-5": f"--arch: '-5' is not accepted: {ARCH}",
    f"{TRAIN} --arch ''": "An argument is empty: --arch needs a value, or is to be left out.",
    f"{TRAIN} --arch ,": f"--arch: ',' is not accepted: {ARCH}",
    f"{TRAIN} --data-dir=": "An argument is empty: --data-dir= needs a value, or is to be left out.",
    "train ''": "An argument is empty: it needs a value, or is to be left out.",
    "report --output ' '": "An argument is empty: --output needs a value, or is to be left out.",
    "worker ex --device foo": f"device 'foo' is not accepted: {DEVICES}",
    "resume ex --device foo": f"device 'foo' is not accepted: {DEVICES}",
    "worker --storage sqlite:///x.db --device cuda:0,cuda:1": (
        "device cuda:0,cuda:1: one process trains on one device. Give one of them."
    ),
    "worker ex --device cuda:128": f"device 'cuda:128' is not accepted: {DEVICES}",
    f"{TUNE} --max-hours 1_0": "--max-hours 1_0: give a number from 0 on.",
    f"{TRAIN} --max-hours nan": "--max-hours nan: give a number from 0 on.",
    "tune --max-hours -1": "--max-hours -1: give a number from 0 on.",
    "resume --checkpoint-every -1": "--checkpoint-every -1: give a number from 0 on.",
    "best --top 0": "--top 0: give a whole number from 1 on.",
    "best --top x": "--top x: give a whole number from 1 on.",
    "best --top 1_0": "--top 1_0: give a whole number from 1 on.",
    "predict model image --top \u0663": "--top \u0663: give a whole number from 1 on.",
    "tensorboard ex --port 65536": "--port 65536: give a whole number from 1 to 65535.",
    "dashboard ex --port 8_080": "--port 8_080: give a whole number from 0 to 65535.",
    "resume nowhere --notify=http://localhost/?token=": "nowhere is not an experiment: there is no such directory.",
    f"{TUNE} --workers \u0663": "--workers \u0663: give auto, or a number from 1 to 1024.",
    f"{TRAIN} --arch 500-0": f"--arch: '500-0' is not accepted: {UNITS}",
    f"{TRAIN} --arch 99999": f"--arch: '99999' is not accepted: {UNITS}",
    f"{TRAIN} --arch {'-'.join(['1'] * 101)}": f"--arch: '{'-'.join(['1'] * 101)}' is not accepted: {UNITS}",
    f"{TUNE} --lr 0.1,,0.2": "--lr: ['0.1,,0.2'] is not accepted: the list is empty or has an empty entry.",
    f"{TUNE} --lr ,": "--lr: [','] is not accepted: the list is empty or has an empty entry.",
    f"{TRAIN} --device gpu": "--device: 'gpu' is not accepted: "
    "give auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or mps.",
    f"{TUNE} --device cuda:0,mps": "--device: 'cuda:0,mps' is not accepted: "
    "give auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or mps.",
    f"{TRAIN} --device cuda:0,cuda:1": (
        "device cuda:0,cuda:1: a single execution is trained on one device. Give one of them."
    ),
    f"{TUNE} --dropout 0.5": DROPOUT,
    f"{TRAIN} --dropout 0.5": DROPOUT,
    f"{TUNE} --objective val_loss": "objective val_loss without lr. Tune the learning rate on the held-out examples "
    "too:\n"
    "  bpf tune runs/digits-dfa-val_loss --dataset digits --objective val_loss --algorithm dfa "
    "--lr 0.0001,0.001,0.01,0.1\n"
    "or find that of each setup by training loss first, without dropout, and take it over:\n"
    "  bpf tune runs/digits-dfa-loss --dataset digits --objective loss --algorithm dfa --lr 0.0001,0.001,0.01,0.1\n"
    "  bpf tune runs/digits-dfa-val_loss --dataset digits --objective val_loss --algorithm dfa "
    "--lr-from runs/digits-dfa-loss",
    f"{TUNE} --objective val_loss --option dfa.x=1": "Unknown option dfa.x. Known: hidden_factor, through_dropout.",
    f"{TRAIN} --objective val_error --val-frac 0": "objective val_error with val_frac 0: there is no validation split "
    "to measure. Give val_frac, such as 0.1.",
    f"{TRAIN} --imbalance-factor 5": SKEW,
    f"{TUNE} --imbalance-factor 5": SKEW,
    "train --dataset digits --algorithm drtp --problem-type reconstruction": NOT_RECONSTRUCTION.format("drtp"),
    "tune --dataset digits --algorithm ll-mse,ll-cce --problem-type reconstruction": NOT_RECONSTRUCTION.format(
        "ll-cce"
    ),
    f"{TRAIN} --problem-type reconstruction --objective val_error": "objective val_error with problem_type "
    "reconstruction: only classification has an error rate. Use objective val_loss.",
    f"{TRAIN} --problem-type reconstruction --output-loss ce": "output_loss ce with problem_type reconstruction: "
    "pixels are not classes. Use output_loss mse (or bce with scaler zero_one).",
    f"{TRAIN} --problem-type reconstruction --output-loss bce": "output_loss bce with scaler standard: bce needs "
    "targets in [0, 1]. Use scaler zero_one, or output_loss mse.",
    "train --dataset digits --algorithm drtp --activation relu": UNBOUNDED,
    "tune --dataset digits --algorithm dfa,drtp --activation relu": f"Nothing is left of the grid of drtp: {UNBOUNDED}",
    "train --dataset digits --algorithm bp --init aligned": "algorithm bp with init aligned: bp has no feedback "
    "matrices to align with. Use another init, such as orthogonal.",
    f"{TUNE} --seed 2147483646": "seed 2147483646 with executions_per_trial 3: executions have the seeds from seed on, "
    "which must stay below 2147483648. Use a smaller seed.",
    f"{TRAIN} --option nope.x=1": "Options are given for the rule 'nope', which is not in algorithm. Known: dfa.",
    f"{TUNE} --option dfa.x=1 --dry-run": "Unknown option dfa.x. Known: hidden_factor, through_dropout.",
    f"{TRAIN} --option dfa": "--option 'dfa' is not of the form RULE.NAME=VALUE, such as my-rule.scale=0.05.",
    f"{TRAIN} --option dfa.x=": "--option 'dfa.x=' is not of the form RULE.NAME=VALUE, such as my-rule.scale=0.05.",
    f"{TRAIN} --image-size 8": "The dataset 'digits' has images of one size; leave out --image-size. "
    "It works with: caltech256, eurosat, folder.",
    f"{TUNE} --image-size 8 --dry-run": "The dataset 'digits' has images of one size; leave out --image-size. "
    "It works with: caltech256, eurosat, folder.",
    "train --dataset mnist:foo --algorithm dfa": "The dataset 'mnist' takes no path; write 'mnist' instead of "
    "'mnist:foo'.",
    "tune --dataset mnist:foo --algorithm dfa --dry-run": "The dataset 'mnist' takes no path; write 'mnist' instead "
    "of 'mnist:foo'.",
    f"{TUNE} --lr 0.1 0.01": "'0.01' would be the experiment's directory. Give lists with commas, such as "
    "--lr 0.1,0.01; if a directory is meant, write runs/0.01.",
    f"{TUNE} --activation tanh relu": "'relu' would be the experiment's directory. Give lists with commas, such as "
    "--lr 0.1,0.01; if a directory is meant, write runs/relu.",
    f"{TUNE} --batch-norm no": "'no' would be the experiment's directory. Give lists with commas, such as "
    "--lr 0.1,0.01; if a directory is meant, write runs/no.",
    f"{TUNE} --lr {','.join(str(n / 10_000) for n in range(1, 10_001))} --weight-decay 0,0.1": "The grid has more than "
    "1,000,000 cells; fix some parameters or shorten lists.",
    "algorithms dfaa": "Unknown algorithm 'dfaa'. Did you mean 'dfa'?",
    "datasets digit --json": "Unknown dataset 'digit'. Did you mean 'digits'?",
    "resume": NO_EXPERIMENT,
    "status": NO_EXPERIMENT,
    "best --json": NO_EXPERIMENT,
    "show": NO_EXPERIMENT,
    "clean": NO_EXPERIMENT,
    "export": NO_EXPERIMENT,
    **{
        f"{command} nowhere": "nowhere is not an experiment: there is no such directory."
        for command in ("resume", "status", "best", "show", "clean", "export", "worker")
    },
    f"{TUNE} --workers 0": "--workers 0: give auto, or a number from 1 to 1024.",
    f"{TUNE} --workers 1025": "--workers 1025: give auto, or a number from 1 to 1024.",
    f"{TUNE} --workers=-1 --dry-run": "--workers -1: give auto, or a number from 1 to 1024.",
    "resume nowhere --workers abc": "--workers abc: give auto, or a number from 1 to 1024.",
    f"{TUNE} --storage mysql://me@host/db": f"A study is kept in SQLite or PostgreSQL, not in 'mysql': {STORAGES} "
    "Did you mean 'sqlite'?",
    "worker --storage postgre://me@host/db": f"A study is kept in SQLite or PostgreSQL, not in 'postgre': {STORAGES} "
    "Did you mean 'postgresql'?",
    f"{TUNE} --storage postgresql://me@host": "The storage URL postgresql://me@host names no database; "
    "add /NAME to it.",
    f"{TUNE} --storage postgresql://me:secret@host:port/db": "The storage URL cannot be read; it is written "
    "postgresql://USER@HOST:PORT/DATABASE.",
    f"{TUNE} --storage sqlite:////": "/ is a directory; the study is a file in it, such as /study.db.",
    "worker": "Name the experiment's directory, or the --storage that its study is kept in.",
    "worker --storage sqlite:////nowhere/study.db": "There is no study database /nowhere/study.db.",
    "export ex --what histories": "--what histories is not known. Did you mean 'history'?",
    "export ex --what x": "--what x is not known. Known: history, metrics, results, trackers.",
    "export ex --format xml": "--format xml is not known. Known: csv, json, parquet.",
    "export ex --format jsn": "--format jsn is not known. Did you mean 'json'?",
}


@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: command[:60])
def test_a_mistake_in_an_option(bpf_: Bpf, command: str) -> None:
    refused(bpf_, command, OPTIONS[command])


def test_a_device_that_is_not_there(bpf_: Bpf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, found in ((0, "no CUDA device"), (1, "1 CUDA device"), (2, "2 CUDA devices")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        expected = f"device cuda:7: this machine has {found}. Use --device auto or cpu."
        refused(bpf_, f"{TRAIN} --device cuda:7", expected)
        refused(bpf_, f"{TUNE} --device cuda:7 --dry-run", expected)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(bpf_, f"{TRAIN} --device mps", "device mps: this machine has no Apple GPU. Use --device auto or cpu.")


COMMAND_LINE = {
    "tun": "No such command 'tun'. Did you mean 'tune'?",
    "tune --lrr 1": "No such option: --lrr (Possible options: --lr, --lr-from, --scaler)",
    "train --bogus": "No such option: --bogus (Possible options: --verbose)",
    "--bogus": "No such option: --bogus",
    "train --lr": "Option '--lr' requires an argument.",
    "status a b": "Got unexpected extra argument(s) (b)",
}


@pytest.mark.parametrize("command", COMMAND_LINE)
def test_a_mistake_in_the_command_line(bpf_: Bpf, work: Path, command: str) -> None:
    outcome = bpf_(command)
    panel = re.search(r"─ Error ─+╮\n(.*)\n╰─", outcome.err, re.DOTALL)
    assert panel, outcome.err
    said = " ".join(line.strip("│ ") for line in panel[1].splitlines())
    assert (outcome.code, outcome.out, said) == (2, "", COMMAND_LINE[command])
    assert tree(work) == {}


# Spec files


SPEC = "dataset: digits\nalgorithm: dfa\n"
BINARY = bytes(range(256))
SPEC_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "no suffix": ("spec", SPEC, "The spec file spec must end in .yaml, .yml, .toml or .json."),
    "unknown suffix": ("s.ini", SPEC, "The spec file s.ini must end in .yaml, .yml, .toml or .json."),
    "invalid YAML": (
        "s.yaml",
        "dataset: [digits\n",
        "The spec file s.yaml is not valid YAML: expected ',' or ']', but got '<stream end>' (at line 2, column 1).",
    ),
    "invalid TOML": (
        "s.toml",
        "dataset = digits",
        "The spec file s.toml is not valid TOML: Invalid value (at line 1, column 11).",
    ),
    "invalid JSON": (
        "s.json",
        "{dataset: 1}",
        "The spec file s.json is not valid JSON: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1).",
    ),
    "a YAML tag that would run code": (
        "s.yaml",
        "dataset: !!python/object/apply:os.system ['touch hacked']\n",
        "The spec file s.yaml is not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system' (at line 1, column 10).",
    ),
    "a list": ("s.yaml", "- a\n", "The spec file s.yaml must hold settings by name, such as `dataset: digits`."),
    "a number as name": (
        "s.yaml",
        "1: 2\n",
        "The spec file s.yaml must hold settings by name, such as `dataset: digits`.",
    ),
    "empty YAML": ("s.yaml", "", "The spec file s.yaml must hold settings by name, such as `dataset: digits`."),
    "empty JSON": (
        "s.json",
        "",
        "The spec file s.json is not valid JSON: Expecting value: line 1 column 1 (char 0).",
    ),
    "empty TOML": (
        "s.toml",
        "",
        f"dataset is missing: {ABOUT_DATASET}\nalgorithm is missing: {ABOUT_ALGORITHM}",
    ),
    **{
        f"binary {suffix}": (
            f"s.{suffix}",
            BINARY,
            f"The spec file s.{suffix} is not valid {suffix.upper()}: it is not text in UTF-8.",
        )
        for suffix in ("yaml", "toml", "json")
    },
    "nested without end": ("s.json", "[" * 100_000, "The spec file s.json is not valid JSON: it is nested too deeply."),
    "unknown field": ("s.yaml", f"{SPEC}lrr: 1\n", "Unknown field 'lrr'. Did you mean 'lr'?"),
    "a mapping as number": (
        "s.yaml",
        f"{SPEC}lr: {{a: 1}}\n",
        "lr: {'a': 1} is not accepted: it must be a valid number.",
    ),
    "a list in a list": ("s.yaml", f"{SPEC}lr: [[0.1]]\n", "lr: [0.1] is not accepted: it must be a valid number."),
    "an empty list": (
        "s.yaml",
        f"{SPEC}lr: []\n",
        "lr: [] is not accepted: the list is empty or has an empty entry.",
    ),
    "null": ("s.yaml", f"{SPEC}lr:\n", "lr: None is not accepted: it must be a valid number."),
    "yes as a number": ("s.yaml", f"{SPEC}lr: [0.1, yes]\n", "lr: [0.1, True] is not accepted: it must be a number."),
    "a number as dataset": (
        "s.yaml",
        "dataset: 5\nalgorithm: dfa\n",
        "dataset: 5 is not accepted: it must be a valid string.",
    ),
    "a nested architecture": ("s.yaml", f"{SPEC}arch: [[8, 8]]\n", f"arch: [8, 8] is not accepted: {ARCH}"),
    "a misspelled choice": (
        "s.toml",
        'dataset = "digits"\nalgorithm = "dfa"\nactivation = ["tanh", "rely"]\n',
        "activation: 'rely' is not one of the choices. Did you mean 'relu'?",
    ),
    "a number as tracker": (
        "s.yaml",
        f"{SPEC}trackers: [5]\n",
        "trackers: 5 is not accepted: it must be a valid string.",
    ),
    "a list as options": (
        "s.yaml",
        f"{SPEC}options: [1]\n",
        "options: [1] is not accepted: it must be a valid dictionary.",
    ),
    "a number as a rule's options": (
        "s.yaml",
        f"{SPEC}options: {{dfa: 1}}\n",
        "options: 1 is not accepted: it must be a valid dictionary.",
    ),
    "three mistakes": (
        "s.json",
        '{"dataset": "digits", "algorithm": "dfa", "lr": "x", "batch_size": 0, "zoon": 1}',
        "lr: 'x' is not accepted: it must be a valid number, unable to parse string as a number.\n"
        "batch_size: 0 is not accepted: it must be greater than or equal to 1.\n"
        "Unknown field 'zoon'. Did you mean 'zoom'?",
    ),
}


@pytest.mark.parametrize("case", SPEC_FILES)
def test_a_spec_file_with_a_mistake(bpf_: Bpf, work: Path, case: str) -> None:
    name, content, message = SPEC_FILES[case]
    (work / name).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(bpf_, f"tune --spec {name}", message)


def test_a_spec_file_that_is_not_there(bpf_: Bpf, work: Path) -> None:
    refused(bpf_, "tune --spec s.yaml", "The spec file s.yaml cannot be read: No such file or directory.")
    (work / "s.yaml").mkdir()
    refused(bpf_, "train --spec s.yaml", "The spec file s.yaml cannot be read: Is a directory.")


def test_a_spec_file_given_as_the_directory(bpf_: Bpf, work: Path) -> None:
    (work / "s.yaml").write_text(SPEC)
    expected = "s.yaml is a file, not an experiment's directory. A spec file is given with --spec s.yaml."
    refused(bpf_, f"{TUNE} s.yaml", expected)


def test_options_in_a_spec_file_and_on_the_command_line(bpf_: Bpf, work: Path) -> None:
    for options in ("1", "{dfa: 1}"):
        (work / "s.yaml").write_text(f"{SPEC}options: {options}\n")
        expected = "is not accepted: give each rule its options, as RULE: {NAME: VALUE}."
        given = yaml.safe_load(options)
        refused(bpf_, "tune --spec s.yaml --option dfa.x=1", f"options: {given!r} {expected}")


# Data sets


def image(path: Path, width: int = 8, height: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height)).save(path)


def empty_folder(root: Path) -> None:
    (root / "f").mkdir()


def empty_class(root: Path) -> None:
    image(root / "f/a/1.png")
    (root / "f/b").mkdir()


def corrupt_image(root: Path) -> None:
    image(root / "f/a/1.png")
    (root / "f/b").mkdir()
    (root / "f/b/1.png").write_bytes(b"no image")


def differing_sizes(root: Path) -> None:
    image(root / "f/a/1.png")
    image(root / "f/b/1.png", 9, 8)


def only_train(root: Path) -> None:
    image(root / "f/train/a/1.png")


def nothing_for_test(root: Path) -> None:
    image(root / "f/a/1.png")
    image(root / "f/b/1.png")


def a_file(root: Path) -> None:
    (root / "f").write_text("")


def nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "dataset", "message"),
    [
        (nothing, "folder", "The dataset 'folder' needs a path; write folder:PATH."),
        (nothing, "folder:f", f"folder:f: there is no such path. {LAYOUT}"),
        (a_file, "folder:f", f"folder:f: it is a file, not a directory. {LAYOUT}"),
        (empty_folder, "folder:f", f"folder:f: f has no class directories. {LAYOUT}"),
        (
            empty_class,
            "folder:f",
            "folder:f: f/b has no images. Add some or remove the directory; recognised are .bmp .gif .jpeg .jpg .pbm "
            ".pgm .png .pnm .ppm .tif .tiff .webp.",
        ),
        (
            corrupt_image,
            "folder:f",
            "1 of the 2 images of folder:f cannot be read. Replace or remove them:\n  f/b/1.png: is not an image",
        ),
        (
            differing_sizes,
            "folder:f",
            "The images of folder:f differ in size; give --image-size to scale them all to one size. "
            "f/a/1.png is 8x8, unlike 1 of the others:\n  f/b/1.png: 9x8",
        ),
        (only_train, "folder:f", f"folder:f has train/ but no test/. {LAYOUT}"),
        (
            nothing_for_test,
            "folder:f",
            "The dataset 'folder:f' cannot be used: test_images is empty [0, 1, 8, 8]; at least one example is needed.",
        ),
        (nothing, "npz", "The dataset 'npz' needs a path; write npz:PATH."),
        (nothing, "npz:f", f"npz:f: there is no such path. {SAVE}"),
        (empty_folder, "npz:f", f"npz:f: it is not a file. {SAVE}"),
        (a_file, "npz:f", f"npz:f is damaged or no .npz archive. {SAVE}"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_own_data_that_cannot_be_used(
    bpf_: Bpf, work: Path, prepare: Callable[[Path], None], dataset: str, message: str
) -> None:
    prepare(work)
    refused(bpf_, f"train --dataset {dataset} --algorithm dfa", message)


IMAGES, LABELS = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 2
TEST_PART = {"test_images": IMAGES, "test_labels": LABELS}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": IMAGES}, f"npz:x.npz lacks train_images, train_labels, test_images, test_labels. {SAVE}"),
        (
            {"train_images": IMAGES, "train_labels": np.array([{}, 1] * 10, dtype=object), **TEST_PART},
            f"npz:x.npz holds pickled objects. {SAVE}",
        ),
        (
            {"train_images": IMAGES / 1.0, "train_labels": LABELS, **TEST_PART},
            "npz:x.npz: train_images is float64; images must be uint8, 0 to 255.",
        ),
        (
            {"train_images": IMAGES, "train_labels": LABELS[1:], **TEST_PART},
            "The dataset 'npz:x.npz' cannot be used: train_labels is int64 [19]; it must be int64 [20], "
            "one label for each image.",
        ),
    ],
    ids=["wrong keys", "pickled", "floats", "a label too few"],
)
def test_an_archive_that_cannot_be_used(bpf_: Bpf, work: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(work / "x.npz", **arrays)
    refused(bpf_, "train --dataset npz:x.npz --algorithm dfa", message)


def test_a_source_is_looked_for_in_a_dry_run(bpf_: Bpf) -> None:
    expected = f"folder:f: there is no such path. {LAYOUT}"
    refused(bpf_, "tune --dataset folder:f --algorithm dfa --dry-run", expected)


def test_a_tiny_folder_has_nothing_to_validate_on(
    bpf_: Bpf, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BPF_CACHE_DIR", str(tmp_path / "cache"))  # the images are in order, and cached
    for name in ("a", "b"):
        image(work / f"f/train/{name}/1.png")
        image(work / f"f/test/{name}/1.png")
    command = "train --dataset folder:f --algorithm dfa --examples-frac 1"
    refused(
        bpf_,
        command,
        "val_frac 0.1 of 2 training examples leaves no validation example beside one training example per class; "
        "raise val_frac or examples_frac, or set val_frac to 0.",
    )


def test_mnist_without_a_network(bpf_: Bpf, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: Any, root: Path, **options: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(bpf.data.fetching.TorchvisionSet, "_torchvision", download)
    refused(
        bpf_,
        "train --dataset mnist --algorithm dfa --data-dir sets",
        "MNIST cannot be downloaded (URLError: <urlopen error no network>). To need no download, put "
        "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
        f"t10k-labels-idx1-ubyte.gz into {work}/sets/MNIST/raw.",
    )


# Experiments


@dataclass(frozen=True)
class Experiments:
    """A grid that is finished, one that stopped after an epoch, one where nothing began, and a single run."""

    done: Path
    half: Path
    planned: Path
    one: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Experiments:
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert exit_code(RUN) == 0
        patch.setattr(Supervisor, "run", lambda self: None)
        assert exit_code(GRID) == 0
        patch.undo()
        patch.chdir(root)
        (root / "ex").rename(root / "planned")
        shutil.copytree(root / "planned", root / "done")
        shutil.copytree(root / "planned", root / "half")
        assert exit_code("resume done -q --workers 1") == 0
        stop_after_an_epoch(root / "half")
    assert list((root / "half/checkpoints").iterdir())
    return Experiments(root / "done", root / "half", root / "planned", root / "one")


def results(bpf_: Bpf, directory: str = "ex") -> dict[str, Any]:
    """What came out of each cell: everything but its random name."""
    outcome = bpf_(f"best {directory} --json")
    assert outcome.code == 0
    cells = json.loads(outcome.out)
    return {
        f"{cell['algorithm']} {cell['params']}": {name: cell[name] for name in ("objective", "best_epochs", "test")}
        for cell in cells
    }


@pytest.fixture
def truth(bpf_: Bpf, made: Experiments) -> dict[str, Any]:
    expected = results(bpf_, str(made.done))
    assert len(expected) == 2
    return expected


def edited(old: str, new: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        text = (directory / "experiment.yaml").read_text()
        assert old in text
        (directory / "experiment.yaml").write_text(text.replace(old, new))

    return edit


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def linked(name: str, target: str) -> Callable[[Path], None]:
    def link(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(target)

    return link


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


DAMAGED = "ex/experiment.yaml is damaged: "
AGAIN = "Put back the file that bpf wrote, or start anew in another directory."
DATABASE = "{work}/ex/study.db"
BROKEN_EXPERIMENTS: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "experiment.yaml gone": (without("experiment.yaml"), "ex is not an experiment: it has no experiment.yaml.", 2),
    "experiment.yaml empty": (
        replaced("experiment.yaml", b""),
        f"{DAMAGED}it is not the file that bpf wrote. {AGAIN}",
        1,
    ),
    "experiment.yaml binary": (
        replaced("experiment.yaml", BINARY),
        f"{DAMAGED}it is not text in UTF-8. {AGAIN}",
        1,
    ),
    "experiment.yaml truncated": (
        replaced("experiment.yaml", b"format: [1"),
        f"{DAMAGED}expected ',' or ']', but got '<stream end>' (at line 1, column 11). {AGAIN}",
        1,
    ),
    "experiment.yaml of another program": (
        replaced("experiment.yaml", b"name: lights\n"),
        f"{DAMAGED}it is not the file that bpf wrote. {AGAIN}",
        1,
    ),
    "experiment.yaml that explodes": (
        replaced(
            "experiment.yaml",
            b"a: &a [1,1,1,1,1,1,1,1,1]\n"
            + b"".join(
                f"{one}: &{one} [{','.join(9 * [f'*{before}'])}]\n".encode()
                for before, one in zip("abcdefgh", "bcdefghi", strict=True)
            ),
        ),
        f"{DAMAGED}its aliases stand for too many values. {AGAIN}",
        1,
    ),
    "newer format": (
        edited("format: 2", "format: 9"),
        "ex/experiment.yaml is of format 9; this bpf reads format 2.",
        2,
    ),
    "field gone": (edited("name: ex", "nam: ex"), f"{DAMAGED}name: field required. {AGAIN}", 1),
    "wrong types": (
        edited("sessions:", "sessions: 5\nx:"),
        f"{DAMAGED}sessions: input should be a valid list. {AGAIN}",
        1,
    ),
    "a name that is a path": (
        edited("name: ex", "name: ../../ex"),
        f"{DAMAGED}name: a name has no slashes and no control characters, and is not empty or dots alone. {AGAIN}",
        1,
    ),
    "a path of 3,000 characters": (
        edited("data_dir: ", f"data_dir: {3000 * 'x'}"),
        f"{DAMAGED}data_dir: the path is too long. {AGAIN}",
        1,
    ),
    "a date that is none": (
        edited("created: '2", "created: '9999999"),
        f"{DAMAGED}created: it is no date and time. {AGAIN}",
        1,
    ),
    "an older format without its commands": (
        edited("format: 2", "format: 1"),
        "ex/experiment.yaml is of format 1; this bpf reads format 2.",
        2,
    ),
    "unknown kind": (
        edited("kind: tune", "kind: walk"),
        f"{DAMAGED}kind: input should be 'tune' or 'train'. {AGAIN}",
        1,
    ),
    "spec that was edited": (
        edited("epochs: 3", "epochs: many"),
        "The spec in ex/experiment.yaml is not one that this bpf accepts:\n"
        "epochs: 'many' is not accepted: it must be a valid integer, unable to parse string as an integer.",
        2,
    ),
    "spec without skew": (
        edited("  skew_type:", "  skew_typ:"),
        "The spec in ex/experiment.yaml is not one that this bpf accepts:\n"
        "Unknown field 'skew_typ'. Did you mean 'skew_type'?",
        2,
    ),
    "study.db gone": (
        without("study.db"),
        "{work}/ex/study.db is missing, and with it the results of ex. "
        "Put it back, or start anew in another directory.",
        2,
    ),
    "study.db garbage": (
        replaced("study.db", b"garbage"),
        f"{DATABASE} is damaged: file is not a database. Put back a copy of it, or start anew elsewhere.",
        1,
    ),
    "study.db empty": (replaced("study.db", b""), f"{DATABASE} is a database, but no bpf study.", 2),
    "study.db a link to itself": (
        linked("study.db", "study.db"),
        "ex/study.db is a link, and bpf neither writes nor deletes through links. Put what it stands for in its "
        "place; a study or checkpoints can lie elsewhere with --storage and --checkpoints.",
        2,
    ),
}


@pytest.mark.parametrize("command", ["status ex", "best ex --json", "resume ex -q", GRID], ids=lambda c: c.split()[0])
@pytest.mark.parametrize("case", BROKEN_EXPERIMENTS)
def test_an_experiment_that_is_broken(bpf_: Bpf, made: Experiments, work: Path, case: str, command: str) -> None:
    damage, message, code = BROKEN_EXPERIMENTS[case]
    shutil.copytree(made.done, work / "ex")
    damage(work / "ex")
    if case == "experiment.yaml gone" and command == GRID:
        message = "ex is not an experiment, and not empty. Choose another directory."
    refused(bpf_, command, message.format(work=work), code)


def test_directories_that_are_no_experiments(bpf_: Bpf, work: Path) -> None:
    (work / "ex").write_text("a file")
    (work / "one").mkdir()
    (work / "one" / "thesis.tex").write_text("years of work")
    (work / "void").mkdir()
    refused(bpf_, "status ex", "ex is not an experiment: it is a file.")
    refused(bpf_, GRID, "ex is a file. Choose another directory.")
    refused(bpf_, f"{TRAIN} ex/in", "ex/in/running.lock cannot be written: Not a directory. Choose another directory.")
    refused(bpf_, RUN, "one is not an experiment, and not empty. Choose another directory.")
    refused(bpf_, "best one", "one is not an experiment: it has no experiment.yaml.")
    refused(bpf_, "resume void", "void is not an experiment: it has no experiment.yaml.")


def test_a_study_of_somebody_else_is_left_alone(bpf_: Bpf, work: Path) -> None:
    (work / "ex").mkdir()
    (work / "ex" / "study.db").write_bytes(b"precious")
    refused(bpf_, GRID, "ex is not an experiment, and not empty. Choose another directory.")


def test_nothing_is_left_to_resume(bpf_: Bpf, made: Experiments, work: Path) -> None:
    shutil.copytree(made.done, work / "runs/ex")
    expected = "Every experiment in runs is finished. Start one with `bpf tune`, or name a directory."
    refused(bpf_, "resume", expected)


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        (("--lr 0.1,0.01", "--lr 0.1"), "  lr: 0.1, 0.01 there, 0.1 now\n"),
        (
            ("--epochs 3", "--epochs 2 --batch-size 32 --scaler zero_one --tracker gradients"),
            "  epochs: 3 there, 2 now\n  scaler: standard there, zero_one now\n  trackers: none there, gradients now\n"
            "  batch_size: 64 there, 32 now\n",
        ),
    ],
    ids=["a list that shrank", "other settings"],
)
def test_an_experiment_with_other_settings(
    bpf_: Bpf, made: Experiments, work: Path, changes: tuple[str, str], differences: str
) -> None:
    shutil.copytree(made.done, work / "ex")
    refused(bpf_, GRID.replace(*changes), f"ex holds an experiment with other settings:\n{differences}{EXTEND}")


def test_a_run_in_the_directory_of_a_grid(bpf_: Bpf, made: Experiments, work: Path) -> None:
    shutil.copytree(made.done, work / "ex")
    shutil.copytree(made.one, work / "one")
    expected = "ex holds a grid search (bpf tune), not a single execution (bpf train). Choose another directory."
    refused(bpf_, RUN.replace(" one ", " ex "), expected)
    expected = "one holds a single execution (bpf train), not a grid search (bpf tune). Choose another directory."
    refused(bpf_, GRID.replace(" ex ", " one "), expected)
    expected = (
        "one holds an experiment with other settings:\n  lr: 0.001 there, 0.1 now\n"
        "An execution can be extended (epochs may grow), not changed. Give another directory, or the same settings."
    )
    refused(bpf_, f"{RUN} --lr 0.1", expected)


GROWN = "epochs can grow from 3 to 4 only"


def test_more_epochs_need_the_checkpoints_that_were_kept(bpf_: Bpf, made: Experiments, work: Path) -> None:
    shutil.copytree(made.done, work / "ex")
    longer = GRID.replace("--epochs 3", "--epochs 4")
    expected = (
        f"{GROWN} where the checkpoints of finished cells were kept (--keep-checkpoints), and those of 2 cells were "
        "not. Choose another directory."
    )
    refused(bpf_, longer, expected)
    refused(bpf_, f"{longer} --keep-checkpoints", expected)  # too late
    both = longer.replace("--executions-per-trial 1", "--executions-per-trial 2")
    refused(bpf_, both, f"{GROWN} on their own, not together with executions_per_trial. Do one after the other.")


def test_fewer_executions(bpf_: Bpf, made: Experiments, work: Path) -> None:
    shutil.copytree(made.done, work / "ex")
    more = GRID.replace("--executions-per-trial 1", "--executions-per-trial 2")
    assert bpf_(more).code == 0
    expected = f"ex holds an experiment with other settings:\n  executions_per_trial: 2 there, 1 now\n{EXTEND}"
    refused(bpf_, GRID, expected)


def test_the_parts_of_an_experiment_stay_where_they_are(bpf_: Bpf, made: Experiments, work: Path) -> None:
    shutil.copytree(made.done, work / "ex")
    (work / "ex/experiment.yaml").write_text((made.done / "experiment.yaml").read_text())
    cannot = "The experiment in ex cannot be moved: its"
    study = f"{cannot} study is kept in {work}/ex/study.db, not {work}/other.db."
    for command in (GRID, "resume ex", "status ex", "best ex", "worker ex", "clean ex", "export ex"):
        refused(bpf_, f"{command} --storage sqlite:///other.db", study)
    server = f"{cannot} study is kept in {work}/ex/study.db, not postgresql://me@host/db."
    refused(bpf_, "resume ex --storage postgresql://me:secret@host/db", server)
    refused(bpf_, f"{GRID} --experiment other", f"{cannot} name is ex, not other.")
    refused(bpf_, f"{GRID} --checkpoints shared", f"{cannot} checkpoints lie in ex, not {work}/shared/ex.")
    assert bpf_(f"status ex --storage {work}/ex/study.db").code == 0


def test_a_name_that_is_taken_in_a_shared_study(bpf_: Bpf, work: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervisor, "run", lambda self: None)
        assert bpf_(f"{GRID} --storage all.db").code == 0
    expected = "all.db has no experiment 'other'. Known: ex."
    refused(bpf_, "worker --storage all.db --experiment other", f"{work}/{expected}")


def test_nobody_cleans_what_workers_train(bpf_: Bpf, made: Experiments, work: Path) -> None:
    shutil.copytree(made.half, work / "ex")
    with closing(open_experiment(work / "ex").open_study()) as study, Owner(study.locks) as owner:
        claim = study.claim(owner, lambda row: 2)
        assert claim is not None
        before = [name for name in tree(work) if "study.db" not in name]
        expected = "Workers are training in ex. Clean it when they have ended."
        assert bpf_("clean ex") == Outcome(2, "", f"Error: {expected}\n")
        assert [name for name in tree(work) if "study.db" not in name] == before
        study.release(claim)
    assert bpf_("clean ex").code == 0


def test_the_best_before_anything_is_complete(bpf_: Bpf, made: Experiments, work: Path) -> None:
    shutil.copytree(made.half, work / "ex")
    assert bpf_("best ex") == Outcome(0, "No complete cell yet (2 interrupted).\n", "")
    assert bpf_("best ex --json") == Outcome(0, "[]\n", "")


def test_another_process_trains_there(bpf_: Bpf, made: Experiments, work: Path) -> None:
    shutil.copytree(made.half, work / "ex")
    holder = (
        "from filelock import FileLock\n"
        "lock = FileLock('ex/running.lock')\n"
        "lock.acquire()\n"
        "print('held', flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        expected = (
            "Another bpf process is training in ex. Watch it with `bpf status ex`, or help it with `bpf worker ex`."
        )
        refused(bpf_, "resume ex -q", expected)
        refused(bpf_, GRID, expected)
        refused(bpf_, "clean ex", expected)
        refused(bpf_, "clean ex --checkpoints --dry-run --json", expected)
        assert bpf_("status ex").code == 0
        other.communicate("\n")
    assert bpf_("resume ex -q").code == 0


# A place that may not be written, a disk that is full


def unprivileged() -> list[str]:
    """What to put before a command to make it obey permission bits."""
    if os.geteuid() != 0:
        return []
    capabilities = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}"]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("root obeys no permission bits, and setpriv cannot take that right away here")
    return prefix


AS_JSON = """
import io, json, shlex, sys
from contextlib import redirect_stderr, redirect_stdout
from bpf.cli import app as cli
from bpf.workers import processes

processes.warm_up = lambda: None  # nothing is trained
outcomes = []
for command in sys.argv[1:]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            cli.main(shlex.split(command))
        except SystemExit as end:
            code = int(end.code or 0)
    outcomes.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(outcomes))
"""


def without_privileges(commands: Iterable[str]) -> dict[str, Outcome]:
    """What comes of the commands in a process that obeys permission bits."""
    commands = list(commands)
    done = subprocess.run(
        [*unprivileged(), sys.executable, "-c", AS_JSON, *commands], capture_output=True, text=True, check=True
    )
    return {command: Outcome(*outcome) for command, outcome in zip(commands, json.loads(done.stdout), strict=True)}


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    """Nothing below `root` may be written meanwhile."""
    paths = [root, *root.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def test_a_directory_that_may_not_be_written(made: Experiments, work: Path) -> None:
    shutil.copytree(made.half, work / "ex")
    (work / "closed").mkdir()
    for directory in (work / "ex", work / "ex/checkpoints", work):
        directory.chmod(0o555)
    (work / "closed").chmod(0o000)
    before = (tree(work / "ex"), names(work))
    expected = {
        f"{TUNE} {SMALL} -q": "runs/digits-dfa-loss/running.lock cannot be written: Permission denied. "
        "Choose another directory.",
        "resume ex -q": f"{work}/ex/study.db cannot be used as a study database: attempt to write a readonly database.",
        f"{TRAIN} closed/in": "closed/in cannot be used: Permission denied. Choose another place.",
    }
    try:
        found = without_privileges(expected)
    finally:
        work.chmod(0o755)
    assert found == {command: Outcome(2, "", f"Error: {message}\n") for command, message in expected.items()}
    assert (tree(work / "ex"), names(work)) == before


@pytest.mark.parametrize("trained", [False, True], ids=["alone", "while it is trained"])
def test_an_experiment_that_may_only_be_read_can_be_read(
    bpf_: Bpf, made: Experiments, work: Path, trained: bool
) -> None:
    shutil.copytree(made.done, work / "ex")
    commands = ("status ex", "best ex --json", "show ex", "export ex --what history")
    experiment = open_experiment(work / "ex")
    with closing(experiment.open_study()) as study, Owner(study.locks) as owner:
        if trained:  # so that the files of the write-ahead log are there
            assert study.claim(owner, lambda row: 1) is None
        else:
            study.close()
            owner.close()
        expected = {command: bpf_(command) for command in commands}
        before = tree(work / "ex")
        with read_only(work / "ex"):
            found = without_privileges(commands)
        assert tree(work / "ex") == before
    assert found == expected
    assert {outcome.code for outcome in found.values()} == {0}


FULL = (
    "The disk is full: {path} could not be written. Nothing finished is lost; free some space and give the same "
    "command again."
)


WAITING = "The disk is full: {path} cannot be written. The work goes on when there is space.\n"
ALWAYS = 10**9


@contextmanager
def full_for(pattern: str, times: int = ALWAYS, then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The disk is full for files whose path matches, for so many times; `then` is called each time."""
    real, left = os.fsync, iter(range(times))

    def fsync(descriptor: int) -> None:
        if re.search(pattern, str(Path(f"/proc/self/fd/{descriptor}").readlink())) and next(left, None) is not None:
            then()
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@contextmanager
def full_database(commits: int, times: int = ALWAYS) -> Iterator[None]:
    """The disk is full for databases after the given number of commits, for so many times."""
    fitting, failing = iter(range(commits)), iter(range(times))

    class Connection(sqlite3.Connection):
        def commit(self) -> None:
            if self.in_transaction and next(fitting, None) is None and next(failing, None) is not None:
                raise sqlite3.OperationalError("database or disk is full")
            super().commit()

    real = sqlite3.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *given, **named: real(*given, **named, factory=Connection))
        yield


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr(worker, "FULL_DISK_SECONDS", 0.0)
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.0)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds a descriptor's file in /proc")


@needs_proc
@pytest.mark.parametrize("start", ["half", ""])
def test_a_full_disk_at_the_start_loses_nothing(
    bpf_: Bpf, made: Experiments, truth: dict[str, Any], work: Path, start: str
) -> None:
    if start:
        shutil.copytree(made.half, work / "ex")
        checkpoint = next((work / "ex/checkpoints").iterdir())
    with full_for(r"\.experiment\.yaml"):
        outcome = bpf_(GRID)
    assert outcome == Outcome(1, "", f"Error: {FULL.format(path='ex/experiment.yaml')}\n")
    assert [name for name in tree(work) if re.search(r"/\.[^/]+$", name)] == []
    if start:
        assert json.loads(bpf_("status ex --json").out)["cells"]["interrupted"] == 2
        assert checkpoint.exists()
    assert bpf_("resume ex -q" if start else GRID).code == 0
    assert results(bpf_) == truth


@needs_proc
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("part", ["checkpoints", "models"])
def test_a_full_disk_while_training_is_waited_for(
    bpf_: Bpf, made: Experiments, truth: dict[str, Any], work: Path, part: str
) -> None:
    shutil.copytree(made.half, work / "ex")
    path = (
        next((work / "ex/checkpoints").iterdir()) if part == "checkpoints" else work / "ex/models/dfa/KEY.safetensors"
    )
    with full_for(rf"{part}/(dfa/)?\.", 3):
        outcome = bpf_("resume ex --json --checkpoint-every 0")
    assert outcome.code == 0
    said = re.sub(r"[0-9a-f]{16}\.safetensors", "KEY.safetensors", outcome.err)
    assert said == WAITING.format(path=path)  # once, however often it is tried
    assert results(bpf_) == truth
    assert names(work / "ex/checkpoints") == []
    assert len(names(work / "ex/models/dfa")) == 1


@needs_proc
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("part", ["checkpoints", "models"])
def test_nobody_needs_to_wait_for_a_full_disk(
    bpf_: Bpf, made: Experiments, truth: dict[str, Any], work: Path, part: str
) -> None:
    shutil.copytree(made.half, work / "ex")
    before = tree(work / "ex/checkpoints")
    with full_for(rf"{part}/(dfa/)?\.", then=lambda: signal.raise_signal(signal.SIGINT)):
        outcome = bpf_("resume ex --json --checkpoint-every 0")
    assert (outcome.code, outcome.out) == (130, "")
    stopped = "Stopped. What could not be stored is trained again from the last checkpoint."
    assert outcome.err.endswith(f"{stopped} Go on with: bpf resume ex\n")
    assert part == "models" or tree(work / "ex/checkpoints") == before
    assert json.loads(bpf_("status ex --json").out)["cells"]["interrupted"] == 2
    assert bpf_("resume ex -q").code == 0
    assert results(bpf_) == truth


def test_a_file_size_limit_is_a_full_disk(bpf_: Bpf, made: Experiments, truth: dict[str, Any], work: Path) -> None:
    shutil.copytree(made.half, work / "ex")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        outcome = bpf_("resume ex -q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome == Outcome(1, "", f"Error: {work}/ex/study.db cannot be used as a study database: disk I/O error.\n")
    assert bpf_("resume ex -q").code == 0
    assert results(bpf_) == truth


@pytest.mark.usefixtures("here")
def test_a_full_disk_under_the_study(bpf_: Bpf, made: Experiments, truth: dict[str, Any], work: Path) -> None:
    """Whichever of its transactions is the first that does not fit: at the start it fails, later it is waited for."""
    said = "The study database failed: database or disk is full.\n"
    outcomes: list[Outcome] = []
    while not outcomes or outcomes[-1].err:
        shutil.copytree(made.half, work / "ex")
        with full_database(len(outcomes), 3):
            outcomes.append(bpf_("resume ex --json"))
        if outcomes[-1].code:
            assert outcomes[-1] == Outcome(1, "", f"Error: {said}")
            assert bpf_("resume ex -q").code == 0
        else:
            assert outcomes[-1].err in (said, "")
        assert results(bpf_) == truth
        shutil.rmtree(work / "ex")
    codes = [outcome.code for outcome in outcomes]
    assert codes == sorted(codes, reverse=True)
    assert codes.count(1) == 1  # the plan
    assert codes.count(0) > 5


def test_a_full_disk_before_there_is_a_study(bpf_: Bpf, truth: dict[str, Any], work: Path) -> None:
    with full_database(0):
        outcome = bpf_(GRID)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "Error: The study database failed: database or disk is full.\n"
    assert names(work / "ex") == ["experiment.yaml", "locks", "running.lock"]
    cut_short = "Nothing is planned in ex yet, as its start was cut short. Go on with `bpf resume ex`."
    refused(bpf_, "status ex", cut_short)
    assert bpf_("resume ex -q").code == 0
    assert results(bpf_) == truth


# Checkpoints


class Code:
    """Pickles into a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("hacked"),))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def older(change: Callable[[dict[str, Any]], Any] = lambda content: None) -> Callable[[Path], None]:
    """A checkpoint as bpf 0.2 wrote it, after a change."""

    def rewrite(path: Path) -> None:
        content = checkpoint.load(path, path.stem) | {"format": 2, "cohort": path.stem}
        change(content)
        torch.save(content, path)

    return rewrite


def flip_older(path: Path) -> None:
    """One bit in a tensor, which torch does not notice."""
    older()(path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def sealed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A checkpoint with a checksum that is right, after a change."""

    def rewrite(path: Path) -> None:
        content = checkpoint.load(path, path.stem)
        change(content)
        specs = [RunSpec.model_validate(spec) for spec in content["specs"]]
        checkpoint.save(path, path.stem, content["cells"], specs, content["states"])

    return rewrite


def other_network(network: dict[str, torch.Tensor]) -> None:
    network.update({name: tensor[..., :1] for name, tensor in network.items()})
    network.popitem()


def shorter(tensors: dict[str, torch.Tensor]) -> None:
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name][..., :1].contiguous()


def moved(record: dict[str, Any]) -> None:
    record["epochs"] += 1


UNREADABLE = "is damaged and cannot be read"
MISSING = "is damaged: parts of it are missing or no such parts"
CHECKSUM = "is damaged: it does not agree with its checksum"
UNFIT = "does not fit its cells"
BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, CHECKSUM),
    "one bit": (flip, CHECKSUM),
    "one bit of an older one": (flip_older, f"{CHECKSUM}s"),
    "empty": (lambda path: path.write_bytes(b"") and None, UNREADABLE),
    "garbage": (lambda path: path.write_bytes(BINARY * 9) and None, UNREADABLE),
    "a plain pickle with code": (lambda path: path.write_bytes(pickle.dumps(Code())) and None, UNREADABLE),
    "code": (
        lambda path: torch.save({"format": 1, "cohort": path.stem, "state": Code()}, path),
        "is refused: it holds more than tensors and plain values, and loading it could run code",
    ),
    "newer format": (older(lambda content: content.update(format=9)), "is of a format that this bpf does not read"),
    "no checkpoint": (lambda path: torch.save([1, 2], path), "is of a format that this bpf does not read"),
    "other cells": (older(lambda content: content.update(cohort="another")), "belongs to other cells"),
    "without a state": (older(lambda content: content.pop("states")), MISSING),
    "no states": (older(lambda content: content["states"].clear()), MISSING),
    "a cell too few": (older(lambda content: content["cells"].pop()), MISSING),
    "half a state": (older(lambda content: content["states"][0].pop("records")), MISSING),
    "no state": (older(lambda content: content["states"].insert(0, None)), MISSING),
    "specs that are none": (older(lambda content: content["specs"][0].update(lr="fast")), UNFIT),
    "another network": (sealed(lambda content: other_network(content["states"][0]["network"])), UNFIT),
    "a network of doubles": (
        sealed(
            lambda c: c["states"][0]["network"].update({n: t.double() for n, t in c["states"][0]["network"].items()})
        ),
        UNFIT,
    ),
    "another optimizer": (sealed(lambda content: shorter(content["states"][0]["optimizer"]["weight.0"])), UNFIT),
    "half an optimizer": (sealed(lambda content: content["states"][0]["optimizer"]["weight.0"].popitem()), UNFIT),
    "another best network": (sealed(lambda content: shorter(content["states"][0]["best"])), UNFIT),
    "other learning rates": (sealed(lambda content: content["specs"][0].update(lr=0.5)), UNFIT),
    "another structure": (sealed(lambda content: [spec.update(arch="9") for spec in content["specs"]]), UNFIT),
    "a run twice": (sealed(lambda content: content["states"][0]["stacked"].append(0)), UNFIT),
    "an epoch more": (sealed(lambda content: moved(content["states"][0]["records"][0])), UNFIT),
}


@pytest.mark.parametrize("case", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint(
    bpf_: Bpf, made: Experiments, truth: dict[str, Any], work: Path, case: str, request: pytest.FixtureRequest
) -> None:
    """It is told, kept under another name and not believed: its cells come out as if it had never been."""
    if case == "truncated":  # a worker process tells the same
        request.getfixturevalue("in_workers")
    damage, reason = BROKEN_CHECKPOINTS[case]
    shutil.copytree(made.half, work / "ex")
    path = next((work / "ex/checkpoints").iterdir())
    damage(path)
    before = path.read_bytes()
    outcome = bpf_("resume ex -q")
    assert outcome.code == 0
    kept = f"It is kept as {path.name}.damaged, and its cells are trained from their start."
    assert outcome.err == f"The checkpoint {path} {reason}. {kept}\n"
    assert not (work / "hacked").exists()
    assert [(left.name, left.read_bytes()) for left in path.parent.iterdir()] == [(f"{path.name}.damaged", before)]
    assert results(bpf_) == truth


def test_a_checkpoint_is_set_aside_beside_others(work: Path) -> None:
    for number, end in enumerate(("", "-2", "-3")):
        (work / "a.pt").write_text(f"{number}")
        assert checkpoint.set_aside(work / "a.pt") == work / f"a.pt.damaged{end}"
    assert sorted(path.read_text() for path in work.iterdir()) == ["0", "1", "2"]


# Rules


RULES = '''
from pathlib import Path

from bpf.algorithms import ProjectionRule


class Fragile(ProjectionRule):
    """Raises while there is a file named raise, for runs with the bw_init in it or for all."""

    needs_output_error = True
    equation = "none"
    reference = "none"

    def prepare(self, network, runs):
        self.inits = {init for _, init in runs}
        limit = Path("limit")
        if limit.exists() and len(runs) > int(limit.read_text()):
            raise MemoryError("no memory today")

    def teaching_signal(self, projected, target, output_error):
        guilty = Path("raise")
        if guilty.exists() and (not guilty.read_text() or guilty.read_text() in self.inits):
            raise ZeroDivisionError("no signal today")
        return output_error


class NotARule:
    """Something else."""
'''
TARGETS = {
    "fragile": "fragile_rules:Fragile",
    "broken": "broken_rules:Broken",
    "absent": "absent_rules:Absent",
    "norule": "fragile_rules:NotARule",
}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs `fragile`, `broken` (raises at import), `absent` (no such module) and `norule`, as pip would."""
    lib = tmp_path / "lib"
    info = lib / "fragile_rules-1.0.dist-info"
    info.mkdir(parents=True)
    (lib / "fragile_rules.py").write_text(RULES)
    (lib / "broken_rules.py").write_text("raise RuntimeError('half installed')\n\n\nclass Broken:\n    pass\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile-rules\nVersion: 1.0\n")
    entries = "".join(f"{name} = {target}\n" for name, target in TARGETS.items())
    (info / "entry_points.txt").write_text(f"[bpf.algorithms]\n{entries}")
    monkeypatch.syspath_prepend(lib)  # worker processes are told


@pytest.mark.usefixtures("plugins")
def test_a_plugin_that_cannot_be_loaded(bpf_: Bpf) -> None:
    expected = {
        "broken": "The algorithm 'broken' of fragile-rules 1.0 (broken_rules:Broken) cannot be loaded: "
        "RuntimeError: half installed. Mend, update or reinstall fragile-rules, or leave 'broken' out.",
        "absent": "The algorithm 'absent' of fragile-rules 1.0 (absent_rules:Absent) cannot be loaded: "
        "ModuleNotFoundError: No module named 'absent_rules'. "
        "Mend, update or reinstall fragile-rules, or leave 'absent' out.",
        "norule": "The algorithm 'norule' of fragile-rules 1.0 (fragile_rules:NotARule) cannot be used: it is no "
        "subclass of bpf.algorithms.base.Algorithm. Mend, update or reinstall fragile-rules, or leave 'norule' out.",
    }
    for name, message in expected.items():
        refused(bpf_, f"train --dataset digits --algorithm {name}", message)
        refused(bpf_, f"tune --dataset digits --algorithm bp,{name} --dry-run", message)
    listed = bpf_("algorithms")
    assert listed.code == 0
    assert "broken: module absent_rules is not installed" in listed.out


FRAGILE = "tune ex --dataset digits --arch 8 --activation tanh --no-batch-norm --examples-frac 0.1 --epochs 1 --json"
RAISED = "ZeroDivisionError: no signal today (by the algorithm 'fragile' of fragile-rules 1.0: mend or update it)"
ONE_BY_ONE = f"{RAISED}: its cohort is tried again, each cell alone.\n"
CURE = "see `bpf status ex --failed`; `bpf resume ex --retry-failed` tries again."


def cells(outcome: Outcome) -> list[tuple[str, Any, Any]]:
    return sorted(
        (cell["algorithm"], cell["params"]["lr"], cell["params"]["bw_init"]) for cell in json.loads(outcome.out)
    )


@pytest.mark.usefixtures("plugins", "in_workers")
def test_a_rule_that_raises_fails_alone(bpf_: Bpf, work: Path) -> None:
    (work / "raise").touch()
    outcome = bpf_(f"{FRAGILE} --algorithm dfa,fragile --lr 0.1,0.01 --bw-init ortho --workers 1")
    assert outcome.code == 1
    assert outcome.err == f"{ONE_BY_ONE}Error: 2 cells failed: {CURE}\n"
    assert cells(outcome) == [("dfa", 0.01, "ortho"), ("dfa", 0.1, "ortho")]
    failures = json.loads(bpf_("status ex --failed --json").out)
    assert [(failure["algorithm"], failure["params"]["lr"], failure["cause"]) for failure in failures] == [
        ("fragile", 0.1, "exception"),
        ("fragile", 0.01, "exception"),
    ]
    for failure in failures:
        assert failure["error"].startswith("Traceback (most recent call last):\n")
        assert failure["error"].endswith(f"{RAISED}\n")
    assert bpf_("status ex --failed").out.count("ZeroDivisionError: no signal today") == 2
    assert "rule raised: 2 failed\n" in bpf_("status ex").out
    before = results(bpf_)
    assert bpf_("resume ex -q").code == 1
    (work / "raise").unlink()
    outcome = bpf_("resume ex --retry-failed -q --json")
    assert (outcome.code, outcome.err) == (0, "")
    assert [cell[0] for cell in cells(outcome)] == ["dfa", "dfa", "fragile", "fragile"]
    assert {name: result for name, result in results(bpf_).items() if name.startswith("dfa")} == before


@pytest.mark.usefixtures("plugins")
def test_only_the_cell_that_raises_fails(bpf_: Bpf, work: Path) -> None:
    grid = f"{FRAGILE} --algorithm fragile --lr 0.1 --bw-init ortho,lecun --workers 1"
    (work / "raise").write_text("lecun")
    outcome = bpf_(grid)
    assert (outcome.code, outcome.err) == (1, f"{ONE_BY_ONE}Error: 1 cell failed: {CURE}\n")
    assert cells(outcome) == [("fragile", 0.1, "ortho")]
    [failure] = json.loads(bpf_("status ex --failed --json").out)
    assert (failure["params"]["bw_init"], failure["cause"]) == ("lecun", "exception")
    (work / "raise").unlink()
    together = bpf_(grid.replace("tune ex", "tune all"))
    [alone] = json.loads(outcome.out)
    [same] = [cell for cell in json.loads(together.out) if cell["params"] == alone["params"]]
    assert alone["objective"]["values"] == pytest.approx(same["objective"]["values"], rel=1e-6)


@pytest.mark.usefixtures("plugins")
def test_out_of_memory_before_the_first_epoch(bpf_: Bpf, work: Path) -> None:
    grid = f"{FRAGILE} --algorithm fragile --lr 0.1,0.01,0.001 --bw-init ortho --executions-per-trial 2 --workers 1"
    what = "Out of memory training fragile with arch 8 and batch_size 64"
    (work / "limit").write_text("1")
    outcome = bpf_(grid)
    assert outcome.code == 0
    halves = [f"{what}, {runs} executions together; it is tried again with {runs // 2}.\n" for runs in (6, 2)]
    assert outcome.err == "".join(halves)
    assert "out of memory: 3 now complete\n" in bpf_("status ex").out
    (work / "limit").unlink()
    undisturbed = json.loads(bpf_(grid.replace("tune ex", "tune all")).out)
    found = json.loads(outcome.out)
    assert [cell["params"] for cell in found] == [cell["params"] for cell in undisturbed]
    for one, other in zip(found, undisturbed, strict=True):  # stacked otherwise, so equal but for rounding
        assert one["objective"]["values"] == pytest.approx(other["objective"]["values"], rel=1e-6)


@pytest.mark.usefixtures("plugins")
def test_a_cell_that_needs_more_memory_than_there_is_fails(bpf_: Bpf, work: Path) -> None:
    (work / "limit").write_text("0")
    outcome = bpf_(f"{FRAGILE} --algorithm dfa,fragile --lr 0.1 --bw-init ortho --executions-per-trial 1")
    assert (outcome.code, outcome.err) == (1, f"Error: 1 cell failed: {CURE}\n")
    assert cells(outcome) == [("dfa", 0.1, "ortho")]
    [failure] = json.loads(bpf_("status ex --failed --json").out)
    assert (failure["cause"], failure["error"]) == (
        "memory",
        "Out of memory training fragile with arch 8 and batch_size 64 on cpu, one execution alone. "
        "Use a smaller arch or batch_size.",
    )
    assert "out of memory: 1 failed\n" in bpf_("status ex").out


@pytest.mark.usefixtures("plugins")
def test_a_single_run_that_raises(bpf_: Bpf, work: Path) -> None:
    (work / "raise").touch()
    command = RUN.replace("dfa", "fragile")
    expected = (
        f"Error: The execution failed: {RAISED}\n"
        "See `bpf status one --failed`; `bpf resume one --retry-failed` tries again.\n"
    )
    assert bpf_(command) == Outcome(1, "", expected)
    (work / "raise").unlink()
    assert bpf_("resume one --retry-failed -q").code == 0


def test_a_run_that_diverges_is_a_result_and_is_never_ranked(bpf_: Bpf) -> None:
    wild = "--dataset digits --algorithm bp --optimizer sgd --scaler identity --arch 32-32-32-32 --activation lrelu"
    few = "--examples-frac 0.1 --epochs 3 --json"
    outcome = bpf_(f"train one {wild} {few} --lr 10")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert (report["status"], report["epochs"], report["test"]) == ("diverged", 1, None)
    exported = bpf_("export one --what history --format json").out
    [epoch] = json.loads(exported, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (epoch["status"], epoch["epoch"], epoch["loss"]) == ("diverged", 1, None)
    outcome = bpf_(f"tune ex {wild} {few} --no-batch-norm --executions-per-trial 2 --lr 10,1e-9")
    assert (outcome.code, outcome.err) == (0, "")
    assert [cell["params"]["lr"] for cell in json.loads(outcome.out)] == [1e-9]
    assert json.loads(bpf_("status ex --json").out)["cells"]["diverged"] == 1
