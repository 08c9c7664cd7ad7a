"""What a report says in words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from momentum_tuner.comparison import Pair
from momentum_tuner.comparison.statistics import SIGNIFICANCE
from momentum_tuner.report.evidence import Evidence
from momentum_tuner.report.figures.figure import shown

DEFINITIONS: Sequence[tuple[str, str]] = (
    ("step", "an optimizer step, counted from 1."),
    ("valid loss", "the loss on the whole validation set, in evaluation mode, after an epoch."),
    (
        "steps to target",
        "the first step at which the validation measure reaches the target, linear between the two evaluations around "
        "it. A seed that never gets there counts as twice the budget, and the miss rate stands beside it. Where "
        "budgets of equal epochs differ in steps, as with a searched batch size, a step is not the same work for all, "
        "and speed is compared in epochs.",
    ),
    (
        "target",
        "a number of the study file, or `auto`: the median over confirmation seeds of the best value that momentum at "
        "0.9 reached at its own best learning rate, and 5% towards worse.",
    ),
    ("mean valid loss", "its mean over the budget's epochs: how good the model is at any time on the way."),
    ("oscillation", "the share of steps whose update points against the one before."),
    (
        "spikes",
        "steps whose loss exceeds its trailing mean by more than 6 trailing mean absolute deviations (horizon: 50 "
        "steps).",
    ),
    ("gradient ratio", "largest over smallest RMS gradient of a tensor of the model, mean over an epoch."),
    ("diverged", "a loss that is not finite, or above ten times the initial one. It is a result, not a failure."),
    ("seed std", "the standard deviation of the objective over the confirmation seeds."),
    ("stable width", "decades of learning rate, at the best momentum, whose objective is within 5% of the best."),
    (
        "rate sensitivity",
        "mean loss that a learning rate within 1.5 decades of the best costs, over the search trials (after Wortsman "
        "et al. 2023).",
    ),
    (
        "sharpness",
        "the largest eigenvalue of the Hessian at the end; the stability margin is the learning rate times it over the "
        "bound above which a quadratic diverges (Cohen et al. 2021).",
    ),
    (
        "verdict",
        "confirmation seeds fix initial weights and data order, so contestants are compared seed by seed: the "
        "geometric mean of the ratios of steps to target, a 95% interval by paired bootstrap (10,000 resamples), "
        "p by the paired sign-flip permutation test with Holm's correction over the pairs. A difference is claimed "
        "only where the interval excludes 1. Divergence rates have a score interval (Tango 1998), and seeds that all "
        "give the same count as one.",
    ),
)


def headline(evidence: Evidence) -> str:
    """The verdict in one sentence, or why there is none yet."""
    progress, comparison = evidence.progress, evidence.comparison
    if evidence.phase == "search":
        ended = f"{progress.done} of {progress.tickets} trials have ended"
        return f"The search is running: {ended}. There is no verdict yet."
    if evidence.phase == "confirm":
        done, whole = progress.confirm.done, progress.confirm.tickets
        return f"The best settings are being confirmed: {done} of {whole} trials have ended. There is no verdict yet."
    if not comparison.optimizers:
        return "No trial of the search ran to its end, so there is nothing to compare."
    if not comparison.pairs:
        first = comparison.optimizers[0]
        if evidence.spec.confirm.seeds == 0:
            return (
                f"{first.optimizer} had the best trial. Nothing was confirmed on fresh seeds, so this is no verdict: "
                "one seed tells little."
            )
        return f"{first.optimizer} is the only one with a confirmed setting: there is nothing to compare it with."
    fastest = comparison.optimizers[0].optimizer
    behind = [p.b for p in comparison.pairs if p.a == fastest and p.high < 1.0]
    open_against = [p for p in comparison.pairs if fastest in (p.a, p.b) and not (p.a == fastest and p.high < 1.0)]
    equal = [p.b if p.a == fastest else p.a for p in open_against]
    if not behind:
        return f"No difference in speed is shown: {fastest} was fastest, but not beyond chance."
    sooner = "in fewer epochs" if comparison.unit == "epochs" else "sooner"
    words = f"{fastest} reaches the target {sooner} than {_list(behind)}"
    words += f"; against {_list(equal)} no difference is shown." if equal else "."
    weak = [p.b for p in comparison.pairs if p.a == fastest and p.b in behind and p.p > SIGNIFICANCE]
    if weak:
        words += f" After correction for {len(comparison.pairs)} pairs, p is not below 0.05 against {_list(weak)}."
    return words


def pair_words(pair: Pair) -> str:
    """The verdict on a pair, with both names."""
    named = pair.a in pair.verdict and pair.b in pair.verdict
    return pair.verdict if named else f"{pair.a} and {pair.b}: {pair.verdict}"


def fairness(evidence: Evidence) -> str:
    """The budget that every contestant had."""
    spec = evidence.spec
    words = f"Every contestant had the same budget: {spec.budget.trials} trials of up to {spec.budget.epochs} epochs"
    if spec.confirm.seeds:
        words += f" to search, and {spec.confirm.seeds} fresh seeds to confirm its best setting"
    return words + "."


def target_words(evidence: Evidence) -> str | None:
    """What had to be reached."""
    comparison = evidence.comparison
    if comparison.target is None:
        return None
    metric = comparison.target_metric.replace("_", " ")
    origin = "from the study file"
    if evidence.spec.target == "auto":
        origin = f"what {comparison.reference} reaches, and 5% towards worse"
    bound = "at least" if comparison.maximize else "at most"
    return f"The target: {metric} {bound} {shown(comparison.target)} ({origin})."


def moment(seconds: float | None) -> str:
    """A time in UTC."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """A span of time, such as `1 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
