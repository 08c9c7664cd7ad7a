"""Paths over a landscape of two parameters."""

from __future__ import annotations

from momentum_tuner.report.figures.figure import Figure, Trace, axis, colour_of, shown
from momentum_tuner.report.figures.scale import RAINFALL
from momentum_tuner.report.trajectories import Plane, log_height
from momentum_tuner.spec import StudySpec


def paths_figure(spec: StudySpec, plane: Plane) -> Figure:
    """The path of each contestant's best setting over contours of the loss."""
    traces: list[Trace] = [
        {
            "type": "contour",
            "x": plane.x.tolist(),
            "y": plane.y.tolist(),
            "z": [[round(float(v), 3) for v in row] for row in log_height(plane.loss)],
            "colorscale": RAINFALL,
            "opacity": 0.5,
            "ncontours": 24,
            "line": {"width": 0.6},
            "contours": {"coloring": "heatmap"},
            "colorbar": {"title": {"text": "log10 of the loss over its minimum", "side": "right"}, "thickness": 12},
            "hoverinfo": "skip",
        }
    ]
    if plane.optimum is not None:
        traces.append(_mark("optimum", plane.optimum, {"symbol": "star", "size": 16, "color": "--star"}))
    traces.append(
        _mark(
            "start", tuple(plane.paths[0].positions[0].tolist()), {"symbol": "circle", "size": 11, "color": "--paper"}
        )
    )
    for path in plane.paths:
        colour = colour_of(spec, path.optimizer)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": path.optimizer + (" (diverged)" if path.diverged else ""),
                "x": path.positions[:, 0].tolist(),
                "y": path.positions[:, 1].tolist(),
                "text": [f"step {s}: loss {shown(v)}" for s, v in zip(path.steps, path.losses, strict=True)],
                "line": {"color": colour, "width": 1.8},
                "marker": {"color": colour, "size": 3.5},
                "hovertemplate": "%{text}<extra>" + path.optimizer + "</extra>",
            }
        )
    layout = {
        "xaxis": axis("first parameter", range=[float(plane.x[0]), float(plane.x[-1])]),
        "yaxis": axis("second parameter", range=[float(plane.y[0]), float(plane.y[-1])]),
    }
    caption = (
        f"Each contestant's best setting, trained again from the start of seed {plane.seed} for this report. Every one "
        "of the first steps is a point, and evenly spaced ones after them."
    )
    return Figure("trajectories", "Paths over the landscape", caption, traces, layout, 560)


def _mark(name: str, at: tuple[float, ...], marker: dict[str, object]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [at[0]],
        "y": [at[1]],
        "marker": {**marker, "line": {"color": "--ink", "width": 1.5}},
        "hovertemplate": f"{name}<extra></extra>",
    }
