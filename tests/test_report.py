"""The report: its numbers against ones worked out by hand, its figures, and its page in a browser."""

import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from bpf.cli import app as cli
from bpf.errors import UsageError
from bpf.experiment.directory import open_experiment
from bpf.report import comparing, drawing, figure_sections, figures, memory, report, tables, text_sections
from bpf.report.block import block
from bpf.report.drawing import Palette, short, word
from bpf.results import summary
from bpf.study.cells import Row
from bpf.training import footprint
from browser import check_page

pytestmark = pytest.mark.usefixtures("in_this_process")

NAN = pytest.approx(math.nan, nan_ok=True)

SECTIONS = [
    "run", "ranking", "pairs", "curves", "lr", "maps", "effects", "alignment", "divergence", "coverage", "costs",
    "provenance",
]  # fmt: skip
"""Of a classification by several rules whose parameters vary."""


def cell(rule, objectives, *, state="complete", tests=None, seeds=None, seconds=2.0, epochs=4, **params):
    """A row with one execution per objective; test errors are `tests` or the objectives."""
    runs = [
        {
            "seed": seed,
            "status": "complete",
            "epochs": epochs,
            "best_epoch": epochs,
            "objective": value,
            "test": {"loss": value, "error": test},
            "seconds": seconds,
        }
        for seed, value, test in zip(
            seeds or range(len(objectives)), objectives, tests or objectives or [], strict=True
        )
    ]
    ended = state in ("complete", "diverged")
    return Row(
        key="-".join([rule, *map(str, params.values())]),
        rule=rule,
        structure="",
        params=params,
        spec={},
        ordinal=0,
        name="a-name",
        state=state,
        cohort=None,
        owner=None,
        attempt=1,
        trial_id=None,
        trial_number=None,
        value=sum(objectives) / len(objectives) if state == "complete" else None,
        result={"executions": runs, "seconds": seconds * len(runs)} if ended else None,
        error=None,
        cause=None,
        kills=0,
        reached=0,
        max_runs=None,
    )


# Numbers


def test_coverage_counts_what_became_of_each_rules_cells():
    rows = [
        cell("bp", [1.0], lr=0.1),
        cell("bp", [], state="diverged", lr=1.0),
        cell("dfa", [], state="failed", lr=0.1),
        cell("dfa", [], state="running", lr=1.0),
        cell("dfa", [], state="pending", lr=2.0),
        cell("dfa", [], state="interrupted", lr=3.0),
    ]
    assert tables.coverage(rows) == [tables.Coverage("bp", 2, 1, 1, 0, 0), tables.Coverage("dfa", 4, 0, 0, 1, 3)]


def test_rules_are_compared_by_their_best_cells_at_equal_settings_paired_by_seed():
    rows = [
        # 20 units: bp's best is at lr 0.1, dfa's with lecun at lr 0.2; only seeds 1 and 2 are in both
        cell("bp", [0.50, 0.60, 0.70], tests=[0.10, 0.11, 0.12], lr=0.1, arch="20"),
        cell("bp", [0.90, 0.90, 0.90], lr=0.2, arch="20"),
        cell("dfa", [0.95, 0.95], seeds=[1, 2], lr=0.1, bw_init="ortho", arch="20"),
        cell("dfa", [0.70, 0.90], tests=[0.15, 0.18], seeds=[1, 2], lr=0.2, bw_init="lecun", arch="20"),
        # 30 units: seed 0 is not in 20 units, and counts for `wins` only
        cell("bp", [0.90, 0.40, 0.40], tests=[0.9, 0.20, 0.20], lr=0.1, arch="30"),
        cell("dfa", [0.10, 0.30, 0.40], tests=[0.1, 0.21, 0.23], lr=0.1, bw_init="ortho", arch="30"),
        # 40 units
        cell("bp", [0.10, 0.10], tests=[0.3, 0.3], seeds=[1, 2], lr=0.1, arch="40"),
        cell("dfa", [0.15, 0.16], tests=[0.32, 0.32], seeds=[1, 2], lr=0.1, bw_init="ortho", arch="40"),
        # 50 units: no partner
        cell("bp", [0.10, 0.10], lr=0.1, arch="50"),
    ]
    (found,) = comparing.compare(rows)
    assert (found.first, found.second, found.settings, found.wins) == ("bp", "dfa", 3, 2)
    assert (found.lost, found.left_out) == ((0, 0), 1)
    # objective: seed 1 has -0.10, 0.10 and -0.05, seed 2 has -0.20, 0 and -0.06: -0.05 / 3 and -0.26 / 3
    assert found.objective == comparing.Difference(pytest.approx(-0.31 / 6), None, seeds=2, settings=3)
    # test error: -0.04, -0.01 and -0.02; -0.06, -0.03 and -0.02
    assert found.test["error"] == comparing.Difference(pytest.approx(-0.03), None, seeds=2, settings=3)


def test_the_interval_is_over_seeds_however_many_settings_share_them():
    rows = [
        cell("bp", [0.1, 0.2, 0.6], lr=0.1, arch="20"),
        cell("dfa", [0.2, 0.4, 0.9], lr=0.1, arch="20"),
        cell("bp", [0.5, 0.5, 0.5], lr=0.1, arch="30"),
        cell("dfa", [0.8, 0.7, 0.5], lr=0.1, arch="30"),
    ]
    (one,) = comparing.compare(rows[:2])
    # differences -0.1, -0.2, -0.3: std 0.1
    half = 4.302652730 * 0.1 / math.sqrt(3)
    assert one.objective == comparing.Difference(pytest.approx(-0.2), pytest.approx((-0.2 - half, -0.2 + half)), 3, 1)
    (two,) = comparing.compare(rows)
    # of the other setting -0.3, -0.2, 0: means by seed -0.2, -0.2, -0.15, std 0.05 / √3
    half = 4.302652730 * 0.05 / 3
    middle = -0.55 / 3
    interval = pytest.approx((middle - half, middle + half))
    assert two.objective == comparing.Difference(pytest.approx(middle), interval, 3, 2)
    many = [replace(row, params={**row.params, "copy": copy}) for copy in range(50) for row in rows]
    (found,) = comparing.compare(many)
    assert found.objective == comparing.Difference(pytest.approx(middle), interval, 3, 100)


def test_settings_without_a_common_seed_have_a_mean_and_no_interval():
    rows = [
        cell("bp", [0.1, 0.1, 0.1], seeds=[0, 1, 2], lr=0.1, arch="20"),
        cell("dfa", [0.2, 0.3, 0.4], seeds=[0, 1, 2], lr=0.1, arch="20"),
        cell("bp", [0.1, 0.1, 0.1], seeds=[3, 4, 5], lr=0.1, arch="30"),
        cell("dfa", [0.5, 0.5, 0.5], seeds=[3, 4, 5], lr=0.1, arch="30"),
    ]
    (found,) = comparing.compare(rows)
    assert found.objective == comparing.Difference(pytest.approx(-0.3), None, seeds=0, settings=2)
    assert found.wins == 2


def test_an_execution_without_a_test_score_is_left_out_of_its_differences_only():
    rows = [
        cell("bp", [0.1, 0.2, 0.3], tests=[0.1, None, 0.3], lr=0.1, arch="20"),
        cell("dfa", [0.2, 0.4, 0.6], tests=[0.3, 0.2, 0.7], lr=0.1, arch="20"),
    ]
    (found,) = comparing.compare(rows)
    assert (found.objective.seeds, found.objective.interval is None) == (3, False)
    assert found.test["error"] == comparing.Difference(pytest.approx(-0.3), None, seeds=2, settings=1)


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_covers_where_many_settings_share_what_the_seeds_draw(seeds):
    """Twenty fixed settings; a seed moves all of them together, ten times as far as each alone."""
    drawn = random.Random(0)
    fixed = [drawn.gauss(0, 0.02) for _ in range(20)]
    truth = statistics.fmean(fixed)
    covered = over_settings = 0
    repeats = 400
    for _ in range(repeats):
        shared = [drawn.gauss(0, 0.1) for _ in range(seeds)]
        rows = []
        for number, effect in enumerate(fixed):
            differences = [effect + of_seed + drawn.gauss(0, 0.01) for of_seed in shared]
            rows += [cell("bp", differences, lr=0.1, arch=number), cell("dfa", [0.0] * seeds, lr=0.1, arch=number)]
        (found,) = comparing.compare(rows)
        low, high = found.objective.interval
        covered += low <= truth <= high
        low, high = comparing.t_interval([row.value for row in rows[::2]])
        over_settings += low <= truth <= high
    assert 0.92 < covered / repeats < 0.98
    assert over_settings / repeats < 0.3


def test_a_rule_whose_cells_all_diverged_has_lost_the_setting():
    rows = [
        cell("bp", [0.3], lr=0.1, act="tanh"),
        cell("dfa", [0.2], lr=0.1, act="tanh"),
        # lost by dfa, at every learning rate and with every feedback
        cell("bp", [0.3], lr=0.1, act="relu"),
        cell("dfa", [], state="diverged", lr=0.1, bw_init="ortho", act="relu"),
        cell("dfa", [], state="diverged", lr=0.2, bw_init="lecun", act="relu"),
        # lost by bp
        cell("bp", [], state="diverged", lr=0.1, act="elu"),
        cell("dfa", [0.4], lr=0.1, act="elu"),
        # not decided: both diverged, one may still end well, one may be tried again, one is not there
        cell("bp", [], state="diverged", lr=0.1, act="a"),
        cell("dfa", [], state="diverged", lr=0.1, act="a"),
        cell("bp", [0.3], lr=0.1, act="b"),
        cell("dfa", [], state="diverged", lr=0.1, act="b"),
        cell("dfa", [], state="pending", lr=0.2, act="b"),
        cell("bp", [0.3], lr=0.1, act="c"),
        cell("dfa", [], state="diverged", lr=0.1, act="c"),
        cell("dfa", [], state="failed", lr=0.2, act="c"),
        cell("bp", [0.3], lr=0.1, act="d"),
    ]
    (found,) = comparing.compare(rows)
    assert (found.settings, found.wins, found.lost, found.left_out) == (3, 1, (1, 1), 4)
    assert found.objective == comparing.Difference(pytest.approx(0.1), None, seeds=1, settings=1)
    (lost,) = comparing.compare(rows[2:5])
    assert (lost.settings, lost.wins, lost.lost, lost.objective, lost.test) == (1, 1, (0, 1), None, {})


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_no_interval(seeds):
    rows = [cell("bp", [0.1, 0.1][:seeds], lr=0.1, arch="20"), cell("dfa", [0.2, 0.4][-seeds:], lr=0.1, arch="20")]
    (found,) = comparing.compare(rows)
    assert found.objective == comparing.Difference(pytest.approx(-0.3 if seeds == 1 else -0.2), None, seeds, settings=1)


def test_pairs_say_over_which_seeds_and_settings_they_are(experiments):
    def lines(seeds, **others):
        rows = [
            cell(rule, [value + 0.01 * seed for seed in seeds], seeds=seeds, lr=0.1, arch=arch, **others)
            for arch in ("20", "30")
            for rule, value in (("bp", 0.1), ("dfa", 0.2))
        ]
        section = text_sections.pairs(replace(block("x", open_experiment(experiments[0])), rows=rows))
        return section, section.tables[0].lines

    section, [line] = lines([0, 1, 2])
    assert section.tables[0].head[2:5] == ["settings × seeds", "Δ loss", "95 % interval"]
    assert line == ["bp − dfa", "2 of 2", "2 × 3", "−0.1000", "−0.1000 to −0.1000", "−10.00 pp", "−10.00 to −10.00"]
    told = " ".join([*section.notes, section.tables[0].note])
    for words in (
        "its cell with the best objective, which was chosen on the same seeds that are compared here",
        "the mean over seeds of each seed's mean over the settings where both rules have a complete cell",
        "Student's t interval over these means of seeds",
        "The seeds are a random sample; fixed are the settings, which are all of the grid's own",
    ):
        assert words in told
    for seeds, few in (([0, 1], "2 seeds: too few for an interval"), ([4], "1 seed: too few for an interval")):
        _, [line] = lines(seeds)
        assert line[2:] == [f"2 × {len(seeds)}", "−0.1000", few, "−10.00 pp", few]


def test_rules_without_a_common_setting_are_not_compared():
    relu = cell("bp", [0.1], lr=0.1, activation="relu")
    assert comparing.compare([relu, cell("drtp", [0.3], lr=0.1, activation="tanh")]) == []
    assert comparing.compare([relu, cell("dfa", [0.2], seeds=[7], lr=0.1, activation="relu")]) == []
    assert comparing.compare([relu]) == []
    assert comparing.compare([]) == []
    assert comparing.compare([relu, cell("dfa", [], state="pending", lr=0.1, activation="relu")]) == []


def test_rules_are_not_chosen_by_their_test_scores():
    rows = [
        cell("bp", [0.2], tests=[0.9], lr=0.1, arch="20"),
        cell("bp", [0.3], tests=[0.0], lr=0.2, arch="20"),
        cell("dfa", [0.4], tests=[0.5], lr=0.1, arch="20"),
    ]
    (found,) = comparing.compare(rows)
    assert found.test["error"].mean == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [
        (1, 12.7062047362),
        (2, 4.3026527297),
        (3, 3.1824463053),
        (4, 2.7764451052),
        (5, 2.5705818356),
        (30, 2.0422724563),
    ],
)
def test_students_quantiles_are_those_of_the_tables(freedom, t):
    assert comparing.student(freedom, 0.95) == pytest.approx(t, rel=1e-9)


def test_students_distribution_becomes_the_normal_one():
    assert comparing.student(10_001, 0.95) == pytest.approx(1.959964, rel=2e-4)
    assert comparing.student(5, 0.99) == pytest.approx(4.0321429836, rel=1e-9)


def test_a_band_is_mean_and_sample_deviation_over_executions():
    band = tables.band([((1, 2, 3), [1.0, 2.0, 9.0]), ((1, 2), [3.0, None])])
    assert band == tables.Band([1, 2], [2.0, 2.0], [pytest.approx(math.sqrt(2)), NAN], cut=True)
    assert tables.band([(range(1, 3), [1.0, 2.0])]) == tables.Band([1, 2], [1.0, 2.0], None)
    assert tables.band([]) is None
    empty = tables.band([((1,), [None]), ((1,), [None])])
    assert math.isnan(empty.mean[0])
    assert math.isnan(empty.std[0])


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("layer.0", ("", 0, "hidden 1")),
        ("layer.2", ("", None, "output")),
        ("layer.1.saturated", ("saturated", 1, "hidden 2")),
        ("weight.2", ("weight", None, "output")),
        ("layer.3", ("layer.3", None, "network")),
        ("rank", ("rank", None, "network")),
    ],
)
def test_what_trackers_measure_is_of_a_layer_of_the_network(name, of):
    assert tables.place(name, hidden=2) == of


def test_curves_are_those_of_complete_executions():
    records = [
        {"status": "complete", "history": {"loss": [3.0, 2.0]}},
        {"status": "diverged", "history": {"loss": [3.0, None]}},
    ]
    assert [(list(x), y) for x, y in tables.curves(records, "loss")] == [([1, 2], [3.0, 2.0])]
    assert tables.curves(records, "val_loss") == []


def test_measurements_are_found_where_they_are_kept_now_and_where_they_were():
    new = {"step": [0, 5], "epoch": [0.0, 0.5], "bp_cosine/layer.0": [0.1, 0.2], "weights/weight.0": [1.0, 2.0]}
    records = [
        {"status": "complete", "history": {"loss": [1.0]}, "tracked": new},
        {"status": "complete", "history": {"loss": [1.0, 1.0], "bp_cosine/layer.0": [0.3, 0.4]}},
    ]
    found = tables.tracked(records)
    assert list(found) == ["bp_cosine", "weights"]
    series = [(list(x), y) for x, y in found["bp_cosine"]["layer.0"]]
    assert series == [([0.0, 0.5], [0.1, 0.2]), ([1, 2], [0.3, 0.4])]


def test_levels_are_best_and_median_over_all_other_parameters():
    rows = [
        cell("bp", [0.3], lr=0.1, arch="1"),
        cell("bp", [0.1], lr=0.1, arch="2"),
        cell("bp", [0.2], lr=0.1, arch="3"),
        cell("bp", [0.5], lr=0.01, arch="1"),
        cell("bp", [], state="diverged", lr=1.0, arch="1"),
        cell("bp", [], state="pending", lr=2.0, arch="1"),
    ]
    assert tables.levels(rows, "lr") == [
        tables.Level(0.01, 0.5, 0.5, 1, 0),
        tables.Level(0.1, 0.1, 0.2, 3, 0),
        tables.Level(1.0, None, None, 0, 1),
        tables.Level(2.0, None, None, 0, 0),
    ]
    assert tables.levels(rows, "none") == []


def test_effects_are_mean_places_with_ties_shared_and_diverged_cells_last():
    rows = [
        cell("dfa", [0.1], lr=0.1, act="tanh"),  # place 0 of 4
        cell("dfa", [0.2], lr=0.1, act="relu"),  # 1 and 2, shared: 1.5
        cell("dfa", [0.2], lr=0.2, act="tanh"),
        cell("dfa", [0.3], lr=0.2, act="relu"),  # 3
        cell("dfa", [], state="diverged", lr=1.0, act="relu"),  # 4
        cell("dfa", [], state="failed", lr=1.0, act="tanh"),
    ]
    lr, act = tables.effects(rows)
    assert (lr.parameter, lr.places) == ("lr", {0.1: 0.1875, 0.2: 0.5625, 1.0: 1.0})
    assert lr.size == 0.8125
    assert (act.parameter, act.places) == ("act", {"tanh": 0.1875, "relu": pytest.approx((1.5 + 3 + 4) / 4 / 3)})
    assert tables.effects(rows[:1]) == []


def test_maps_have_the_best_value_and_the_diverged_fraction_of_each_place():
    rows = [
        cell("dfa", [0.4], lr=0.1, act="tanh", arch="1"),
        cell("dfa", [0.2], lr=0.1, act="tanh", arch="2"),
        cell("dfa", [], state="diverged", lr=1.0, act="tanh", arch="1"),
        cell("dfa", [0.9], lr=1.0, act="tanh", arch="2"),
        cell("dfa", [], state="diverged", lr=1.0, act="relu", arch="1"),
        cell("dfa", [], state="pending", lr=0.1, act="relu", arch="1"),
    ]
    best = tables.best_map(rows, "act", "lr")
    assert (best.rows, best.columns) == (["tanh", "relu"], [0.1, 1.0])
    assert best.values == [[0.2, 0.9], [None, None]]
    assert best.counts == [[2, 2], [0, 1]]
    wider = tables.best_map(rows[:1], "act", "lr", among=rows)
    assert (wider.rows, wider.columns, wider.values) == (best.rows, best.columns, [[0.4, None], [None, None]])
    assert tables.divergence_map(rows, "act", "lr").values == [[0.0, 0.5], [None, 1.0]]


def test_costs_are_seconds_per_epoch_without_what_trackers_took():
    tracking = cell("bp", [0.1], seconds=3.0, epochs=2, lr=0.1)
    tracking.result["executions"][0]["tracking_seconds"] = 1.0
    rows = [cell("bp", [0.1, 0.1], seconds=2.0, epochs=4, lr=0.2), tracking, cell("dfa", [], state="failed", lr=0.1)]
    assert tables.costs(rows) == [tables.Cost("bp", 0.5, 0.5, 1.0, 7.0, 1 / 7)]


def test_values_are_in_order_and_parameters_vary_where_cells_differ():
    rows = [cell("bp", [0.1], lr=1.0, act="tanh", bn=False), cell("dfa", [0.1], lr=0.1, act="relu", bn=False)]
    assert tables.values_of(rows, "lr") == [0.1, 1.0]
    assert tables.values_of(rows, "act") == ["tanh", "relu"]
    assert tables.varying(rows) == ["lr", "act"]


# Looks


def test_each_rule_keeps_its_colour_whatever_stands_beside_it():
    few, many = Palette(["dfa", "pepita"]), Palette(["pepita", "drtp", "bp", "dfa"])
    assert few.points("dfa") == many.points("dfa")
    assert few.points("pepita") == many.points("pepita")
    assert few.colour("bp") == "#000000"
    assert len({str(many.points(rule)) for rule in ("bp", "dfa", "drtp", "ll-cce", "ll-mse", "pepita")}) == 6
    assert len({Palette([f"rule{i}" for i in range(20)]).colour(f"rule{i}") for i in range(20)}) == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1234.5, "1234"), (123456.0, "1.2e5"), (1e-6, "1e-6")],
)
def test_numbers_in_figures_are_short(value, text):
    assert short(value) == text


def test_scales_are_logarithmic_for_positive_values_that_are_far_apart():
    assert drawing.wide([0.01, 1.0, math.nan])
    assert not drawing.wide([0.5, 1.0])
    assert not drawing.wide([0.0, 1.0])
    assert not drawing.wide([])


def test_a_map_tells_diverged_places_from_those_never_run_and_clips_its_colours():
    rows = [
        cell("bp", [0.1], lr=0.1, act="tanh"),
        cell("bp", [1e6], lr=1.0, act="tanh"),
        cell("bp", [], state="diverged", lr=0.1, act="relu"),
        cell("bp", [], state="pending", lr=1.0, act="relu"),
    ]
    figure = figures.best_maps({"bp": tables.best_map(rows, "act", "lr")}, "training loss (nats)")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.100", "1e6", "×", "–"]
    (mesh,) = axes.collections
    assert (mesh.norm.vmin, mesh.norm.vmax, type(mesh.norm).__name__) == (0.1, 10.0, "LogNorm")


def test_each_statistic_of_a_tracker_has_panels_and_each_layer_its_line():
    band = tables.Band([0, 1], [0.5, 0.6], None)
    looks = {"hidden 1": drawing.layer(0, 2), "hidden 2": drawing.layer(1, 2), "output": drawing.layer(None, 2)}
    of_bp = {"hidden 1": band, "output": band}
    shown = {"mean": {"bp": of_bp, "dfa": looks.fromkeys(looks, band)}, "dead": {"bp": of_bp}}
    figure = figures.tracked(shown, "activations", looks)
    assert [axes.get_ylabel() for axes in figure.axes] == ["activations\nmean", "", "activations\ndead", ""]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(looks)
    assert [len(axes.lines) for axes in figure.axes] == [2, 3, 2, 0]
    assert figure.axes[0].lines[1].get_color() == figure.axes[1].lines[2].get_color() == drawing.INK


def test_words_in_figures_are_those_of_the_tables():
    assert [word(value) for value in (True, 1e-05, "100-100")] == ["yes", "1e-5", "100-100"]


# The page

GRID = "--arch 8,8-8 --activation tanh --bw-init ortho --no-batch-norm --examples-frac 0.2 --epochs 3 --workers 1 -q"


def bpf_(*command):
    with pytest.raises(SystemExit) as left:
        cli.main([part for words in command for part in words.split()])
    assert left.value.code in (0, None)


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """A classification with trackers and a rule that is left out, a reconstruction, and one that diverges."""
    place = tmp_path_factory.mktemp("experiments")
    names = [str(place / name) for name in ("rules", "images", "lost")]
    bpf_(
        f"tune {names[0]} --dataset digits --algorithm bp,dfa,drtp --lr 0.001,0.01 --executions-per-trial 2 {GRID} "
        "--tracker bp_cosine --tracker weight_alignment"
    )
    bpf_(
        f"tune {names[1]} --dataset digits --problem-type reconstruction --algorithm bp,ll-mse --lr 0.001,0.01 "
        f"--executions-per-trial 1 {GRID}"
    )
    wild = GRID.replace("tanh", "lrelu").replace("--epochs 3", "--epochs 20")
    bpf_(
        f"tune {names[2]} --dataset digits --problem-type reconstruction --scaler identity --optimizer sgd "
        f"--algorithm bp --lr 1e-6,0.1 --executions-per-trial 1 {wild}"
    )
    return [Path(name) for name in names]


class Page(HTMLParser):
    """What a page holds: its ids, what it refers to, and its text by section."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.references, self.svgs, self.text = [], [], 0, {}
        self._section, self._skip = "", 0
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.ids += [known["id"]] if "id" in known else []
        self.references += [value for name, value in attributes if name in ("href", "src", "xlink:href", "srcset")]
        self.svgs += tag == "svg"
        if tag == "section":
            self._section = known["id"]
        self._skip += tag in ("svg", "style")

    def handle_endtag(self, tag):
        self._skip -= tag in ("svg", "style")

    def handle_data(self, data):
        if not self._skip:
            self.text[self._section] = " ".join([self.text.get(self._section, ""), *data.split()]).strip()


@pytest.fixture(scope="module")
def page(experiments, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "all.html"
    written = report([open_experiment(directory) for directory in experiments], output, "png")
    return Page(output), written, output


def test_a_page_has_every_section_of_every_experiment(page):
    found, written, output = page
    assert written[0] == output
    assert list(found.text)[1:] == [
        "all-across",
        *(f"e1-{name}" for name in SECTIONS),
        *(f"e2-{name}" for name in [*SECTIONS[:-2], "images", *SECTIONS[-2:]]),
        *(f"e3-{name}" for name in [*SECTIONS[:-2], "images", *SECTIONS[-2:]] if name != "pairs"),
    ]
    assert {"#all", "#e1", "#e2", "#e3"} <= set(found.references)
    assert len(found.ids) == len(set(found.ids))


def test_a_page_refers_to_nothing_outside_itself(page):
    found, _, _ = page
    inside = [value for value in found.references if value.startswith(("#", "data:"))]
    assert found.references == inside
    assert {value[1:] for value in inside if value.startswith("#")} <= set(found.ids)
    assert not re.search(r"url\((?!#)|@import|<script", found.source)


def test_figures_are_files_and_part_of_the_page(page):
    found, written, output = page
    files = written[1:]
    assert found.svgs == len(files) > 15
    assert all(path.parent == output.parent / "all-figures" for path in files)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert {"rules-curves-loss.png", "rules-tracker-bp_cosine.png", "images-reconstructions.png"} <= {
        path.name for path in files
    }


def test_figures_take_the_pages_colour_and_have_text(page):
    found, _, _ = page
    assert "currentColor" in found.source
    assert "#000000" not in found.source
    assert "stroke: var(--0072b2, #0072b2)" in found.source
    assert "--0072b2: #4fa8e0" in found.source
    assert re.search(r"<text[^>]*>training loss \(nats\)</text>", found.source)


def test_sections_without_data_say_why(page):
    text = page[0].text
    none = "No tracker was given: --tracker bp_cosine, --tracker weight_alignment."
    assert text["e2-alignment"] == f"Alignment and other measurements over time {none}"
    assert text["e1-divergence"] == "Divergence No cell has diverged."


def test_the_page_says_what_was_held_out_and_which_seeds_there_were(page):
    text = page[0].text["e1-run"]
    assert "data set digits, 20 % of the training images held out 10 % of these for validation" in text
    assert "seeds seeds 0 to 1 of the executions; data seed 0 of subset, validation split and skew" in text
    assert "seeds seed 0 of the executions;" in page[0].text["e2-run"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0019, "1.90 ms"), (0.1, "100 ms"), (0.9996, "1.00 s"), (2.134, "2.13 s"), (61.23, "61.2 s"), (300, "5 min")],
)
def test_times_have_three_digits(seconds, text):
    assert text_sections._time(seconds) == text


def test_numbers_are_set_to_the_right_and_words_to_the_left(page):
    head = re.findall(r"<th(| class=\"number\")>([^<]*)</th>", page[0].source.partition('id="e1-ranking"')[2])[:7]
    assert [name for place, name in head if not place] == ["rule", "parameters"]


def test_the_page_says_what_diverged(page):
    assert (
        "2 of 4 cells have diverged: a loss or a weight was not finite, or a loss exceeded 1e6."
        in page[0].text["e3-divergence"]
    )


def test_training_and_validation_have_the_same_scale_and_percent_is_never_logarithmic(experiments):
    scores = {"loss": [1.0, 0.01], "val_loss": [0.5, 0.4], "error": [0.9, 0.001], "val_error": [0.2, 0.1]}
    known = replace(
        block("x", open_experiment(experiments[0])), histories={"bp": [{"status": "complete", "history": scores}]}
    )
    drawn = {one.name: one.figure.axes[0].get_yscale() for one in figure_sections.learning_curves(known).figures}
    assert drawn == {
        "x-curves-loss": "log",
        "x-curves-val_loss": "log",
        "x-curves-error": "linear",
        "x-curves-val_error": "linear",
    }


def test_the_ranking_is_that_of_the_objective(page, experiments, capsys):
    capsys.readouterr()
    bpf_(f"best {experiments[0]} --json")
    best = json.loads(capsys.readouterr().out)[0]
    first = f"1 {best['algorithm']} {best['objective']['mean']:.4f} ± {best['objective']['std']:.4f}"
    first += f" {100 * best['test']['error']:.2f} ± {100 * best['test']['error_std']:.2f} %"
    assert first in page[0].text["e1-ranking"]


def test_the_command_and_the_settings_repeat_the_experiment(page, tmp_path, experiments, capsys):
    text = page[0].source
    settings = re.findall(r"as a file for --spec</summary><pre>(.*?)</pre>", text, re.DOTALL)[0]
    file = tmp_path / "again.yaml"
    file.write_text(settings.replace("&#39;", "'"))
    assert yaml.safe_load(file.read_text())["algorithm"] == ["bp", "dfa", "drtp"]
    capsys.readouterr()
    bpf_(f"tune {experiments[0]} --spec {file} --dry-run")  # refuses other settings
    assert "12 cells of 2 executions" in capsys.readouterr().out


def test_what_is_missing_is_said_and_the_rest_is_shown(experiments, tmp_path):
    """Without the models and the data set there are no reconstructions."""
    shutil.copytree(experiments[1], tmp_path / "images")
    here = open_experiment(tmp_path / "images")
    (model,) = (here.files / "models" / "ll-mse").iterdir()
    model.unlink()
    report([here], tmp_path / "one.html")
    assert f"ll-mse: There is no model {model}" in Page(tmp_path / "one.html").text["e1-images"]
    (model,) = (here.files / "models" / "bp").iterdir()
    model.write_bytes(b"damaged")
    report([here], tmp_path / "one.html")
    text = Page(tmp_path / "one.html").text["e1-images"]
    assert text.startswith(f"Reconstructions No network of a best cell can be read. bp: {model} ")
    gone = here.grid.model_copy(update={"dataset": f"npz:{tmp_path}/gone.npz"})
    report([replace(here, grid=gone)], tmp_path / "one.html")
    assert "The data set cannot be read here: " in Page(tmp_path / "one.html").text["e1-images"]


def test_reconstructions_have_the_test_loss_that_training_reported(experiments, monkeypatch):
    from bpf.report import images

    here = open_experiment(experiments[1])
    monkeypatch.setattr(images, "SHOWN", 360)  # all of them
    best = [one.row for one in summary.best(here) if one.row.rule == "ll-mse"][:1]
    found = images.reconstruct(here, best)
    pairs = zip(found.originals, found.by_rule["ll-mse"], strict=True)
    squares = [((2 * (a - b)) ** 2).mean() for a, b in pairs]  # inputs are in -1..1, images in 0..1
    assert len(squares) == 360
    assert sum(squares) / 360 == pytest.approx(best[0].result["executions"][0]["test"]["loss"], rel=1e-4)


def test_an_experiment_without_a_complete_cell_has_a_report(tmp_path):
    bpf_(f"tune {tmp_path}/ex --dataset digits --algorithm bp,dfa --lr 0.1,0.2 --plan-only {GRID}".replace("-q", ""))
    report([open_experiment(tmp_path / "ex")], tmp_path / "page.html", "svg")
    found = Page(tmp_path / "page.html")
    assert found.svgs == 0
    assert list(found.text)[1:] == [f"e1-{name}" for name in SECTIONS]
    assert "8 of 8 cells are not finished yet: everything below is provisional." in found.text["e1-run"]
    assert found.text["e1-ranking"] == "Ranking No cell is complete yet, so there is nothing to rank."
    assert found.text["e1-coverage"].endswith("bp 4 0 0 0 4 dfa 4 0 0 0 4 Pending: not finished, or at work now.")


def test_a_single_run_has_a_report(tmp_path):
    bpf_(f"train {tmp_path}/one --dataset digits --algorithm dfa --arch 8 --epochs 2 --examples-frac 0.1 -q")
    report([open_experiment(tmp_path / "one")], tmp_path / "page.html", "pdf")
    found = Page(tmp_path / "page.html")
    assert "1 cell, 1 execution each, 2 epochs" in found.text["e1-run"]
    assert "One execution: no spread." in found.text["e1-ranking"]
    kept = ["run", "ranking", "curves", "alignment", "divergence", "coverage", "costs", "provenance"]
    assert list(found.text)[1:] == [f"e1-{name}" for name in kept]
    assert (tmp_path / "page-figures" / "curves-loss.pdf").read_bytes().startswith(b"%PDF")


def test_only_the_best_cells_histories_are_read(experiments, tmp_path, monkeypatch):
    from bpf.study.view import StudyView

    read = []
    history = StudyView.history
    monkeypatch.setattr(StudyView, "history", lambda study, key: read.append(key) or history(study, key))
    report([open_experiment(experiments[0])], tmp_path / "page.html")
    assert len(read) == 3


def test_names_are_text_and_nothing_else(tmp_path):
    odd = tmp_path / "<script>alert(1)<i>&$x_1$"
    with pytest.raises(SystemExit):
        cli.main(["tune", str(odd), *f"--dataset digits --algorithm bp --lr 0.1,0.2 {GRID}".split()])
    written = report([open_experiment(odd)] * 2, tmp_path / "page.html", "png")
    found = Page(tmp_path / "page.html")
    assert "<script" not in found.source
    assert "<i>" not in found.source
    assert {"e1-lr.png", "e2-lr.png"} < {path.name for path in written}
    escaped = "&lt;script&gt;alert(1)&lt;i&gt;&amp;$x_1$"
    assert f"<title>{escaped}, {escaped} · bpf report</title>" in found.source


def test_any_two_parameters_make_a_map(experiments, tmp_path, capsys):
    output = tmp_path / "page.html"
    bpf_(f"report {experiments[0]} --output {output} --figures svg --map lr,activation --map bw_init,lr")
    found = Page(output)
    names = {path.name for path in (tmp_path / "page-figures").glob("map-*")}
    assert names == {"map-lr-activation.svg", "map-bw_init-lr.svg"}
    drawn = [re.findall(r">(bp|dfa|drtp)</text>", (tmp_path / "page-figures" / name).read_text()) for name in names]
    assert sorted(drawn) == [["bp", "dfa", "drtp"], ["dfa", "drtp"]]
    text = found.text["e1-maps"]
    assert "bp has no complete cell with bw_init and lr." in text
    assert "Best training loss (nats) over all other parameters, by bw_init and lr; the colours are on one" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lr,act", "'act' is no parameter of the grid in {directory}. Did you mean 'activation'?"),
        ("lr,skew_type", "'skew_type' is no parameter of the grid in {directory}. Did you mean 'skew'?"),
        ("lr", "--map lr: give two different parameters, such as arch,lr."),
        ("lr,lr", "--map lr,lr: give two different parameters, such as arch,lr."),
        ("lr,arch,lr", "--map lr,arch,lr: give two different parameters, such as arch,lr."),
    ],
)
def test_maps_that_cannot_be_are_refused(experiments, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as left:
        cli.main(["report", str(experiments[0]), "--output", str(tmp_path / "page.html"), "--map", words])
    assert left.value.code == 2
    assert capsys.readouterr().err == f"Error: {message.format(directory=experiments[0])}\n"
    assert list(tmp_path.iterdir()) == []


def test_memory_is_that_of_the_tensors(experiments):
    here = open_experiment(experiments[0])
    best = {one.row.rule: one.row for one in reversed(summary.best(here))}
    found = {rule: memory.of_cell(here, row) for rule, row in best.items()}
    for rule, one in found.items():
        sizes = [64, *map(int, best[rule].params["arch"].split("-")), 10]
        weights, biases = sum(a * b for a, b in itertools.pairwise(sizes)), sum(sizes[1:])
        assert one.parameters == weights + biases
        feedback = sum(sizes[1:-1]) * 10 if rule != "bp" else 0
        steps = 2 * (len(sizes) - 1)  # Adam counts them for each parameter
        assert one.kept == 4 * (4 * one.parameters + feedback + steps)
        activations = 4 * best[rule].spec["batch_size"] * sum(sizes[1:])
        assert activations <= one.step < 10 * activations


def test_a_meter_counts_what_is_alive_at_the_same_time():
    with footprint._Meter() as meter:
        first = torch.zeros(1000)
        second = first + 1
        part = second[:10]
        del second  # its memory is still that of `part`
        third = torch.ones(1000)
        third.add_(first)
        del first, part
        torch.zeros(500)
    assert meter.peak == 3 * 4000


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(UsageError) as refused:
        report([], tmp_path / "page.html", "jpg")
    assert str(refused.value) == "Figures are not written as 'jpg'. Did you mean 'png'?"


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError) as refused:
        report([], tmp_path / "page.html")
    assert str(refused.value) == "A report needs matplotlib: pip install 'bpf[report]'"


# In a browser


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_a_browser_shows_the_page_without_a_request_or_an_error(page, tmp_path, width, dark):
    shown = check_page(page[2], "report", width, dark, tmp_path / "profile")
    assert [name for name in SECTIONS if f'id="e1-{name}"' not in shown] == []
