"""Whether MLflow shows all of a study, found without importing MLflow, which takes longer than all the rest."""

from __future__ import annotations

import json
import sqlite3
import urllib.parse
import urllib.request
from contextlib import closing
from http.client import HTTPException
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from momentum_tuner.database import Database, Study, Ticket

PATIENCE_SECONDS = 5.0


def is_shown(database: Database, study_id: int, tracking_uri: str) -> bool:
    """Whether a study is done and all of it is in this MLflow.

    The database notes what was shown, but not where: that is told by the parent run, whose id no other MLflow has.
    False where it cannot be told: then a publisher finds out.
    """
    with database.read() as session:
        row = session.get(Study, study_id)
        if row is None or row.phase != "done" or row.parent_published != "done" or row.parent_run_id is None:
            return False
        if count_unshown(session, study_id):
            return False
        run_id = row.parent_run_id
    if tracking_uri.startswith("sqlite:///"):
        return _file_has(tracking_uri, run_id)
    return tracking_uri.startswith(("http://", "https://")) and _server_has(tracking_uri, run_id)


def count_unshown(session: Session, study_id: int) -> int:
    """How many trials of a study that is done are not shown as they ended."""
    unshown = sa.select(sa.func.count()).where(
        Ticket.study_id == study_id, Ticket.trial_number.is_not(None), Ticket.published_outcome.is_(None)
    )
    return session.scalar(unshown) or 0


def _file_has(uri: str, run_id: str) -> bool:
    """Whether MLflow's SQLite file has a run that has ended well and was not deleted."""
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    ended = "SELECT 1 FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active' AND status = 'FINISHED'"
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=PATIENCE_SECONDS)) as connection:
            return connection.execute(ended, (run_id,)).fetchone() is not None
    except sqlite3.Error:
        return False


def _server_has(uri: str, run_id: str) -> bool:
    """The same of a server; one that wants to know who asks is left to MLflow's own client."""
    asked = f"{uri.rstrip('/')}/api/2.0/mlflow/runs/get?run_id={urllib.parse.quote(run_id)}"
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE_SECONDS) as answer:
            info = json.load(answer)["run"]["info"]
            return (info["lifecycle_stage"], info["status"]) == ("active", "FINISHED")
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return False
