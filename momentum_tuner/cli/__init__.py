"""The command line: a thin skin. Each command parses, calls the library and prints."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import Any

import click

from momentum_tuner.errors import MomentumTunerError
from momentum_tuner.leaving import leave

COMMANDS = {
    "init": "momentum_tuner.cli.start:init",
    "run": "momentum_tuner.cli.run:run",
    "resume": "momentum_tuner.cli.run:resume",
    "submit": "momentum_tuner.cli.run:submit",
    "worker": "momentum_tuner.cli.run:worker",
    "status": "momentum_tuner.cli.look:status",
    "list": "momentum_tuner.cli.look:list_command",
    "best": "momentum_tuner.cli.look:best",
    "compare": "momentum_tuner.cli.compare:compare",
    "report": "momentum_tuner.cli.report:report",
    "replay": "momentum_tuner.cli.replay:replay",
    "ui": "momentum_tuner.cli.ui:ui",
    "publish": "momentum_tuner.cli.ui:publish",
    "register": "momentum_tuner.cli.register:register",
    "delete": "momentum_tuner.cli.look:delete",
    "doctor": "momentum_tuner.cli.doctor:doctor",
}
"""Where each command is defined, in the order in which help lists them; a module is imported when it is asked for."""


class Refusal(click.ClickException):
    """An error of momentum-tuner as click shows it: its message, and its exit code."""

    def __init__(self, error: MomentumTunerError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


class LazyGroup(click.Group):
    """Imports a command's module only when that command is used, and ends errors in one line with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; errors of momentum-tuner become errors of click, and a reader who has seen enough is none."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # not left to click, which exits with 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except MomentumTunerError as error:
            raise Refusal(error) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        found = getattr(import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name in the message for a misspelt one."""
        if args and args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            if near:
                ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="momentum-tuner", prog_name="momentum-tuner")
def cli() -> None:
    r"""Which of SGD, momentum and Nesterov trains your PyTorch model fastest and most stably, and at which settings.

    \b
    momentum-tuner init demo && cd demo      a study file and a task file to start from
    momentum-tuner run study.yaml            tune them, well under a minute
    momentum-tuner best demo --format torch  the line to paste into your script
    momentum-tuner compare demo              which is faster, and how sure that is
    momentum-tuner ui                        every run in MLflow

    \b
    In bash, TAB completes commands, options and names of studies after
    eval "$(_MOMENTUM_TUNER_COMPLETE=bash_source momentum-tuner)"
    (zsh: zsh_source; fish: _MOMENTUM_TUNER_COMPLETE=fish_source momentum-tuner | source).
    """


def main() -> None:
    """Entry point: exit 0 when done, 1 when the work failed, 2 on wrong use or bad input, 130 when interrupted."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    gc.set_threshold(100_000)  # what is imported is many objects and no garbage
    try:
        code = cli.main(prog_name="momentum-tuner", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        code = 130
    leave(code if isinstance(code, int) else 0)
