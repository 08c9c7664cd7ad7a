"""Checkpoints of one worker's trials in one study: written beside training, noted in the database, cleared away."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from momentum_tuner.checkpoints import (
    CheckpointStore,
    Reference,
    SavedSlot,
    references_from_text,
    references_to_text,
)
from momentum_tuner.database import Database
from momentum_tuner.errors import CheckpointError, redact
from momentum_tuner.faults import crash_point
from momentum_tuner.tickets import StudyRecord, alive_workers, note_checkpoints, noted_checkpoints
from momentum_tuner.trainer import SlotState
from momentum_tuner.worker.held import Held, Stage

logger = logging.getLogger(__name__)

_NUMBERS = itertools.count(1)
"""Of all files of this process: it may come back to a study, where tickets still refer to what it wrote before."""
KEPT = 2
"""Checkpoints of a trial: the newest, and one to fall back on."""


@dataclass(frozen=True)
class _Writing:
    """A checkpoint on its way: whose trials are in it, and whether each has come further than ever before."""

    further: Mapping[int, bool]
    file: Future[Reference]


class Saver:
    """Keeps checkpoints.

    Args:
        database: where they are noted.
        store: where they are kept; None: no checkpoints.
        study: whose trials.
        worker_id: who trains them.
        seconds: how often.
        grace_seconds: after how long a silent worker is given up, and its files may be cleared away.
    """

    def __init__(
        self,
        database: Database,
        store: CheckpointStore | None,
        study: StudyRecord,
        worker_id: str,
        seconds: float,
        grace_seconds: float,
    ) -> None:
        self._database = database
        self._store = store
        self._study_id = study.id
        self._folder = study.checkpoint_folder
        self._worker_id = worker_id
        self._seconds = seconds
        self._grace_seconds = grace_seconds
        self._next = time.monotonic() + seconds
        self._writing: _Writing | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def keeps(self) -> bool:
        """Whether there are checkpoints at all."""
        return self._store is not None

    @property
    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return self._store is not None and self._writing is None and time.monotonic() >= self._next

    def hasten(self) -> None:
        """Make the next checkpoint due now."""
        self._next = time.monotonic()

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is written, or waits to be noted."""
        return self._writing is not None

    @property
    def written(self) -> bool:
        """Whether a checkpoint waits to be noted: until then it saves no work."""
        return self._writing is not None and self._writing.file.done()

    def begin(self, held: Sequence[Held], export: Callable[[int], SlotState]) -> None:
        """Take the states of these trials, and write them in the background; one that is not noted yet is given up."""
        self._next = time.monotonic() + self._seconds
        if self._store is None or not held:
            return
        slots: dict[int, SavedSlot] = {}
        further: dict[int, bool] = {}
        for one in held:
            state = export(one.claim.ticket_id)
            slots[one.claim.ticket_id] = SavedSlot(state.tensors, state.header())
            further[one.claim.ticket_id] = (state.epoch, state.epoch_steps) > one.position
        name = f"{self._folder}/{self._worker_id}-{next(_NUMBERS)}.safetensors"
        self._writing = _Writing(further, self._writer.submit(self._store.save, name, slots))

    def note(self, held: Mapping[int, Held], wait: bool = False) -> None:
        """Note a checkpoint that is written, once the records before it are, and clear old files away.

        One that could not be written is passed over with a warning: the one before it stays good.

        Args:
            held: the worker's tickets by id.
            wait: for one that is being written.

        Raises:
            StorageError: the database does not answer; call again.
        """
        writing = self._writing
        if writing is None or not (wait or writing.file.done()):
            return
        try:
            reference = writing.file.result()
        except CheckpointError as error:
            logger.warning("checkpoint skipped: %s", redact(str(error)))
            self._writing = None
            return
        unfinished = (Stage.TRAINING, Stage.RETURNING)
        ours = {t: held[t] for t in writing.further if t in held and held[t].stage in unfinished}
        references = {t: [reference, *one.references][:KEPT] for t, one in ours.items()}
        noted = note_checkpoints(
            self._database,
            [(one.claim, references_to_text(references[t]), writing.further[t]) for t, one in ours.items()],
        )
        self._writing = None
        crash_point("checkpoint-noted")
        for ticket_id in noted:
            one = held[ticket_id]
            one.references = references[ticket_id]
            if writing.further[ticket_id]:
                one.last_attempt = False
        self._clear()

    def load(self, held: Sequence[Held]) -> dict[int, SavedSlot]:
        """The states from which these trials can go on, by ticket; those without one begin anew."""
        for one in held:
            one.references = references_from_text(one.claim.checkpoint)
        wanted = {one.claim.ticket_id: one.references for one in held if one.references}
        return {} if self._store is None or not wanted else self._store.load(wanted)

    def forget(self) -> None:
        """Remove all files of the study, which is done."""
        if self._store is not None:
            self._store.remove_folder(self._folder)

    def close(self) -> None:
        """Wait for a file that is being written."""
        self._writer.shutdown()

    def _clear(self) -> None:
        """Remove files that no ticket refers to, but not those that another worker may be about to note."""
        assert self._store is not None
        needed = {
            r.file for text in noted_checkpoints(self._database, self._study_id) for r in references_from_text(text)
        }
        others = alive_workers(self._database, self._grace_seconds) - {self._worker_id}
        for file in self._store.files(self._folder):
            if file not in needed and _writer_of(file) not in others:
                self._store.remove(file)


def _writer_of(file: str) -> str:
    """The id of the worker that wrote a file `<study>/<worker>-<n>.safetensors`, or left it half written."""
    return file.split("/")[1].removeprefix(".").rpartition("-")[0]
