"""Which of SGD, momentum and Nesterov trains your PyTorch model fastest and most stably, and how sure.

What a task file imports from here is loaded on first use, so that `import momentum_tuner` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from momentum_tuner.tasks.adapters import from_huggingface, from_lightning
    from momentum_tuner.tasks.loop import Loop, LoopContext
    from momentum_tuner.tasks.task import Task

    __version__: str

__all__ = ["Loop", "LoopContext", "Task", "__version__", "from_huggingface", "from_lightning"]


def __getattr__(name: str) -> object:
    if name in __all__ and name != "__version__":
        from momentum_tuner import tasks

        return getattr(tasks, name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("momentum-tuner")
        except PackageNotFoundError:  # a source tree that nobody installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
