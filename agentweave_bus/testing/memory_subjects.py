"""Subjects with wildcards, as NATS compares them: ``*`` is one token, a last ``>`` one or more."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["matches", "matches_any"]


def matches(pattern: str, subject: str) -> bool:
    """Say whether a message on ``subject`` reaches a subscription to ``pattern``.

    A subscription that is compared with a permission counts as if its wildcards were plain words, so that
    ``a.>`` is allowed by ``a.*``: that is how the real server compares.
    """
    if pattern == subject:
        return True
    wanted, given = pattern.split("."), subject.split(".")
    for index, word in enumerate(wanted):
        if word == ">":
            return len(given) > index
        if index >= len(given) or word not in ("*", given[index]):
            return False
    return len(wanted) == len(given)


def matches_any(patterns: Iterable[str], subject: str) -> bool:
    """Say whether one of ``patterns`` matches ``subject``."""
    return any(matches(pattern, subject) for pattern in patterns)
