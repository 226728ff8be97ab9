"""What is said to a user, and that it survives the way between processes."""

from __future__ import annotations

import pickle

from intarsia.errors import Problem, UserError, missing_package


def test_all_problems_are_reported_also_after_a_pickle() -> None:
    problems = [Problem(f"file:{line}: is wrong.", "Mend it.") for line in (1, 2)]
    error = pickle.loads(pickle.dumps(UserError(problems)))
    assert error.problems == tuple(problems)
    assert str(error) == "file:1: is wrong. Mend it.\nfile:2: is wrong. Mend it."


def test_a_missing_package_names_the_extra() -> None:
    (plain,) = missing_package("gguf", where="m.gguf", extra="gguf").problems
    assert plain == Problem(
        "m.gguf needs the package gguf, which is not installed.", "Install it (pip install 'intarsia[gguf]')."
    )
    # One that is there and broken is named as such.
    error = ImportError("cannot import name 'a' from 'peft'\nmore")
    (broken,) = missing_package("peft", where="--lora", extra="train", instead="leave it out", error=error).problems
    assert broken.message.endswith("which cannot be imported: cannot import name 'a' from 'peft'.")
    assert broken.hint == "Install it (pip install 'intarsia[train]'), or leave it out."
