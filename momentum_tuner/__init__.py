"""Which of SGD, momentum and Nesterov trains your PyTorch model fastest and most stably, and how sure.

`Task` is what a task file imports from here. It is loaded on first use, so that `import momentum_tuner` stays
cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from momentum_tuner.tasks.task import Task

    __version__: str

__all__ = ["Task", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Task":
        from momentum_tuner.tasks.task import Task

        return Task
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("momentum-tuner")
        except PackageNotFoundError:  # a source tree that nobody installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
