"""One line of the doctor's report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from momentum_tuner.errors import InputError, describe_failure, redact


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: what was looked at.
        status: `fail` keeps studies from running as they were asked to; `warn` does not.
        found: what is there.
        mend: what to do about it, where it is not `ok`.
    """

    check: str
    status: Literal["ok", "warn", "fail"]
    found: str
    mend: str | None = None


def refused(check: str, error: InputError, mend: str) -> Finding:
    """The finding of an error whose message ends in what to change; `mend` where it does not."""
    found, _, change = redact(str(error)).partition("; ")
    return Finding(check, "fail", found, change or mend)


def checked(check: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check found; one that breaks off is a fault too, and keeps no other from its turn."""
    try:
        return list(look())
    except Exception as error:
        return [Finding(check, "fail", describe_failure(error), "this should not happen: please report it")]
