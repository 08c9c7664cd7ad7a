"""Which of SGD, momentum and Nesterov trains your PyTorch model fastest and most stably, and how sure.

`Task`, `Loop` and the adapters are what a task file imports from here; the rest does what the command line does, for a
script or a notebook:

    from momentum_tuner import Study, run

    result = run(Study.from_yaml("study.yaml"))

All of it is loaded on first use, so that `import momentum_tuner` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from momentum_tuner.api import Study, StudyResult, best, compare, resume, run
    from momentum_tuner.tasks.adapters import from_huggingface, from_lightning
    from momentum_tuner.tasks.loop import Loop, LoopContext
    from momentum_tuner.tasks.task import Task

    __version__: str

__all__ = [
    "Loop",
    "LoopContext",
    "Study",
    "StudyResult",
    "Task",
    "__version__",
    "best",
    "compare",
    "from_huggingface",
    "from_lightning",
    "resume",
    "run",
]

_PLACES = {
    "Task": "momentum_tuner.tasks.task",
    **dict.fromkeys(("Loop", "LoopContext"), "momentum_tuner.tasks.loop"),
    **dict.fromkeys(("from_huggingface", "from_lightning"), "momentum_tuner.tasks.adapters"),
    **dict.fromkeys(("Study", "StudyResult", "best", "compare", "resume", "run"), "momentum_tuner.api"),
}


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("momentum-tuner")
        except PackageNotFoundError:  # a source tree that nobody installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
