"""Dataclass fields as flags: names, help, conversion, plain data.

A field needs only its type, default and comment:

    @dataclass(frozen=True, kw_only=True)
    class ComeSettings:
        # Adjacent layers to merge in a step.
        merge: int = 2

is `--merge` on the command line and `merge:` in a config file, with the comment as help. Use `flag()` as the default
for other names, or another conversion. This module is independent of the library that parses the command line.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from intarsia.errors import Problem, Problems, UserError

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TOKENS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The flags and help of a field (by `flag()`) or of a verb's parameter (in `Annotated[...]`)."""

    # Its flags with dashes, the main one first; () derives one from the field's name.
    names: tuple[str, ...] = ()
    # One or two sentences; for a field its comment.
    help: str = ""
    # The placeholder of the value in the help.
    metavar: str | None = None
    # Whether it is a positional argument.
    positional: bool = False
    # Parses its text, if the type is not enough; raises UserError.
    parse: Callable[[str], Any] | None = None
    # Whether commas separate the items of a list.
    commas: bool = True


def flag(default: Any = MISSING, *names: str, metavar: str | None = None, **how: Any) -> Any:
    """A dataclass field with explicit flags; see `Flag` for the other arguments."""
    return dataclasses.field(default=default, metadata={"flag": Flag(names=names, metavar=metavar, **how)})


@dataclass(frozen=True, kw_only=True)
class Option:
    """One flag of a command, with the field or parameter that it sets."""

    # The field or parameter.
    attribute: str
    annotation: Any
    # MISSING if it is required.
    default: Any
    help: str
    flag: Flag

    @property
    def names(self) -> tuple[str, ...]:
        """All its flags, with dashes."""
        return self.flag.names or (f"--{self.attribute.replace('_', '-')}",)

    @property
    def key(self) -> str:
        """Its name in a config file: the flag without dashes; for a positional, the attribute."""
        long = next((name for name in self.names if name.startswith("--")), self.names[0])
        return self.attribute if self.flag.positional else long.lstrip("-")

    @property
    def called(self) -> str:
        """Its name in errors."""
        return (self.flag.metavar or self.attribute.upper()) if self.flag.positional else f"--{self.key}"

    @property
    def kind(self) -> Any:
        """The type of its value, or of one item, without None."""
        kind = _without_none(self.annotation)
        return get_args(kind)[0] if get_origin(kind) in (tuple, list) else kind

    @property
    def many(self) -> bool:
        """Whether it takes several values."""
        return get_origin(_without_none(self.annotation)) in (tuple, list)

    def convert(self, given: Any) -> Any:
        """Convert a value from text or plain data to the field's type.

        Raises:
            UserError: it is not of that type.
        """
        if given is None and _takes_none(self.annotation):
            return None
        if not self.many:
            return self._one(given)
        items = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
        split: list[Any] = []
        for item in items:
            words = item.split(",") if self.flag.commas and isinstance(item, str) else [item]
            split += [word.strip() if isinstance(word, str) else word for word in words]
        return tuple(self._one(item) for item in split if item != "")

    def _one(self, given: Any) -> Any:
        if self.flag.parse is not None and isinstance(given, str):
            try:
                return self.flag.parse(given)
            except UserError as error:
                raise UserError(
                    Problem(f"{self.called}: {each.message}", each.hint) for each in error.problems
                ) from None
        if isinstance(given, str) and given.strip().lower() == "none" and _takes_none(self.annotation):
            return None
        from pydantic import ConfigDict, TypeAdapter, ValidationError

        try:
            config = ConfigDict(coerce_numbers_to_str=not isinstance(given, bool))
            return TypeAdapter(self.kind, config=config).validate_python(given)
        except ValidationError:
            raise UserError(
                f"{self.called} takes {_noun(self.kind)}, not {given!r}.", f"Give {_noun(self.kind)}."
            ) from None

    def words(self, value: Any) -> list[str]:
        """The command-line arguments for this value."""
        if isinstance(value, bool):
            return [f"--{self.key}" if value else f"--no-{self.key}"]
        texts = [_text(item) for item in value] if self.many and value is not None else [_text(value)]
        if self.many and self.flag.commas and not any("," in text for text in texts):
            texts = [",".join(texts)]
        return texts if self.flag.positional else [word for text in texts for word in (f"--{self.key}", text)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One parameter of a verb: a value object, a choice of methods, or a plain value."""

    name: str
    # MISSING if it is required.
    default: Any
    # A dataclass, whose fields are flags.
    values: type | None = None
    # Methods of one kind, an `intarsia.registry.Kind`.
    choices: Any = None
    # The option of a plain value.
    option: Option | None = None
    # Whether it is a `*parameter`.
    rest: bool = False

    @property
    def options(self) -> tuple[Option, ...]:
        """Its flags; those of a choice depend on the chosen method."""
        if self.option is not None:
            return (self.option,)
        return () if self.values is None else options_of(self.values, self.default)


def parts_of(verb: Callable[..., Any]) -> tuple[Part, ...]:
    """The parameters of a verb, for its command line."""
    hints = get_type_hints(verb, include_extras=True)
    return tuple(_part(each, hints[each.name]) for each in inspect.signature(verb).parameters.values())


def _part(parameter: inspect.Parameter, hint: Any) -> Part:
    default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
    facts = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    for fact in facts:
        if hasattr(fact, "choose"):
            return Part(name=parameter.name, default=default, choices=fact)
    annotation: Any = get_args(hint)[0] if facts else hint
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    for member in members:
        if dataclasses.is_dataclass(member):
            assert isinstance(member, type)
            return Part(name=parameter.name, default=default, values=member)
    how = next((fact for fact in facts if isinstance(fact, Flag)), Flag())
    rest = parameter.kind is inspect.Parameter.VAR_POSITIONAL
    if rest:
        how, annotation, default = dataclasses.replace(how, positional=True), tuple[annotation, ...], ()
    option = Option(attribute=parameter.name, annotation=annotation, default=default, help=how.help, flag=how)
    return Part(name=parameter.name, default=default, option=option, rest=rest)


def options_of(kind: type, defaults: Any = MISSING) -> tuple[Option, ...]:
    """The flags of a dataclass. `defaults`, an instance of it, replaces its own defaults."""
    hints, comments = get_type_hints(kind), field_comments(kind)
    return tuple(
        Option(
            attribute=field.name,
            annotation=hints[field.name],
            default=getattr(defaults, field.name, field.default) if isinstance(defaults, kind) else field.default,
            help=comments.get(field.name, ""),
            flag=field.metadata.get("flag", Flag()),
        )
        for field in dataclasses.fields(kind)
        if field.init
    )


def from_plain(kind: type, given: Mapping[str, Any], *, where: str = "", defaults: Any = MISSING) -> Any:
    """An instance of a settings dataclass from plain data; keys are names of fields or flags, with `-` or `_`.

    Raises:
        UserError: with every wrong key and value.
    """
    problems, values = Problems(), {}
    options = {option.attribute: option for option in options_of(kind)}
    by_flag = {option.key.replace("-", "_"): option.attribute for option in options.values()}
    prefix = f"{where}: " if where else ""
    for key, value in given.items():
        name = str(key).replace("-", "_")
        name = by_flag.get(name, name)
        if name not in options:
            known = ", ".join(options) or "none"
            problems.add(f"{prefix}there is no option {key}.", f"The options are: {known}.")
            continue
        with problems:
            values[name] = options[name].convert(value)
    problems.raise_any()
    return kind(**values) if defaults is MISSING else dataclasses.replace(defaults, **values)


def plain(value: Any) -> Any:
    """A value as JSON-able data, for a run folder."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value) if isinstance(value, Path) else value


class Result:
    """Base of the result of a verb, a dataclass; `--json` prints its `to_dict()`."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with `push` only after an upload."""
        found: dict[str, Any] = plain(self)
        return {key: value for key, value in found.items() if key != "push" or value is not None}


@cache
def field_comments(kind: type) -> dict[str, str]:
    """The help of each field, inherited ones too: the comment above it."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        lines, comment = [], list[str]()
        if dataclasses.is_dataclass(base):
            with suppress(OSError, TypeError):  # no source, no help
                lines = inspect.getsource(base).splitlines()
        for line in lines:
            if line.lstrip().startswith("#"):
                comment.append(line.strip("# "))
                continue
            field = re.match(r"\s+(\w+):", line)
            if field and comment:
                found[field[1]] = " ".join(comment)
            comment = []
    return found


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(member for member in get_args(annotation) if member is not type(None))
    return annotation


def _takes_none(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)


def _noun(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    nouns = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "text"}
    return nouns.get(kind, getattr(kind, "__name__", str(kind)))


def _text(value: Any) -> str:
    return "none" if value is None else repr(value) if isinstance(value, float) else str(value)


def byte_count(text: str) -> int:
    """`5GB`, `500MB`, `1.5GiB` or plain bytes as a number.

    Raises:
        UserError: it is none of these.
    """
    return _count(text, _BYTES, "a size such as 5GB, 500MB or 1.5GiB")


def token_count(text: str) -> int:
    """`65536`, `500k`, `2M` or `1.5G` as a number.

    Raises:
        UserError: it is none of these.
    """
    return _count(text, _TOKENS, "a number of tokens such as 65536, 500k or 2M")


def _count(text: str, units: Mapping[str, int], expected: str) -> int:
    """A positive number times its unit."""
    digits = text.strip().rstrip("BGIKMbgikm ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        count = int(float(digits.replace("_", "")) * units[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise UserError(f"{text!r} is not {expected}.", "Give such a number.")
    return count
