"""The runs of one study in MLflow: a parent, and a child for each trial."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from momentum_tuner.errors import TrackingError, redact
from momentum_tuner.tracking.runs import PARENT_TAG, STUDY_TAG, TICKET_TAG, Point, Run, TrialRun
from momentum_tuner.tracking.tables import RunChange, UnusualError, open_tables

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Experiment

logger = logging.getLogger(__name__)

PARENT = ""
"""The key of the parent among the runs, where a child's is its ticket."""


def check_tracking_uri(uri: str) -> str:
    """A tracking URI that MLflow 3 can use, unchanged.

    Raises:
        TrackingError: it has no scheme or one that MLflow has given up, or its folder is missing.
    """
    scheme, separator, rest = uri.partition("://")
    if uri != "databricks" and not (separator and rest.strip("/") and _known(scheme)):
        raise TrackingError(
            f"--tracking-uri {redact(uri)!r} is not supported; write sqlite:///mlflow.db or http://host:5000 "
            "(MLflow 3 has no file store)"
        )
    if scheme.startswith("sqlite"):
        folder = Path(rest.removeprefix("/").partition("?")[0]).absolute().parent
        if not folder.is_dir():
            raise TrackingError(f"--tracking-uri: the folder {folder} does not exist; make it first")
    return uri


def _known(scheme: str) -> bool:
    return scheme.partition("+")[0] in {"sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks"}


def quiet_mlflow() -> None:
    """Settings of MLflow for this process, where the user has made none.

    No telemetry, no long waits, no retries inside MLflow (a run that is created twice would show twice, and the
    publisher tries again by itself), no line on standard output for each run.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def make_sqlite_store(uri: str) -> None:
    """Make MLflow's SQLite file, if there is none: aside, and put in its place when it is whole.

    MLflow makes it in some fifty steps in its place; killed or disturbed on the way, it leaves a file that nothing can
    use or mend. As these steps take a second of the processor, a copy of the empty file is kept for the next time.
    """
    url = sa.make_url(uri) if uri.startswith("sqlite") else None
    if url is None or url.query or not url.database or Path(url.database).exists():
        return
    place, kept = Path(url.database), kept_store()
    with _made_aside(place) as made:
        try:
            shutil.copyfile(kept, made)
        except OSError:
            _initialize(made)
            with contextlib.suppress(OSError):  # a home that cannot be written to
                kept.parent.mkdir(parents=True, exist_ok=True)
                with _made_aside(kept) as copy:
                    shutil.copyfile(made, copy)


def kept_store() -> Path:
    """Where the empty SQLite file of this version of MLflow is kept."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches, "momentum-tuner", f"mlflow-{version('mlflow')}.db")


def _initialize(file: Path) -> None:
    from mlflow.store.db.utils import _initialize_tables

    engine = sa.create_engine(f"sqlite:///{file}")
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()


@contextmanager
def _made_aside(place: Path) -> Iterator[Path]:
    """A path to make a file at, which is put in its place when it is whole, unless another one was quicker."""
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.absolute().parent) as folder:
        made = Path(folder, place.name)
        yield made
        try:
            os.link(made, place)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            made.rename(place)


class RunStore:
    """The runs of one study in MLflow.

    Args:
        tracking_uri: where MLflow is.
        experiment: the name of the study's experiment.
        identity: what the runs of this study have as their study tag, and those of no other.
    """

    def __init__(self, tracking_uri: str, experiment: str, identity: str) -> None:
        check_tracking_uri(tracking_uri)
        quiet_mlflow()
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        make_sqlite_store(tracking_uri)
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._tables = open_tables(self._client)
        self._experiment = experiment
        self._identity = identity
        self.experiment_id = ""
        self.runs: dict[str, Run] = {}

    def learn(self, noted: Mapping[str, str]) -> None:
        """Find or make the experiment, and learn which runs are there.

        Where a trial has two (MLflow made one for a request that nobody waited for any longer), one is deleted.

        Args:
            noted: the id of the run that stays then, by key; the experiment is that of the parent.
        """
        self.experiment_id = self._find_experiment(noted.get(PARENT, ""))
        self.runs = {}
        for run in self._found():
            key = run.tags.get(TICKET_TAG, PARENT)
            other = self.runs.setdefault(key, run)
            if other is not run:
                if run.id == noted.get(key):
                    self.runs[key], run = run, other
                self._client.delete_run(run.id)

    def create(self, key: str, name: str, start: float, tags: Mapping[str, str]) -> Run:
        """Make a run that began at `start` (seconds since 1970)."""
        tags = {**tags, **self._own_tags(key)}
        made = self._client.create_run(self.experiment_id, start_time=_milliseconds(start), tags=tags, run_name=name)
        self.runs[key] = Run(made.info.run_id, made.info.status, tags=tags)
        return self.runs[key]

    def delete(self, key: str) -> None:
        """Delete a run, which can then be made anew."""
        self._client.delete_run(self.runs.pop(key).id)

    def show(
        self,
        run: Run,
        points: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Add points, and params and tags as far as MLflow has not got them."""
        new_params, new_tags = run.new_params(params or {}), run.new_tags(tags or {})
        if not (points or new_params or new_tags):
            return
        change = RunChange(run.id, False, "", 0, None, None, new_params, new_tags, points, False)
        if not self._write([change], None):
            self._log(change)
        run.params |= new_params
        run.tags |= new_tags

    def _write(self, changes: Sequence[RunChange], data: DatasetInput | None) -> bool:
        """Write into MLflow's tables; returns whether that could be done."""
        if self._tables is None:
            return False
        try:
            self._tables.write(self.experiment_id, changes, data)
        except UnusualError:
            return False
        return True

    def _log(self, change: RunChange) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self._client.log_batch(
            change.id,
            # The newest first: MLflow then need not replace its latest value again and again.
            metrics=[Metric(p.key, p.value, p.timestamp, p.step) for p in reversed(change.points)],
            params=[Param(k, v) for k, v in change.params.items()],
            tags=[RunTag(k, v) for k, v in change.tags.items()],
        )

    def show_together(self, trials: Sequence[TrialRun], data: DatasetInput | None) -> bool:
        """Show trials as they are now in one go, all of them or none.

        Args:
            trials: what is shown.
            data: what they learn from, if that is known.

        Returns:
            Whether it was done; if not, they are to be shown one by one.
        """
        if self._tables is None:
            return False
        found = {trial.key: self.runs.get(trial.key) for trial in trials}
        changes = [self._change(trial, found[trial.key], data is not None) for trial in trials]
        if not self._write(changes, data):
            return False
        for trial, change in zip(trials, changes, strict=True):
            run = found[trial.key]
            if run is None:
                run = self.runs[trial.key] = Run(change.id, trial.status)
            run.status = trial.status
            run.params |= change.params
            run.tags |= change.tags
            run.has_data = run.has_data or change.data
        return True

    def _change(self, trial: TrialRun, run: Run | None, data: bool) -> RunChange:
        """What MLflow has not got of a trial."""
        have = run or Run(uuid.uuid4().hex, trial.status)
        tags = {**trial.tags, **(self._own_tags(trial.key) if run is None else {})}
        return RunChange(
            id=have.id,
            new=run is None,
            name=trial.name,
            start=_milliseconds(trial.start),
            status=trial.status,
            end=None if trial.end is None else _milliseconds(trial.end),
            params=have.new_params(trial.params),
            tags=have.new_tags(tags),
            points=trial.points,
            data=data and not have.has_data,
        )

    def _own_tags(self, key: str) -> dict[str, str]:
        """What a run is found again by."""
        return {STUDY_TAG: self._identity} | ({TICKET_TAG: key} if key != PARENT else {})

    def show_file(self, run: Run, text: str, name: str) -> None:
        """Add a text file, or replace the one of that name; it may be in a folder."""
        self._client.log_text(run.id, text, name)

    def show_data(self, run: Run, data: DatasetInput) -> None:
        """Say what a run learns from, unless it says so."""
        if not run.has_data:
            self._client.log_inputs(run.id, datasets=[data])
            run.has_data = True

    def curve(self, run: Run, key: str) -> list[tuple[int, int]]:
        """Steps and times (milliseconds since 1970) of a metric's points, in order."""
        return sorted((point.step, point.timestamp) for point in self._client.get_metric_history(run.id, key))

    def mark(self, tag: str, keys: Collection[str]) -> None:
        """Let those runs have a tag and no other run have it."""
        for key, run in self.runs.items():
            if key in keys:
                self.show(run, tags={tag: "true"})
            elif tag in run.tags:
                self._client.delete_tag(run.id, tag)
                del run.tags[tag]

    def set_status(self, run: Run, status: str) -> None:
        """Show a run that has not ended as `RUNNING` or as `SCHEDULED`."""
        if run.status != status:
            self._client.update_run(run.id, status=status)
            run.status = status

    def end(self, run: Run, status: str, end: float) -> None:
        """Show a run as ended at `end` (seconds since 1970)."""
        self._client.set_terminated(run.id, status, _milliseconds(end))
        run.status = status

    def _find_experiment(self, parent_id: str) -> str:
        """The experiment of the parent, which people may have renamed, or that of the study's name, made if need be."""
        from mlflow.entities import LifecycleStage

        found = self._experiment_of(parent_id) or self._client.get_experiment_by_name(self._experiment)
        if found is None:
            made: str = self._client.create_experiment(self._experiment)
            return made
        if found.lifecycle_stage == LifecycleStage.DELETED:
            self._client.restore_experiment(found.experiment_id)
        experiment_id: str = found.experiment_id
        return experiment_id

    def _experiment_of(self, run_id: str) -> Experiment | None:
        """Where a run of this study is; None if there is no such run here, deleted or not."""
        if not run_id:
            return None
        try:
            run = self._client.get_run(run_id)
            ours = run.data.tags.get(STUDY_TAG) == self._identity
            return self._client.get_experiment(run.info.experiment_id) if ours else None
        except Exception as error:
            if not is_refusal(error):
                raise
            return None

    def _found(self) -> Iterator[Run]:
        """The study's runs, the newest first."""
        if self._tables is not None:
            yield from self._tables.find(self.experiment_id, STUDY_TAG, self._identity)
            return
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], f"tags.`{STUDY_TAG}` = '{self._identity}'", max_results=1000, page_token=token
            )
            for one in page:
                has_data = one.inputs is not None and bool(one.inputs.dataset_inputs)
                yield Run(one.info.run_id, one.info.status, dict(one.data.params), dict(one.data.tags), has_data)
            token = page.token
            if not token:
                return

    def link(self, parent: Run) -> None:
        """Let every child that belongs to a parent of before belong to this one."""
        for key, run in self.runs.items():
            if key != PARENT:
                self.show(run, tags={PARENT_TAG: parent.id})


def is_refusal(error: Exception) -> bool:
    """Whether MLflow answered that it will not do what it was asked, rather than not answering."""
    return getattr(error, "error_code", None) in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
