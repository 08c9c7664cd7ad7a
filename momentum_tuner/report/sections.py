"""The sections of a report, each with its figures and tables, or with what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from momentum_tuner.comparison import Comparison, Contestant
from momentum_tuner.comparison.landscape import momentum_of
from momentum_tuner.report.evidence import Evidence, Machine
from momentum_tuner.report.figures import curves as curve_figures
from momentum_tuner.report.figures import searching
from momentum_tuner.report.figures.figure import Figure, shown
from momentum_tuner.report.figures.landscape import colour_span, stability_figure
from momentum_tuner.report.figures.paths import paths_figure
from momentum_tuner.report.figures.working import timeline
from momentum_tuner.report.words import target_words
from momentum_tuner.space import torch_line, torch_notes
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import BestSetting
from momentum_tuner.tracking.runs import short_momentum


@dataclass(frozen=True)
class Table:
    """A table of text; numbers are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        name: its place in the page.
        title: its heading.
        lead: sentences under it, among them what is missing.
        figures: its figures, side by side where the page is wide and `columns` is 2 or 3.
        tables: below them.
        lines: of code to copy, below them.
        columns: figures beside each other at most.
    """

    name: str
    title: str
    lead: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    lines: Sequence[str] = field(default=())
    columns: int = 1


def sections(evidence: Evidence) -> list[Section]:
    """All sections but the verdict, the table of trials and how it was measured, which the page makes itself."""
    found = [
        _best(evidence),
        _learning(evidence),
        _speed(evidence),
        _stability(evidence),
        _landscape(evidence),
        _search(evidence),
        _work(evidence),
    ]
    if evidence.plane is not None:
        lead = ["Where the best settings went, and how they got there."]
        found.insert(5, Section("paths", "Paths", lead, [paths_figure(evidence.spec, evidence.plane)]))
    return found


# The best settings


def _best(evidence: Evidence) -> Section:
    lead = [f"{o} has no complete trial yet." for o in _without_best(evidence)]
    if not evidence.best:
        return Section("best", "Best settings", lead)
    ranked = _ranked(evidence)
    return Section(
        "best", "Best settings", lead, tables=[best_table(evidence, ranked)], lines=torch_lines(evidence.spec, ranked)
    )


def _without_best(evidence: Evidence) -> list[str]:
    there = {b.optimizer for b in evidence.best}
    return [o for o in evidence.spec.contestants if o not in there]


def torch_lines(spec: StudySpec, best: Sequence[BestSetting]) -> list[str]:
    """A line of Python for each setting, with comments; an optimizer that torch has not is named in one."""
    lines = []
    for b in best:
        plain = ", ".join(f"{name}={shown(value, 6)}" for name, value in b.settings.items())
        line = torch_line(b.optimizer, b.settings)
        if line is None:
            lines.append(f"# {b.optimizer} is not in torch.optim: {plain}")
        else:
            first, *more = line.splitlines()
            lines += [f"{first}  # {b.optimizer}", *more]
        lines += torch_notes(spec, b.optimizer, b.settings if line else {})
    return lines


def _ranked(evidence: Evidence) -> list[BestSetting]:
    """The best setting of each contestant, the first of the comparison first."""
    by_optimizer = {b.optimizer: b for b in evidence.best}
    order = [c.optimizer for c in evidence.comparison.optimizers]
    ranked = [by_optimizer[o] for o in order if o in by_optimizer]
    return ranked + [b for b in evidence.best if b.optimizer not in order]


def best_table(evidence: Evidence, ranked: Sequence[BestSetting]) -> Table:
    """The best settings, with what their search trials and their confirmation came to."""
    confirmed = {c.optimizer: c for c in evidence.comparison.optimizers if c.seeds}
    searched = [n for n in _searched(evidence) if n not in ("learning_rate", "momentum")]
    columns = ["optimizer", "learning rate", "momentum", *(n.replace("_", " ") for n in searched)]
    columns += [aim.metric.replace("_", " ") for aim in evidence.spec.objective.aims]
    metrics = [m for m in _metrics(evidence) if m not in {aim.metric for aim in evidence.spec.objective.aims}]
    columns += [*(m.replace("_", " ") for m in metrics), "trial"]
    if confirmed:
        columns += ["seeds", f"{evidence.comparison.unit} to target", "missed", "diverged", "seed std", "stable width"]
    rows = []
    for b in ranked:
        momentum = momentum_of(b.optimizer, b.settings)
        row = [b.optimizer, shown(b.settings.get("learning_rate"))]
        row += [short_momentum(momentum) if momentum else "-"]
        row += [shown(b.settings.get(name)) for name in searched]
        row += [shown(b.objective)]
        row += [shown(b.second_objective)] if evidence.spec.objective.second is not None else []
        row += [*(shown(b.measures.get(m)) for m in metrics), str(b.trial)]
        if confirmed:
            row += _confirmed(evidence.comparison, confirmed.get(b.optimizer))
        rows.append(row)
    return Table(columns, rows)


def _confirmed(comparison: Comparison, found: Contestant | None) -> list[str]:
    if found is None:
        return ["-"] * 6
    width = "-" if found.stable_width is None else f"{found.stable_width:.2f} decades"
    rates = [found.miss_rate, found.divergence_rate]
    shares = ["-" if rate is None else f"{100 * rate:.0f}%" for rate in rates]
    return [str(found.seeds), shown(comparison.to_target(found)), *shares, shown(found.seed_std, 2), width]


def _searched(evidence: Evidence) -> list[str]:
    """Hyperparameters in which the best settings differ or that were searched."""
    fixed = evidence.spec.fixed
    return list(dict.fromkeys(n for b in evidence.best for n, v in b.settings.items() if fixed.get(n) != v))


def _metrics(evidence: Evidence) -> list[str]:
    return sorted({m for b in evidence.best for m in b.measures if m.startswith("valid_")})


# The confirmation


def _not_confirmed(evidence: Evidence) -> list[str]:
    if evidence.confirmed:
        return []
    if not evidence.searched:
        return ["No trial has run to its end yet."]
    why = "The study confirms nothing." if evidence.spec.confirm.seeds == 0 else "Nothing is confirmed yet."
    return [f"{why} Shown is the best search trial of each, on the one seed of the search."]


def _learning(evidence: Evidence) -> Section:
    comparison = evidence.comparison
    metrics = dict.fromkeys([comparison.target_metric, "valid_loss"])
    figures = [
        curve_figures.learning_curves(
            evidence.spec,
            evidence.curves,
            metric,
            comparison.maximize and metric == comparison.target_metric,
            comparison.target if metric == comparison.target_metric else None,
        )
        for metric in metrics
        if evidence.curves
    ]
    return Section("curves", "Learning curves", _not_confirmed(evidence), [f for f in figures if f.data], columns=2)


def _speed(evidence: Evidence) -> Section:
    comparison = evidence.comparison
    lead = [words for words in [target_words(evidence)] if words is not None]
    if not evidence.confirmed:
        return Section(
            "speed", "Speed", [*lead, "Speed is compared on the confirmation, of which nothing has ended yet."]
        )
    figures = [
        curve_figures.target_figure(evidence.spec, evidence.confirmed, comparison),
        curve_figures.pairs_figure(comparison),
    ]
    rows = [
        [
            f"{p.a} / {p.b}",
            str(p.seeds),
            shown(p.speed_ratio, 3),
            f"{shown(p.low, 3)} to {shown(p.high, 3)}",
            shown(p.p, 2),
            "-" if p.smallest_ratio is None else shown(p.smallest_ratio, 3),
            p.verdict,
        ]
        for p in comparison.pairs
    ]
    columns = [
        "pair",
        "seeds",
        f"ratio of {comparison.unit}",
        "95% interval",
        "p (Holm)",
        "smallest ratio that could show",
        "verdict",
    ]
    tables = [Table(columns, rows)] if rows else []
    return Section("speed", "Speed", lead, [f for f in figures if f is not None], tables, columns=2)


def _stability(evidence: Evidence) -> Section:
    figures = curve_figures.stability_panel(evidence.spec, evidence.curves) if evidence.curves else []
    compared = [c for c in evidence.comparison.optimizers if c.seeds]
    tables = []
    if compared:
        columns = ["optimizer", "oscillation", "spikes", "gradient ratio", "diverged", "sharpness", "stability margin"]
        columns.append("rate sensitivity")
        rows = [
            [
                c.optimizer,
                shown(c.oscillation, 3),
                shown(c.spikes, 3),
                shown(c.layer_grad_ratio, 3),
                "-" if c.divergence_rate is None else f"{100 * c.divergence_rate:.0f}%",
                shown(c.sharpness, 3),
                shown(c.stability_margin, 3),
                shown(c.lr_sensitivity, 3),
            ]
            for c in compared
        ]
        tables.append(Table(columns, rows))
    differences = [
        [f"{p.a} - {p.b}", d.measure.replace("_", " "), shown(d.value, 3), f"{shown(d.low, 3)} to {shown(d.high, 3)}"]
        for p in evidence.comparison.pairs
        for d in p.stability
    ]
    if differences:
        tables.append(Table(["pair", "measure", "difference", "95% interval"], differences))
    return Section("stability", "Stability", _not_confirmed(evidence), figures, tables, columns=3)


# The search


def _landscape(evidence: Evidence) -> Section:
    maps = [m for m in evidence.maps if m.points]
    lead = ["Every trial of the search, and where training diverges: measured, and as theory has it for a quadratic."]
    missing = [m.optimizer for m in evidence.maps if not m.points]
    if missing:
        lead.append(f"No trial of {', '.join(missing)} has ended yet.")
    best = {b.optimizer: b for b in evidence.best}
    span = colour_span(evidence.spec, maps)
    figures = [stability_figure(evidence.spec, m, best.get(m.optimizer), span) for m in maps]
    return Section("landscape", "Landscape and edge of stability", lead, figures, columns=2)


def _search(evidence: Evidence) -> Section:
    spec, trials = evidence.spec, evidence.trials
    figures = [
        searching.history(spec, trials),
        searching.two_aims(spec, trials, evidence.fronts),
        searching.survival(spec, trials),
        searching.importance_figure(spec, evidence.importances),
    ]
    silent = [f"{i.optimizer} ({i.reason})" for i in evidence.importances if i.reason is not None]
    lead = [f"The importance of hyperparameters is not shown for {', '.join(silent)}."] if silent else []
    if figures[0] is None:
        lead.insert(0, "No trial has run to its end yet.")
    columns = ["optimizer", "ended", "complete", "pruned", "diverged", "failed", "epochs of the budget"]
    table = Table(columns, searching.spent(spec, trials))
    return Section("search", "Search", lead, [f for f in figures if f is not None], [table], columns=2)


def _work(evidence: Evidence) -> Section:
    workers = [m.worker for m in evidence.machines]
    figure = timeline(evidence.trials, workers, evidence.read_at)
    rows = [
        [m.worker, m.node, m.device, _hardware(m), str(sum(t.worker == m.worker for t in evidence.trials))]
        for m in evidence.machines
    ]
    lead = [] if figure is not None else ["No trial has begun yet."]
    tables = [Table(["worker", "node", "device", "hardware", "trials"], rows)] if rows else []
    return Section("workers", "Workers", lead, [figure] if figure is not None else [], tables)


def _hardware(machine: Machine) -> str:
    return str(machine.environment.get("gpu") or machine.environment.get("processor") or "-")
