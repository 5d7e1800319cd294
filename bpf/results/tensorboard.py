"""An experiment for TensorBoard: what to look at (`write`), and TensorBoard itself (`serve`).

One run per cell, RULE/PARAMETERS NAME. Curves of the mean over executions, and if asked for of each, for every score
and every value of a tracker; deciles as histograms; the weights of each rule's best network; and the cell's parameters
with what came out.

The events are put into files here, without TensorBoard's asynchronous writer: that one would import TensorFlow where it
is installed, and make another file each time instead of replacing the one that is there.
"""

import math
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from bpf.errors import RunError, UsageError, did_you_mean
from bpf.experiment.directory import Experiment
from bpf.experiment.places import model_path
from bpf.extras import need
from bpf.files import write_atomically
from bpf.reading import file_name
from bpf.results.exporting import Columns, measurements, parameters, scores, typed
from bpf.spec.run import RunSpec
from bpf.study.cells import Row
from bpf.study.ranking import result_columns
from bpf.words import describe

FILE = "events.out.tfevents.bpf"
BINS = 50
PER = ("cell", "execution")
LONGEST = 150
"""Characters of a run's name."""
METRICS = {"objective": "objective", "test/loss": "test_loss", "test/error": "test_error"}
"""What TensorBoard's table of parameters shows of a cell, by tag, and how the table of results calls it."""
_QUANTILE = re.compile(r"(.+)\.q(\d+)")

Moment = tuple[float, int]
"""An epoch, which may be between two, and the step that TensorBoard shows it at."""
Curve = dict[Moment, float]


def write(experiment: Experiment, directory: Path, per: str = "cell") -> int:
    """Write every cell that has a history below `directory`; returns how many that are.

    With `per` cell the curves are means over executions; with `per` execution also those of each, by their seed. What
    bpf has written there before is replaced, byte for byte by the same unless the experiment has gone on. Scores and
    trackers have the epoch as their step; trackers that measured between epochs have the optimizer's. Raises UsageError
    for another `per`, and if TensorBoard is missing.
    """
    if per not in PER:
        raise UsageError(f"There is no curve per {per!r}: give cell or execution.{did_you_mean(per, PER)}")
    events = _Events(datetime.fromisoformat(experiment.created).timestamp())
    written = 0
    with closing(experiment.read_study()) as study:
        rules = study.spec["algorithm"]
        columns: Columns = {"algorithm": str, **parameters(study, rules)}
        several = study.varying() | ({"algorithm"} if len(rules) > 1 else set())
        events.write(directory / FILE, [events.at((0.0, 0), [events.grid(columns, several)])])
        for rule in rules:
            best = study.best(rule)
            for row in study.rows(rule=rule):
                if records := study.history(row.key):
                    weights = _weights(experiment, row) if best and best[0] == row.key else {}
                    folder = directory / file_name(rule)
                    name = run_name(row, study.varying())
                    each = per == "execution"
                    events.write(folder / name / FILE, _cell(events, row, columns, records, weights, each))
                    _discard_others(folder, row.name, name)
                    written += 1
    return written


def run_name(row: Row, varying: Collection[str]) -> str:
    """A cell's run in TensorBoard, below its rule: what it differs in, and its name, such as `lr=0.1 brave-otter-417`.

    It is a part of a path, of at most `LONGEST` characters.
    """
    told = [describe({name: value}) for name, value in row.chosen.items() if name in varying]
    words = " ".join(re.sub(r"[^\w.=+-]", "_", one, flags=re.ASCII) for one in told)
    return f"{words[: LONGEST - len(row.name) - 1]} {row.name}".strip()


def _discard_others(folder: Path, cell: str, name: str) -> None:
    """Remove what was written for the cell under another name: the file, and its folder if nothing else is in it.

    Such a name is the cell's own, or has parameters before it, of which the last may have been cut.
    """
    if folder.is_symlink():
        return
    for other in folder.iterdir():
        *words, last = other.name.split(" ")
        made = last == cell and all("=" in word for word in words[:-1]) and (len(words) != 1 or "=" in words[0])
        file = other / FILE
        if made and other.name != name and not other.is_symlink() and not file.is_symlink() and file.is_file():
            file.unlink()
            with suppress(OSError):
                other.rmdir()


def serve(directories: Sequence[Path], port: int | None = None) -> int:
    """Run TensorBoard on what `write` has put into these directories until Ctrl-C; returns its exit code.

    It can be reached from this machine only, at `port` or else the first free one from 6006 on. Of several
    directories the runs have the part of the path in their names by which the directories differ. Raises UsageError
    if nothing was written, or if TensorBoard is missing.
    """
    for directory in directories:
        if not (directory / FILE).exists():
            raise UsageError(f"There is nothing for TensorBoard in {directory}.")
    plugins = _tensorboard("default").get_plugins()
    tensorboard = _tensorboard("program").TensorBoard(plugins=plugins)
    with tempfile.TemporaryDirectory(prefix="bpf-tensorboard-") as gathered:
        logdir = directories[0]
        if len(directories) > 1:
            logdir = Path(gathered)
            _gather(directories, logdir)
        flags = ["--logdir", str(logdir), "--host", "127.0.0.1", *([] if port is None else ["--port", str(port)])]
        tensorboard.configure(["tensorboard", *flags])
        with suppress(KeyboardInterrupt):
            return abs(int(tensorboard.main()))  # -1 where the port is taken, which it has said itself
    return 0


def _tensorboard(module: str) -> Any:
    return need(f"tensorboard.{module}", "TensorBoard", "tensorboard", "tensorboard")


class _Events:
    """Makes TensorBoard's events, and writes them into files."""

    def __init__(self, began: float) -> None:
        """`began` is the time, in seconds since 1970, that all cells are shown to begin at."""
        summaries = _tensorboard("compat.proto.summary_pb2")
        self._event, self._summary = _tensorboard("compat.proto.event_pb2").Event, summaries.Summary
        self._histogram = summaries.HistogramProto
        self._hparams, self._api = _tensorboard("plugins.hparams.metadata"), _tensorboard("plugins.hparams.api_pb2")
        self._data = _tensorboard("plugins.hparams.plugin_data_pb2")
        self._writer = _tensorboard("summary.writer.record_writer").RecordWriter
        self._began = began

    def write(self, path: Path, events: Iterable[Any]) -> None:
        first = self._event(wall_time=self._began, file_version="brain.Event:2")

        def write(file: Any) -> None:
            records = self._writer(file)
            for event in (first, *events):
                records.write(event.SerializeToString())

        write_atomically(path, write)

    def at(self, moment: Moment, values: Iterable[Any], seconds_per_epoch: float = 0.0) -> Any:
        time = self._began + seconds_per_epoch * moment[0]
        return self._event(wall_time=time, step=moment[1], summary=self._summary(value=values))

    def scalar(self, tag: str, value: float) -> Any:
        return self._summary.Value(tag=tag, simple_value=value)

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float]) -> Any:
        """Counts between neighbours of the `edges`, which are one more than the counts and in order."""
        middles = [(left + right) / 2 for left, right in pairwise(edges)]
        told = self._histogram(
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limit=edges[1:],
            bucket=counts,
        )
        return self._summary.Value(tag=tag, histo=told)

    def grid(self, columns: Columns, several: Collection[str]) -> Any:
        """What parameters there are, with their types; those with `several` values are shown first."""
        kinds = {str: "DATA_TYPE_STRING", bool: "DATA_TYPE_BOOL"}
        typed = {name: kinds.get(kind, "DATA_TYPE_FLOAT64") for name, kind in columns.items()}
        make = self._api.HParamInfo
        return self.merged_grid([make(name=name, type=kind, differs=name in several) for name, kind in typed.items()])

    def merged_grid(self, parameters: Iterable[Any]) -> Any:
        """The parameters, as TensorBoard has them, and what comes out of a cell."""
        metrics = [self._api.MetricInfo(name=self._api.MetricName(tag=tag)) for tag in METRICS]
        experiment = self._api.Experiment(hparam_infos=parameters, metric_infos=metrics)
        return self._parameters(self._hparams.EXPERIMENT_TAG, experiment=experiment)

    def trial(self, name: str, values: Mapping[str, Any]) -> Any:
        """The parameters of a cell."""
        start = self._data.SessionStartInfo(group_name=name, start_time_secs=self._began)
        for parameter, value in values.items():
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
            setattr(start.hparams[parameter], f"{kind}_value", value)
        return self._parameters(self._hparams.SESSION_START_INFO_TAG, session_start_info=start)

    def end_of_cell(self, complete: bool, seconds: float) -> Any:
        status = "STATUS_SUCCESS" if complete else "STATUS_FAILURE"
        end = self._data.SessionEndInfo(status=status, end_time_secs=self._began + seconds)
        return self._parameters(self._hparams.SESSION_END_INFO_TAG, session_end_info=end)

    def _parameters(self, tag: str, **content: Any) -> Any:
        metadata = self._hparams.create_summary_metadata(self._data.HParamsPluginData(**content))
        return self._summary.Value(tag=tag, metadata=metadata, tensor=self._hparams.NULL_TENSOR)


def _cell(
    events: _Events,
    row: Row,
    columns: Columns,
    records: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any],
    each: bool,
) -> Iterator[Any]:
    """The events of one cell, in the order of its epochs; with those of `each` execution."""
    cell = {"algorithm": row.rule, **row.chosen}
    given = {name: typed(cell.get(name), kind) for name, kind in columns.items()}
    yield events.at((0.0, 0), [events.trial(row.name, {name: v for name, v in given.items() if v is not None})])

    shown: dict[Moment, list[Any]] = defaultdict(list)
    means: dict[str, Curve] = {}
    for name, curves in _curves(records).items():
        means[name] = _mean(curves)
        if not _QUANTILE.fullmatch(name):
            tagged = {f"{name}/mean": means[name]}
            if each and len(records) > 1:
                tagged |= {f"{name}/seed {record['seed']}": c for record, c in zip(records, curves, strict=True)}
            for tag, curve in tagged.items():
                for moment, value in curve.items():
                    shown[moment].append(events.scalar(tag, value))
    for name, quantiles in _quantiles(means).items():
        counts = [after - before for before, after in pairwise(quantiles)]
        for moment in next(iter(quantiles.values())):
            if all(moment in curve for curve in quantiles.values()):
                edges = [curve[moment] for curve in quantiles.values()]
                shown[moment].append(events.histogram(name, edges, counts))

    epochs = max(record["epochs"] for record in records)
    seconds = statistics.fmean(record["seconds"] for record in records)
    outcome, end = result_columns(row), shown[float(epochs), epochs]
    end += [events.scalar(tag, outcome[name]) for tag, name in METRICS.items() if outcome[name] is not None]
    end += [events.histogram(f"network/{name}", *histogram) for name, histogram in weights.items()]
    end.append(events.end_of_cell(row.state == "complete", seconds))
    yield from (events.at(moment, shown[moment], seconds / max(1, epochs)) for moment in sorted(shown))


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Curve]]:
    """Each score and value of a tracker, as one curve per execution. What is not finite is left out."""
    curves: dict[str, list[Curve]] = defaultdict(lambda: [{} for _ in records])
    for number, record in enumerate(records):
        measured = list(measurements(record))
        between = any(float(point["epoch"]) % 1 for point in measured)
        for point in (*scores(record), *measured):
            epoch = float(point["epoch"])
            moment = (epoch, point["step"] if between and point.get("step") is not None else int(epoch))
            for name, value in point.items():
                if name not in ("epoch", "step") and value is not None and math.isfinite(value):
                    curves[name][number][moment] = value
    return curves


def _mean(curves: Sequence[Curve]) -> Curve:
    """The mean over the executions, as long as all of them go on: without one that ends early it would jump."""
    first, *others = curves
    return {
        moment: statistics.fmean(curve[moment] for curve in curves)
        for moment in first
        if all(moment in curve for curve in others)
    }


def _quantiles(means: Mapping[str, Curve]) -> dict[str, dict[int, Curve]]:
    """The values of trackers called `.q00` to `.q100`: for each name its curves by the percentage, in order."""
    found: dict[str, dict[int, Curve]] = defaultdict(dict)
    for name, curve in means.items():
        if match := _QUANTILE.fullmatch(name):
            found[match[1]][int(match[2])] = curve
    return {name: dict(sorted(curves.items())) for name, curves in found.items() if len(curves) > 1}


def _weights(experiment: Experiment, row: Row) -> dict[str, tuple[list[float], list[float]]]:
    """Edges and counts of a histogram of each tensor of a cell's network; nothing where it was not kept."""
    import numpy as np

    path, histograms = model_path(experiment.files / "models", row.rule, row.key), {}
    if path.exists():
        from bpf.results.models import read  # torch, which is needed for nothing else here

        try:
            model = read(path)
        except UsageError as error:
            raise RunError(f"{error} Move it away, and give the command again.") from error
        spec, own = model.spec.identity(), RunSpec.model_validate(row.spec).identity()
        if spec | {"seed": 0} != own | {"seed": 0}:
            raise RunError(f"{path} is the model of another cell. Move it away, and give the command again.")
        for name, tensor in model.tensors.items():
            values = tensor.numpy()
            counts, edges = np.histogram(values[np.isfinite(values)], bins=BINS)
            histograms[name] = edges.tolist(), counts.tolist()
    return histograms


def _gather(directories: Sequence[Path], root: Path) -> None:
    """Link the rules of several directories into one, below names that differ, and describe all their parameters.

    TensorBoard believes the first description that it finds.
    """
    loader = _tensorboard("backend.event_processing.event_file_loader").LegacyEventFileLoader
    metadata = _tensorboard("plugins.hparams.metadata")
    parameters: dict[str, Any] = {}
    for label, directory in zip(_labels(directories), directories, strict=True):
        (root / label).mkdir()
        for path in directory.iterdir():
            if path.is_dir():
                (root / label / path.name).symlink_to(path.resolve(), target_is_directory=True)
        for event in loader(str(directory / FILE)).Load():
            for value in event.summary.value:
                found = metadata.parse_experiment_plugin_data(value.metadata.plugin_data.content).hparam_infos
                for parameter in found:
                    parameter.differs |= parameter.name in parameters and parameters[parameter.name].differs
                    parameters[parameter.name] = parameter
    events = _Events(0.0)
    events.write(root / FILE, [events.at((0.0, 0), [events.merged_grid(parameters.values())])])


def _labels(directories: Sequence[Path]) -> list[str]:
    """The parts of the paths by which they differ, joined to one name each."""
    parts = [directory.resolve().parts for directory in directories]
    shortest = min(map(len, parts))
    start = next((at for at in range(shortest) if len({path[at] for path in parts}) > 1), shortest - 1)
    end = next((at for at in range(1, shortest - start) if len({path[-at] for path in parts}) > 1), shortest - start)
    labels: list[str] = []
    for path in parts:
        label = "-".join(path[start : len(path) - end + 1])
        labels.append(label if label not in labels else f"{label}-{len(labels) + 1}")
    return labels
