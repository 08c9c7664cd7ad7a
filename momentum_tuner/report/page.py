"""The report as one HTML file that needs nothing but a browser.

Plotly's library has 4.8 MB, and its Python package holds no smaller one; compressed it has 2.0 MB in base64, which the
page unpacks by itself (DecompressionStream, in every browser since 2023). All text is escaped by the template, JSON so
that it cannot end its script, and the page's own policy keeps it from loading anything.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momentum_tuner.database import Database
from momentum_tuner.errors import redact
from momentum_tuner.report.evidence import Evidence, gather
from momentum_tuner.report.figures.figure import Figure
from momentum_tuner.report.files import check_ending, write_whole
from momentum_tuner.report.sections import Section, Table, sections
from momentum_tuner.report.trials import TrialRow, trials_columns
from momentum_tuner.report.words import DEFINITIONS, duration, fairness, headline, moment, pair_words, target_words
from momentum_tuner.tickets import StudyRecord

if TYPE_CHECKING:
    from jinja2 import Template

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
PAGE_ENDINGS = (".html", ".htm")
"""What the name of a report's file can end in."""
_DIGITS = 6
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?%?|-|inf|[-+]?[\d.]+(e[-+]?\d+)? to [-+]?[\d.]+(e[-+]?\d+)?")


def write_report(database: Database, study: StudyRecord, path: Path, trusted: Collection[str] = ()) -> Path:
    """Write the report of a study, in whatever phase it is, to a file whose name ends in `.html` or `.htm`.

    Args:
        database: where the study is.
        study: the study.
        path: the file to write.
        trusted: what may be imported to train paths over a landscape again; built-in tasks always are.

    Raises:
        InputError: its name ends in something else, or it cannot be written.
    """
    check_ending(path, PAGE_ENDINGS)
    return write_whole(path, render(gather(database, study, trusted)).encode())


def render(evidence: Evidence) -> str:
    """The whole report as HTML."""
    found = sections(evidence)
    comparison = evidence.comparison
    links = [("verdict", "Verdict"), *((s.name, s.title) for s in found)]
    links += [("trials", "Trials"), ("method", "How it was measured")]
    return _page(
        evidence,
        found,
        {
            "whole": True,
            "links": links,
            "headline": headline(evidence),
            "verdicts": [pair_words(p) for p in comparison.pairs],
            "fairness": fairness(evidence),
            "target": target_words(evidence),
            "notes": comparison.notes,
            "facts": facts(evidence),
            "definitions": DEFINITIONS,
            "reproduce": (
                f"To do it again, put this into a file and type: momentum-tuner run FILE. Seed {evidence.spec.seed} "
                "fixes the search's initial weights and data order; a search by several workers asks its sampler in "
                "another order each time, so that it may find other settings."
            ),
            "study_file": redact(evidence.spec.to_yaml()),
        },
        trials_table(evidence.trials) if evidence.trials else None,
    )


def render_figures(evidence: Evidence, title: str, figures: Sequence[Figure]) -> str:
    """A page of nothing but some figures."""
    return _page(evidence, [Section("figures", title, figures=figures, columns=2)], {"whole": False}, None)


def _page(
    evidence: Evidence, found: Sequence[Section], context: Mapping[str, Any], trials: Mapping[str, Any] | None
) -> str:
    from markupsafe import Markup

    figures = {f.name: f for s in found for f in s.figures}
    data = {
        "figures": {name: {"data": f.data, "layout": f.layout, "height": f.height} for name, f in figures.items()},
        "trials": trials,
    }
    page = page_template().render(
        context,
        policy=POLICY,
        title=f"{evidence.study.name}: momentum-tuner",
        name=evidence.study.name,
        subtitle=_subtitle(evidence),
        sections=found,
        trials=trials is not None,
        # Our own files, checked to hold nothing that ends them; the data are made harmless by `script_json`.
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        data=Markup(script_json(data)),
        library=Markup(packed_plotly()) if figures else "",
    )
    return page + "\n"


def _subtitle(evidence: Evidence) -> str:
    begun = f"Begun {moment(evidence.created_at)}"
    if evidence.finished_at is not None and evidence.phase == "done":
        took = duration(evidence.finished_at - evidence.created_at)
        return f"{begun}, done {moment(evidence.finished_at)} ({took})."
    return f"{begun}; as of {moment(evidence.read_at)}."


@functools.cache
def _asset(name: str) -> str:
    text = (files("momentum_tuner.report") / "assets" / name).read_text()
    if not name.endswith(".j2") and "</" in text:
        raise ValueError(f"{name} could end the element that it is in")
    return text


@functools.cache
def page_template() -> Template:
    """The page as it is filled in; jinja2 takes as long to read it as to fill in several."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.tests["number_like"] = lambda text: _NUMBER.fullmatch(text) is not None
    return environment.from_string(_asset("page.html.j2"))


@functools.cache
def packed_plotly() -> str:
    """Plotly's library, compressed, in base64."""
    library = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(library, 6, mtime=0)).decode()


def script_json(value: Any) -> str:
    """A value as JSON that can stand in a script element: numbers of 6 digits, nothing that ends the element."""
    text = json.dumps(_short(value), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for harmful in "<>&\u2028\u2029":
        text = text.replace(harmful, f"\\u{ord(harmful):04x}")
    return text


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return value


def trials_table(trials: Sequence[TrialRow]) -> dict[str, Any]:
    """The table of trials by rows; columns that say nothing are left out."""
    columns = {
        name: values
        for name, values in trials_columns(trials).items()
        if not name.startswith(("initial_", "measured_"))
        and name not in ("slot", "finished_at", "diverged")
        and any(v is not None for v in values)
        and (name in ("kind", "optimizer", "outcome", "number") or len({v for v in values if v is not None}) > 1)
    }
    return {
        "columns": list(columns),
        "titles": [name.replace("_", " ") for name in columns],
        "rows": [list(row) for row in zip(*columns.values(), strict=True)],
    }


def facts(evidence: Evidence) -> list[Table]:
    """What the numbers depend on: study, data, machines, versions."""
    spec, data = evidence.spec, evidence.data or {}
    study = [
        ("task", spec.task.factory),
        ("data", _data_words(data)),
        ("objective", ", ".join(f"{aim.direction} {aim.metric}" for aim in spec.objective.aims)),
        ("budget of each", f"{spec.budget.trials} trials of {spec.budget.epochs} epochs"),
        ("sampler, pruner", f"{spec.sampler.name}, {spec.pruner.name}"),
        ("schedule", spec.schedule.name),
        ("precision", spec.precision),
        ("seed of the search", str(spec.seed)),
        ("seeds of the confirmation", _seeds(evidence)),
        ("database", evidence.source),
    ]
    machines: dict[str, list[str]] = {}
    for machine in evidence.machines:
        for name, value in machine.environment.items():
            if str(value) not in machines.setdefault(name, []):
                machines[name].append(str(value))
    seen = [(name.replace("_", " "), "; ".join(values)) for name, values in machines.items()]
    seen.append(("report by", f"momentum-tuner {_version()}"))
    return [Table(["study", ""], study), Table(["machines and versions", ""], seen)]


def _version() -> str:
    return version("momentum-tuner")


def _seeds(evidence: Evidence) -> str:
    seeds = sorted({t.seed for t in evidence.trials if t.kind == "confirm"})
    return ", ".join(map(str, seeds)) or "-"


def _data_words(data: Mapping[str, Any]) -> str:
    if not data:
        return "not known yet"
    words = f"{data.get('name')}, {data.get('kind')}, digest {data.get('digest')}"
    for part in ("train", "valid"):
        if data.get(part) is not None:
            words += f"; {part} {data[part]}"
    return redact(words)
