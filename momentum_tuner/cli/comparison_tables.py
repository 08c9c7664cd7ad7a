"""A comparison for people: contestants, pairs with their verdicts, stability, and what to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from momentum_tuner.cli.tables import number, plain_table
from momentum_tuner.comparison import Comparison, Contestant, FrontPoint, Pair, Profile
from momentum_tuner.tracking.runs import short_momentum

PROFILE_TAUS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)

_Measure = tuple[str, Callable[[Contestant], float | None]]
_STABILITY: tuple[_Measure, ...] = (
    ("oscil-\nlation", lambda c: c.oscillation),
    ("spikes", lambda c: c.spikes),
    ("gradient\nratio", lambda c: c.layer_grad_ratio),
    ("sharp-\nness", lambda c: c.sharpness),
    ("stability\nmargin", lambda c: c.stability_margin),
    ("seed\nstd", lambda c: c.seed_std),
)
_LANDSCAPE: tuple[_Measure, ...] = (
    ("stable width, decades", lambda c: c.stable_width),
    ("learning-rate sensitivity", lambda c: c.lr_sensitivity),
)


def print_comparison(out: Console, comparison: Comparison) -> None:
    """The whole comparison of one study; it fits 80 columns."""
    print_contestants(out, comparison)
    if comparison.pairs:
        out.print(pairs_table(comparison))
    if comparison.front:
        out.print(front_table(comparison.front))
    if any(c.seeds for c in comparison.optimizers):
        out.print(_measures_table("stability, means over the seeds", comparison.optimizers, _STABILITY))
    if comparison.pairs:
        out.print(differences_table(comparison.pairs))
    if any(of(c) is not None for c in comparison.optimizers for _, of in _LANDSCAPE):
        out.print(_measures_table("how much the learning rate matters", comparison.optimizers, _LANDSCAPE))
    _print_notes(out, comparison)


def print_verdict(out: Console, comparison: Comparison) -> None:
    """Who is faster, and how sure that is: what a run ends in."""
    print_contestants(out, comparison)
    if comparison.pairs:
        out.print(pairs_table(comparison))
    _print_notes(out, comparison)


def print_comparisons(out: Console, comparisons: Sequence[Comparison], profile: Profile) -> None:
    """Several studies: each one's contestants, and how the contestants do over all of them."""
    for comparison in comparisons:
        print_contestants(out, comparison)
        _print_notes(out, comparison)
        out.print()
    if profile.lines:
        out.print(profile_table(profile))


def print_contestants(out: Console, comparison: Comparison) -> None:
    """The contestants, the fastest first, with the target and the budget."""
    if comparison.optimizers:
        out.print(contestants_table(comparison))
    if comparison.target is not None:
        _line(out, f"target: {_target(comparison)}")
    budget = comparison.budget
    parts = [f"{budget['trials']} trials", f"{budget['epochs']} epochs", f"{budget['seeds']} seeds"]
    _line(out, f"equal budgets: {', '.join(parts)} each")


def contestants_table(comparison: Comparison) -> Table:
    """Each contestant's setting, and how soon and how often it reached the target."""
    table = plain_table(f"{comparison.study}: best settings, the fastest first")
    table.add_column("optimizer", no_wrap=True)
    for name in ("learning\nrate", "momentum", f"{comparison.unit} to\ntarget", "missed", "diverged", "best\nloss"):
        table.add_column(name, justify="right")
    uneven = any(c.seeds != comparison.budget["seeds"] for c in comparison.optimizers)
    if uneven:
        table.add_column("seeds", justify="right")
    for c in comparison.optimizers:
        row = [
            c.optimizer,
            f"{c.learning_rate:.4g}",
            "-" if c.momentum is None else short_momentum(c.momentum),
            number(comparison.to_target(c)),
            _percent(c.miss_rate),
            _percent(c.divergence_rate),
            number(c.best_valid_loss),
        ]
        table.add_row(*row, *([str(c.seeds)] if uneven else []))
    return table


def pairs_table(comparison: Comparison) -> Table:
    """Speed ratios, with the verdict in words."""
    table = plain_table(f"{comparison.unit} to target, the first over the second, on the same seeds")
    table.add_column("pair")
    for name in ("ratio", "95% interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for pair in comparison.pairs:
        interval = f"{pair.low:.3g} to {pair.high:.3g}"
        table.add_row(_names(pair), f"{pair.speed_ratio:.3g}", interval, f"{pair.p:.2g}", pair.verdict)
    return table


def front_table(front: Sequence[FrontPoint]) -> Table:
    """The settings that none of the same optimizer is better than in both aims; they may trade one for the other."""
    table = plain_table("what each optimizer can trade for what: its front in the search")
    table.add_column("optimizer", no_wrap=True)
    for name in ("learning\nrate", "momentum", *(aim.replace("_", " ") for aim in front[0].values), "trial"):
        table.add_column(name, justify="right")
    for point in front:
        momentum = "-" if point.momentum is None else short_momentum(point.momentum)
        values = [number(value) for value in point.values.values()]
        table.add_row(point.optimizer, f"{point.learning_rate:.4g}", momentum, *values, str(point.trial))
    return table


def differences_table(pairs: Sequence[Pair]) -> Table:
    """Paired differences of the stability measures, with their 95% intervals."""
    table = plain_table("stability, the first minus the second, on the same seeds")
    table.add_column("pair")
    measures = {d.measure: None for pair in pairs for d in pair.stability}
    for measure in measures:
        table.add_column(measure.replace("_", " "), justify="right")
    for pair in pairs:
        found = {d.measure: d for d in pair.stability}
        cells = [
            f"{found[m].value:.3g}\n{found[m].low:.3g} to {found[m].high:.3g}" if m in found else "-" for m in measures
        ]
        table.add_row(_names(pair), *cells)
    return table


def profile_table(profile: Profile) -> Table:
    """In what share of the studies each contestant is within a factor of the fastest."""
    table = plain_table("share of studies within a factor of the fastest")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("studies", justify="right")
    columns = [min(range(len(profile.taus)), key=lambda i: abs(profile.taus[i] - tau)) for tau in PROFILE_TAUS]
    for index in columns:
        table.add_column(f"{profile.taus[index]:g}x", justify="right")
    table.add_column("score", justify="right")
    for line in profile.lines:
        shares = [_percent(line.shares[index]) for index in columns]
        table.add_row(line.optimizer, str(line.studies), *shares, f"{line.score:.2f}")
    return table


def _measures_table(title: str, contestants: Sequence[Contestant], measures: Sequence[_Measure]) -> Table:
    """Measures of each contestant, without those that nobody has."""
    table = plain_table(title)
    table.add_column("optimizer", no_wrap=True)
    measured = [(name, of) for name, of in measures if any(of(c) is not None for c in contestants)]
    for name, _ in measured:
        table.add_column(name, justify="right")
    for c in contestants:
        table.add_row(c.optimizer, *(_short(of(c)) for _, of in measured))
    return table


def _print_notes(out: Console, comparison: Comparison) -> None:
    for note in comparison.notes:
        _line(out, f"note: {note}")


def _line(out: Console, text: str) -> None:
    out.print(text, markup=False)


def _target(comparison: Comparison) -> str:
    side = "or more" if comparison.maximize else "or less"
    return f"{comparison.target_metric} of {number(comparison.target)} {side}"


def _names(pair: Pair) -> str:
    return f"{pair.a} / {pair.b}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
