"""How the search went: the best so far, which hyperparameters matter, how far trials were let go on."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from momentum_tuner.report.figures.figure import Figure, Trace, axis, colour_of, fitting_axis, shown
from momentum_tuner.report.figures.landscape import objective_name
from momentum_tuner.report.importance import Importance
from momentum_tuner.report.trials import TrialRow
from momentum_tuner.spec import StudySpec


def history(spec: StudySpec, trials: Sequence[TrialRow]) -> Figure | None:
    """The best objective so far by number of trials, for each contestant."""
    traces: list[Trace] = []
    values: list[float] = []
    better = functools.partial(_better, pick=max if spec.objective.maximize else min)
    for optimizer in spec.contestants:
        done = _searched(trials, optimizer)
        complete = [t for t in done if t.outcome == "complete" and t.objective is not None]
        if not complete:
            continue
        known = {t.number: t.objective for t in complete if t.objective is not None and t.number is not None}
        values += known.values()
        numbers = [t.number for t in done if t.number is not None]
        best = list(itertools.accumulate((known.get(n) for n in numbers), better))
        colour = colour_of(spec, optimizer)
        group = {"legendgroup": optimizer, "name": optimizer, "type": "scatter"}
        x = [n + 1 for n in numbers]
        line = {"shape": "hv", "color": colour, "width": 2}
        traces.append({**group, "mode": "lines", "x": x, "y": best, "line": line})
        traces.append(
            {
                **group,
                "mode": "markers",
                "x": [n + 1 for n in known],
                "y": list(known.values()),
                "showlegend": False,
                "marker": {"color": colour, "size": 5, "opacity": 0.55},
                "hovertemplate": "trial %{customdata}: %{y:.4g}<extra>" + optimizer + "</extra>",
                "customdata": list(known),
            }
        )
    if not traces:
        return None
    layout = {"xaxis": axis("trials"), "yaxis": fitting_axis(objective_name(spec), values)}
    caption = "The line is the best complete trial so far; points are complete trials. Pruned ones have no value here."
    return Figure("search-history", "Best so far", caption, traces, layout)


def _better(a: float | None, b: float | None, pick: Any) -> float | None:
    known = [v for v in (a, b) if v is not None]
    return pick(known) if known else None


def _searched(trials: Sequence[TrialRow], optimizer: str) -> list[TrialRow]:
    return [t for t in trials if t.kind != "confirm" and t.optimizer == optimizer and t.finished_at is not None]


def two_aims(spec: StudySpec, trials: Sequence[TrialRow], front: Mapping[str, set[int]]) -> Figure | None:
    """The two aims of complete trials against each other, with those that none is better than in both.

    Args:
        spec: the study.
        trials: of the study.
        front: for each contestant the numbers of those trials.
    """
    if spec.objective.second is None:
        return None
    traces: list[Trace] = []
    for optimizer in spec.contestants:
        done = [t for t in _searched(trials, optimizer) if t.outcome == "complete" and t.second_objective is not None]
        best = sorted((t for t in done if t.number in front.get(optimizer, ())), key=lambda t: t.objective or 0.0)
        for some, mode, size, opacity in ((done, "markers", 6, 0.45), (best, "lines+markers", 9, 1.0)):
            if some:
                traces.append(
                    {
                        "type": "scatter",
                        "mode": mode,
                        "name": optimizer,
                        "legendgroup": optimizer,
                        "showlegend": some is best,
                        "x": [t.objective for t in some],
                        "y": [t.second_objective for t in some],
                        "text": [f"trial {t.number}" for t in some],
                        "marker": {"color": colour_of(spec, optimizer), "size": size, "opacity": opacity},
                        "line": {"color": colour_of(spec, optimizer), "width": 1.5},
                    }
                )
    if not traces:
        return None
    first, second = (aim.metric.replace("_", " ") for aim in spec.objective.aims)
    layout = {
        "xaxis": fitting_axis(first, (x for t in traces for x in t["x"])),
        "yaxis": fitting_axis(second, (y for t in traces for y in t["y"])),
    }
    caption = "On the lines are the trials than which no other of the same optimizer is better in both aims."
    return Figure("two-aims", "The two aims", caption, traces, layout)


def importance_figure(spec: StudySpec, found: Sequence[Importance]) -> Figure | None:
    """Bars of each hyperparameter's importance, with what resampled trials make of it."""
    traces: list[Trace] = []
    names = list(dict.fromkeys(name for one in found for name in one.shares))
    for one in found:
        if one.shares:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": f"{one.optimizer} ({one.trials} trials)",
                    "y": [_hyperparameter(name) for name in one.shares],
                    "x": list(one.shares.values()),
                    "marker": {"color": colour_of(spec, one.optimizer)},
                    "error_x": {
                        "type": "data",
                        "symmetric": False,
                        "array": [one.high[name] - share for name, share in one.shares.items()],
                        "arrayminus": [share - one.low[name] for name, share in one.shares.items()],
                        "color": "--soft",
                        "thickness": 1.5,
                        "width": 4,
                    },
                    "hovertemplate": "%{y}: %{x:.2f}<extra>" + one.optimizer + "</extra>",
                }
            )
    if not traces:
        return None
    layout = {
        "xaxis": axis("share of importance", range=[0, 1.02]),
        "yaxis": axis("", type="category", autorange="reversed"),
        "barmode": "group",
    }
    caption = (
        "How much a hyperparameter decides whether a trial is among the best tenth (PED-ANOVA, Watanabe et al. 2023, "
        "as in Optuna), over complete and diverged trials. The whiskers hold 80% of what trials drawn anew would give: "
        "with few trials they are wide, and then the bars say little."
    )
    height = 130 + 34 * len(names) * max(1, len(traces))
    return Figure("importance", "What matters", caption, traces, layout, min(height, 620))


def _hyperparameter(name: str) -> str:
    return name.replace("one_minus_", "").replace("_", " ")


def survival(spec: StudySpec, trials: Sequence[TrialRow]) -> Figure | None:
    """How many search trials trained at least so many epochs."""
    traces: list[Trace] = []
    for optimizer in spec.contestants:
        reached = [t.epochs for t in _searched(trials, optimizer)]
        if reached:
            epochs = sorted({0, *(e for e in reached), spec.budget.epochs})
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": optimizer,
                    "x": epochs,
                    "y": [sum(r >= e for r in reached) for e in epochs],
                    "line": {"shape": "vh", "color": colour_of(spec, optimizer), "width": 2},
                    "hovertemplate": "%{y} trials trained %{x} epochs or more<extra>" + optimizer + "</extra>",
                }
            )
    if not traces:
        return None
    layout: dict[str, Any] = {
        "xaxis": axis("epochs"),
        "yaxis": axis("trials that trained so far", rangemode="tozero"),
    }
    rungs = spec.rungs()
    if rungs:
        layout["shapes"] = [
            {
                "type": "line",
                "yref": "paper",
                "x0": rung,
                "x1": rung,
                "y0": 0,
                "y1": 1,
                "line": {"color": "--soft", "width": 1, "dash": "dot"},
            }
            for rung in rungs[:40]
        ]
    caption = "Dotted lines are the epochs at which trials report and may be pruned." if rungs else "Nothing is pruned."
    return Figure("pruning", "How far trials went", caption, traces, layout)


def spent(spec: StudySpec, trials: Sequence[TrialRow]) -> list[tuple[str, str, str, str, str, str, str]]:
    """For each contestant how its search trials ended, and what part of its budget of epochs they took."""
    rows = []
    for optimizer in spec.contestants:
        done = _searched(trials, optimizer)
        counts = [sum(t.outcome == outcome for t in done) for outcome in ("complete", "pruned", "diverged", "failed")]
        whole = spec.budget.trials * spec.budget.epochs
        epochs = sum(t.epochs for t in done)
        complete, pruned, diverged, failed = map(str, counts)
        share = f"{shown(100.0 * epochs / whole, 3)}%"
        rows.append((optimizer, str(len(done)), complete, pruned, diverged, failed, f"{epochs} of {whole} ({share})"))
    return rows
