"""Sections of a report that are mostly figures. One that does not apply to an experiment is None."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bpf.errors import BpfError
from bpf.report import drawing, figures, tables
from bpf.report.block import SCORES, Block, Drawn, Section, Table


def learning_curves(block: Block) -> Section:
    """Training and validation side by side, that of the objective first, on the same kind of scale."""
    objective = block.objective.removeprefix("val_")
    drawn = []
    for score in (objective, "error" if objective == "loss" else "loss"):
        names = [score, f"val_{score}"][:: -1 if block.objective.startswith("val_") else 1]
        found = {
            name: bands
            for name in names
            if (bands := _bands({rule: tables.curves(runs, name) for rule, runs in block.histories.items()}))
        }
        means = [value for bands in found.values() for band in bands.values() for value in band.mean]
        log = score == "loss" and drawing.wide(means)
        for name, bands in found.items():
            cut = " Cut to the shortest execution." if any(band.cut for band in bands.values()) else ""
            kind = ", on a logarithmic scale" if log else ""
            caption = f"{_capital(SCORES[name])} of each rule's best cell{kind}{_spread(bands)}.{cut}"
            draw = partial(figures.curves, bands, block.label(name), log, block.palette)
            drawn.append(block.draw(f"curves-{name}", caption, draw))
    none = [] if drawn else ["No complete cell has a history yet."]
    return Section("curves", "Learning curves", none, figures=drawn)


def _bands(series: Mapping[str, Sequence[tables.Series]]) -> dict[str, tables.Band]:
    bands = {name: tables.band(found) for name, found in series.items()}
    return {name: band for name, band in bands.items() if band is not None}


def _spread(bands: Mapping[str, tables.Band]) -> str:
    if all(band.std is None for band in bands.values()):
        return ", one execution"
    return "; bands are mean ± standard deviation over its executions"


def learning_rates(block: Block) -> Section | None:
    title = "Sensitivity to the learning rate"
    if "lr" not in block.varying:
        return None
    found = {rule: tables.levels(tables.of_rule(block.rows, rule), "lr") for rule in block.rules}
    found = {rule: levels for rule, levels in found.items() if any(one.complete for one in levels)}
    if not found:
        return Section("lr", title, ["No cell is complete yet."])
    caption = "Best and median objective of the complete cells with each learning rate."
    if any(one.diverged and not one.complete for levels in found.values() for one in levels):
        caption += " A cross at the top: every cell that ended there has diverged."
    draw = partial(figures.sensitivity, found, "learning rate", block.label(block.objective), block.palette)
    return Section("lr", title, figures=[block.draw("lr", caption, draw)])


def heat_map(block: Block, rules: Sequence[str], row: str, column: str) -> Drawn:
    """The best objective of rules by any two of their parameters."""
    of_rules = {rule: tables.of_rule(block.rows, rule) for rule in rules}
    among = [one for rows in of_rules.values() for one in rows]
    found = {rule: tables.best_map(rows, row, column, among) for rule, rows in of_rules.items()}
    label = block.label(block.objective)
    common = "; the colours are on one scale" if len(rules) > 1 else ""
    caption = f"Best {label} over all other parameters, by {row} and {column}{common}."
    empty = [
        count
        for one in found.values()
        for values, counts in zip(one.values, one.counts, strict=True)
        for value, count in zip(values, counts, strict=True)
        if value is None
    ]
    caption += " ×: all that ended there diverged." if any(empty) else ""
    caption += " –: no cell ended there." if 0 in empty else ""
    return block.draw(f"map-{row}-{column}", caption, partial(figures.best_maps, found, label))


def heat_maps(block: Block) -> Section | None:
    if block.maps:
        return _given_maps(block)
    title = "The two parameters that matter most"
    by_rule = {rule: tables.of_rule(block.rows, rule) for rule in block.rules}
    if all(len(tables.varying(rows)) < 2 for rows in by_rule.values()):
        return None
    by_pair: dict[tuple[str, str], list[str]] = {}
    for rule, rows in by_rule.items():
        found = tables.effects(rows)
        if len(found) > 1 and tables.complete(rows):
            by_pair.setdefault(_axes(block, found[0].parameter, found[1].parameter), []).append(rule)
    if not by_pair:
        return Section("maps", title, ["No rule has two parameters with several values and complete cells yet."])
    drawn = [heat_map(block, rules, row, column) for (row, column), rules in by_pair.items()]
    return Section("maps", title, ["Those with the largest main effect, for each rule."], figures=drawn)


def _axes(block: Block, first: str, second: str) -> tuple[str, str]:
    """A pair of parameters as row and column, the same for every rule: across goes the one with more values, or lr."""
    order = list(dict.fromkeys(name for row in block.rows for name in row.params))
    across = max(
        (first, second), key=lambda name: (name == "lr", len(tables.values_of(block.rows, name)), order.index(name))
    )
    return (second, first) if across == first else (first, second)


def _given_maps(block: Block) -> Section:
    drawn, lacking = [], []
    for row, column in block.maps:
        able = []
        for rule in block.rules:
            mine = tables.of_rule(block.rows, rule)
            if {row, column} <= mine[0].params.keys() and tables.complete(mine):
                able.append(rule)
            else:
                lacking.append(f"{rule} has no complete cell with {row} and {column}.")
        if able:
            drawn.append(heat_map(block, able, row, column))
    return Section("maps", "Two parameters at a time", lacking, figures=drawn)


def main_effects(block: Block) -> Section | None:
    if not any(tables.varying(tables.of_rule(block.rows, rule)) for rule in block.rules):
        return None
    found = {rule: tables.effects(tables.of_rule(block.rows, rule)) for rule in block.rules}
    found = {rule: effects for rule, effects in found.items() if effects}
    if not found:
        return Section("effects", "Main effects", ["No parameter has several values with cells that ended yet."])
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
    title = "Alignment and other measurements over time"
    depths = {one.row.rule: len(str(one.row.spec["arch"]).split("-")) for one in block.best}
    found: dict[str, dict[str, dict[str, dict[str, tables.Band]]]] = {}
    looks: dict[str, dict[str, Any]] = {}
    for rule, runs in block.histories.items():
        for tracker, series in tables.tracked(runs).items():
            for name, band in _bands({name: one for name, one in series.items() if _drawable(name)}).items():
                statistic, index, layer = tables.place(name, depths[rule])
                looks[layer] = drawing.layer(index, max(depths.values()))
                found.setdefault(tracker, {}).setdefault(statistic, {}).setdefault(rule, {})[layer] = band
    drawn = []
    for tracker, by_statistic in found.items():
        every = [band for by_rule in by_statistic.values() for bands in by_rule.values() for band in bands.values()]
        spread = _spread({str(number): band for number, band in enumerate(every)})
        caption = f"{tracker} on a fixed batch of training images, in each rule's best cell{spread}."
        drawn.append(block.draw(f"tracker-{tracker}", caption, partial(figures.tracked, by_statistic, tracker, looks)))
    if drawn:
        return Section("alignment", title, figures=drawn)
    if block.experiment.grid.trackers:
        return Section("alignment", title, ["No complete cell has measurements yet."])
    return Section("alignment", title, ["No tracker was given: --tracker bp_cosine, --tracker weight_alignment."])


def _drawable(name: str) -> bool:
    """Not each decile of a layer's outputs."""
    return re.search(r"\.q\d+$", name) is None


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
    notes = [
        f"{lost} of {len(block.rows)} cells have diverged: a loss or a weight was not finite, or a loss exceeded 1e6."
    ]
    drawn = [block.draw("divergence", caption, partial(figures.divergence, found))] if found else []
    return Section("divergence", title, notes, figures=drawn)


def reconstructions(block: Block) -> Section | None:
    title = "Reconstructions"
    if block.experiment.grid.problem_type != "reconstruction":
        return None
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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
