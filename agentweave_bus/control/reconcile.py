"""Making the streams that are declared in ``bus/streams.py``, again and again without harm.

A stream that is missing is made; one whose configuration differs is updated; a difference that the
broker can't apply is an error that says which stream and what the broker said. Nothing is ever deleted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any, Final

from agentweave_bus.bus.connection import Session
from agentweave_bus.bus.streams import StreamSpec
from agentweave_bus.exceptions import BusError, ConfigurationError

__all__ = ["reconcile_streams"]

_log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
_NOT_FOUND: Final = 10059


async def reconcile_streams(session: Session, streams: Iterable[StreamSpec]) -> list[str]:
    """Bring the broker's streams in line with ``streams``; return the names of those that were made.

    Raises:
        BusError: the broker does not answer.
        ConfigurationError: a stream exists in a form that can't be changed into the declared one.

    """
    return [stream.name for stream in streams if await _reconcile(session, stream)]


async def _reconcile(session: Session, stream: StreamSpec) -> bool:
    info = await _ask(session, f"$JS.API.STREAM.INFO.{stream.name}", {})
    if "error" not in info:
        if _differs(stream.config, info["config"]):
            await _apply(session, "UPDATE", stream)
        return False
    if info["error"].get("err_code") != _NOT_FOUND:
        raise BusError(f"the broker can't tell about stream {stream.name}: {_said(info)}")
    await _apply(session, "CREATE", stream)
    return True


async def _apply(session: Session, verb: str, stream: StreamSpec) -> None:
    answer = await _ask(session, f"$JS.API.STREAM.{verb}.{stream.name}", stream.config)
    if "error" in answer:
        raise ConfigurationError(
            f"stream {stream.name} ({stream.config['description']}) can't be brought to its declared form:"
            f" {_said(answer)}.",
            hint="Change it by hand, or remove it when no call is under way.",
        )
    _log.info("stream %s (%s): %s", stream.name, stream.config["description"], verb.lower())


async def _ask(session: Session, subject: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = await session.ask(subject, json.dumps(body).encode() if body else b"", timeout_s=_TIMEOUT_S)
        decoded = json.loads(answer.data)
    except TimeoutError as error:
        raise BusError(f"the broker does not answer on {subject}; is JetStream on?") from error
    except ValueError as error:
        raise BusError(f"JetStream is not available at this broker (no answer on {subject})") from error
    if not isinstance(decoded, dict):
        raise BusError(f"the broker's answer on {subject} is not understood")
    return decoded


def _differs(wanted: dict[str, Any], have: dict[str, Any]) -> bool:
    """Compare what is declared; the broker leaves out what is false, zero or empty."""
    return any((have.get(key) or None) != (value or None) for key, value in wanted.items())


def _said(answer: dict[str, Any]) -> str:
    return str(answer["error"].get("description", "no reason given"))
