"""Extension points: what registers itself, how it is chosen, and files of a user's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from intarsia import registry
from intarsia.errors import UserError
from intarsia.registry import Chosen, Kind

PLUGIN = '''
from dataclasses import dataclass
from intarsia.registry import engine, heal_stage, merge_op, planner

@dataclass(frozen=True, kw_only=True)
class MineSettings:
    # How often.
    times: int = 2

@planner("mine", settings=MineSettings, paper="1234.5678")
class Mine:
    """Removes what I say."""

@heal_stage("mine")
def heal(context, recipe): ...

@merge_op("mine", needs_base=True, search={"density": (0.2, 0.8)})
def join(tensors, weights, base, *, density=0.3): ...

@engine("mine")
class Search: ...
'''


@dataclass(frozen=True, kw_only=True)
class Settings:
    # One.
    one: int = 1
    # Two.
    two: bool = True


@dataclass(frozen=True, kw_only=True)
class More(Settings):
    # Three.
    three: float = 3.0


@pytest.fixture
def kind() -> Kind:
    kind = Kind("method", "method", "intarsia.errors")

    @kind.register("alpha", Settings)
    class Alpha:
        """The first letter.

        And more.
        """

        def __init__(self, settings: Settings) -> None:
            self.settings = settings

    @kind.register("beta", More, paper="1")
    class Beta:
        pass

    @kind.register("gamma")
    class Gamma:
        pass

    return kind


@pytest.fixture
def clean(own_registry: None) -> None:
    registry._LOADED.clear()


def test_names(kind: Kind) -> None:
    assert kind.names == ("alpha", "beta", "gamma")
    assert "beta" in kind and "delta" not in kind
    assert kind.get("beta").facts == {"paper": "1"}


def test_an_unknown_name_lists_the_known_ones(kind: Kind) -> None:
    with pytest.raises(UserError) as caught:
        kind.get("alpa")
    (problem,) = caught.value.problems
    assert problem.message == "There is no method 'alpa'."
    assert problem.hint == "Did you mean alpha? The known ones are: alpha, beta, gamma."


def test_who_has_an_option(kind: Kind) -> None:
    assert kind.with_option("one") == ("alpha", "beta")
    assert kind.with_option("three") == ("beta",)
    assert kind.with_option("four") == ()


@pytest.mark.parametrize(
    ("choice", "name", "settings", "label"),
    [
        ("alpha", "alpha", Settings(), "alpha"),
        ("gamma", "gamma", None, "gamma"),
        ("beta[three=1, two=false]", "beta", More(two=False, three=1.0), "beta[two=false,three=1.0]"),
        (Settings(one=4), "alpha", Settings(one=4), "alpha[one=4]"),
        (More(), "beta", More(), "beta"),
    ],
)
def test_a_choice(kind: Kind, choice: Any, name: str, settings: Any, label: str) -> None:
    chosen = kind.choose(choice)
    assert (chosen.name, chosen.settings, chosen.label) == (name, settings, label)
    assert kind.choose(chosen) is chosen
    assert kind.choose(chosen.label) == chosen


def test_what_was_chosen_is_created_with_its_settings(kind: Kind) -> None:
    assert kind.choose(Settings(one=5)).create().settings == Settings(one=5)
    assert type(kind.choose("gamma").create()).__name__ == "Gamma"


def test_several_choices(kind: Kind) -> None:
    several = kind.choose_all("beta[one=2,two=no],alpha, gamma")
    assert [each.label for each in several] == ["beta[one=2,two=false]", "alpha", "gamma"]
    assert kind.choose_all("none") == kind.choose_all(()) == ()
    assert [each.name for each in kind.choose_all([Settings(), "gamma"])] == ["alpha", "gamma"]


def test_every_problem_of_several_choices(kind: Kind) -> None:
    with pytest.raises(UserError) as caught:
        kind.choose_all("delta,alpha[four=1],gamma[x=1],alpha,alpha")
    assert [problem.message for problem in caught.value.problems] == [
        "There is no method 'delta'.",
        "alpha: there is no option four.",
        "The method gamma has no options.",
        "The method alpha is named more than once.",
    ]


def test_settings_of_nothing(kind: Kind) -> None:
    with pytest.raises(UserError, match="int is not a method, nor the settings of one"):
        kind.choose(3)


def test_two_things_of_one_name(kind: Kind) -> None:
    with pytest.raises(UserError, match="The method alpha is defined twice"):
        kind.register("alpha")(Settings)


def test_a_file_of_the_users(tmp_path: Path, clean: None) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN, encoding="utf-8")
    registry.load_plugin(file)
    registry.load_plugin(file)  # once
    assert registry.loaded_plugins() == (str(file),)
    chosen = registry.planners.choose("mine[times=3]")
    assert chosen.settings.times == 3
    assert chosen.entry.facts == {"paper": "1234.5678"}
    assert registry.planners.with_option("times") == ("mine",)
    assert registry.heal_stages.choose("mine")[0].settings is None
    op = registry.merge_ops.get("mine")
    assert op.parameters == {"density": 0.3}
    assert op.facts["needs_base"] is True and op.facts["search"] == {"density": (0.2, 0.8)}
    assert "mine" in registry.engines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a file"),
        ("1 / 0", "failed with ZeroDivisionError: division by zero."),
        ("import nothing_of_that_name", "failed with ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_loaded(text: str | None, message: str, tmp_path: Path, clean: None) -> None:
    file = tmp_path / "bad.py"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        registry.load_plugin(file)
    assert registry.loaded_plugins() == ()


def test_installed_packages_announce_theirs(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    points = [EntryPoint(name="theirs", value="json", group=registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    monkeypatch.setattr(registry, "_announced", False)
    assert kind.names == ("alpha", "beta", "gamma")
    points[0] = EntryPoint(name="theirs", value="no_such_module", group=registry.GROUP)
    monkeypatch.setattr(registry, "_announced", False)
    with pytest.raises(UserError, match=r"The plugin theirs \(no_such_module\) failed with ModuleNotFoundError"):
        assert Kind("method", "method", "intarsia.errors").names


def test_a_chosen_thing_records_nothing_but_its_name_without_settings(kind: Kind) -> None:
    assert kind.choose("gamma").to_dict() == {"name": "gamma"}
    assert kind.choose("alpha").to_dict() == {"name": "alpha", "one": 1, "two": True}
    assert isinstance(kind.choose("alpha"), Chosen)
