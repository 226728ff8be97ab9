"""The extension points: planners, heal stages, merge operators and search engines, each in a file of its own.

    @planner("shortgpt", paper="2403.03853")
    class ShortGPT: ...

    @heal_stage("closed-form", settings=ClosedFormSettings)
    def closed_form(context, recipe, settings): ...

    @merge_op("ties", needs_base=True, search={"density": (0.2, 0.8)})
    def ties(tensors, weights, base, *, density=0.2): ...

    @engine("evolve", settings=EvolveSettings)
    class Evolve: ...

Built-in entries are found by listing the modules of one package for each kind, at the first lookup. Such a module
imports torch inside its functions, because `--help` reads its settings. Third-party entries come from `load_plugin`,
from a package with an entry point in the group `intarsia.plugins`, or from an import in Python.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from intarsia.errors import Problems, UserError
from intarsia.flags import from_plain, options_of, plain

T = TypeVar("T")

GROUP = "intarsia.plugins"
PRESETS = "presets"
"""Optional attribute of a settings class: for each preset name the values of its fields, for `--preset NAME`."""

_NAME_AND_OPTIONS = re.compile(r"\s*([^\[\]]+?)\s*(?:\[([^\[\]]*)\])?\s*")
_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\]]*\])")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A registered method, stage, operator or engine."""

    # Its name on the command line and in files.
    name: str
    # The decorated class or function.
    object: Any
    # The dataclass of its options; None if it has none.
    settings: type | None = None
    # Other arguments of its decorator: paper, needs_base, search.
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """A function's keyword-only parameters with their defaults."""
        signature = inspect.signature(self.object).parameters.values()
        return {each.name: each.default for each in signature if each.kind is inspect.Parameter.KEYWORD_ONLY}


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A chosen entry with its settings."""

    entry: Entry
    settings: Any = None

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def label(self) -> str:
        """The name with all non-default settings: `come-p[spans=1]`."""
        options = () if self.settings is None else options_of(type(self.settings))
        pairs = ((option, getattr(self.settings, option.attribute)) for option in options)
        words = [f"{option.key}={_written(value)}" for option, value in pairs if value != option.default]
        return f"{self.name}[{','.join(words)}]" if words else self.name

    def create(self, *arguments: Any) -> Any:
        """Call the class or function with `arguments`, and the settings if it has any."""
        return self.entry.object(*arguments, *([] if self.settings is None else [self.settings]))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **({} if self.settings is None else plain(self.settings))}


def words_of(text: str) -> list[str]:
    """Split at commas outside brackets."""
    return [word.strip() for word in _OUTSIDE_BRACKETS.split(text) if word.strip()]


class Kind:
    """All registered entries of one kind.

    Attributes:
        noun: what one entry is called in messages.
        flag: the option that chooses one.
        many: whether several may be chosen, in order.
    """

    def __init__(self, noun: str, flag: str, package: str, *, many: bool = False) -> None:
        self.noun, self.flag, self.many = noun, flag, many
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._found = False

    def by(self, flag: str) -> Kind:
        """The same entries, chosen by another option."""
        other = copy(self)  # shares the dictionary
        other.flag = flag
        return other

    def register(self, name: str, settings: type | None = None, **facts: Any) -> Callable[[T], T]:
        """A decorator that registers a class or function as `name`."""

        def known(thing: T) -> T:
            entry = Entry(name=name, object=thing, settings=settings, facts=facts)
            before = self._entries.get(name)
            if before is not None and _home(before.object) != _home(thing):
                raise UserError(
                    f"The {self.noun} {name} is defined twice: by {_home(before.object)} and by {_home(thing)}.",
                    "Give one of them another name.",
                )
            assert settings is None or dataclasses.is_dataclass(settings), f"the settings of {name} must be a dataclass"
            self._entries[name] = entry
            return thing

        return known

    def __iter__(self) -> Iterator[Entry]:
        self._find()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self)

    def __contains__(self, name: object) -> bool:
        self._find()
        return name in self._entries

    def get(self, name: str) -> Entry:
        """The entry with a name.

        Raises:
            UserError: there is none.
        """
        self._find()
        if name not in self._entries:
            near = get_close_matches(name, self.names, n=1)
            known = f"The known ones are: {', '.join(self.names) or 'none'}."
            raise UserError(f"There is no {self.noun} {name!r}.", f"Did you mean {near[0]}? {known}" if near else known)
        return self._entries[name]

    def with_option(self, key: str) -> tuple[str, ...]:
        """Names of the entries that have an option, given by its flag without dashes."""
        return tuple(
            entry.name
            for entry in self
            if entry.settings is not None and any(option.key == key for option in options_of(entry.settings))
        )

    def choose(self, choice: Any) -> Any:
        """The entry and settings for a name, `name[option=value,...]`, a settings object, or a `Chosen`.

        If several may be chosen: a tuple, for a list of these or a comma-separated text; `none` is the empty one.

        Raises:
            UserError: with every problem.
        """
        return self.choose_all(choice) if self.many else self._one(choice)

    def choose_all(self, choices: Any) -> tuple[Chosen, ...]:
        """Choose several, each once; see `choose`."""
        if isinstance(choices, str):
            choices = [] if choices.strip() in ("", "none") else words_of(choices)
        elif not isinstance(choices, Sequence):
            choices = [choices]
        problems, found = Problems(), list[Chosen]()
        for choice in choices:
            with problems:
                found.append(self._one(choice))
        labels = [each.label for each in found]
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            problems.add(f"The {self.noun} {label} is named more than once.", "Name it once.")
        problems.raise_any()
        return tuple(found)

    def _one(self, choice: Any) -> Chosen:
        if isinstance(choice, Chosen):
            return choice
        if not isinstance(choice, str):
            return self._of_settings(choice)
        form = _NAME_AND_OPTIONS.fullmatch(choice)
        if form is None:
            raise UserError(f"{choice!r} is not a {self.noun} with options.", "Write NAME or NAME[option=value,...].")
        entry = self.get(form[1])
        words = [word for word in (form[2] or "").split(",") if word.strip()]
        if entry.settings is None:
            if words:
                raise UserError(f"The {self.noun} {entry.name} has no options.", f"Write {entry.name}.")
            return Chosen(entry=entry)
        given = {key.strip(): value.strip() for key, _, value in (word.partition("=") for word in words)}
        return Chosen(entry=entry, settings=from_plain(entry.settings, given, where=entry.name))

    def _of_settings(self, settings: Any) -> Chosen:
        owners = [entry for entry in self if entry.settings is type(settings)]
        if len(owners) != 1:
            names = ", ".join(entry.name for entry in owners)
            found = f"the settings of each of {names}" if owners else f"not a {self.noun}, nor the settings of one"
            raise UserError(f"{type(settings).__name__} is {found}.", f"Name the {self.noun}: {', '.join(self.names)}.")
        return Chosen(entry=owners[0], settings=settings)

    def _find(self) -> None:
        """Import the built-in modules and the packages with an entry point, once."""
        if self._found:
            return
        self._found = True
        package = import_module(self._package)  # or a module
        for module in sorted(pkgutil.iter_modules(getattr(package, "__path__", [])), key=lambda each: each.name):
            import_module(f"{self._package}.{module.name}")
        _load_announced()


planners = Kind("method", "method", "intarsia.pruning.methods")
heal_stages = Kind("heal stage", "heal", "intarsia.healing.stages", many=True)
merge_ops = Kind("merge operator", "merge-op", "intarsia.building.operators")
engines = Kind("engine", "engine", "intarsia.tailoring.engines")

KINDS = (planners, heal_stages, merge_ops, engines)

Planner: TypeAlias = Annotated[Any, planners]
"""A parameter that takes a planner: its name, or its settings."""
HealStages: TypeAlias = Annotated[Any, heal_stages]
"""A parameter that takes heal stages: their names or settings, in order."""
Engine: TypeAlias = Annotated[Any, engines]
"""A parameter that takes a search engine: its name, or its settings."""


def planner(name: str, *, settings: type | None = None, paper: str = "") -> Callable[[T], T]:
    """Register a planner: a class with `decide(model, target, history)`. `paper` is its number at arXiv."""
    return planners.register(name, settings, paper=paper)


def heal_stage(
    name: str,
    *,
    settings: type | None = None,
    whole_model: bool = False,
    check: Callable[[Any], None] | None = None,
    memory: Callable[[Any, int, int], int] | None = None,
    paper: str = "",
) -> Callable[[T], T]:
    """Register a heal stage: a function of context, recipe and settings that gives a recipe.

    Args:
        whole_model: whether it trains all layers at once, in every launched process, and never streamed.
        check: called with the settings before any work; raises UserError if a requirement is missing.
        memory: least memory in bytes, from the settings, the parameters of the healed model, and the bytes of the
            original's weights.
    """
    return heal_stages.register(name, settings, whole_model=whole_model, check=check, memory=memory, paper=paper)


def merge_op(
    name: str,
    *,
    needs_base: bool = False,
    sources: tuple[int, int | None] = (1, None),
    weights: str = "finite",
    search: Mapping[str, tuple[float, float]] | None = None,
    settle: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
    rule: Callable[[Mapping[str, float]], str | None] | None = None,
    paper: str = "",
) -> Callable[[T], T]:
    """Register a merge operator: a function of tensors, weights and base; keyword-only parameters are its options.

    A parameter `generators` gets a `torch.Generator` for each tensor, and adds the option `seed`. A trailing underscore
    of a parameter's name is not part of the option's: `lambda_`.

    Args:
        needs_base: whether it works on differences to the base model's layer.
        sources: least and greatest number of layers with a nonzero weight.
        weights: their condition: `finite`, `positive`, `equal`, or `sum 1`.
        search: the range of each option in a search. Names that are not options of the operator set its weights:
            `lead` the first one (they sum to 1, the others are equal), `lambda` all of them.
        settle: converts searched values to options, if they differ.
        rule: returns the expectation that a combination of options violates, if any.
    """
    facts: dict[str, Any] = {"needs_base": needs_base, "sources": sources, "weights": weights, "search": search or {}}
    return merge_ops.register(name, **facts, settle=settle, rule=rule, paper=paper)


def engine(name: str, *, settings: type | None = None, paper: str = "") -> Callable[[T], T]:
    """Register a search engine: a class with `ask(n)` and `tell(candidate, budget, costs)`."""
    return engines.register(name, settings, paper=paper)


_LOADED: dict[str, str] = {}
_announced = False


def load_plugin(path: str | Path) -> None:
    """Run a user's file once; it registers its definitions.

    Raises:
        UserError: there is no such file, or it fails.
    """
    file = Path(path).resolve()
    if str(file) in _LOADED:
        return
    if not file.is_file():
        raise UserError(
            f"--plugin {path} is not a file.", "Give a Python file that registers a method, stage, operator or engine."
        )
    name = f"intarsia_plugin_{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path} is not a Python file.", "Give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        found = f"--plugin {path} failed with {type(error).__name__}: {error}."
        raise UserError(found, "Run it with Python to see the traceback.") from error
    _LOADED[str(file)] = name


def loaded_plugins() -> tuple[str, ...]:
    """The loaded files, for other processes to load too."""
    return tuple(_LOADED)


def _load_announced() -> None:
    """Import the entry points `intarsia.plugins` of installed packages, once."""
    global _announced
    if _announced:
        return
    _announced = True  # set first, so that a plugin's lookups during its import do not import it again
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise UserError(
                f"The plugin {point.name} ({point.value}) failed with {type(error).__name__}: {error}.",
                "Fix or uninstall its package.",
            ) from error


def _home(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
