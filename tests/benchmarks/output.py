"""What every benchmark here prints: tables for people, rows for programs, and the machine that they are from."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from momentum_tuner.launcher.devices import available_cores


class Output:
    """Where a benchmark prints: to standard output, or with `--json` to standard error, and rows at the end.

    Args:
        as_json: whether a program reads standard output.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._machine = machine()  # before it is busy
        self.aside = Console(stderr=True)
        """For what is not a result."""
        self._console = self.aside if as_json else Console()

    def table(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)

    def line(self, text: str = "") -> None:
        """Print a line as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self, rows: Sequence[Any]) -> None:
        """Print the machine, and the rows (dataclasses) if they are wanted."""
        for text in self._machine:
            self.line(text)
        if self._as_json:
            json.dump([asdict(row) for row in rows], sys.stdout, indent=2)
            print()


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line, with `--json`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout, the rest on stderr")
    return parser


def at_least(kind: type[int] | type[float], lowest: float) -> Callable[[str], float]:
    """A number of the command line that is not below `lowest`."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= lowest:
            raise argparse.ArgumentTypeError(f"{text} is below {lowest:g}")
        return value

    return number


def machine() -> list[str]:
    """Hardware, versions, and when."""
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return [
        f"{processor()}, {available_cores()} cores{load}",
        f"torch {version('torch')}, Python {platform.python_version()}, momentum-tuner {version('momentum-tuner')}, "
        f"{platform.platform()}",
        datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    ]


def processor() -> str:
    """The CPU's model."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
