"""What a run ends in: the best settings, and where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from momentum_tuner.cli.comparison_tables import print_verdict
from momentum_tuner.cli.options import storage_again, tracking_again, work_again
from momentum_tuner.cli.tables import best_table, console
from momentum_tuner.comparison import compare_study
from momentum_tuner.database import Database
from momentum_tuner.errors import StudyFailedError, redact
from momentum_tuner.launcher import RunOutcome
from momentum_tuner.tickets import best_settings


def print_summary(database: Database, outcome: RunOutcome, tracking_uri: str | None, trusted: Sequence[str]) -> None:
    """Print what came of a run and what to type next.

    Args:
        database: where the study is.
        outcome: how the run ended.
        tracking_uri: the MLflow that shows the runs; None if none does.
        trusted: what its workers may import.
    """
    out, progress, name = console(), outcome.progress, outcome.study.name
    say = partial(out.print, markup=False, soft_wrap=True)
    storage = storage_again()
    best = best_settings(database, outcome.study)
    if progress.phase == "done":
        if outcome.was_complete:
            out.print(f"Study {name} is complete.")
        out.print(best_table(progress, best, out.width))
        if outcome.study.spec.confirm.seeds:
            print_verdict(out, compare_study(database, outcome.study))
    if not outcome.published:
        again = f"momentum-tuner publish {name}{storage}{tracking_again()}"
        say(f"MLflow does not show everything yet; bring it up to date with: {again}")
    if progress.phase != "done":
        again = f"momentum-tuner resume {name}{work_again(trusted)}"
        say(f"Stopped at {progress.done} of {progress.tickets} trials. Go on with: {again}")
        return
    lines = {}
    if best:
        lines["Paste into your script:"] = f"momentum-tuner best {name} --format torch{storage}"
    if best and outcome.study.spec.confirm.seeds:
        lines["How stable each is:"] = f"momentum-tuner compare {name}{storage}"
    lines["All of it in one page:"] = f"momentum-tuner report {name}{storage}"
    if tracking_uri is not None:
        is_server = tracking_uri.startswith(("http://", "https://"))
        lines["Browse every run:"] = redact(tracking_uri) if is_server else f"momentum-tuner ui{tracking_again()}"
    lines["Everything is in:"] = database.shown
    for what, where in lines.items():
        say(f"{what:<24} {where}")


def check_not_all_failed(database: Database, outcome: RunOutcome) -> None:
    """See that a search came to something: one whose trials all failed is work that failed, though it is complete.

    Raises:
        StudyFailedError: all failed; with the first one's reason.
    """
    tickets = sum(o.tickets for o in outcome.progress.optimizers)
    if tickets == 0 or sum(o.failed for o in outcome.progress.optimizers) < tickets:
        return
    from momentum_tuner.report import read_trials

    reason = next((row.reason for row in read_trials(database, outcome.study) if row.reason), "no reason was recorded")
    raise StudyFailedError(f"all {tickets} trials of the search failed; the first one: {reason}")
