"""From a study file's `task.factory` to a `Task`, importing nothing that the user does not trust.

A factory is `momentum_tuner.tasks:<name>` for a built-in task, `package.module:function`, or
`file.py:function` with a path relative to the study file's folder. No torch is imported until one is loaded.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import BUILT_IN

if TYPE_CHECKING:
    from momentum_tuner.tasks.loop import Loop
    from momentum_tuner.tasks.task import Task

_BUILT_IN_MODULE = "momentum_tuner.tasks"
_IDENTIFIER = r"[^\W\d]\w*"
_MODULE = re.compile(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*")
_FILE = re.compile(r"[^\\\x00-\x1f\x7f:]+\.py")

_loading = 0
_beside_studies: set[str] = set()
"""Modules that were found only in a study's folder: the next study may mean others by the same names."""


@dataclass(frozen=True)
class _Reference:
    """A factory's parts: the callable's name, and either a module's name or a file's absolute path."""

    text: str
    module: str | None
    file: Path | None
    name: str

    @property
    def built_in(self) -> bool:
        return self.module is not None and _within(self.module, _BUILT_IN_MODULE)

    @property
    def trusted_by(self) -> str:
        return self.module if self.module is not None else str(self.file)


def trust_of(factory: str, base: Path | None) -> str | None:
    """The entry of `trusted` by which a user who names this study file on the command line trusts its task.

    Args:
        factory: `task.factory` of the study file.
        base: the study file's folder; None if it is not known.

    Returns:
        the module's full name, the absolute path of the .py file, or None for a built-in task.

    Raises:
        TaskError: `factory` is malformed, or a file outside `base`.
    """
    reference = _parse(factory, base)
    return None if reference.built_in else reference.trusted_by


def check_trust(factory: str, base: Path | None, trusted: Collection[str]) -> None:
    """See that a factory may be imported, without importing anything; the arguments are those of `load_task`.

    Raises:
        TaskError: it is malformed, a file outside `base`, or not trusted.
    """
    _trusted(factory, base, trusted)


def is_loading() -> bool:
    """Whether a task is being loaded now, so that who asks is called by the user's file as it is imported."""
    return _loading > 0


@contextmanager
def _noted() -> Iterator[None]:
    global _loading
    _loading += 1
    try:
        yield
    finally:
        _loading -= 1


def _trusted(factory: str, base: Path | None, trusted: Collection[str]) -> _Reference:
    reference = _parse(factory, base)
    if not reference.built_in and not _is_trusted(reference, trusted):
        entry = reference.trusted_by
        raise TaskError(f"task.factory {factory!r} is not trusted: add --trust {shlex.quote(entry)} if it is yours")
    return reference


def load_task(
    factory: str, params: Mapping[str, Any], *, base: Path | None, trusted: Collection[str] = ()
) -> Task | Loop:
    """Import a factory, if it is trusted, and call it.

    While it loads, `base` and the working directory are importable. A file is read anew each time.

    Args:
        factory: `momentum_tuner.tasks:<name>`, `package.module:function`, or `file.py:function` in `base`.
        params: the factory's arguments by name.
        base: the study file's folder; None if it is not known.
        trusted: names of packages or modules, each trusting all below it, and absolute paths of .py files.

    Raises:
        TaskError: in one line, why the factory is refused (before anything is imported), is not found, or
            does not take `params`; what it raised and where; or what it returned in place of a `Task` or `Loop`.
    """
    reference = _trusted(factory, base, trusted)
    from momentum_tuner.tasks.loop import Loop
    from momentum_tuner.tasks.task import Task, user_code

    with _noted(), _importable(reference, base):
        build = _callable(reference)
        _check_origin(reference, build, trusted)
        _check_params(factory, build, params)
        with user_code(f"task.factory {factory!r}"):
            task = build(**params)
    if not isinstance(task, Task | Loop):
        kind = type(task).__name__
        raise TaskError(f"task.factory {factory!r} must return a momentum_tuner.Task, not {kind}")
    return task


def load_usable_task(
    factory: str,
    params: Mapping[str, Any],
    metrics: Collection[str],
    *,
    base: Path | None,
    trusted: Collection[str] = (),
) -> Task | Loop:
    """As `load_task`, and see that the task can be trained and measures all that is asked for.

    Args:
        factory: see `load_task`.
        params: see `load_task`.
        metrics: what a search aims at.
        base: see `load_task`.
        trusted: see `load_task`.

    Raises:
        TaskError: it cannot be loaded or trained, or has no such metric.
    """
    from momentum_tuner.tasks.task import check_objective, check_task

    task = load_task(factory, params, base=base, trusted=trusted)
    check_task(task)
    for metric in metrics:
        check_objective(metric, task)
    return task


def _parse(factory: str, base: Path | None) -> _Reference:
    where, _, name = factory.rpartition(":")
    if re.fullmatch(_IDENTIFIER, name):
        if _FILE.fullmatch(where):
            return _Reference(factory, None, _file(factory, where, base), name)
        if _MODULE.fullmatch(where):
            return _Reference(factory, where, None, name)
    raise TaskError(f"task.factory {factory!r} must be package.module:function or file.py:function")


def _file(factory: str, where: str, base: Path | None) -> Path:
    """The file's absolute path with links resolved, inside `base`."""
    path = PurePosixPath(where)
    if path.is_absolute() or ".." in path.parts:
        raise TaskError(f"task.factory {factory!r} must name a file in the study file's folder or below it")
    if base is None:
        raise TaskError(f"task.factory {factory!r} is a file, but the study file's folder is not known here")
    folder = base.resolve()
    resolved = (folder / path).resolve()
    if not resolved.is_relative_to(folder):
        raise TaskError(f"task.factory {factory!r} is a link that leaves the study file's folder, {folder}")
    return resolved


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _is_trusted(reference: _Reference, trusted: Collection[str]) -> bool:
    if reference.module is not None:
        return any(_within(reference.module, entry) for entry in trusted)
    files = (Path(entry) for entry in trusted if entry.endswith(".py"))
    return any(file.is_absolute() and file.resolve() == reference.file for file in files)


@contextmanager
def _importable(reference: _Reference, base: Path | None) -> Iterator[None]:
    """Make the study's folder and the working directory importable, unless the module is found without."""
    for name in _beside_studies:
        sys.modules.pop(name, None)
    _beside_studies.clear()
    importlib.invalidate_caches()
    if reference.built_in or (reference.module is not None and _is_installed(reference.module)):
        yield
        return
    folders = [folder.resolve() for folder in (base, Path.cwd()) if folder is not None]
    known = {Path(entry).resolve() for entry in sys.path}
    added = [str(folder) for folder in dict.fromkeys(folders) if folder not in known]
    before = set(sys.modules)
    sys.path[:0] = added
    try:
        yield
    finally:
        for entry in added:
            sys.path.remove(entry)
        new = set(sys.modules) - before
        _beside_studies.update(name for name in new if _is_directly_in(name, added))


def _is_installed(module: str) -> bool:
    """Whether the module's top-level package is on the import path already; a bare folder does not count."""
    top = module.partition(".")[0]
    if top in sys.modules:
        return True
    spec = importlib.util.find_spec(top)
    return spec is not None and spec.origin is not None


def _is_directly_in(module: str, folders: list[str]) -> bool:
    """Whether the module's top-level package lies in one of the folders, and not in a venv further down."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None or top == "momentum_tuner":
        return False
    path = Path(file).resolve()
    place = path.parent.parent if path.name == "__init__.py" else path.parent
    return str(place) in folders


def _callable(reference: _Reference) -> Callable[..., Any]:
    from momentum_tuner.tasks.task import user_code

    if reference.built_in:
        return _built_in(reference)
    what = f"task.factory {reference.text!r}"
    if reference.file is not None:
        if not reference.file.is_file():
            raise TaskError(f"{what}: there is no file {reference.file}")
        with user_code(what):
            module = _import_file(reference.file)
    else:
        module = _import_module(what, str(reference.module))
    try:
        with user_code(what):  # the module may have a __getattr__ of its own
            build: Any = getattr(module, reference.name)
    except TaskError as error:
        if not isinstance(error.__cause__, AttributeError):
            raise
        names = [name for name in vars(module) if not name.startswith("_")]
        hint = _near(reference.name, names)
        raise TaskError(f"{what}: {_shown(module)} has no {reference.name!r}{hint}") from None
    if not callable(build):
        raise TaskError(f"{what} is not a function, but {type(build).__name__}")
    return build  # type: ignore[no-any-return]


def _shown(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


def _near(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _built_in(reference: _Reference) -> Callable[..., Any]:
    if reference.module != _BUILT_IN_MODULE or reference.name not in BUILT_IN:
        hint = _near(reference.name, BUILT_IN)
        names = ", ".join(BUILT_IN)
        raise TaskError(
            f"task.factory {reference.text!r} is not a built-in task{hint}; {_BUILT_IN_MODULE} has: {names}"
        )
    module, _, name = BUILT_IN[reference.name].partition(":")
    build: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return build


def _import_module(what: str, name: str) -> ModuleType:
    from momentum_tuner.tasks.task import user_code

    try:
        with user_code(what):
            return importlib.import_module(name)
    except TaskError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name is not None and _within(name, cause.name):
            looked = "the study file's folder, the working directory and the installed packages"
            raise TaskError(f"{what}: no module {cause.name!r} in {looked}") from None
        raise


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source every time: a .pyc survives a change of the file within a second, at equal size."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _import_file(path: Path) -> ModuleType:
    stem = re.sub(r"\W", "_", path.stem)
    name = f"_task_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, _SourceLoader(name, str(path)), origin=str(path))
    assert spec is not None and spec.loader is not None
    spec.has_location = True  # as for any file: the module gets its __file__
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if previous is None:
            del sys.modules[name]
        else:
            sys.modules[name] = previous
        raise
    return module


def _check_origin(reference: _Reference, build: Callable[..., Any], trusted: Collection[str]) -> None:
    """Refuse what a trusted module only imported, such as `my_task:system` after `from os import system`."""
    if reference.built_in:
        return
    origin: Any = build
    while isinstance(origin, functools.partial):
        origin = origin.func
    if not hasattr(origin, "__qualname__"):
        origin = type(origin)
    module = getattr(origin, "__module__", None) or "builtins"
    name = origin.__qualname__
    if reference.module is not None:
        at_home = _within(module, reference.module.partition(".")[0])
    else:
        at_home = getattr(sys.modules.get(module), "__file__", None) == str(reference.file)
    if at_home or f"{module}:{name}" in BUILT_IN.values() or any(_within(module, entry) for entry in trusted):
        return
    raise TaskError(
        f"task.factory {reference.text!r} is {module}.{name}, which is not trusted: "
        f"add --trust {shlex.quote(module)} if it is yours"
    )


def _check_params(factory: str, build: Callable[..., Any], params: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature: the call itself will tell
        return
    named = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    shown = ", ".join(
        name if parameter.default is parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in named.items()
    )
    takes = f"{factory} takes {shown or 'no parameters'}"
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        for name in params:
            if name not in named:
                hint = _near(str(name), named)
                raise TaskError(f"task.params: {name!r} is unknown{hint}; {takes}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in params:
            raise TaskError(f"task.params: {name!r} is missing; {takes}")
