"""Where the search looked, what came of it, and where training diverges: one map for each contestant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from momentum_tuner.comparison.landscape import MeasuredEdge, Point, StabilityMap
from momentum_tuner.report.figures.figure import (
    OUTCOME_COLOURS,
    Figure,
    Trace,
    colour_of,
    fitting_axis,
    log_axis,
    shown,
)
from momentum_tuner.report.figures.scale import RAINFALL
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import BestSetting
from momentum_tuner.tracking.runs import short_momentum

Span = tuple[float, float]


def colour_span(spec: StudySpec, maps: Sequence[StabilityMap]) -> Span | None:
    """The objective's values between which colours differ: from the best to what most complete trials stay below."""
    values = [p.objective for m in maps for p in m.points if p.outcome == "complete" and p.objective is not None]
    if not values:
        return None
    low, high = np.quantile(values, (0.1, 0.95) if spec.objective.maximize else (0.05, 0.9))
    return float(low), float(high)


def stability_figure(spec: StudySpec, found: StabilityMap, best: BestSetting | None, span: Span | None) -> Figure:
    """One contestant's search over learning rate and 1 - momentum, with the edges of divergence."""
    momenta = {p.one_minus_momentum for p in found.points}
    if len(momenta) <= 1:
        return _over_learning_rate(spec, found, best)
    log = span is not None and span[0] > 0.0 and span[1] / span[0] > 5.0
    traces: list[Trace] = []
    for outcome, symbol, size in (("pruned", "circle", 7), ("failed", "square-open", 8), ("diverged", "x", 8)):
        traces += _markers(found.points, outcome, {"symbol": symbol, "size": size, "color": OUTCOME_COLOURS[outcome]})
    complete: dict[str, Any] = {"symbol": "circle", "size": 11, "line": {"color": "--ink", "width": 0.8}}
    if span is not None:
        values = [p.objective for p in found.points if p.outcome == "complete"]
        complete |= {
            "color": [math.log10(v) if log and v and v > 0 else v for v in values],
            "cmin": math.log10(span[0]) if log else span[0],
            "cmax": math.log10(span[1]) if log else span[1],
            "colorscale": RAINFALL,
            "reversescale": spec.objective.maximize,
            "showscale": True,
            "colorbar": _colour_bar(spec, span, log),
        }
    traces += _markers(found.points, "complete", complete)
    traces += _measured(found.measured)
    if found.predicted:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "predicted edge",
                "x": [p.learning_rate for p in found.predicted],
                "y": [p.one_minus_momentum for p in found.predicted],
                "line": {"color": "--ink", "width": 1.5, "dash": "dash"},
                "hovertemplate": "quadratic of the measured sharpness<br>diverges above lr = %{x:.3g}<extra></extra>",
            }
        )
    if best is not None and "momentum" in best.settings:
        traces.append(_star(best, 1.0 - best.settings["momentum"]))
    rates = [p.learning_rate for p in found.points]
    layout = {
        "xaxis": log_axis("learning rate", rates, range=_log_range(rates)),
        "yaxis": log_axis("1 - momentum", momenta),
    }
    return Figure(f"landscape-{_slug(found)}", found.optimizer, _caption(found), traces, layout, 440)


def _over_learning_rate(spec: StudySpec, found: StabilityMap, best: BestSetting | None) -> Figure:
    """The map of a contestant whose momentum is fixed, or that has none: the objective over the learning rate."""
    traces: list[Trace] = []
    for outcome, symbol in (("pruned", "circle"), ("diverged", "x"), ("complete", "circle")):
        colour = colour_of(spec, found.optimizer) if outcome == "complete" else OUTCOME_COLOURS[outcome]
        marker = {"symbol": symbol, "size": 10 if outcome == "complete" else 7, "color": colour}
        traces += _markers([p for p in found.points if p.objective is not None], outcome, marker, objective=True)
    if best is not None:
        traces.append(_star(best, best.objective))
    values = [p.objective for p in found.points if p.objective is not None]
    measured = [edge.edge for edge in found.measured if edge.edge is not None]
    predicted = [p.learning_rate for p in found.predicted]
    if values:
        traces += [_upright("measured edge", x, values, {"color": "--bad", "width": 2.5}) for x in measured]
        dashed = {"color": "--ink", "width": 1.5, "dash": "dash"}
        traces += [_upright("predicted edge", x, values, dashed) for x in predicted]
    reach = [*(p.learning_rate for p in found.points), *measured, *predicted]
    layout = {
        "xaxis": log_axis("learning rate", reach, range=_log_range(reach)),
        "yaxis": fitting_axis(objective_name(spec), values),
    }
    return Figure(f"landscape-{_slug(found)}", found.optimizer, _caption(found), traces, layout, 440)


def objective_name(spec: StudySpec) -> str:
    """The objective in words."""
    return spec.objective.metric.replace("_", " ")


def _markers(points: Sequence[Point], outcome: str, marker: dict[str, Any], objective: bool = False) -> list[Trace]:
    some = [p for p in points if p.outcome == outcome]
    if not some:
        return []
    text = [
        f"trial {p.trial}: lr = {shown(p.learning_rate)}"
        + ("" if p.one_minus_momentum is None else f", momentum = {short_momentum(1.0 - p.one_minus_momentum)}")
        + ("" if p.objective is None else f"<br>objective {shown(p.objective)}")
        for p in some
    ]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": outcome,
            "x": [p.learning_rate for p in some],
            "y": [p.objective if objective else p.one_minus_momentum for p in some],
            "text": text,
            "marker": marker,
            "hovertemplate": "%{text}<extra>" + outcome + "</extra>",
        }
    ]


def _measured(edges: Sequence[MeasuredEdge]) -> list[Trace]:
    """In each bin of 1 - momentum where an edge was measured, a line from its lower to its upper end."""
    x: list[float | None] = []
    y: list[float | None] = []
    for edge in edges:
        if edge.edge is not None and edge.low is not None and edge.high is not None:
            low, high = (edge.low, edge.high) if edge.low < edge.high else (edge.low / 1.15, edge.high * 1.15)
            x += [edge.edge, edge.edge, None]
            y += [low, high, None]
    if not x:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "measured edge",
            "x": x,
            "y": y,
            "line": {"color": "--bad", "width": 3},
            "hovertemplate": "between the last stable and the first<br>diverged trial: lr = %{x:.3g}<extra></extra>",
        }
    ]


def _star(best: BestSetting, y: float) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "best",
        "x": [best.settings["learning_rate"]],
        "y": [y],
        "marker": {"symbol": "star", "size": 18, "color": "--star", "line": {"color": "--ink", "width": 1.2}},
        "hovertemplate": f"best: trial {best.trial}<extra></extra>",
    }


def _upright(name: str, x: float, values: Sequence[float], line: dict[str, Any]) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"{name} {shown(x, 3)}",
        "x": [x, x],
        "y": [min(values), max(values)],
        "line": line,
        "hovertemplate": f"{name}<extra></extra>",
    }


def _log_range(values: Sequence[float]) -> list[float] | None:
    known = [math.log10(v) for v in values if v > 0.0]
    if not known:
        return None
    margin = 0.06 * (max(known) - min(known)) + 0.04
    return [min(known) - margin, max(known) + margin]


def _colour_bar(spec: StudySpec, span: Span, log: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"title": {"text": objective_name(spec), "side": "right"}, "thickness": 12, "len": 0.95}
    if log:
        ticks = np.linspace(math.log10(span[0]), math.log10(span[1]), 5).tolist()
        found |= {"tickvals": ticks, "ticktext": [shown(10.0**tick, 2) for tick in ticks]}
    return found


def _slug(found: StabilityMap) -> str:
    return found.optimizer.replace("_", "-").replace(".", "-")


def _caption(found: StabilityMap) -> str:
    counts = {outcome: sum(p.outcome == outcome for p in found.points) for outcome in OUTCOME_COLOURS}
    words = [f"{len(found.points)} trials: " + ", ".join(f"{n} {o}" for o, n in counts.items() if n) + "."]
    if any(edge.edge is not None for edge in found.measured):
        words.append("The measured edge lies between the last stable and the first diverged trial.")
    elif not counts["diverged"]:
        words.append("No trial diverged, so no edge was measured.")
    if found.predicted:
        words.append(
            f"The predicted edge is where a quadratic of the measured sharpness ({shown(found.sharpness, 3)}) diverges."
        )
    else:
        words.append("No edge is predicted: " + _why_not(found))
    return " ".join(words)


def _why_not(found: StabilityMap) -> str:
    return "the sharpness was not measured." if found.sharpness is None else "none is known for this optimizer."
