"""Who worked when."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from momentum_tuner.report.figures.figure import OUTCOME_COLOURS, Figure, Trace, axis, plain
from momentum_tuner.report.trials import TrialRow

_PART = 0.8
"""Of a worker's row that its slots fill."""
MOST_WORKERS = 40


def timeline(trials: Sequence[TrialRow], workers: Sequence[str], now: float) -> Figure | None:
    """A line for each trial from its start to its end, in the row of the worker and the place of the slot it had last.

    Args:
        trials: of the study.
        workers: ids, in the order in which they began.
        now: where the lines of trials that still run end.
    """
    ran = [t for t in trials if t.worker is not None and t.started_at is not None]
    if not ran:
        return None
    rows = [w for w in workers if any(t.worker == w for t in ran)]
    rows += sorted({t.worker for t in ran if t.worker is not None} - set(rows))
    shown = rows[-MOST_WORKERS:]
    slots = {w: 1 + max((t.slot or 0) for t in ran if t.worker == w) for w in shown}
    traces: list[Trace] = []
    for outcome in OUTCOME_COLOURS:
        x: list[str | None] = []
        y: list[float | None] = []
        text: list[str | None] = []
        for t in ran:
            if t.outcome == outcome and t.worker in slots and t.started_at is not None:
                end = t.finished_at if t.finished_at is not None else now
                place = shown.index(t.worker) + _PART * ((t.slot or 0) + 0.5) / slots[t.worker] - _PART / 2
                again = f", attempt {t.attempts}" if t.attempts > 1 else ""
                said = f"{t.optimizer} {t.kind} {t.number}{again}, {end - t.started_at:.1f} s"
                x += [_time(t.started_at), _time(max(end, t.started_at)), None]
                y += [round(place, 4), round(place, 4), None]
                text += [said, said, None]
        if x:
            width = max(1.5, min(6.0, 30.0 / max(slots.values())))
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": outcome,
                    "x": x,
                    "y": y,
                    "text": text,
                    "line": {"color": OUTCOME_COLOURS[outcome], "width": width},
                    "marker": {"size": width + 0.5, "symbol": "line-ns", "color": OUTCOME_COLOURS[outcome]},
                    "hovertemplate": "%{text}<extra>" + outcome + "</extra>",
                    "connectgaps": False,
                }
            )
    anew = [t for t in ran if t.attempts > 1 and t.worker in slots]
    if anew:
        places = [shown.index(t.worker) for t in anew if t.worker is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "begun more than once",
                "x": [_time(t.started_at or now) for t in anew],
                "y": [
                    place + _PART * ((t.slot or 0) + 0.5) / slots[t.worker or ""] - _PART / 2
                    for place, t in zip(places, anew, strict=True)
                ],
                "text": [f"{t.optimizer} {t.kind} {t.number}: attempt {t.attempts}" for t in anew],
                "marker": {"symbol": "diamond-open", "size": 9, "color": "--ink"},
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout = {
        "xaxis": axis("time (UTC)", type="date"),
        "yaxis": axis(
            "",
            tickvals=list(range(len(shown))),
            ticktext=[plain(_short(w)) for w in shown],
            range=[len(shown) - 0.5, -0.5],
        ),
        "hovermode": "closest",
    }
    caption = (
        "A line is a trial, from when it was first claimed to its end, at the worker and slot that trained it last. A "
        "trial that was begun more than once without getting further (its worker died) has a diamond at its start."
    )
    if len(rows) > len(shown):
        caption += f" The last {len(shown)} of {len(rows)} workers are shown."
    return Figure("timeline", "Workers", caption, traces, layout, 160 + 90 * min(len(shown), 10))


def _short(worker: str) -> str:
    """An id that fits beside an axis."""
    return worker if len(worker) <= 26 else f"{worker[:12]}…{worker[-13:]}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
