"""Files of plain data: a strict subset of YAML, and pydantic models whose problems are all reported at once.

YAML here is text, whole numbers, decimal numbers, true/false/null, lists and mappings. Anchors, aliases and tags are
refused (an alias can blow a small file up to any size), and so are duplicate keys, several documents and deep nesting.
Words such as `no`, dates and `8:4` are text, as in the YAML 1.2 core schema, so that a variant may be called `8`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from intarsia.errors import Problem, UserError, in_words, mismatch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_CHARACTERS = 2**20
MAX_INDEX = 2**31 - 1
_MAX_NESTING = 32
_MAX_DIGITS = 600  # Python itself may refuse to read longer numbers.

# Models


class Strict(BaseModel):
    """A model that refuses unknown keys and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=BaseModel)

_EXPECTED = {
    "missing": "a value",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "literal_error": "one of {expected}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than_equal": "a number of at most {le:g}",
}


def unexpected(expected: str, found: str = "", remedy: str = "") -> PydanticCustomError:
    """The error for a validator to raise; `found` and `remedy` default to the input and the file's remedy."""
    return PydanticCustomError("unexpected", "{expected}", {"expected": expected, "found": found, "remedy": remedy})


def one_line(value: str) -> str:
    """Check that a text is one printable line, and return it."""
    if value.strip() and value.isprintable() and len(value) <= 4096:
        return value
    raise unexpected("one line of text")


Text: TypeAlias = Annotated[str, AfterValidator(one_line)]

Misplaced = tuple[tuple[int | str, ...], PydanticCustomError, Any]
"""A path below a validator's value, the error there, and the value there."""


def raise_misplaced(wrong: Sequence[Misplaced]) -> None:
    """Raise the errors that a validator found below its own value, if there are any."""
    if wrong:
        details = [InitErrorDetails(type=error, loc=path, input=value) for path, error, value in wrong]
        raise ValidationError.from_exception_data("", details)


def checked(model: type[Model], data: Any, *, where: str, remedy: str) -> Model:
    """Validate plain data as a model.

    Args:
        where: the file's name, for messages.
        remedy: for problems without a remedy of their own.

    Raises:
        UserError: with every problem.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise refusal(problems_of(error, model, where=where, remedy=remedy), where=where) from None


def problems_of(error: ValidationError, model: type[BaseModel], *, where: str, remedy: str) -> Iterator[Problem]:
    """The problems in an error of pydantic."""
    for detail in error.errors(include_url=False):
        # The tag of a union starts with a colon; it is not in the data. An unknown key, the last step, may be anything.
        last = len(detail["loc"]) - 1 if detail["type"] == "extra_forbidden" else -1
        path = [
            step
            for at, step in enumerate(detail["loc"])
            if at == last or (step != "[key]" and not str(step).startswith(":"))
        ]
        place = place_of(path)
        expected, found, own_remedy = _expectation(detail, model, path)
        yield mismatch(f"{where}: {place}" if place else where, expected, found, own_remedy or remedy)


def refusal(problems: Iterable[Problem], *, where: str, most: int = 50) -> UserError:
    """The error with these problems, at most `most`; the number of the others is reported at `where`."""
    listed = list(problems)
    rest = len(listed) - most
    if rest > 0:
        listed[most:] = [mismatch(where, "no more of these", f"{rest} more problems", "Correct the first ones.")]
    return UserError(listed)


def place_of(path: Iterable[int | str]) -> str:
    """A place in plain data: `layers[3].concat.cuts`."""
    place = ""
    for step in path:
        if isinstance(step, int):
            place += f"[{step}]"
        else:
            name = step if step.isprintable() and 0 < len(step) <= 60 else shown(step)
            place += f".{name}" if place else name
    return place


def shown(value: Any) -> str:
    """A value in a message: short, on one line."""
    if isinstance(value, (Mapping, list)):
        return "a mapping" if isinstance(value, Mapping) else f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) > MAX_INDEX:
        return "a huge number"
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


def _expectation(detail: ErrorDetails, model: type[BaseModel], path: Sequence[int | str]) -> tuple[str, str, str]:
    """The expectation, the value found, and the remedy (empty: the file's own)."""
    kind, context, found = detail["type"], detail.get("ctx", {}), shown(detail["input"])
    if kind == "unexpected":
        return context["expected"], context.get("found") or found, context.get("remedy", "")
    if kind == "extra_forbidden":
        expected = f"one of {', '.join(_keys(model, path[:-1]))}"
        return expected, f"the unknown key {shown(path[-1])}", "Remove it, or correct its spelling."
    if kind == "model_type":
        return f"a mapping with {', '.join(_keys(model, path))}", found, ""
    if kind == "missing":
        return "a value", "nothing", "Add it."
    if kind in ("too_short", "too_long"):
        found = str(context["actual_length"])
    expected = _EXPECTED.get(kind) or detail["msg"].removeprefix("Input should be ")
    return expected.format(**context) if kind in _EXPECTED else expected, found, ""


def _keys(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """The keys of the models at a place in the data."""
    models = [model]
    for step in path:
        fields = {field.alias or name: field for kind in models for name, field in kind.model_fields.items()}
        if isinstance(step, str) and step in fields:
            models = list(_models_in(fields[step].annotation))
    return [field.alias or name for kind in models for name, field in kind.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


# YAML

_DIGITS = "-+0123456789"
_RESOLVERS = (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+$", [*_DIGITS]),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        [*_DIGITS, "."],
    ),
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
)
"""The types of plain scalars, and their first characters; PyYAML matches from the start."""


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

    def construct_text(self, node: yaml.ScalarNode) -> str:
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise yaml.MarkedYAMLError(
                problem="half of a surrogate pair, which UTF-8 cannot hold", problem_mark=node.start_mark
            )
        return str(node.value)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise yaml.MarkedYAMLError(problem="a number has too many digits", problem_mark=node.start_mark)
        return int(node.value)

    def construct_decimal(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which also quotes what this loader, or a YAML 1.1 reader, would not read as text."""

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
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_decimal)
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(InlineList, _Dumper.represent_inline_list)
_Dumper.add_representer(InlineMap, _Dumper.represent_inline_map)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: dict, list, str, int, float, bool or None.

    Raises:
        yaml.YAMLError: the text is not in the subset of YAML that this module reads.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"more than {MAX_CHARACTERS} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path, *, what: str) -> Any:
    """The value of a YAML file; `what` is its expected content, such as `a recipe`.

    Raises:
        UserError: there is no such file, or it is not in the subset of YAML that this module reads.
    """

    def unusable(expected: str, found: str, remedy: str) -> UserError:
        return UserError([mismatch(path, expected, found, remedy)])

    if not path.is_file():
        found = "something else" if path.exists() else "no such file"
        raise unusable(f"{what} file", found, "Check the path.")
    try:
        with path.open("rb") as file:
            return parse_yaml(file.read(MAX_CHARACTERS * 4 + 1).decode("utf-8"))
    except OSError as error:
        raise unusable(f"{what} that can be read", str(error.strerror), "Check its permissions.") from None
    except UnicodeDecodeError as error:
        raise unusable("UTF-8 text", f"another byte at {error.start}", "Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is None:
            raise unusable("YAML", in_words(error), "Correct the file.") from None
        found = f"{getattr(error, 'problem', None)} in line {mark.line + 1}, column {mark.column + 1}"
        raise unusable("YAML", found, "Correct that place.") from None


def dump_yaml(value: Any) -> str:
    """YAML text from which `parse_yaml` reads the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


# TOML


def read_toml(file: Any) -> dict[str, Any]:
    """The value of a TOML file, given as a path or a package resource."""
    return tomllib.loads(file.read_text(encoding="utf-8"))
