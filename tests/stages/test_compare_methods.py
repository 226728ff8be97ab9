"""Methods as they are written for a comparison."""

from __future__ import annotations

import pytest

from intarsia.errors import UserError
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.ladder import METHODS, progressive_methods
from intarsia.pruning.settings import ComeSettings, LacoSettings, SlebSettings
from intarsia.stages.compare_methods import parse_methods


def test_every_method_by_name() -> None:
    entrants = parse_methods(",".join(METHODS))
    assert tuple(entrant.name for entrant in entrants) == METHODS
    assert len({entrant.folder for entrant in entrants}) == len(METHODS)
    settings = {entrant.name: entrant.settings for entrant in entrants}
    assert settings["come"] == settings["come-p"] == ComeSettings()
    assert settings["laco"] == LacoSettings()
    assert settings["sleb"] == SlebSettings()
    assert settings["shortgpt"] is None


def test_options() -> None:
    entrants = parse_methods(
        " come[combine=weight-sum] ,come[ norm = average, sharpness=2 ],come-p[spans=1,racing=false],"
        "come[dominance=0.8,no-repeat=yes],laco[merge=2,highest=none,threshold=0.5],sleb[racing=no],come[]"
    )
    assert [(entrant.name, entrant.method) for entrant in entrants] == [
        ("come[combine=weight-sum]", "come"),
        ("come[norm=average,sharpness=2]", "come"),
        ("come-p[spans=1,racing=false]", "come-p"),
        ("come[dominance=0.8,no_repeat=true]", "come"),
        ("laco[merge=2,highest=none,threshold=0.5]", "laco"),
        ("sleb[racing=false]", "sleb"),
        ("come", "come"),
    ]
    assert [entrant.settings for entrant in entrants] == [
        ComeSettings(combine="weight-sum"),
        ComeSettings(norm="average", sharpness=2.0),
        ComeSettings(spans=1, racing=False),
        ComeSettings(dominance=0.8, no_repeat=True),
        LacoSettings(merge=2, threshold=0.5),
        SlebSettings(racing=False),
        ComeSettings(),
    ]
    assert entrants[1].folder == "come-norm-average-sharpness-2"
    assert parse_methods(["come[norm=average,sharpness=2]", "mka,reverse"]) == (
        entrants[1],
        *parse_methods("mka,reverse"),
    )


@pytest.mark.parametrize(
    ("text", "expected", "remedy"),
    [
        ("comme", "one of come, come-p", "Did you mean come?"),
        ("nothing-like-it", "one of come, come-p", "Choose one of them."),
        ("come[norms=average]", "an option among span_choice", "Did you mean norm?"),
        ("come[norm=mean]", "one of fold, average", "Give it such a value."),
        ("come[sharpness=much]", "a number", "Give it such a value."),
        ("come[spans=1.5]", "a whole number", "Give it such a value."),
        ("come[racing=maybe]", "true or false", "Give it such a value."),
        ("come[sharpness=-1]", "a number, 0 or more", "Give it such a value."),
        ("come[norm=fold,norm=average]", "every option once", "Leave it out."),
        ("shortgpt[merge=2]", "no options: shortgpt has none", "Write shortgpt."),
        ("come[norm=average", "NAME or NAME[option=value,...]", "Write it like come[spans=1]."),
        ("come,come", "every method once", "Leave it out."),
        ("", "some of come, come-p", "Name at least one."),
    ],
)
def test_what_is_no_method(text: str, expected: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_methods(text)
    (problem,) = caught.value.problems
    assert problem.where.startswith("--methods")
    assert problem.expected.startswith(expected)
    assert problem.remedy == remedy


def test_repair_in_the_loop() -> None:
    (entrant,) = parse_methods("come-p[spans=1,heal-in-loop=true]")
    assert entrant.name == "come-p[spans=1,heal_in_loop=true]"
    assert entrant.settings == ComeSettings(spans=1)
    assert entrant.in_loop == ClosedFormSettings()
    assert parse_methods("sleb[heal_in_loop=no]")[0].in_loop is None
    for method in METHODS:  # what has options is what can repair as it goes
        can = method in progressive_methods()
        assert can == (parse_methods(method)[0].settings is not None)


def test_all_problems_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_methods("come,no-such,mka[a=1],come[norm=x,spans=y]")
    assert len(caught.value.problems) == 4
