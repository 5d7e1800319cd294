"""The sections of a report on one experiment: which numbers and figures it has, or one sentence why not."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import yaml

from bpf import api
from bpf.console import describe, duration, percent, plus_minus, word
from bpf.errors import BpfError
from bpf.grid import expand
from bpf.report import comparing, figures, tables
from bpf.report.block import SCORES, Block, Drawn, Section, Table
from bpf.results import Ranked

TOP = 15


def sections(block: Block) -> Iterator[Section]:
    """All sections, one after the other, so that a page never holds more than it must."""
    yield from (
        make(block)
        for make in (
            run,
            ranking,
            pairs,
            learning_curves,
            learning_rates,
            heat_maps,
            main_effects,
            alignment,
            divergence,
            coverage,
            reconstructions,
            costs,
            provenance,
        )
    )


def run(block: Block) -> Section:
    spec = block.experiment.grid
    counts = [
        _count(len(block.rows), "cell"),
        f"{_count(spec.executions_per_trial, 'execution')} each",
        _count(spec.epochs, "epoch"),
    ]
    unfinished = sum(one.open for one in tables.coverage(block.rows))
    notes = []
    if unfinished:
        notes.append(f"{unfinished} of {len(block.rows)} cells are not finished yet: everything below is provisional.")
    facts = [
        ["data set", f"{spec.dataset}, {_fraction(spec.examples_frac)} of the training images"],
        ["problem", f"{spec.problem_type}, output loss {spec.resolved_loss}"],
        ["objective", f"{spec.objective} ({SCORES[spec.objective]}), minimised; the test set selects nothing"],
        ["size", ", ".join(counts)],
        ["rules", ", ".join(block.rules)],
    ]
    for name in dict.fromkeys(name for row in block.rows for name in row.params):
        facts.append([name, ", ".join(map(word, tables.values_of(block.rows, name)))])
    if spec.lr_from:
        facts.append(["lr", "that of each setup in the phase before"])
    return Section("run", "What was run", notes, [Table(["setting", "value"], facts, words=2)])


def ranking(block: Block) -> Section:
    if not block.ranked:
        return Section("ranking", "Ranking", ["No cell is complete yet, so there is nothing to rank."])
    executions = len(block.best[0].objective.values)
    spread = "Mean ± standard deviation over executions" if executions > 1 else "One execution: no spread"
    note = f"{spread}. Ranked by {block.objective} alone; test scores are those of the objective's best epoch."
    found = [Table(*_ranked(block, block.best), "The best cell of each rule.", words=0)]
    if len(block.ranked) > len(block.best):
        top = block.ranked[:TOP]
        of = f"The best {len(top)} of {len(block.ranked)} complete cells; bpf export has all of them."
        found.append(Table(*_ranked(block, top), of, words=0))
    return Section("ranking", "Ranking", [note], found)


def _ranked(block: Block, ranked: Sequence[Ranked]) -> tuple[list[str], list[list[str]]]:
    tests = [name for name in ("error", "loss") if any(name in one.test for one in ranked)]
    head = ["#", "rule", block.objective, *(f"test {name}" for name in tests), "best epoch", "parameters"]
    lines = []
    for place, one in enumerate(ranked, 1):
        scores = [plus_minus(name, one.test[name]) if name in one.test else "–" for name in tests]
        epochs = sorted({min(one.best_epochs), max(one.best_epochs)})
        params = describe({name: value for name, value in one.row.chosen.items() if name in block.shown})
        shown = plus_minus(block.objective, one.objective)
        lines.append([str(place), one.row.rule, shown, *scores, "–".join(map(str, epochs)), params or "–"])
    return head, lines


def pairs(block: Block) -> Section:
    title = "Rule against rule at equal settings"
    if len(block.rules) < 2:
        return Section("pairs", title, ["There is one rule only."])
    found = comparing.compare(block.rows)
    if not found:
        return Section("pairs", title, ["No two rules have a complete cell at the same setting."])
    test = block.test_score
    head = ["first − second", "settings", "first is better", "Δ " + block.objective, "95 % interval"]
    head += [f"Δ test {test}", "95 % interval"]
    lines = []
    for one in found:
        scores = [one.objective, one.test.get(test)]
        shown = [text for name, s in zip((block.objective, test), scores, strict=True) for text in _difference(name, s)]
        lines.append([f"{one.first} − {one.second}", str(one.settings), f"{one.wins} of {one.settings}", *shown])
    over = "its settings" if any(one.settings > 1 for one in found) else "the seeds of the only setting"
    if any(one.settings > 1 for one in found) and any(one.settings == 1 for one in found):
        over += " (over seeds where there is one setting)"
    note = (
        f"Student's t interval of the mean paired difference over {over}, not corrected for the number of pairs; "
        "negative: the first rule is better."
    )
    how = (
        "A setting fixes every parameter that both rules have, except the learning rate. In it each rule is "
        "represented by its cell with the best objective, and differences are paired by seed."
    )
    alone = sum(one.unmatched for one in found)
    if alone:
        how += " Settings where one of the two has no complete cell are left out."
    return Section("pairs", title, [how], [Table(head, lines, note)])


def _difference(name: str, difference: comparing.Difference | None) -> tuple[str, str]:
    if difference is None:
        return "–", "–"
    scale, digits = (100, "+.2f") if name.endswith("error") else (1, "+.4f")
    unit = " pp" if name.endswith("error") else ""
    mean = f"{difference.mean * scale:{digits}}{unit}".replace("-", "−")
    if difference.interval is None:
        return mean, "one pair only"
    low, high = (f"{end * scale:{digits}}".replace("-", "−") for end in difference.interval)
    return mean, f"{low} to {high}"


def learning_curves(block: Block) -> Section:
    order = [block.objective, *(name for name in SCORES if name != block.objective)]
    drawn = []
    for score in order:
        bands = _bands({rule: tables.curves(runs, score) for rule, runs in block.histories.items()})
        if bands:
            cut = " Cut to the shortest execution." if any(band.cut for band in bands.values()) else ""
            caption = f"{_capital(SCORES[score])} of each rule's best cell{_spread(bands)}.{cut}"
            draw = partial(figures.curves, bands, block.label(score), block.palette)
            drawn.append(block.draw(f"curves-{score}", caption, draw))
    none = [] if drawn else ["No complete cell has a history yet."]
    return Section("curves", "Learning curves", none, figures=drawn)


def _bands(series: Mapping[str, Sequence[tables.Series]]) -> dict[str, tables.Band]:
    bands = {name: tables.band(found) for name, found in series.items()}
    return {name: band for name, band in bands.items() if band is not None}


def _spread(bands: Mapping[str, tables.Band]) -> str:
    if all(band.std is None for band in bands.values()):
        return ", one execution"
    return "; bands are mean ± standard deviation over executions"


def learning_rates(block: Block) -> Section:
    title = "Sensitivity to the learning rate"
    if "lr" not in block.varying:
        return Section("lr", title, ["The grid has one learning rate only: give several as --lr 0.001,0.01."])
    found = {rule: tables.levels(tables.of_rule(block.rows, rule), "lr") for rule in block.rules}
    found = {rule: levels for rule, levels in found.items() if any(one.complete for one in levels)}
    if not found:
        return Section("lr", title, ["No cell is complete yet."])
    caption = (
        "Best (markers) and median (faint) objective over all other parameters. "
        "A cross at the top: every cell that ended there has diverged."
    )
    draw = partial(figures.sensitivity, found, "learning rate", block.label(block.objective), block.palette)
    return Section("lr", title, figures=[block.draw("lr", caption, draw)])


def heat_map(block: Block, rule: str, row: str, column: str) -> Drawn:
    """The best objective of a rule by any two of its parameters."""
    found = tables.best_map(tables.of_rule(block.rows, rule), row, column)
    caption = f"{rule}: best {block.label(block.objective)} over all other parameters, by {row} and {column}."
    return block.draw(
        f"map-{rule}-{row}-{column}", caption, partial(figures.best_map, found, block.label(block.objective))
    )


def heat_maps(block: Block) -> Section:
    if block.maps:
        return _given_maps(block)
    title, drawn = "The two parameters that matter most", []
    for rule in block.rules:
        mine = tables.of_rule(block.rows, rule)
        found = tables.effects(mine)
        if len(found) > 1 and any(row.state == "complete" for row in mine):
            column, row = (one.parameter for one in found[:2])
            if len(tables.values_of(mine, row)) > len(tables.values_of(mine, column)):
                row, column = column, row
            drawn.append(heat_map(block, rule, row, column))
    if not drawn:
        return Section("maps", title, ["No rule has two parameters with several values and complete cells."])
    return Section("maps", title, ["Those with the largest main effect, for each rule."], figures=drawn)


def _given_maps(block: Block) -> Section:
    drawn, lacking = [], []
    for row, column in block.maps:
        for rule in block.rules:
            mine = tables.of_rule(block.rows, rule)
            if {row, column} <= mine[0].params.keys() and any(one.state == "complete" for one in mine):
                drawn.append(heat_map(block, rule, row, column))
            else:
                lacking.append(f"{rule} has no complete cell with {row} and {column}.")
    return Section("maps", "Two parameters at a time", lacking, figures=drawn)


def main_effects(block: Block) -> Section:
    found = {rule: tables.effects(tables.of_rule(block.rows, rule)) for rule in block.rules}
    found = {rule: effects for rule, effects in found.items() if effects}
    if not found:
        return Section("effects", "Main effects", ["No parameter has several values with cells that ended."])
    caption = (
        "Mean place of the cells with each value among the cells of the same rule: 0 if they are its best, 1 if they "
        "are its worst. Diverged cells share the last places. Panels with the largest effect first."
    )
    drawn = block.draw("effects", caption, partial(figures.effects, found, block.palette))
    head = ["parameter", *found]
    names = dict.fromkeys(effect.parameter for effects in found.values() for effect in effects)
    sizes = {(rule, one.parameter): f"{one.size:.2f}" for rule, effects in found.items() for one in effects}
    lines = [[name, *(sizes.get((rule, name), "–") for rule in found)] for name in names]
    note = "Size of the effect: largest minus smallest mean place."
    return Section("effects", "Main effects", tables=[Table(head, lines, note)], figures=[drawn])


def alignment(block: Block) -> Section:
    title, drawn = "Alignment and other measurements over time", []
    by_tracker: dict[str, dict[str, dict[str, tables.Band]]] = {}
    for rule, runs in block.histories.items():
        for tracker, series in tables.tracked(runs).items():
            if bands := _bands({name: found for name, found in series.items() if _drawable(name)}):
                by_tracker.setdefault(tracker, {})[rule] = bands
    for tracker, found in by_tracker.items():
        spread = _spread({f"{rule} {name}": band for rule, bands in found.items() for name, band in bands.items()})
        caption = f"{tracker} on a fixed batch of training images, in each rule's best cell{spread}."
        drawn.append(block.draw(f"tracker-{tracker}", caption, partial(figures.alignment, found, tracker)))
    if drawn:
        return Section("alignment", title, figures=drawn)
    if block.experiment.grid.trackers:
        return Section("alignment", title, ["No complete cell has measurements yet."])
    return Section("alignment", title, ["No tracker was given: --tracker bp_cosine, --tracker weight_alignment."])


def _drawable(name: str) -> bool:
    """One line per layer: not each decile of its outputs, and no biases."""
    return not name.startswith("bias.") and not (name.count(".") > 1 and name.rpartition(".")[2][:1] == "q")


def divergence(block: Block) -> Section:
    title = "Divergence"
    lost = sum(row.state == "diverged" for row in block.rows)
    if not lost:
        return Section("divergence", title, ["No cell has diverged."])
    found = {}
    for rule in block.rules:
        mine = tables.of_rule(block.rows, rule)
        others = [name for name in mine[0].params if name != "lr"]
        varied = [name for name in ("activation", "optimizer", "arch", *others) if name in tables.varying(mine)]
        if "lr" in mine[0].params and others:
            row = next((name for name in varied if name != "lr"), others[0])
            found[rule] = tables.divergence_map(mine, row, "lr")
    caption = "Diverged cells in % of those that ended, for each rule. A cell diverges with any of its executions."
    notes = [f"{lost} of {len(block.rows)} cells have diverged: a loss or a weight was not finite."]
    drawn = [block.draw("divergence", caption, partial(figures.divergence, found))] if found else []
    return Section("divergence", title, notes, figures=drawn)


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


def reconstructions(block: Block) -> Section:
    title = "Reconstructions"
    if block.experiment.grid.problem_type != "reconstruction":
        return Section("images", title, ["The problem is classification: nothing is reconstructed."])
    if not block.best:
        return Section("images", title, ["No cell is complete yet."])
    from bpf.report.images import reconstruct

    try:
        found = reconstruct(block.experiment, [one.row for one in block.best])
    except BpfError as error:
        return Section("images", title, [f"The data set cannot be read here: {error}"])
    if not found.by_rule:
        return Section("images", title, ["No network of a best cell can be read.", *found.missing])
    caption = "The first test images, and what the best network of each rule makes of them."
    draw = partial(figures.reconstructions, found.originals, found.by_rule)
    return Section("images", title, found.missing, figures=[block.draw("reconstructions", caption, draw)])


def costs(block: Block) -> Section:
    found = tables.costs(block.rows)
    if not found:
        return Section("costs", "Time and memory", ["No cell is complete yet."])
    head = ["rule", "median", "fastest", "slowest", "all its cells", "of which trackers"]
    lines = []
    for one in found:
        paces = [_pace(seconds) for seconds in (one.median, one.fastest, one.slowest)]
        tracking = percent(one.tracking) if one.tracking is not None else "–"
        lines.append([one.rule, *paces, _time(one.total), tracking])
    note = (
        "Time of one epoch of one execution, over complete cells and without trackers; runs that were trained "
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
            structure = describe({name: one.row.chosen[name] for name in ("arch", "batch_norm")})
            counts = f"{found.parameters:,}", _size(found.kept), _size(found.step)
            lines.append([one.row.rule, structure, *counts])
    if lines:
        head = ["rule", "best cell", "parameters", "kept", "in a step"]
        note = (
            "Measured for this page by training each rule's best network, alone and on the CPU, for a step on random "
            "images. Kept: parameters, gradients, the optimizer's memory and feedback. In a step: the largest sum of "
            "all other tensors, mostly activations, which grow with the batch size."
        )
        yield Table(head, lines, note, words=2)


def provenance(block: Block) -> Section:
    known = api.provenance(block.experiment)
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
        "To repeat it, in this order and in an empty directory": "\n".join(s["command"] for s in known["sessions"]),
        "All settings as they were resolved, as a file for --spec": yaml.safe_dump(
            _for_a_file(known["spec"]), sort_keys=False, allow_unicode=True
        ),
    }
    started = Table(["start", "versions", "git", "hardware"], lines, words=4)
    about = Table(["", ""], [["kind", f"bpf {kind}"], *facts], words=2)
    return Section("provenance", "Where the numbers come from", [], [about, started], codes=codes)


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
    note = "Each rule's best cell by the objective of its own experiment. Compare columns only where settings agree."
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


def _pace(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def _fraction(value: float) -> str:
    return "all" if value in (0, 1) else f"{100 * value:g} %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
