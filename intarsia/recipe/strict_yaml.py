"""The small, predictable part of YAML that recipes are written in.

Text, whole numbers, decimal numbers, true/false/null, lists and mappings; nothing else. Anchors, aliases and tags are
refused (an alias can blow a small file up to any size), and so are keys that appear twice, more than one document
and deep nesting. Words such as `no`, dates, and `8:4` are text, as in the YAML 1.2 core schema, so that a variant may
be called `8`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from intarsia.errors import UserError

MAX_CHARACTERS = 2**20
_MAX_NESTING = 32
_MAX_DIGITS = 600  # Python itself may refuse to read longer numbers.

_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)
_NULL = ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""])


class InlineList(list[Any]):
    """A list that is written on one line."""


class InlineMap(dict[str, Any]):
    """A mapping that is written on one line."""


class _Loader(yaml.SafeLoader):
    """The safe loader without YAML's expansions."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    nesting = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=event.start_mark)
        self.nesting += 1
        if self.nesting > _MAX_NESTING:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.nesting -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a name or a number", problem_mark=key_node.start_mark)
            key = self.construct_object(key_node)
            if key in found:
                raise yaml.MarkedYAMLError(problem=f"{key!r} appears twice", problem_mark=key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=True)
        return found

    def construct_number(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise yaml.MarkedYAMLError(problem="a number has too many digits", problem_mark=node.start_mark)
        return int(node.value)

    def construct_decimal(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes what the loader, or a reader of YAML 1.1, would not take for text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.Node:
        # Line breaks of all kinds are escaped: the plain and single-quoted styles would read back as spaces.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')

    def represent_inline_list(self, data: InlineList) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_inline_map(self, data: InlineMap) -> yaml.Node:
        return self.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)


for _kind in (_Loader, _Dumper):
    for _tag, _pattern, _first in _RESOLVERS:
        _kind.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
    _kind.add_implicit_resolver(_NULL[0], re.compile(_NULL[1]), _NULL[2])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_decimal)
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(InlineList, _Dumper.represent_inline_list)
_Dumper.add_representer(InlineMap, _Dumper.represent_inline_map)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: dict, list, str, int, float, bool or None.

    Raises:
        yaml.YAMLError: the text is not of the YAML that this module reads.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"more than {MAX_CHARACTERS} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path, *, what: str) -> Any:
    """The value of a YAML file; `what` is what it should hold, as `a recipe`.

    Raises:
        UserError: there is no such file, or it is not of the YAML that this module reads.
    """

    def unusable(expected: str, found: str, remedy: str) -> UserError:
        return UserError.of(where=str(path), expected=expected, found=found, remedy=remedy)

    if not path.is_file():
        found = "something else" if path.exists() else "no such file"
        raise unusable(f"{what} file", found, "Check the path.")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CHARACTERS * 4 + 1)
        return parse_yaml(raw.decode("utf-8"))
    except OSError as error:
        raise unusable(f"{what} that can be read", str(error.strerror), "Check its permissions.") from None
    except UnicodeDecodeError as error:
        raise unusable("UTF-8 text", f"another byte at {error.start}", "Save it as UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise unusable("YAML", f"{error.problem}{place}", "Mend that place.") from None
    except yaml.YAMLError as error:
        raise unusable("YAML", " ".join(str(error).split())[:200], "Mend the file.") from None


def dump_yaml(value: Any) -> str:
    """YAML text that `parse_yaml` reads back as the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text
