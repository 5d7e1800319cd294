"""Sections of a report that are tables and sentences. One that does not apply to an experiment is None."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from shlex import quote
from typing import Any

import yaml

from bpf.errors import BpfError
from bpf.experiment.grid import expand
from bpf.report import comparing, tables
from bpf.report.block import SCORES, Block, Section, Table
from bpf.results import published, summary
from bpf.spec.run import Settings
from bpf.study.ranking import Ranked
from bpf.words import counted, describe, duration, percent, plus_minus, word

TOP = 15
_TOLD = frozenset({"dataset", "problem_type", "objective", "epochs", "examples_frac", "val_frac", "output_loss"})
_TOLD |= {"seed", "data_seed", "matmul_precision", "options", "device", "trackers", "tracker_every"}
"""Settings that are told in sentences, or that change no numbers."""


def run(block: Block) -> Section:
    spec = block.experiment.grid
    counts = [
        counted(len(block.rows), "cell"),
        f"{counted(spec.executions_per_trial, 'execution')} each",
        "epochs and all else as each row says" if spec.rows else counted(spec.epochs, "epoch"),
    ]
    unfinished = sum(one.open for one in tables.coverage(block.rows))
    notes = []
    if unfinished:
        notes.append(f"{unfinished} of {len(block.rows)} cells are not finished yet: everything below is provisional.")
    last = spec.seed + spec.executions_per_trial - 1
    seeds = f"seed {spec.seed}" if last == spec.seed else f"seeds {spec.seed} to {last}"
    facts = [
        ["data set", f"{spec.dataset}, {_fraction(spec.examples_frac)} of the training images"],
        ["held out", f"{100 * spec.val_frac:g} % of these for validation" if spec.val_frac else "nothing"],
        ["problem", f"{spec.problem_type}, output loss {spec.resolved_loss}"],
        ["objective", f"{spec.objective} ({SCORES[spec.objective]}), minimised; the test set selects nothing"],
        ["size", ", ".join(counts)],
        ["seeds", f"{seeds} of the executions; data seed {spec.data_seed} of subset, validation split and skew"],
        ["rules", ", ".join(block.rules)],
        ["numbers", f"float32, matrix products with precision {spec.matmul_precision}"],
    ]
    for name, field in Settings.model_fields.items():
        if name not in _TOLD and (value := getattr(spec, name)) != field.default:
            facts.append([name, word(value)])
    for name in dict.fromkeys(name for row in block.rows for name in row.params):
        facts.append([name, ", ".join(map(word, tables.values_of(block.rows, name)))])
    if spec.lr_from:
        facts.append(["lr", "that of each setup in the phase before"])
    return Section("run", "What was run", notes, [Table(["setting", "value"], facts, words=(0, 1)), *_rules(block)])


def _rules(block: Block) -> Iterator[Table]:
    """What each rule says of itself, where all are installed here."""
    with suppress(BpfError):
        found = block.experiment.rules()
        lines = [[name, found[name].equation or "–", found[name].reference or "–"] for name in block.rules]
        yield Table(["rule", "equation", "source"], lines, words=range(3))


def ranking(block: Block) -> Section:
    if not block.ranked:
        return Section("ranking", "Ranking", ["No cell is complete yet, so there is nothing to rank."])
    executions = len(block.best[0].objective.values)
    spread = "One execution: no spread"
    if executions > 1:
        spread = "Mean ± standard deviation over the executions of a cell, which differ in their seed"
    of = "last epoch" if block.experiment.grid.keep == "last" else "objective's best epoch"
    note = f"{spread}. Ranked by {block.objective} alone; test scores are those of the {of}."
    found = [_ranked(block, block.best, "The best cell of each rule.")]
    if len(block.ranked) > len(block.best):
        top = block.ranked[:TOP]
        of = "All complete cells."
        if len(block.ranked) > TOP:
            of = f"The best {TOP} of {len(block.ranked)} complete cells; bpf export has all of them."
        found.append(_ranked(block, top, of))
    beyond = "At the edge of what was tried, so that better ones may lie beyond:"
    edges = [f"{beyond} {'; '.join(map(str, block.further.edges))}."] if block.further.edges else []
    return Section("ranking", "Ranking", [note, *edges], found, codes=block.further.commands)


def _ranked(block: Block, ranked: Sequence[Ranked], note: str) -> Table:
    tests = [name for name in ("error", "loss") if any(name in one.test for one in ranked)]
    head = ["#", "rule", block.objective, *(f"test {name}" for name in tests), "best epoch", "parameters"]
    lines = []
    for place, one in enumerate(ranked, 1):
        scores = [plus_minus(name, one.test[name]) if name in one.test else "–" for name in tests]
        epochs = sorted({min(one.best_epochs), max(one.best_epochs)})
        params = describe({name: value for name, value in one.row.chosen.items() if name in block.shown})
        shown = plus_minus(block.objective, one.objective)
        lines.append([str(place), one.row.rule, shown, *scores, "–".join(map(str, epochs)), params or "–"])
    return Table(head, lines, note, words=(1, len(head) - 1))


def rows(block: Block) -> Section | None:
    """Rows beside what was published for them, their settings and their sources."""
    grid = block.experiment.grid
    if not grid.rows:
        return None
    found = published.compared(grid, block.rows)
    table = Table(list(published.HEAD), published.lines(found), words=(0, len(published.HEAD) - 1))
    sources = []
    for one in found:
        settings = " ".join(f"{name}={value}" for name, value in _told(grid.rows[one.row].settings))
        of = one.published
        read = "–" if of is None else f"{of.source} ({of.read_in}{f', {of.epoch} epoch' if of.epoch else ''})"
        sources.append([one.row, settings, read, " · ".join(one.choices) or "–"])
    head = ["row", "settings", "published in", "left open there, chosen here"]
    known = Table(head, sources, "Settings on top of those that all rows share (How it was made).", words=range(4))
    return Section("rows", "Published and ours", published.notes(grid, found), [table, known])


def _told(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings in words: the options of a rule one by one."""
    for name, value in settings.items():
        if name != "options":
            yield name, _listed(value)
    for rule, options in settings.get("options", {}).items():
        yield from ((f"{rule}.{name}", _listed(values)) for name, values in options.items())


def _listed(value: Any) -> str:
    return ", ".join(map(word, value)) if isinstance(value, list | tuple) else word(value)


def pairs(block: Block) -> Section | None:
    title = "Rule against rule at equal settings"
    if len(block.rules) < 2:
        return None
    found = comparing.compare(block.rows)
    if not found:
        return Section("pairs", title, ["No two rules have a complete cell at the same setting."])
    lost, left_out = any(sum(one.lost) for one in found), any(one.left_out for one in found)
    test = block.test_score
    head = ["first − second", "first is better"]
    head += ["diverged"] * lost + ["left out"] * left_out
    head += ["settings × seeds", "Δ " + block.objective, "95 % interval", f"Δ test {test}", "95 % interval"]
    lines = []
    for one in found:
        counts = [f"{one.wins} of {one.settings}"]
        counts += [f"{one.lost[0]} / {one.lost[1]}"] * lost + [str(one.left_out)] * left_out
        shown = [*_difference(block.objective, one.objective), *_difference(test, one.test.get(test))]
        lines.append([f"{one.first} − {one.second}", *counts, _size_of(one.objective), *shown])
    how = (
        "A setting fixes every parameter that both rules have, except the learning rate. In it each rule is "
        "represented by its cell with the best objective, which was chosen on the same seeds that are compared here, "
        "and differences are paired by seed."
    )
    note = (
        "Δ: the difference between the two, as the mean over seeds of each seed's mean over the settings where both "
        "rules have a complete cell; negative: the first rule is better. 95 %: Student's t interval over these means "
        "of seeds. The seeds are a random sample; fixed are the settings, which are all of the grid's own, the data "
        "split, and the cells that stand for the rules: nothing is said of other settings. Not corrected for the "
        "number of pairs. First is better: in so many settings, by their mean over seeds."
    )
    if lost:
        note += " Diverged: settings that the first / the second rule lost, as all its cells there diverged; they "
        note += "count in “first is better”, and not in Δ."
    if left_out:
        note += " Left out: settings where a rule has no cell, or none that is complete."
    return Section("pairs", title, [how], [Table(head, lines, note)])


def _size_of(difference: comparing.Difference | None) -> str:
    return f"{difference.settings} × {difference.seeds}" if difference else "–"


def _difference(name: str, difference: comparing.Difference | None) -> tuple[str, str]:
    if difference is None:
        return "–", "–"
    small = 1e-3 <= abs(difference.mean) < 1e5 or not difference.mean
    scale, digits = (100, "+.2f") if name.endswith("error") else (1, "+.4f" if small else "+.1e")
    unit = " pp" if name.endswith("error") else ""
    mean = f"{difference.mean * scale:{digits}}{unit}".replace("-", "−")
    if difference.interval is None:
        few = f"{counted(difference.seeds, 'seed')}: too few for an interval"
        return mean, few if difference.seeds else "no common seed"
    low, high = (f"{end * scale:{digits}}".replace("-", "−") for end in difference.interval)
    return mean, f"{low} to {high}"


def coverage(block: Block) -> Section:
    head = ["rule", "planned", "complete", "diverged", "failed", "pending"]
    lines = [
        [one.rule, *map(str, (one.planned, one.complete, one.diverged, one.failed, one.open))]
        for one in tables.coverage(block.rows)
    ]
    notes = []
    with suppress(BpfError):  # a rule that is not installed here
        left_out = expand(block.experiment.grid, block.experiment.rules()).left_out
        notes = [f"Left out of the grid: {one.cells} cells of {one.rule} ({one.reason})." for one in left_out]
    failed = next((row for row in block.rows if row.state == "failed"), None)
    if failed is not None:
        last = (failed.error or "no message").strip().splitlines()[-1]
        notes.append(f"First failure: {failed.rule} {describe(failed.params)}: {last}")
    return Section("coverage", "Grid coverage", notes, [Table(head, lines, "Pending: not finished, or at work now.")])


def costs(block: Block) -> Section:
    found = tables.costs(block.rows)
    if not found:
        return Section("costs", "Time and memory", ["No cell is complete yet."])
    head = ["rule", "median", "fastest", "slowest", "all its cells", "of which trackers"]
    lines = []
    for one in found:
        paces = [_time(seconds) for seconds in (one.median, one.fastest, one.slowest)]
        tracking = percent(one.tracking) if one.tracking is not None else "–"
        lines.append([one.rule, *paces, _time(one.total), tracking])
    note = (
        "Time of one epoch of one execution, over complete cells and without trackers; executions that were trained "
        "together share their time equally, so structures and hardware matter as much as rules."
    )
    return Section("costs", "Time and memory", tables=[Table(head, lines, note), *_memory(block)])


def _memory(block: Block) -> Iterator[Table]:
    """What a training step of each rule's best cell takes, where its model and its rule are here."""
    from bpf.report import memory

    lines = []
    for one in block.best:
        with suppress(BpfError):
            found = memory.of_cell(block.experiment, one.row)
            structure = describe({name: one.row.spec[name] for name in ("arch", "batch_norm")})
            counts = f"{found.parameters:,}", _size(found.kept), _size(found.step)
            lines.append([one.row.rule, structure, *counts])
    if lines:
        head = ["rule", "best cell", "parameters", "kept", "in a step"]
        note = (
            "Measured for this page by training each rule's best network, alone and on the CPU, for a step on random "
            "images. Kept: parameters, gradients, the optimizer's memory and feedback. In a step: the largest sum of "
            "all other tensors, mostly activations, which grow with the batch size."
        )
        yield Table(head, lines, note, words=(0, 1))


def provenance(block: Block) -> Section:
    known = summary.provenance(block.experiment)
    facts = [[name.replace("_", " "), str(known[name])] for name in ("experiment", "created", "storage", "data_dir")]
    lines = []
    for session in known["sessions"]:
        hardware = session.get("hardware") or {}
        versions = ", ".join(f"{name} {version}" for name, version in (session.get("versions") or {}).items())
        cores = f"{hardware['host']}: {hardware['cores']} cores of {hardware['cpu']}" if hardware else "–"
        gpus = "".join(f", {gpu['name']}" for gpu in hardware.get("gpus", ()))
        commits = [_commit(name, session.get(key)) for name, key in (("", "git"), ("bpf ", "bpf_git"))]
        git = ", ".join(filter(None, commits)) or "–"
        lines.append([session.get("time", "earlier"), versions or "–", git, cores + gpus])
    kind = block.experiment.kind
    codes = {
        "To repeat it, in this order and in an empty directory": "\n".join(_commands(known)),
        "All settings as they were resolved, as a file for --spec": yaml.safe_dump(
            _for_a_file(known["spec"]), sort_keys=False, allow_unicode=True
        ),
    }
    started = Table(["start", "versions", "git", "hardware"], lines, words=range(4))
    about = Table(["", ""], [["kind", f"bpf {kind}"], *facts], words=(0, 1))
    return Section("provenance", "How the results were made", [], [about, started], codes=codes)


def _commands(known: Mapping[str, Any]) -> Iterator[str]:
    """What to run; calls from Python and learning rates from an earlier phase are found in the settings."""
    settings = "with the settings below as SPEC.yaml"
    if known["spec"].get("lr_from"):
        yield f"# {settings}, which have the learning rates of the phase before:"
        yield f"bpf tune {quote(known['experiment'])} --spec SPEC.yaml"
        yield "# or after that phase:"
    for command in (session["command"] for session in known["sessions"]):
        kind, _, directory = command.partition(" ")
        called = kind.removeprefix("bpf.")
        yield command if called == kind else f"bpf {called} {directory} --spec SPEC.yaml  # from Python, {settings}"


def across(blocks: Sequence[Block]) -> Section:
    """The best cell of each rule in every experiment, side by side."""
    rules = list(dict.fromkeys(rule for one in blocks for rule in one.rules))
    lines = []
    for rule in rules:
        line = [rule]
        for one in blocks:
            found = next((best for best in one.best if best.row.rule == rule), None)
            if found is None:
                line += ["–", "–"]
                continue
            test = found.test.get(one.test_score)
            line += [plus_minus(one.objective, found.objective)]
            line += [plus_minus(one.test_score, test) if test else "–"]
        lines.append(line)
    head = ["rule"]
    for one in blocks:
        head += [f"{one.experiment.name}: {one.objective}", f"{one.experiment.name}: test {one.test_score}"]
    note = (
        "Each rule's best cell by the objective of its own experiment, ± standard deviation over its executions. "
        "Compare columns only where settings agree."
    )
    return Section("across", "The experiments side by side", tables=[Table(head, lines, note)])


def _for_a_file(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Without an imbalance factor that means nothing, which a spec refuses."""
    skewed = spec["skew_type"] != ["none"]
    return {name: value for name, value in spec.items() if name != "imbalance_factor" or skewed}


def _commit(name: str, git: Mapping[str, Any] | None) -> str:
    if not git:
        return ""
    changed = f" with {git['changed_files']} changed files" if git.get("dirty") else ""
    return f"{name}{(git.get('commit') or 'no commit')[:12]}{changed}"


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MiB"


def _time(seconds: float) -> str:
    """Three digits, such as `1.90 ms` and `61.2 s`, or minutes and hours."""
    if seconds >= 90:
        return duration(seconds)
    value, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1000, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def _fraction(value: float) -> str:
    return "all" if value in (0, 1) else f"{100 * value:g} %"
