"""Whatever is killed and however often: each cell of a grid is finished once, with the numbers of an undisturbed run.

`make chaos` kills longer than the tests do, and tells what it did.
"""

import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bpf import api
from bpf.experiment.directory import open_experiment
from bpf.results import summary
from chaos import PLANNING, TRAINING, Command, assert_ran_once, assert_undisturbed, files, needed, outcomes, places

KILLS = int(os.environ.get("BPF_CHAOS_KILLS", "20"))
SEED = int(os.environ.get("BPF_CHAOS_SEED", "1"))
GRID = [
    *("--dataset", "digits", "--algorithm", "bp,drtp,ll-cce", "--arch", "12,9-7,8-8-8,16", "--activation", "tanh"),
    *("--batch-norm", "--bw-init", "ortho", "--lr", "0.001,0.003,0.01", "--epochs", "24"),
    *("--executions-per-trial", "2", "--checkpoint-every", "0"),
]
CHANCE = {"training": 1 / 20, "planning": 1 / 10}
"""Of a place that is armed to kill while a cohort is trained, or while a command begins."""
LONGEST_DELAY = 0.5
NEVER_SHOWN = ("Traceback", "locked", "bug in bpf")


@pytest.mark.slow
def test_a_grid_survives_any_number_of_kills(tmp_path: Path) -> None:
    began = time.monotonic()
    with Command(tmp_path / "undisturbed", "tune", str(tmp_path / "grid"), *GRID, "--workers", "1") as command:
        assert command.wait() == 0, command.output
    chaos = Chaos(tmp_path, KILLS, random.Random(SEED))
    try:
        chaos.run(outcomes(tmp_path / "grid"))
    finally:
        print(f"\n{chaos.kills.total()} kills with BPF_CHAOS_SEED={SEED} in {time.monotonic() - began:.0f} s")
        for what, count in [*sorted(chaos.found.items()), *sorted(chaos.kills.items())]:
            print(f"{count:6} {what}")


@dataclass
class Chaos:
    """Runs grids and kills their processes until there were `wanted` kills: half at places, half at moments."""

    folder: Path
    wanted: int
    random: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)

    def run(self, undisturbed: dict[str, Any]) -> None:
        while self.kills.total() < self.wanted:
            self.found["grids"] += 1
            directory = self.folder / f"grid {self.found['grids']}"
            with ExitStack() as commands:
                set_aside = self._finish(directory, commands)
            self.found["cells trained apart"] += assert_undisturbed(directory, undisturbed)
            self.found["cells set aside and tried again"] += set_aside
            assert_ran_once(directory, set_aside)
            self.found["files for `bpf clean`"] += len(api.clean(open_experiment(directory))["files"])
            assert files(directory) == needed(directory)

    def _finish(self, directory: Path, commands: ExitStack) -> int:
        """Run a grid until it is complete; returns how many cells had to be tried again."""
        arguments = again = ("tune", str(directory), *GRID, "--workers", "2")
        set_aside, before = 0, None
        while True:
            self.found["commands"] += 1
            faults = self._draw(PLANNING, CHANCE["planning"]) if self.random.random() < 1 / 3 else {}
            work = self.folder / f"command {self.found['commands']}"
            command = commands.enter_context(Command(work, *arguments, faults=faults))
            if before is not None:  # its orphans end while the next command begins
                assert before.wait() == -signal.SIGKILL
                before.wait_for_nobody()
            self._disturb(command)
            code, arguments, before = command.process.returncode, again, None
            if code is None:
                code = command.wait()
            assert not [word for word in NEVER_SHOWN if word in command.output], command.output
            if code == -signal.SIGKILL:
                before = command
                continue
            command.wait_for_nobody()
            if code == 0:
                return set_aside
            rows = summary.rows(open_experiment(directory))
            failed = [row for row in rows if row.state == "failed"]
            if failed:
                assert {row.cause for row in failed} == {"killed"}, command.output
                set_aside += len(failed)
                arguments = ("resume", str(directory), "--retry-failed", "--checkpoint-every", "0", "--workers", "2")
            else:
                assert "in a row have crashed" in command.output, command.output
                self.found["commands that gave up"] += 1

    def _disturb(self, command: Command) -> None:
        """Kill processes of a command until it ends, its supervisor is killed or there were kills enough.

        After each kill it may get further: nobody else is killed until a process that has begun since then has stored
        something. Otherwise cells would be set aside, as those that kill their workers.
        """
        begun: set[int] = set()
        while command.process.returncode is None and (event := command.hear()) is not None:
            if event.kind == "started":
                begun.add(event.pid)
            elif event.kind == "killed":
                self._count(event.role, event.place)
                begun.clear()
            elif event.pid in begun and command.disarm():
                if self.kills.total() >= self.wanted:
                    return
                if self.random.random() < 0.4:  # as those while a command begins are at places as well
                    command.arm(self._draw(TRAINING, CHANCE["training"]))
                    begun.clear()
                elif self._kill_at_a_moment(command):
                    begun.clear()

    def _kill_at_a_moment(self, command: Command) -> bool:
        end = time.monotonic() + self.random.uniform(0.0, LONGEST_DELAY)
        try:
            while command.hear(max(0.0, end - time.monotonic())) is not None:
                pass
            return False
        except TimeoutError:
            pass
        victim = self.random.choice([command.process.pid, *command.workers])
        killed = command.kill(victim) and command.process.returncode in (None, -signal.SIGKILL)
        if killed:
            self._count("supervisor" if victim == command.process.pid else "worker", "at a moment")
        return killed

    def _draw(self, of: Mapping[str, Mapping[str, float]], chance: float) -> dict[str, int]:
        """For each place the pass that kills, if each pass does so with a chance that makes all places alike."""
        return {
            place: 1 + int(math.log(1.0 - self.random.random()) / math.log1p(-min(0.5, chance / passes)))
            for place, passes in places(of).items()
        }

    def _count(self, role: str, place: str) -> None:
        self.kills[place if place.startswith(role) else f"{role} {place}"] += 1
        self.found["kills by place" if place.startswith(role) else "kills by time"] += 1
