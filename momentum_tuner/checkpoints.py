"""Checkpoints: the states of running trials, in safetensors files on any file system that fsspec knows.

A worker saves all its slots in one file: the tensors of a slot are named `<ticket>/<name>`, and its header is JSON in
the file's metadata under `<ticket>`. A file appears whole under its name, or not at all, and is never changed. The
database holds its digest, and a file that has another one is not read. Nothing in a file can run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from safetensors import safe_open

from momentum_tuner.errors import CheckpointError, redact
from momentum_tuner.faults import crash_point

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
_PART = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+"
_INSIDE = re.compile(rf"{_PART}(?:/{_PART})*")
_FILE = re.compile(rf"{_PART}/{_PART}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class SavedSlot:
    """What a trial needs to go on.

    Args:
        tensors: tensors of any shape on the CPU, by name: `parameters`, `moment/velocity`, `buffer/bn.running_mean`.
        header: plain JSON values; numbers may be infinite or NaN.
    """

    tensors: Mapping[str, Tensor]
    header: Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """What the database holds of a checkpoint.

    Args:
        file: its name below the store's root, `<folder of the study>/<name>`.
        digest: the SHA-256 of the file, in hexadecimal.
    """

    file: str
    digest: str


def references_to_text(references: Sequence[Reference]) -> str:
    """The references of a ticket, newest first, as the database holds them."""
    return json.dumps([{"file": r.file, "digest": r.digest} for r in references])


def references_from_text(text: str | None) -> list[Reference]:
    """What `references_to_text` wrote; all else is left out, as others may write to the database."""
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    read = [_reference(item) for item in found] if isinstance(found, list) else []
    return [reference for reference in read if reference is not None]


def _reference(item: object) -> Reference | None:
    if not isinstance(item, dict):
        return None
    file, digest = item.get("file"), item.get("digest")
    if not isinstance(file, str) or not isinstance(digest, str):
        return None
    return Reference(file, digest) if _FILE.fullmatch(file) and _DIGEST.fullmatch(digest) else None


def default_checkpoints(dialect: str, database: str | None) -> str:
    """The folder of checkpoints that belongs to a database: beside an SQLite file, else in the current folder.

    Args:
        dialect: `sqlite` or `postgresql`.
        database: the path of an SQLite file, or the name of the database on its server.
    """
    file = Path(database) if dialect == "sqlite" and database else Path("momentum_tuner")
    return str(file.with_suffix(".checkpoints").absolute())


class CheckpointStore:
    """The place of checkpoints, with a folder for each study.

    Args:
        url: a folder, or a URL of fsspec, as `s3://bucket/prefix`; `shown` is how people may see it.

    Raises:
        CheckpointError: the URL cannot be used, or needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        self._secrets = _secrets(url)
        self.shown = self._hidden(url)
        if not url.strip():
            raise CheckpointError("--checkpoints is empty; write a folder, or a URL as s3://bucket/prefix")
        try:
            self._system, root = url_to_fs(url)
        except ImportError as error:
            extra = "pip install 'momentum-tuner[s3]'" if re.match(r"s3a?://", url) else self._reason(error)
            raise CheckpointError(
                f"--checkpoints {self.shown} needs a package that is not installed: {extra}"
            ) from None
        except Exception as error:  # each file system has its own
            raise CheckpointError(
                f"--checkpoints {self.shown} cannot be used: {self._reason(error)}; "
                "write a folder, or a URL as s3://bucket/prefix"
            ) from None
        self._local = isinstance(self._system, LocalFileSystem)
        self._root = (os.path.abspath(root) if self._local else root).rstrip("/")

    def prepare(self) -> None:
        """Make the root, where that is needed, and check that it can be written.

        Raises:
            CheckpointError: it cannot.
        """
        probe = f"{self._root}/.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            try:
                self._system.pipe_file(probe, b"momentum-tuner")
            except FileNotFoundError:  # asked only then, as making a bucket takes rights that writing to it does not
                self._system.makedirs(self._root, exist_ok=True)
                self._system.pipe_file(probe, b"momentum-tuner")
            self._system.rm_file(probe)
        except Exception as error:  # each file system has its own
            raise CheckpointError(
                f"--checkpoints {self.shown} cannot be written: {self._reason(error)}; name another folder or URL"
            ) from None

    def save(self, file: str, slots: Mapping[int, SavedSlot]) -> Reference:
        """Write the slots of a worker, by ticket, as one file that appears whole or not at all.

        Raises:
            CheckpointError: that failed; nothing of it is left.
        """
        path = self._path(file, _FILE)
        headers = {str(ticket): json.dumps(dict(slot.header)) for ticket, slot in slots.items()}
        tensors = _storable(
            {f"{t}/{name}": tensor for t, slot in slots.items() for name, tensor in slot.tensors.items()}
        )
        try:
            digest = self._write(path, tensors, headers)
        except Exception as error:  # a full disk, a lost network, a type of number that safetensors does not know
            raise CheckpointError(f"the checkpoint {file} cannot be saved: {self._reason(error)}") from None
        crash_point("checkpoint-written")
        return Reference(file, digest)

    def load(self, wanted: Mapping[int, Sequence[Reference]]) -> dict[int, SavedSlot]:
        """The newest good checkpoint of each ticket; tickets that have none are left out.

        A file that is missing, broken, or not what its reference says is passed over with one warning.

        Args:
            wanted: for each ticket its references, newest first.
        """
        found = {}
        with ExitStack() as copies:
            reading = _Reading(self, copies)
            for ticket, references in wanted.items():
                slots = (reading.slot(reference, ticket) for reference in references)
                newest = next((slot for slot in slots if slot is not None), None)
                if newest is not None:
                    found[ticket] = newest
        return found

    def remove(self, file: str) -> None:
        """Remove a file that may be there."""
        try:
            path = self._path(file)
            with suppress(FileNotFoundError):
                self._system.rm_file(path)
                if self._local and os.path.dirname(path).endswith(_TEMPORARY):
                    os.rmdir(os.path.dirname(path))
        except Exception as error:  # each file system has its own
            logger.info("checkpoint %s is not removed: %s", file, self._reason(error))

    def files(self, folder: str) -> list[str]:
        """Names, below the root, of all files of a study, also of those that a writer is at, or was killed at.

        These are in folders of their own, `<folder>/.<name>.<random>.tmp/`.
        """
        try:
            self._system.invalidate_cache()  # other machines write too
            paths = self._system.find(self._path(folder))
        except FileNotFoundError:
            return []
        except Exception as error:  # each file system has its own
            logger.info("checkpoints of %s are not listed: %s", folder, self._reason(error))
            return []
        names = [path.removeprefix(f"{self._root}/") for path in paths]
        return [name for name in names if name.startswith(f"{folder}/")]  # a file in the folder's place is none of ours

    def remove_folder(self, folder: str) -> None:
        """Remove a study's folder, if there is one, with all that is in it."""
        try:
            path = self._path(folder)
            if self._local:
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)
                return
            for file in self.files(folder):  # not by `rm`, which takes a root with a `*` or `[` in it as a pattern
                self.remove(file)
            if self._system.exists(path):
                self._system.rmdir(path)
        except Exception as error:  # each file system has its own
            logger.info("checkpoints of %s are not removed: %s", folder, self._reason(error))

    def _fetch(self, file: str, copies: ExitStack) -> Path:
        """A file of the store on this machine: itself where it is here, else a copy that goes with `copies`."""
        path = self._path(file, _FILE)
        if not self._local:
            folder = tempfile.TemporaryDirectory(prefix="momentum-tuner-", ignore_cleanup_errors=True)
            copy = Path(copies.enter_context(folder), "copy")
            self._system.get_file(path, str(copy))
            return copy
        if not os.path.isfile(path):  # to open a pipe would wait for ever
            raise CheckpointError("there is no such file")
        return Path(path)

    def _write(self, path: str, tensors: dict[str, Tensor], headers: dict[str, str]) -> str:
        """Write a file in a folder of its own, then put it under its name; returns its digest."""
        from safetensors.torch import save_file  # loads torch, which takes seconds

        folder, _, name = path.rpartition("/")
        if self._local:
            os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{name}.", suffix=_TEMPORARY, dir=folder if self._local else None, ignore_cleanup_errors=True
        ) as own:
            written = Path(own) / name
            save_file(tensors, written, metadata=headers)
            crash_point("checkpoint-writing")
            with written.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
                if self._local:
                    os.fsync(handle.fileno())
            if self._local:
                _rename(written, Path(path))
            else:
                self._upload(written, path)
        return digest

    def _upload(self, written: Path, path: str) -> None:
        try:
            self._system.put_file(str(written), path)
        except BaseException:
            with suppress(Exception):  # what went wrong first is what counts
                self._system.rm_file(path)
            raise

    def _path(self, inside: str, shape: re.Pattern[str] = _INSIDE) -> str:
        if not shape.fullmatch(inside):
            raise CheckpointError(f"{inside!r} is not the name of a checkpoint or of a study's folder")
        return f"{self._root}/{inside}"

    def _reason(self, error: Exception) -> str:
        """One line, without secrets."""
        if isinstance(error, OSError) and error.strerror:
            return self._hidden(error.strerror)
        lines = str(error).strip().splitlines()
        if isinstance(error, CheckpointError) and lines:
            return lines[0]
        return self._hidden(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)[:300]

    def _hidden(self, text: str) -> str:
        text = redact(text)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class _Reading:
    """The files that one `load` reads: each is fetched and digested once, and complained of once."""

    def __init__(self, store: CheckpointStore, fetched: ExitStack) -> None:
        self._store = store
        self._fetched = fetched
        self._copies: dict[str, _Copy | None] = {}
        self._complained: set[str] = set()

    def slot(self, reference: Reference, ticket: int) -> SavedSlot | None:
        copy = self._copy(reference.file)
        if copy is None:
            return None
        try:
            if copy.digest != reference.digest:
                raise CheckpointError("it is broken or was replaced, its digest is not the one that was noted")
            return copy.slot(ticket)
        except Exception as error:  # whatever safetensors, JSON and torch make of a hostile file
            self._complain(reference.file, error)
            return None

    def _copy(self, file: str) -> _Copy | None:
        if file not in self._copies:
            try:
                self._copies[file] = _Copy(self._store._fetch(file, self._fetched))
            except Exception as error:  # each file system has its own
                self._copies[file] = None
                self._complain(file, error)
        return self._copies[file]

    def _complain(self, file: str, error: Exception) -> None:
        if file not in self._complained:
            self._complained.add(file)
            logger.warning("checkpoint %r is passed over: %s", file, self._store._reason(error))


class _Copy:
    """A file of checkpoints on this machine; it is opened when a slot is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as handle:
            self.digest = hashlib.file_digest(handle, "sha256").hexdigest()

    def slot(self, ticket: int) -> SavedSlot:
        text = self._headers.get(str(ticket))
        if text is None:
            raise CheckpointError(f"it does not hold ticket {ticket}")
        header = json.loads(text)
        if not isinstance(header, dict):
            raise CheckpointError(f"its header of ticket {ticket} is not a mapping")
        names = self._names.get(str(ticket), ())
        tensors = {name: self._content.get_tensor(f"{ticket}/{name}") for name in names}
        return SavedSlot(tensors, header)

    @cached_property
    def _content(self) -> Any:
        # Not mapped into memory, as a mapped file that is cut or goes away on a server ends the process (SIGBUS).
        return safe_open(str(self._path), framework="pt", backend="pread")

    @cached_property
    def _headers(self) -> dict[str, str]:
        return self._content.metadata() or {}

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Names of tensors by ticket."""
        names: dict[str, list[str]] = {}
        for full in self._content.keys():  # noqa: SIM118 - not a mapping
            ticket, _, name = full.partition("/")
            names.setdefault(ticket, []).append(name)
        return names


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: dense, and no two in the same memory. Copies only those that are not."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name, tensor in sorted(dense.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            dense[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return dense


def _rename(written: Path, path: Path) -> None:
    """Put a file under its name for good, readable by those who can read its folder."""
    with suppress(OSError):  # some network file systems have no modes
        written.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only its owner
    os.replace(written, path)
    folder = os.open(path.parent, os.O_RDONLY)
    with suppress(OSError):  # some cannot
        os.fsync(folder)
    os.close(folder)


def _secrets(url: str) -> list[str]:
    """User and password of a URL in the forms that a library may show, longest first."""
    before, at, _ = url.rpartition("@")
    if not at or "://" not in before:
        return []
    both = before.partition("://")[2]
    shown = {both, unquote(both), both.partition(":")[2], unquote(both.partition(":")[2])}
    return sorted(shown - {""}, key=len, reverse=True)
