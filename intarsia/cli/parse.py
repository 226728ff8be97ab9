"""The command line of a verb, generated from its signature: value objects, choices of methods, and plain values.

The flags are the fields of the value objects and of the chosen methods' settings; a config file (`--config`) has the
same names as keys. `cyclopts` splits the arguments and prints the help; `intarsia.flags` converts, so that all problems
of an input are found at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.exceptions import MissingArgumentError

from intarsia import registry
from intarsia.data_file import read_yaml
from intarsia.errors import Problems, UserError
from intarsia.flags import Flag, Option, Part, flag, options_of, parts_of

_ARGUMENTS = Group("Arguments", sort_key=-1)
HELP_FLAGS = ("--help", "-h")
_OPTION = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Options of every verb."""

    # Print the result as one JSON object on stdout, and show no progress.
    json: bool = False
    # Show no progress.
    quiet: bool = flag(False, "--quiet", "-q")
    # Read options from a YAML file with the flags' names as keys; the command line takes precedence.
    config: Path | None = flag(None, metavar="FILE")
    # Python files that register your own methods, stages, operators or engines.
    plugin: tuple[Path, ...] = flag((), metavar="FILE.py")
    # Run the code in a model's folder if transformers has no class for it (default: refuse the model).
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """A verb with its arguments, ready to be called."""

    verb: Callable[..., Any]
    rest: tuple[Any, ...]
    arguments: Mapping[str, Any]
    shared: Shared

    def __call__(self) -> Any:
        return self.verb(*self.rest, **self.arguments)


_Panel: TypeAlias = tuple[str, Sequence[Option]]
"""A group of options in the help, with its title."""


def parse(verb: Callable[..., Any], name: str, words: Sequence[str]) -> Call:
    """Read the command line of a verb.

    Raises:
        UserError: with every problem.
        SystemExit: after printing the help, if it was requested.
    """
    problems = Problems()
    shared = {option.key: option for option in options_of(Shared)}
    for plugin in shared["plugin"].convert(_found(words, "--plugin")):
        registry.load_plugin(plugin)
    config = _config(_found(words, "--config"))
    parts = parts_of(verb)
    if any(word in HELP_FLAGS for word in words):
        app, _ = _app(verb, name, [*_panels(parts), *_owned_panels(parts)], shown=True)
        app.help_print([])
        raise SystemExit(0)
    chosen: dict[str, Any] = {}
    for part in parts:
        if part.choices is not None:
            with problems:
                found = _chosen(part, words, config)
                chosen |= {} if found is None else {part.name: found}
    every = [each for value in chosen.values() for each in (value if isinstance(value, tuple) else (value,))]
    settings = [each.settings for each in every if each.settings is not None]
    panels = [*_panels(parts), ("Chosen", [option for each in settings for option in options_of(type(each), each)])]
    presets = {name: None for each in every for name in _presets(each.entry)}
    app, options = _app(verb, name, [*panels, *_preset_panel(presets)])
    given = {
        **{key: value for key, value in config.items() if key in options},
        **_split(app, options, words, parts, problems),
    }
    for key in config:
        if key not in options:
            problems.add(*_unknown(key, parts, f"{key} in the config file"))
    if "preset" in given:
        with problems:
            options["preset"].convert(given["preset"])
    arguments = {part.name: _argument(part, given, chosen, problems) for part in parts}
    with problems:
        result = _build(Shared, options_of(Shared), given, MISSING)
    problems.raise_any()
    rest = next((arguments.pop(part.name) for part in parts if part.rest), ())
    arguments = {key: value for key, value in arguments.items() if value is not MISSING}
    return Call(verb=verb, rest=rest, arguments=arguments, shared=result)


def _found(words: Sequence[str], flag: str) -> list[str]:
    """The values of a flag, before all flags are known."""
    values = [after for word, after in zip(words, [*words[1:], ""], strict=False) if word == flag]
    return values + [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]


def _config(files: Sequence[str]) -> dict[str, Any]:
    if not files:
        return {}
    data = read_yaml(Path(files[-1]), what="a config file")
    if not isinstance(data, Mapping):
        raise UserError(f"--config {files[-1]} has no options.", "Write one `name: value` per line.")
    return {str(key).replace("_", "-"): value for key, value in data.items()}


def _chosen(part: Part, words: Sequence[str], config: Mapping[str, Any]) -> Any:
    kind = part.choices
    default = () if part.default is MISSING else part.default
    choice: Any = [config.get(kind.flag, default), *_found(words, f"--{kind.flag}")][-1]
    preset: Any = [config.get("preset"), *_found(words, "--preset")][-1]
    if choice == () and not kind.many:
        raise UserError(f"--{kind.flag} is not given.", f"Choose one of {', '.join(kind.names)}.")
    if choice is None:  # the verb has the default
        return None
    chosen = kind.choose(choice)
    if preset is None:
        return chosen
    return tuple(_preset(each, preset) for each in chosen) if kind.many else _preset(chosen, preset)


def _presets(entry: registry.Entry) -> Mapping[str, Mapping[str, Any]]:
    return getattr(entry.settings, registry.PRESETS, {})


def _preset(chosen: registry.Chosen, name: str) -> registry.Chosen:
    values = _presets(chosen.entry).get(name)
    return dataclasses.replace(chosen, settings=dataclasses.replace(chosen.settings, **values)) if values else chosen


def _preset_panel(names: Iterable[str]) -> Iterator[_Panel]:
    if names := tuple(names):
        kind = Literal[names] | None  # type: ignore[valid-type]
        comment = "Set several options together; explicit options take precedence."
        how = Flag(metavar="NAME")
        yield "Preset", (Option(attribute="preset", annotation=kind, default=None, help=comment, flag=how),)


def _panels(parts: Sequence[Part]) -> Iterator[_Panel]:
    """The options that do not depend on a choice."""
    plain = [option for part in parts if part.option is not None for option in part.options]
    yield "Options", plain + [_choice_option(part) for part in parts if part.choices is not None]
    for part in parts:
        if part.values is not None:
            # The title of a value object is the start of its docstring.
            yield re.split("[:.]", inspect.getdoc(part.values) or part.values.__name__)[0], part.options
    yield "Every verb", options_of(Shared)


def _choice_option(part: Part) -> Option:
    kind, default = part.choices, part.default
    names = ", ".join(kind.names)
    several = f"{kind.noun.capitalize()}s, comma-separated, in the order in which they run, or none. Known: {names}."
    if default is not MISSING and default is not None:
        default = ",".join(each.label for each in kind.choose_all(default)) or "none"
    return Option(
        attribute=part.name,
        annotation=str,
        default=default,
        help=several if kind.many else f"{kind.noun.capitalize()}: {names}.",
        flag=Flag(names=(f"--{kind.flag}",), metavar="NAMES" if kind.many else "NAME"),
    )


def _owned_panels(parts: Sequence[Part]) -> Iterator[_Panel]:
    """For the help: the options of all possible choices, grouped by owners."""
    presets: dict[str, None] = {}
    for kind in (part.choices for part in parts if part.choices is not None):
        owners: dict[str, list[tuple[str, Option]]] = {}
        for entry in kind:
            presets |= dict.fromkeys(_presets(entry))
            for option in () if entry.settings is None else options_of(entry.settings):
                owners.setdefault(option.key, []).append((entry.name, option))
        panels: dict[str, list[Option]] = {}
        for having in owners.values():
            title = f"With --{kind.flag} {', '.join(name for name, _ in having)}"
            panels.setdefault(title, []).append(_together(having))
        yield from panels.items()
    yield from _preset_panel(presets)


def _together(having: Sequence[tuple[str, Option]]) -> Option:
    """The help of an option of several methods whose help or default differs."""
    _, first = having[0]
    lines = [first.help]
    lines += [f"{name}: {option.help}" for name, option in having[1:] if option.help != first.help]
    lines += [f"{name}: {_shown(option)}." for name, option in having[1:] if option.default != first.default]
    return dataclasses.replace(first, help=" ".join(line for line in lines if line))


def _app(
    verb: Callable[..., Any], name: str, panels: Sequence[_Panel], *, shown: bool = False
) -> tuple[App, dict[str, Option]]:
    """A parser of these options, or the app that prints their help. The same option of several owners is one flag."""
    options: dict[str, Option] = {}
    order: list[inspect.Parameter] = []
    for title, listed in panels:
        panel = Group.create_ordered(title)
        for option in listed:
            if option.key not in options:
                options[option.key] = option
                order.append(_parameter(option, panel, shown=shown))
    order.sort(key=lambda each: each.kind)

    def takes(*rest: Any, **given: Any) -> None:
        raise AssertionError("only its signature is used")

    takes.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    positional = " ".join(
        f"[{option.called}...]" if option.many else option.called if option.default is MISSING else f"[{option.called}]"
        for option in options.values()
        if option.flag.positional
    )
    # Paragraphs without line breaks, so that any terminal can wrap them, and without sections for programmers.
    paragraphs = re.split(r"\n\n(?=Args:|Raises:|Returns:)", inspect.getdoc(verb) or "")[0].split("\n\n")
    app = App(
        name=f"intarsia {name}",
        default_command=takes,
        help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs),
        usage=f"Usage: intarsia {name} {positional} [OPTIONS]".replace("  ", " "),
        help_format="plaintext",
        version_flags=(),
        help_flags=(),
        group_arguments=_ARGUMENTS,
    )
    return app, options


def _parameter(option: Option, panel: Group, *, shown: bool) -> inspect.Parameter:
    """An option as a parameter of the function that cyclopts reads; all values are text, converted later.

    The help omits `--no-...` of flags that are off by default.
    """
    flag, truth = option.flag, option.kind is bool
    annotation: Any = bool | None if truth else list[str] | None if option.many else str | None
    how = Parameter(
        name=option.called if flag.positional else option.names,
        help=_help(option),
        metavar=flag.metavar or {int: "N", float: "X", Path: "PATH", bool: None}.get(option.kind, "NAME"),
        group=_ARGUMENTS if flag.positional else panel,
        negative=f"--no-{option.key}" if truth and not (shown and option.default is False) else (),
        show_default=False,
        required=False,
    )
    rest = flag.positional and option.many
    kinds = inspect.Parameter
    kind = kinds.VAR_POSITIONAL if rest else kinds.POSITIONAL_ONLY if flag.positional else kinds.KEYWORD_ONLY
    return inspect.Parameter(
        option.key.replace("-", "_"),
        kind,
        default=kinds.empty if rest else None,
        annotation=Annotated[str if rest else annotation, how],
    )


def _help(option: Option) -> str:
    kind = option.kind
    choices = f"One of {', '.join(map(str, get_args(kind)))}." if get_origin(kind) is Literal else ""
    again = "Comma-separated." if option.many and option.flag.commas and not option.flag.positional else ""
    return " ".join(
        each for each in (option.help, choices, again, f"({_shown(option)})" if _shown(option) else "") if each
    )


def _shown(option: Option) -> str:
    if option.default is MISSING:
        return "required"
    if option.default is None or option.default == () or option.default is False:
        return ""
    if option.default is True:
        return "default: on"
    items = option.default if option.many else [option.default]
    return f"default: {','.join(f'{item:.3g}' if isinstance(item, float) else str(item) for item in items)}"


def _split(
    app: App, options: Mapping[str, Option], words: Sequence[str], parts: Sequence[Part], problems: Problems
) -> dict[str, Any]:
    """The given values by key, as text; and the problems of their form."""
    known = {name for option in options.values() if not option.flag.positional for name in option.names}
    known |= {f"--no-{option.key}" for option in options.values() if option.kind is bool}
    unknown = [word for word in words if _OPTION.match(word) and word.partition("=")[0] not in known]
    for word in unknown:
        name = word.partition("=")[0]
        problems.add(*_unknown(name.lstrip("-"), parts, name))
    try:
        _, bound, unused, _ = app.parse_known_args([word for word in words if word not in unknown])
    except CycloptsError as error:
        if isinstance(error, MissingArgumentError):
            problems.add(
                f"{error.argument.name if error.argument else 'An option'} has no value.", "Give one after it."
            )
        else:
            message = " ".join(str(error.msg or type(error).__name__).split())[:200].rstrip(".")
            problems.add(f"{message}.", f"See {app.name[0]} --help.")
        raise UserError(problems) from None
    if not unknown:  # otherwise it may be the value of an unknown option
        for word in unused:
            problems.add(f"{word!r} is one argument too many.", f"See {app.name[0]} --help.")
    return {name.replace("_", "-"): value for name, value in bound.arguments.items()}


def _unknown(key: str, parts: Sequence[Part], called: str) -> tuple[str, str]:
    """The message about an unknown option: the methods that have it, or similar names."""
    name = key.removeprefix("no-")
    for part in parts:
        if part.choices is not None:
            owners = part.choices.with_option(key) or part.choices.with_option(name)
            if owners:
                listed = " and ".join([", ".join(owners[:-1]), owners[-1]] if len(owners) > 1 else owners)
                return (
                    f"{called} is an option of {listed}.",
                    f"Leave it out, or choose --{part.choices.flag} {owners[0]}.",
                )
    known = [option.key for part in parts for option in part.options] + [option.key for option in options_of(Shared)]
    near = get_close_matches(name, known, n=1)
    return f"There is no option {called}.", f"Did you mean --{near[0]}?" if near else "See --help."


def _argument(part: Part, given: Mapping[str, Any], chosen: Mapping[str, Any], problems: Problems) -> Any:
    """The value of a parameter; MISSING for its default."""
    if part.choices is not None:
        return _with_settings(chosen.get(part.name, MISSING), given, problems)
    if part.values is not None:
        with problems:
            return _build(part.values, part.options, given, part.default)
        return MISSING
    assert part.option is not None
    with problems:
        return _build(dict, part.options, given, part.default).get(part.name, () if part.rest else MISSING)
    return MISSING


def _with_settings(chosen: Any, given: Mapping[str, Any], problems: Problems) -> Any:
    if isinstance(chosen, tuple):
        return tuple(_with_settings(each, given, problems) for each in chosen)
    if chosen is MISSING or chosen.settings is None:
        return chosen
    with problems:
        kind = type(chosen.settings)
        return dataclasses.replace(chosen, settings=_build(kind, options_of(kind), given, chosen.settings))
    return chosen


def _build(kind: Any, options: Sequence[Option], given: Mapping[str, Any], default: Any) -> Any:
    """An object with the given options; the others are those of `default`."""
    problems, values = Problems(), {}
    for option in options:
        if option.key in given:
            with problems:
                values[option.attribute] = option.convert(given[option.key])
        elif option.default is MISSING:
            problems.add(f"{option.called} is missing.", f"Give {option.called}: {option.help or 'it has no default.'}")
    problems.raise_any()
    return dataclasses.replace(default, **values) if isinstance(default, kind) else kind(**values)
