"""Values that are given on the command line: read, or refused with the name of the option."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from agentweave_bus.exceptions import ConfigurationError, InvalidSpiffeIdError
from agentweave_bus.names import EVENT_NAME
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["parse_json", "parse_principal", "parse_scope", "parse_via", "read_text"]

_QUOTE: Final = 'Quote it for the shell: \'{"name": "value"}\'.'


def read_text(data: str) -> str:
    """Return an argument's text: itself, the content of ``@file``, or for ``-`` standard input.

    Raises:
        OSError: the file can't be read.

    """
    if data == "-":
        return sys.stdin.read()
    if data.startswith("@"):
        return Path(data[1:]).read_text(encoding="utf-8")
    return data


def parse_json(text: str, option: str) -> Any:
    """Read the JSON value of ``option``.

    Raises:
        ConfigurationError: it is none.

    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{option} is no JSON: {error}.", key=option, hint=_QUOTE) from error


def parse_principal(text: str | None) -> dict[str, str] | None:
    """Read ``--principal``, an object whose members are texts; None where it is not given.

    Raises:
        ConfigurationError: it is something else.

    """
    if text is None:
        return None
    value = parse_json(text, "--principal")
    if isinstance(value, dict) and value and all(isinstance(one, str) for one in value.values()):
        return value
    raise ConfigurationError(
        "--principal is no object of texts.",
        key="--principal",
        hint='Write it like \'{"iss": "https://login.example", "sub": "ada"}\'.',
    )


def parse_scope(entries: Sequence[str] | None) -> list[str] | None:
    """Check every ``--scope``; None where none is given.

    Raises:
        ConfigurationError: one is no ``SPIFFE_ID#CAPABILITY``.

    """
    for entry in entries or ():
        agent, _, name = entry.partition("#")
        if not _is_spiffe_id(agent) or not (name == "*" or EVENT_NAME.fullmatch(name)):
            raise ConfigurationError(
                f"--scope {entry!r} is no SPIFFE_ID#CAPABILITY.",
                key="--scope",
                hint="Write it like spiffe://shop.test/agent/order#get_order; #* is all that the agent has.",
            )
    return None if entries is None else list(entries)


def _is_spiffe_id(text: str) -> bool:
    try:
        return bool(SpiffeID(text))
    except InvalidSpiffeIdError:
        return False


def parse_via(text: str | None) -> tuple[dict[str, Any], ...]:
    """Read ``--via``, the links of a delegation, origin first; empty where it is not given.

    Raises:
        ConfigurationError: it is something else than a list of objects.

    """
    if text is None:
        return ()
    value = parse_json(text, "--via")
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return tuple(value)
    raise ConfigurationError(
        "--via is no list of objects.",
        key="--via",
        hint='Write it like \'[{"iss": "spiffe://...", "aud": "spiffe://...", "cap": "create_order"}]\'.',
    )
