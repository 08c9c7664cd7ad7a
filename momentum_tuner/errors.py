"""The exceptions of momentum-tuner.

    MomentumTunerError            the root: catch this to catch them all
    ├── InputError                wrong use or bad input: one clear line, exit code 2
    │   ├── StudyFileError        the study file has mistakes; one line for each
    │   ├── TaskError             the task cannot be loaded, or is not a usable `Task`
    │   ├── StudyNotFoundError    no study of that name in this database
    │   ├── TrialNotFoundError    the study has no trial of that optimizer and number
    │   ├── StudyChangedError     the study file differs from what the database holds
    │   ├── StorageError          the database URL is wrong or nothing answers there
    │   ├── CheckpointError       the place for checkpoints is wrong, or cannot be written
    │   ├── TrackingError         the MLflow URI is wrong or nothing answers there
    │   ├── DeviceError           the device asked for is not on this machine
    │   └── MissingExtraError     an optional package is not installed
    └── StudyFailedError          the work itself failed: exit code 1

A trial that diverges is a result (`outcome = "diverged"`), not an exception. `TrialError` is not of this tree: it
fails one trial, and the study goes on.
"""

import re
import traceback
from pathlib import Path


class MomentumTunerError(Exception):
    """Root of all errors that momentum-tuner raises on purpose."""

    exit_code = 1


class InputError(MomentumTunerError):
    """Wrong use or bad input: the message says what to change."""

    exit_code = 2


class StudyFileError(InputError):
    """The study file has mistakes; the message has one line for each."""


class TaskError(InputError):
    """The task cannot be loaded, or what it returns is not a usable `Task`."""


class StudyNotFoundError(InputError):
    """The database holds no study of that name."""


class TrialNotFoundError(InputError):
    """The study has no trial of that optimizer and number, or nothing was recorded of it."""


class StudyChangedError(InputError):
    """The study file differs from the study of that name in the database."""


class StorageError(InputError):
    """The database URL is wrong, or no database answers there."""


class CheckpointError(InputError):
    """The place for checkpoints is wrong, or cannot be written."""


class TrackingError(InputError):
    """The MLflow tracking URI is wrong, or no server answers there."""


class DeviceError(InputError):
    """The device asked for is not on this machine."""


class MissingExtraError(InputError):
    """A package of an optional extra is not installed."""


class StudyFailedError(MomentumTunerError):
    """The study could not be brought to its end."""


class WorkersEndedError(StudyFailedError):
    """The workers of a study ended before it was done, which can go on."""


class TrialError(Exception):
    """A trial cannot go on, for the reason that the message says in full."""


_USER = re.compile(r"([a-zA-Z][\w+.-]*://)\S*@")  # up to the last @ of the word: a password may hold one
_LONGEST_TRACEBACK = 4000
_OPTION = re.compile(r"((?:password|passwd|pwd|token|secret)=)[^\s&;'\"]+", re.IGNORECASE)


def redact(text: str) -> str:
    """A text with user and password of every URL in it hidden, for logs, tables, tags and messages."""
    return _OPTION.sub(r"\1***", _USER.sub(r"\1***@", text))


def describe_failure(error: BaseException) -> str:
    """One line on what went wrong and where, without secrets."""
    if isinstance(error, TrialError):
        return redact(str(error))[:500]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines()
    return redact(f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}")[:500]


def describe_traceback(error: BaseException) -> str:
    """The innermost frames of an error, deepest last, and what it says; no line of source, which may hold a secret."""
    frames = [f'File "{f.filename}", line {f.lineno}, in {f.name}' for f in traceback.extract_tb(error.__traceback__)]
    says = redact("".join(traceback.format_exception_only(error)).strip())[-_LONGEST_TRACEBACK:]
    room = _LONGEST_TRACEBACK - len(says)
    kept: list[str] = []
    for frame in map(redact, reversed(frames)):  # the deepest tell most
        room -= len(frame) + 1
        if room < 0:
            break
        kept.insert(0, frame)
    return "\n".join([*kept, says])
