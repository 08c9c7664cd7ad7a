"""A page of Markdown whose code blocks are marked, each with what a test does with it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_BLOCK = re.compile(r"<!-- (?P<what>[^>]+?) -->\n```\w*\n(?P<text>.*?)```", re.DOTALL)


class Page:
    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        self.blocks = [(found["what"], found["text"]) for found in _BLOCK.finditer(self.text)]

    def commands(self, about: str) -> list[list[str]]:
        """The arguments of each command of the blocks `commands on <about>`, without the program."""
        texts = [text for what, text in self.blocks if what == f"commands on {about}"]
        lines = [line for text in texts for line in text.replace("\\\n", " ").strip().splitlines()]
        return [shlex.split(line)[1:] for line in lines]

    def block(self, what: str) -> str:
        """The one block of that mark."""
        (text,) = [t for w, t in self.blocks if w == what]
        return text
