"""What is trained: `Task`, `Loop`, the tasks built in, and the loader of a study file's `task.factory`.

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from momentum_tuner.tasks.adapters import from_huggingface, from_lightning
    from momentum_tuner.tasks.content import describe_data
    from momentum_tuner.tasks.digits import digits_cnn, digits_mlp, digits_rnn, digits_transformer
    from momentum_tuner.tasks.landscapes import double_well, quadratic, rosenbrock
    from momentum_tuner.tasks.loader import check_trust, is_loading, load_task, load_usable_task, trust_of
    from momentum_tuner.tasks.loop import Loop, LoopContext
    from momentum_tuner.tasks.task import Task, check_objective, check_task

__all__ = [
    "BUILT_IN",
    "Loop",
    "LoopContext",
    "Task",
    "check_objective",
    "check_task",
    "check_trust",
    "describe_data",
    "digits_cnn",
    "digits_mlp",
    "digits_rnn",
    "digits_transformer",
    "double_well",
    "from_huggingface",
    "from_lightning",
    "is_loading",
    "load_task",
    "load_usable_task",
    "quadratic",
    "rosenbrock",
    "trust_of",
]

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "quadratic": "momentum_tuner.tasks.landscapes:quadratic",
        "rosenbrock": "momentum_tuner.tasks.landscapes:rosenbrock",
        "double_well": "momentum_tuner.tasks.landscapes:double_well",
        "digits_mlp": "momentum_tuner.tasks.digits:digits_mlp",
        "digits_cnn": "momentum_tuner.tasks.digits:digits_cnn",
        "digits_rnn": "momentum_tuner.tasks.digits:digits_rnn",
        "digits_transformer": "momentum_tuner.tasks.digits:digits_transformer",
    }
)
"""The built-in tasks by name, `momentum_tuner.tasks:<name>` in a study file, and where each is defined."""

_EXPORTS = {
    **BUILT_IN,
    "Loop": "momentum_tuner.tasks.loop:Loop",
    "LoopContext": "momentum_tuner.tasks.loop:LoopContext",
    "Task": "momentum_tuner.tasks.task:Task",
    "check_objective": "momentum_tuner.tasks.task:check_objective",
    "check_task": "momentum_tuner.tasks.task:check_task",
    "check_trust": "momentum_tuner.tasks.loader:check_trust",
    "from_huggingface": "momentum_tuner.tasks.adapters:from_huggingface",
    "from_lightning": "momentum_tuner.tasks.adapters:from_lightning",
    "is_loading": "momentum_tuner.tasks.loader:is_loading",
    "describe_data": "momentum_tuner.tasks.content:describe_data",
    "load_task": "momentum_tuner.tasks.loader:load_task",
    "load_usable_task": "momentum_tuner.tasks.loader:load_usable_task",
    "trust_of": "momentum_tuner.tasks.loader:trust_of",
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
