"""A figure as Plotly draws it, and the parts that figures share.

Colours are names of the page's own, `--c0` or `--c0/20` for 20% of it, so that light and dark are one figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from momentum_tuner.spec import StudySpec

Trace = dict[str, Any]

OUTCOME_COLOURS: Mapping[str, str] = {
    "complete": "--good",
    "pruned": "--pruned",
    "diverged": "--bad",
    "failed": "--failed",
    "running": "--running",
}
COLOURS = 9
"""How many colours of contestants the page has: one for each optimizer of the catalog."""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of its file and its place in the page.
        title: above it.
        caption: below it: what is drawn, and how to read it.
        data: Plotly's traces.
        layout: Plotly's layout, without colours and fonts of the page.
        height: in pixels.
    """

    name: str
    title: str
    caption: str
    data: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 420


def colour_of(spec: StudySpec, optimizer: str) -> str:
    """The colour of a contestant, the same in all figures."""
    return f"--c{spec.contestants.index(optimizer) % COLOURS}"


def axis(title: str, **more: Any) -> dict[str, Any]:
    """A Plotly axis."""
    return {"title": {"text": title}, **more}


def log_axis(title: str, values: Iterable[float | None], **more: Any) -> dict[str, Any]:
    """A logarithmic axis for these values: labelled at powers of ten where it is long, else at 1, 2 and 5."""
    known = [v for v in values if v is not None and 0.0 < v < math.inf]
    decades = math.log10(max(known) / min(known)) if known else 0.0
    found: dict[str, Any] = {"type": "log"}
    if decades > 2.0:
        found |= {"dtick": max(1, math.ceil(decades / 8)), "exponentformat": "power"}
    else:
        found |= {"dtick": "D2" if decades > 0.5 else "D1", "tickformat": "~g"}
    return axis(title, **found, **more)


def fitting_axis(title: str, values: Iterable[float | None], factor: float = 20.0, **more: Any) -> dict[str, Any]:
    """A logarithmic axis where values are all above zero and further apart than this factor, else a linear one."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    wide = bool(known) and min(known) > 0.0 and max(known) / min(known) > factor
    return log_axis(title, known, **more) if wide else axis(title, **more)


def shown(value: float | None, digits: int = 4) -> str:
    """A number as people read it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.{digits}g}"


def plain(text: str) -> str:
    """Text of a user's as Plotly shows it: it takes some HTML in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
