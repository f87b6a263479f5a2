"""Subjects with wildcards, as NATS compares them: ``*`` is one token, a last ``>`` one or more."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import zip_longest

__all__ = ["has_wildcard", "matches", "matches_any", "overlap"]


def has_wildcard(pattern: str) -> bool:
    """Say whether a pattern is for more than one subject."""
    return "*" in pattern or ">" in pattern


def matches(pattern: str, subject: str) -> bool:
    """Say whether a message on ``subject`` reaches a subscription to ``pattern``.

    A subscription that is compared with a permission counts as if its wildcards were plain words, so that
    ``a.>`` is allowed by ``a.*``: that is how the real server compares.
    """
    if pattern == subject:
        return True
    return has_wildcard(pattern) and _expression(pattern).fullmatch(subject) is not None


def matches_any(patterns: Iterable[str], subject: str) -> bool:
    """Say whether one of ``patterns`` matches ``subject``."""
    return any(matches(pattern, subject) for pattern in patterns)


def overlap(one: str, other: str) -> bool:
    """Say whether there is a subject that both patterns match."""
    for mine, theirs in zip_longest(one.split("."), other.split(".")):
        if mine is None or theirs is None:
            return False
        if ">" in (mine, theirs):
            return True
        if mine != theirs and "*" not in (mine, theirs):
            return False
    return True


@lru_cache(maxsize=4096)
def _expression(pattern: str) -> re.Pattern[str]:
    """Return what a pattern means. Kept, because the same few are compared with every message."""
    words = {"*": r"[^.]+", ">": r".+"}
    return re.compile(r"\.".join(words.get(word, re.escape(word)) for word in pattern.split(".")), re.DOTALL)
