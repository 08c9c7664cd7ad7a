"""Learning curves, steps to target and stability, over the seeds of the confirmation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from momentum_tuner.comparison.outcome import Comparison
from momentum_tuner.metrics import MISS_FACTOR, EpochRecord, steps_to_target
from momentum_tuner.report.figures.figure import Figure, Trace, axis, colour_of, fitting_axis, log_axis, shown
from momentum_tuner.spec import StudySpec

Curves = Mapping[str, Mapping[int, Sequence[EpochRecord]]]
"""Epoch records by contestant and seed."""

MOST_POINTS = 250
"""Of a curve; of a longer one evenly spaced epochs are drawn."""


def learning_curves(spec: StudySpec, curves: Curves, metric: str, maximize: bool, target: float | None) -> Figure:
    """Median and quartiles over seeds of a measure after each epoch."""
    found = bands(spec, curves, lambda record: record.value(metric), -math.inf if maximize else math.inf)
    values = [*(v for trace in found for v in trace["y"]), *([] if target is None else [target])]
    name = metric.replace("_", " ")
    layout: dict[str, Any] = {"xaxis": axis("optimizer step"), "yaxis": fitting_axis(name, values)}
    if target is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": target,
                "y1": target,
                "line": {"color": "--ink", "width": 1, "dash": "dot"},
                "label": {"text": f"target {shown(target)}", "textposition": "end", "font": {"color": "--ink"}},
            }
        ]
    caption = f"{_over(curves)} A seed that diverged counts as the worst from there on: where half have, the line ends."
    return Figure(f"learning-curves-{metric.replace('_', '-')}", f"Learning curves: {name}", caption, found, layout)


def stability_panel(spec: StudySpec, curves: Curves) -> list[Figure]:
    """Oscillation, spikes and the ratio of gradients over layers, after each epoch."""
    panels: list[tuple[str, str, str, Callable[[EpochRecord], float | None]]] = [
        (
            "oscillation",
            "share of steps that turn back",
            "The share of an epoch's steps whose update points against the one before: 0.5 is a random walk, near 1 "
            "the iterate bounces from wall to wall.",
            lambda r: r.oscillation,
        ),
        (
            "spikes",
            "spikes in an epoch",
            "Steps whose loss stands out of its trailing mean by more than 6 mean absolute deviations.",
            lambda r: r.spikes,
        ),
        (
            "layer_grad_ratio",
            "largest / smallest layer gradient",
            "Largest over smallest RMS gradient of a tensor: large values show vanishing or exploding gradients.",
            lambda r: r.layer_grad_ratio,
        ),
    ]
    found = []
    for measure, label, caption, value in panels:
        traces = bands(spec, curves, value, math.nan, trained_only=True)
        values = [v for t in traces for v in t["y"]]
        layout = {"xaxis": axis("optimizer step"), "yaxis": {**fitting_axis(label, values), "rangemode": "nonnegative"}}
        title = measure.replace("_", " ").replace("layer grad ratio", "gradient ratio").capitalize()
        if any(trace["y"] for trace in traces):
            found.append(Figure(f"stability-{measure.replace('_', '-')}", title, caption, traces, layout, 340))
    return found


def bands(
    spec: StudySpec,
    curves: Curves,
    value: Callable[[EpochRecord], float | None],
    worst: float,
    trained_only: bool = False,
) -> list[Trace]:
    """For each contestant a line through the medians over seeds, in a band from the first to the third quartile.

    Args:
        spec: the study.
        curves: what is drawn.
        value: of a record.
        worst: what a seed counts as after it diverged; NaN leaves it out.
        trained_only: whether epoch 0, the untrained model, is left out.
    """
    traces: list[Trace] = []
    for optimizer, by_seed in curves.items():
        steps, table = _table([r[1:] if trained_only else r for r in by_seed.values()], value, worst)
        if not steps:
            continue
        low, middle, high = (_quantile(table, q) for q in (0.25, 0.5, 0.75))
        colour = colour_of(spec, optimizer)
        group = {"legendgroup": optimizer, "x": steps, "mode": "lines"}
        if len(by_seed) > 1:
            edge = {"width": 0, "color": colour}
            hidden = {"line": edge, "showlegend": False, "hoverinfo": "skip"}
            traces.append({**group, **hidden, "type": "scatter", "y": high, "name": optimizer})
            fill = {"fill": "tonexty", "fillcolor": f"{colour}/18"}
            traces.append({**group, **hidden, **fill, "type": "scatter", "y": low, "name": optimizer})
        line = {"color": colour, "width": 2}
        traces.append({**group, "type": "scatter", "y": middle, "line": line, "name": optimizer})
    return traces


def _table(
    curves: Sequence[Sequence[EpochRecord]], value: Callable[[EpochRecord], float | None], worst: float
) -> tuple[list[int], np.ndarray]:
    """Steps `[epochs]` and values `[seeds, epochs]`, NaN where a seed has none."""
    longest: Sequence[EpochRecord] = max(curves, key=_length, default=())
    epochs = [r for r in longest if r.diverged_at_step is None]
    kept = [epochs[i] for i in _spread(len(epochs))]
    place = {r.epoch: n for n, r in enumerate(kept)}
    table = np.full((len(curves), len(kept)), np.nan)
    for row, records in zip(table, curves, strict=True):
        if records and records[-1].diverged_at_step is not None:
            row[[n for epoch, n in place.items() if epoch >= records[-1].epoch]] = worst
        for r in records:
            found = value(r) if r.diverged_at_step is None else None
            if found is not None and r.epoch in place:
                row[place[r.epoch]] = found
    return [r.step for r in kept], table


def _length(records: Sequence[EpochRecord]) -> int:
    return sum(r.diverged_at_step is None for r in records)


def _spread(count: int) -> list[int]:
    """Up to `MOST_POINTS` numbers below `count`, evenly spaced, ends included."""
    if count <= MOST_POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})


def _quantile(table: np.ndarray, q: float) -> list[float | None]:
    """A quantile over the seeds that have a value, of each epoch; None where it is not finite."""
    found: list[float | None] = []
    for column in table.T:
        known = np.sort(column[~np.isnan(column)])
        if not known.size:
            found.append(None)
            continue
        place = q * (known.size - 1)
        low, high = known[math.floor(place)], known[math.ceil(place)]
        value = low if low == high else low + (place - math.floor(place)) * (high - low)
        found.append(float(value) if math.isfinite(value) else None)
    return found


def _over(curves: Curves) -> str:
    seeds = max((len(by_seed) for by_seed in curves.values()), default=0)
    if seeds < 2:
        return "One seed each, so without a band."
    return f"The line is the median over {seeds} seeds, the band reaches from their first to their third quartile."


def target_figure(spec: StudySpec, curves: Curves, comparison: Comparison) -> Figure | None:
    """Steps (or epochs) to target of each seed; a miss is shown at what it counts as."""
    target, unit = comparison.target, comparison.unit
    traces: list[Trace] = []
    if target is None:
        return None
    for contestant in reversed(comparison.optimizers):
        optimizer = contestant.optimizer
        by_seed = curves.get(optimizer, {})
        if not by_seed:
            continue
        budget = comparison.budget[unit]
        metric, maximize = comparison.target_metric, comparison.maximize
        reached = {s: steps_to_target(r, target, metric, maximize) for s, r in by_seed.items()}
        colour = colour_of(spec, optimizer)
        scale = budget / contestant.budget_steps  # 1 in steps, which then are equally many for all
        got = {seed: scale * steps for seed, steps in reached.items() if steps is not None}
        missed = [seed for seed, steps in reached.items() if steps is None]
        counted = [*got.values(), *(MISS_FACTOR * budget for _ in missed)]
        common = {"orientation": "h", "name": optimizer, "showlegend": False}
        traces.append(
            {
                **common,
                "type": "box",
                "x": counted,
                "y": [optimizer] * len(counted),
                "boxpoints": False,
                "line": {"color": colour, "width": 1.5},
                "fillcolor": f"{colour}/18",
                "hoverinfo": "x",
            }
        )
        for seeds, x, symbol, word in (
            (list(got), list(got.values()), "circle", "reached"),
            (missed, [MISS_FACTOR * budget] * len(missed), "x", "missed"),
        ):
            if seeds:
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "markers",
                        "name": f"{optimizer}, {word}",
                        "showlegend": False,
                        "x": x,
                        "y": [optimizer] * len(x),
                        "text": [f"seed {seed}" for seed in seeds],
                        "marker": {"color": colour, "symbol": symbol, "size": 8, "opacity": 0.85},
                        "hovertemplate": "%{text}: %{x:.4g} " + f"{unit}<extra>{optimizer}, {word}</extra>",
                    }
                )
    if not traces:
        return None
    reached_at = [x for t in traces for x in t["x"]]
    layout = {
        "xaxis": fitting_axis(f"{'optimizer steps' if unit == 'steps' else unit} to target", reached_at, 8.0),
        "yaxis": axis("", type="category"),
    }
    rows = len({optimizer for t in traces for optimizer in t["y"]})
    reaches = f"{comparison.target_metric.replace('_', ' ')} reaches {shown(target)}"
    caption = (
        f"{unit.capitalize()} until {reaches}, one point for each seed; "
        f"the box holds the middle half. A cross is a seed that never got there: it counts as {MISS_FACTOR:g} budgets."
    )
    return Figure("steps-to-target", f"{unit.capitalize()} to target", caption, traces, layout, 150 + 62 * rows)


def pairs_figure(comparison: Comparison) -> Figure | None:
    """Speed ratios of all pairs with their intervals."""
    pairs = [p for p in comparison.pairs if p.speed_ratio > 0.0]
    if not pairs:
        return None
    labels = [f"{p.a} / {p.b}" for p in pairs]
    shows = [p.high < 1.0 for p in pairs]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [p.speed_ratio for p in pairs],
        "y": labels,
        "text": [f"{p.speed_ratio:.3g} ({p.low:.3g} to {p.high:.3g}), p = {p.p:.2g}" for p in pairs],
        "hovertemplate": "%{y}: %{text}<extra></extra>",
        "showlegend": False,
        "marker": {"size": 10, "color": ["--good" if s else "--pruned" for s in shows]},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [p.high - p.speed_ratio for p in pairs],
            "arrayminus": [p.speed_ratio - p.low for p in pairs],
            "color": "--soft",
            "thickness": 2,
            "width": 6,
        },
    }
    line = {"type": "line", "yref": "paper", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "line": {"color": "--ink", "width": 1}}
    ends = [1.0, *(end for p in pairs for end in (p.low, p.high))]
    layout = {
        "xaxis": log_axis(f"ratio of {comparison.unit} to target, with 95% interval", ends),
        "yaxis": axis("", type="category", autorange="reversed"),
        "shapes": [line],
    }
    caption = (
        f"Left of 1 the first needs fewer {comparison.unit} than the second. Only where the whole interval is left of "
        "1 (green) is a difference shown."
    )
    return Figure("pairs", "Pairs", caption, [trace], layout, 140 + 44 * len(pairs))
