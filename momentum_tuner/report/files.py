"""Files for people: whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from momentum_tuner.errors import InputError


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
