"""The result of a study that is done, for those who look at it in MLflow: a description, tags and files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from momentum_tuner.comparison import Pair
from momentum_tuner.database import Database
from momentum_tuner.report.evidence import Evidence, gather
from momentum_tuner.report.page import packed_plotly, page_template, render, render_figures
from momentum_tuner.report.sections import Section, Table, sections
from momentum_tuner.report.trials import trials_csv
from momentum_tuner.report.words import fairness, headline, pair_words, target_words
from momentum_tuner.tickets import StudyRecord

PAGES: Mapping[str, tuple[str, Sequence[str]]] = {
    "curves": ("Learning curves and speed", ("curves", "speed")),
    "stability": ("Stability and landscape", ("stability", "landscape", "paths")),
    "search": ("Search and workers", ("search", "workers")),
}
"""Pages of figures: each has Plotly's library in it, so that there is not one for each figure."""
_LONGEST_DESCRIPTION = 7500
"""In characters; MLflow takes 8,000."""


@dataclass(frozen=True)
class Publication:
    """The result of a study.

    Attributes:
        description: in Markdown: the verdict in words, the best settings, how to do it again.
        verdicts: tags: the verdict in one sentence, and of each pair.
        files: texts by their paths: report, trials, environment, figures.
    """

    description: str
    verdicts: Mapping[str, str]
    files: Mapping[str, str]


def prepare() -> None:
    """Import and read what a publication takes, and pack Plotly's library, which takes longest of a small study's.

    For a process that does nothing else: its Optuna is without fANOVA, which nobody asks here. scikit-learn, which that
    is made of, would take half as long to import as all the rest of the process.
    """
    page_template()
    with _without("sklearn"):
        import_module("optuna.importance")
    packed_plotly()


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Let imports of a module fail meanwhile, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def publication(database: Database, study: StudyRecord) -> Publication:
    """Make what is shown of a study's result.

    Args:
        database: where the study is.
        study: the study.
    """
    evidence = gather(database, study)
    found = sections(evidence)
    machines = {m.worker: {"node": m.node, "device": m.device, **m.environment} for m in evidence.machines}
    files = {
        "report.html": render(evidence),
        "trials.csv": trials_csv(database, study),
        "environment.json": json.dumps(machines, indent=2),
    }
    for name, (title, wanted) in PAGES.items():
        figures = [figure for section in found if section.name in wanted for figure in section.figures]
        if figures:
            files[f"figures/{name}.html"] = render_figures(evidence, title, figures)
    return Publication(_description(evidence, found), _verdicts(evidence), files)


def _verdicts(evidence: Evidence) -> dict[str, str]:
    tags = {"verdict": headline(evidence)}
    order = list(evidence.spec.contestants)
    for pair in evidence.comparison.pairs:
        first, second = sorted((pair.a, pair.b), key=order.index)  # the same key whoever wins
        tags[f"verdict.{first}.{second}"] = _pair(pair, evidence.comparison.unit)
    return tags


def _pair(pair: Pair, unit: str) -> str:
    numbers = f"{unit} {pair.a} / {pair.b}: {pair.speed_ratio:.3g}, 95% interval {pair.low:.3g} to {pair.high:.3g}"
    return f"{pair_words(pair)}; {numbers}, p = {pair.p:.2g}"


def _description(evidence: Evidence, found: Sequence[Section]) -> str:
    """The most important first: what does not fit is left out from the end."""
    comparison = evidence.comparison
    parts = [f"**{headline(evidence)}**", "", *(f"- {_pair(pair, comparison.unit)}" for pair in comparison.pairs)]
    parts += ["", " ".join(words for words in (target_words(evidence), fairness(evidence)) if words)]
    for section in found:
        if section.name == "best":
            parts += ["", "### Best settings", "", *section.lead, *(_markdown(table) for table in section.tables)]
            parts += ["", *(f"    {line}" for line in section.lines)]
    parts += [
        "",
        "### To do it again",
        "",
        f"Take `study.yaml` from the artifacts: `momentum-tuner run study.yaml`. Seed {evidence.spec.seed} fixes the "
        "search's initial weights and data order. Machines and versions are in `environment.json`, all trials in "
        "`trials.csv`, all figures in `report.html`.",
    ]
    if comparison.notes:
        parts += ["", "### Notes", "", *(f"- {_plain(note)}" for note in comparison.notes)]
    lines = "\n".join(parts).splitlines()
    while sum(len(line) + 1 for line in lines) > _LONGEST_DESCRIPTION:
        lines.pop()
    return "\n".join(lines)


def _markdown(table: Table) -> str:
    rows = [table.columns, ["---"] + ["---:"] * (len(table.columns) - 1), *table.rows]
    return "\n".join(
        "| " + " | ".join(_plain(cell) if cell[:3] != "---" else cell for cell in row) + " |" for row in rows
    )


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    for special in "\\|`*_<[":
        text = text.replace(special, f"\\{special}")
    return text
