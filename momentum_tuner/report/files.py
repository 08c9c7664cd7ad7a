"""Files for people: whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from momentum_tuner.errors import InputError


def check_ending(path: Path, endings: Sequence[str]) -> None:
    """See that a file to be written is named as what it will hold: a slip of the hand must not cost a database.

    Raises:
        InputError: its name ends in none of these.
    """
    if path.suffix.lower() not in endings:
        raise InputError(f"{path}: write a name that ends in {' or '.join(endings)}")


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file; one of that name stays as it was until the new one is whole.

    Raises:
        InputError: it cannot be written.
    """
    aside = None
    try:
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except OSError as error:
        if aside is not None:
            with contextlib.suppress(OSError):
                os.unlink(aside)
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
