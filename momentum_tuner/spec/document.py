"""The text of a study file: a small, safe part of YAML, read into plain values and written back.

Of YAML 1.1 as PyYAML reads it, this leaves out what surprises: `1e-4` is a number and not text, `010` is ten, `1:30`
and `2026-01-01` are text. Tags, anchors, aliases, merge keys and repeated keys are refused.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from momentum_tuner.errors import StudyFileError
from momentum_tuner.spec.mistakes import shown

_DEEPEST = 20
_LONGEST_NUMBER = 100
_LONGEST_FILE = 1_000_000

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    "int": (r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
"""How plain text is understood: the first kind whose pattern fits, and the characters it may begin with."""


class _Refused(yaml.MarkedYAMLError):
    """Something that YAML allows and a study file does not."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.mistakes: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(problem="anchors (&) and aliases (*) are not allowed", problem_mark=event.start_mark)
        if tag := getattr(event, "tag", None):
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(
                problem=f"the tag {shown(tag)} is not allowed; a study file holds only plain values",
                problem_mark=event.start_mark,
            )
        if self.depth == _DEEPEST:
            raise _Refused(problem=f"more than {_DEEPEST} levels deep", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not key_node.tag.endswith(":str"):
                value = key_node.value if isinstance(key_node, yaml.ScalarNode) else "[...]"
                self.mistakes.append(f"line {line}: the key {shown(value)} is not allowed; a key must be text")
                continue
            key = key_node.value
            if key in lines:
                self.mistakes.append(f"line {line}: the key {shown(key)} is here already on line {lines[key]}")
            lines.setdefault(key, line)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value.replace("_", "")
        if len(text) > _LONGEST_NUMBER:
            raise _Refused(problem="this number is too long", problem_mark=node.start_mark)
        if node.tag.endswith(":int"):
            return int(text, 16) if text.startswith("0x") else int(text)
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _kind, (_pattern, _first) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def read_document(text: str, source: str) -> tuple[dict[str, object], list[str]]:
    """The mapping that `text` holds, and lines for the mistakes that did not keep it from being read.

    Raises:
        StudyFileError: it is not YAML, or YAML of a kind that a study file must not hold.
    """
    if len(text) > _LONGEST_FILE:
        raise StudyFileError(f"{source}: is larger than 1 MB; that is no study file")
    try:
        loader = _Loader(text)
        document = loader.get_single_data()
    except _Refused as error:
        raise StudyFileError(f"{source}: line {_line(error)}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or "it cannot be read"
        if "'\\t'" in problem:
            problem = "a tab is not allowed here; indent with spaces"
        raise StudyFileError(f"{source}: line {_line(error)}: is not valid YAML: {problem}") from None
    except yaml.YAMLError:
        raise StudyFileError(f"{source}: is not valid YAML: it holds control characters") from None
    if document is None:
        raise StudyFileError(f"{source}: is empty; a study file begins with 'name: ...'")
    if not isinstance(document, dict):
        raise StudyFileError(f"{source}: must be a mapping that begins with 'name: ...', not {shown(document)}")
    return document, [f"{source}: {line}" for line in loader.mistakes]


def write_document(document: Mapping[str, object]) -> str:
    """The mapping as YAML that `read_document` reads back to the same values."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def read_text(path: str, content: bytes) -> str:
    """The content of a study file as text."""
    if len(content) > _LONGEST_FILE:
        raise StudyFileError(f"{path}: is larger than 1 MB; that is no study file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StudyFileError(f"{path}: line {line}: is not UTF-8 text; save the file as UTF-8") from None


def _line(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1
