"""What handing out cells costs, without any training: planning, claiming, finishing, and looking at the result.

    python benchmarks/study.py                       # 200 to 50,000 cells, against Optuna's own GridSampler
    python benchmarks/study.py --cells 50000 --whole # every cell by way of the study; takes minutes

The grids are real ones (`dfa`, eleven parameters), their cells have real specs, and each outcome is that of three
executions with a history of 100 epochs. A cell costs what a worker asks of the study for a cohort of one: claim, best,
finish, best. That must not depend on how many cells there are or on how many are done, so it is printed for the first
and for the last tenth of the plan.

Of a plan with more cells than twice `--slice`, only the first and the last ones are claimed and finished; those between
them are written straight into the tables, ours and Optuna's, as copies of finished ones with their own parameters, grid
ids, names and keys. The tables are then as full as if every cell had been trained. `--whole` does without that.

The baseline is Optuna's GridSampler in a plain SQLite study with the same parameters, in the same run; its cost grows
with the trials that are done. Read the numbers as ratios: disks and processors differ.
"""

import argparse
import json
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import optuna

from bpf import api
from bpf.experiment.grid import expand
from bpf.spec.grid import GridSpec
from bpf.study.cells import Axis, Finished
from bpf.study.owner import Owner
from bpf.study.study import Study
from bpf.study.trials import _distribution, _grid_ids, search_space

EPOCHS, EXECUTIONS, DIFFERENT = 100, 3, 50
FULL: dict[str, list[Any]] = {
    "arch": ["100", "500", "500-500", "1000-1000", "500-500-500"],
    "activation": ["tanh", "relu", "swish", "lrelu", "sigmoid"],
    "batch_norm": [False, True],
    "bw_init": ["ortho", "lecun", "frenkel", "nokland", "principled"],
    "batch_size": [32, 64, 128, 256],
}


def grid(size: int) -> GridSpec:
    """All values of a parameter, or one where they do not fit into `size`, and as many learning rates as it takes."""
    lists, rest = {}, size
    for name, values in FULL.items():
        lists[name] = values if rest % len(values) == 0 else values[:1]
        rest //= len(lists[name])
    fixed = {"dataset": "fmnist", "algorithm": "dfa", "epochs": EPOCHS, "executions_per_trial": EXECUTIONS}
    return GridSpec.model_validate(fixed | lists | {"lr": [1e-4 * (1 + rate) for rate in range(rest)]})


def outcome(number: int) -> tuple[float, dict[str, Any], list[dict[str, Any]]]:
    """The value, the result and the history of a cell, as a worker makes them, with as many digits."""
    digits = random.Random(number)
    executions = []
    for seed in range(EXECUTIONS):
        record = {"seed": seed, "status": "complete", "epochs": EPOCHS, "best_epoch": 98, "objective": digits.random()}
        for part in ("train", "val", "test"):
            record[part] = {"loss": digits.random(), "error": digits.random()}
        executions.append(record | {"seconds": digits.random()})
    series = ("loss", "error", "val_loss", "val_error")
    history = [
        record | {"history": {name: [digits.random() / (1 + epoch) for epoch in range(EPOCHS)] for name in series}}
        for record in executions
    ]
    value = statistics.fmean(record["objective"] for record in executions)
    result = {"executions": executions, "seconds": sum(record["seconds"] for record in executions)}
    return value, result | {"device": "cpu", "examples": 27000}, history


def timed(step: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    begun = time.perf_counter()
    returned = step()
    return time.perf_counter() - begun, returned


def work(study: Study, owner: Owner, numbers: Iterable[int]) -> list[float]:
    """Milliseconds of each cell."""
    outcomes = [outcome(number) for number in range(DIFFERENT)]
    taken = []
    for number in numbers:
        value, result, history = outcomes[number % DIFFERENT]

        def step(value: float = value, result: Any = result, history: Any = history) -> None:
            claim = study.claim(owner, lambda row: 1)
            assert claim is not None
            row = claim.rows[0]
            study.best(row.rule)
            study.finish(claim, Finished(row.key, value, "complete", result, history))
            study.best(row.rule)

        taken.append(1e3 * timed(step)[0])
    return taken


def fill(path: Path, study: Study, first: int, last: int) -> None:
    """Finish the cells `first` to `last` - 1 of the plan in the tables. The earlier ones must be finished."""
    axes = study.axes("dfa")
    space = search_space(axes)
    ids = _grid_ids(space)
    internal = {axis.name: _distribution(axis).to_internal_repr for axis in axes}
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for start in range(first, last, 1000):
            cells, parameters = [], []
            for key, name, params, at in db.execute(_PENDING, (study.experiment, start, min(start + 1000, last))):
                values, like = json.loads(params), at % first
                trial = {"trial": at + 1, "template": like + 1}  # alone in its database, it is numbered as its cell
                parameters += [trial | {"name": n, "value": internal[n](value)} for n, value in values.items()]
                mine = {"experiment": study.experiment, "key": key, "at": at, "like": like}
                grid_id = json.dumps(ids[tuple(values[axis] for axis in sorted(space))])
                cells.append(
                    trial | mine | {"key_json": json.dumps(key), "name_json": json.dumps(name), "grid_id": grid_id}
                )
            db.execute("BEGIN IMMEDIATE")
            for statement in _FILLING:
                db.executemany(statement, parameters if "trial_params" in statement else cells)
            db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


_PENDING = """SELECT key, name, params, ordinal FROM bpf_cells
    WHERE experiment = ? AND state = 'pending' AND ordinal >= ? AND ordinal < ? ORDER BY ordinal"""
_FILLING = (
    """INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete)
    SELECT :trial, :at, study_id, state, datetime_start, datetime_complete FROM trials WHERE trial_id = :template""",
    """INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT :trial, objective, value, value_type FROM trial_values WHERE trial_id = :template""",
    """INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT :trial, param_name, :value, distribution_json FROM trial_params
    WHERE trial_id = :template AND param_name = :name""",
    """INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT :trial, key, CASE key WHEN 'name' THEN :name_json WHEN 'cell' THEN :key_json ELSE value_json END
    FROM trial_user_attributes WHERE trial_id = :template""",
    """INSERT INTO trial_system_attributes (trial_id, key, value_json)
    SELECT :trial, key, CASE key WHEN 'grid_id' THEN :grid_id ELSE value_json END
    FROM trial_system_attributes WHERE trial_id = :template""",
    """INSERT INTO bpf_histories (experiment, key, records)
    SELECT h.experiment, :key, h.records FROM bpf_histories h JOIN bpf_cells c USING (experiment, key)
    WHERE c.experiment = :experiment AND c.state = 'complete' AND c.ordinal = :like""",
    """UPDATE bpf_cells SET state = 'complete', trial_id = :trial, trial_number = :at, attempt = 1, cohort = :key,
    (owner, value, result, seconds) = (SELECT owner, value, result, seconds FROM bpf_cells
    WHERE experiment = :experiment AND state = 'complete' AND ordinal = :like)
    WHERE experiment = :experiment AND state = 'pending' AND ordinal = :at""",
)


def ours(size: int, part: int | None, directory: Path) -> Iterator[str]:
    """Lines of the second table, after a line of the first one."""
    experiment = api.open_tune(directory / "grid", grid(size), directory / "data")
    expanding, planned = timed(lambda: expand(experiment.grid, experiment.rules()))
    assert len(planned.cells) == size
    experiment.directory.mkdir()
    experiment.save(["bpf", "tune"])
    planning, (study, _) = timed(experiment.plan)
    with study, Owner(study.locks) as owner:
        again, (other, _) = timed(experiment.plan)
        other.close()
        if part is None or size <= 2 * part:
            taken = work(study, owner, range(size))
            tenth = max(1, size // 10)
        else:
            tenth = part
            taken = work(study, owner, range(part))
            fill(experiment.directory / "study.db", study, part, size - part)
            taken += work(study, owner, range(size - part, size))
        counting, counts = timed(study.counts)
        assert counts["complete"] == size
    report("bpf", size, taken, tenth)
    megabytes = (experiment.directory / "study.db").stat().st_size / 2**20
    seen = [command(name, str(experiment.directory)) for name in ("status", "best")]
    yield (
        f"{size:>8,}{expanding:>10.2f}{planning:>10.2f}{again:>10.2f}{1e3 * counting:>12.1f}"
        f"{seen[0]:>14.2f}{seen[1]:>12.2f}{megabytes:>9.0f}"
    )


def command(*words: str) -> float:
    """Seconds of a bpf command, the median of five."""
    program = Path(sys.executable).with_name("bpf")

    def run() -> None:
        subprocess.run([program, *words], check=True, stdout=subprocess.DEVNULL)

    return statistics.median(timed(run)[0] for _ in range(5))


def report(what: str, size: int, taken: list[float], tenth: int) -> None:
    first, last = (sum(part) / len(part) for part in (taken[:tenth], taken[-tenth:]))
    mean = sum(taken) / len(taken)
    print(f"{what:<18}{size:>8,}{len(taken):>10,}{mean:>10.2f}{first:>9.2f}{last:>9.2f}{max(taken):>9.1f}", flush=True)


def stock(size: int, directory: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spec = grid(size)
    axes = expand(spec, api.open_tune(directory / "grid", spec, directory).rules()).axes["dfa"]
    sampler = optuna.samplers.GridSampler(search_space(axes))
    study = optuna.create_study(storage=f"sqlite:///{directory / 'stock.db'}", sampler=sampler)

    def step() -> None:
        trial = study.ask()
        for axis in axes:
            suggest(trial, axis)
        with suppress(RuntimeError):  # GridSampler stops the study at its last trial, which ask/tell forbids
            study.tell(trial, 0.5)

    report("stock GridSampler", size, [1e3 * timed(step)[0] for _ in range(size)], max(1, size // 10))


def suggest(trial: optuna.Trial, axis: Axis) -> None:
    if axis.low is None or axis.high is None:
        trial.suggest_categorical(axis.name, axis.choices or axis.values)
    elif axis.kind == "int":
        trial.suggest_int(axis.name, int(axis.low), int(axis.high), log=axis.log)
    else:
        trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[200, 2_000, 10_000, 50_000], metavar="N")
    parser.add_argument("--stock", type=int, default=200, metavar="N", help="baseline cells; 0: none")
    parser.add_argument("--slice", type=int, default=500, metavar="N", help="cells at either end that are worked on")
    parser.add_argument("--whole", action="store_true", help="work on every cell")
    options = parser.parse_args()
    load = "/".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"optuna {optuna.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, load {load}")
    print(f"{'ms per cell':<18}{'cells':>8}{'worked on':>10}{'mean':>10}{'first':>9}{'last':>9}{'worst':>9}")
    lines = []
    for size in options.cells:
        with tempfile.TemporaryDirectory() as directory:
            lines += ours(size, None if options.whole else options.slice, Path(directory))
    if options.stock:
        with tempfile.TemporaryDirectory() as directory:
            stock(options.stock, Path(directory))
    print("\nseconds        expand      plan     again   counts, ms    bpf status    bpf best      MiB")
    print("\n".join(lines))
    print("plan: expand, make the database and insert every cell; again: the same with nothing new")


if __name__ == "__main__":
    main()
