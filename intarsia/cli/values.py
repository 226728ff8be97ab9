"""What a user writes after an option, as values: lists, sizes and counts."""

from __future__ import annotations

from collections.abc import Mapping

from intarsia.errors import UserError

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TOKENS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def words(text: str | None) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def numbers(text: str, option: str) -> list[int]:
    """`27,25,23` as whole numbers.

    Raises:
        UserError: they are none.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError.of(
            where=option,
            expected="whole numbers with commas between them",
            found=repr(text),
            remedy="Write them like 27,25,23.",
        ) from None


def one_or_more(given: list[str]) -> str | list[str]:
    """One specification as it is, several as a list."""
    return given[0] if len(given) == 1 else given


def memory_bytes(text: str | None) -> int | None:
    """`--memory` as a number.

    Raises:
        UserError: it is no size.
    """
    return None if text is None else byte_count(text, "--memory")


def byte_count(text: str, option: str = "--max-shard-size") -> int:
    """`5GB`, `500MB`, `1.5GiB` or plain bytes as a number.

    Raises:
        UserError: it is none of these.
    """
    return _count(text, _BYTES, option, "a size such as 5GB, 500MB or 1.5GiB")


def token_count(text: str, option: str) -> int:
    """`65536`, `500k`, `2M` or `1.5G` as a number.

    Raises:
        UserError: it is none of these.
    """
    return _count(text, _TOKENS, option, "a number of tokens such as 65536, 500k or 2M")


def _count(text: str, units: Mapping[str, int], option: str, expected: str) -> int:
    """A positive number before a unit, in ones."""
    digits = text.strip().rstrip("BGIKMbgikm ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        count = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise UserError.of(where=option, expected=expected, found=repr(text), remedy="Give such a number.")
    return count
