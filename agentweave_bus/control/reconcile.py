"""Making the streams and consumers that are declared in ``bus/streams.py``, again and again without harm.

One that is missing is made; one whose configuration differs is updated; a difference that the broker can't
apply is an error that says which it is, what the broker said and what to do. Nothing is ever deleted. What a
declaration leaves open is the broker's to fill in, and is not compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any, Final

from agentweave_bus.bus.connection import Session
from agentweave_bus.bus.streams import ConsumerSpec, StreamSpec
from agentweave_bus.exceptions import BusError, ConfigurationError

__all__ = ["reconcile_consumers", "reconcile_streams"]

_log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
_NO_STREAM: Final = 10059
_NO_CONSUMER: Final = 10014
_NOT_NOW: Final = frozenset({10005, 10008, 10009})
"""Of a cluster: servers are missing that the replicas need, or nobody leads it at the moment."""

_NO_ROOM: Final = "Raise max_file_store of the servers, or lower the bytes under streams."
_HINTS: Final = {
    10074: "Set streams.replicas to 1, or make a cluster of the servers.",
    10023: _NO_ROOM,
    10047: _NO_ROOM,
}
"""What to do about what the broker says, by its code; what it reserves for all streams has to fit."""

_WHEN_REFUSED: Final = {
    "create": "If there are too many, remove by hand the consumers of capabilities that are no more.",
    "update": "Remove it by hand: no task is lost by that, those that run are given out again, and it is made"
    " anew when a worker announces itself.",
}


async def reconcile_streams(
    session: Session, streams: Iterable[StreamSpec], *, make: bool = True
) -> list[str]:
    """Bring the broker's streams in line with ``streams``; return the names of those that were made.

    Without ``make`` none is made, and only those that are there are brought in line.

    Raises:
        BusError: the broker does not answer, or can't do it now.
        ConfigurationError: a stream exists in a form that can't be changed into the declared one.

    """
    return [stream.name for stream in streams if await _reconcile(session, stream, make=make)]


async def _reconcile(session: Session, stream: StreamSpec, *, make: bool) -> bool:
    info = await _ask(session, f"$JS.API.STREAM.INFO.{stream.name}", {})
    if "error" not in info:
        if _differs(stream.config, info["config"]):
            await _apply(session, "UPDATE", stream)
        return False
    if info["error"].get("err_code") != _NO_STREAM:
        raise BusError(f"the broker can't tell about stream {stream.name}: {_said(info)}")
    if make:
        await _apply(session, "CREATE", stream)
    return make


async def _apply(session: Session, verb: str, stream: StreamSpec) -> None:
    answer = await _ask(session, f"$JS.API.STREAM.{verb}.{stream.name}", stream.config)
    if "error" in answer:
        if answer["error"].get("err_code") in _NOT_NOW:
            raise BusError(f"the broker can't make stream {stream.name} now: {_said(answer)}")
        raise ConfigurationError(
            f"stream {stream.name} ({stream.config['description']}) can't be brought to its declared form:"
            f" {_said(answer)}.",
            hint=_HINTS.get(
                answer["error"].get("err_code"), "Change it by hand, or remove it when no call is under way."
            ),
        )
    _log.log(_level(verb), "stream %s (%s): %s", stream.name, stream.config["description"], verb.lower())


async def reconcile_consumers(session: Session, consumers: Iterable[ConsumerSpec]) -> list[str]:
    """Bring consumers of existing streams in line with ``consumers``; return the names of those made.

    Raises:
        BusError: the broker does not answer.
        ConfigurationError: one exists in a form that can't be changed into the declared one, or the broker
            refuses to make it.

    """
    return [one.name for one in consumers if await _reconcile_consumer(session, one)]


async def _reconcile_consumer(session: Session, consumer: ConsumerSpec) -> bool:
    info = await _ask(session, f"$JS.API.CONSUMER.INFO.{consumer.stream}.{consumer.name}", {})
    if "error" not in info:
        if _differs(consumer.config, info["config"]):
            await _apply_consumer(session, "update", consumer)
        return False
    if info["error"].get("err_code") != _NO_CONSUMER:
        raise BusError(f"the broker can't tell about {_of(consumer)}: {_said(info)}")
    await _apply_consumer(session, "create", consumer)
    return True


async def _apply_consumer(session: Session, action: str, consumer: ConsumerSpec) -> None:
    body = {"stream_name": consumer.stream, "config": consumer.config, "action": action}
    answer = await _ask(session, f"$JS.API.CONSUMER.CREATE.{consumer.stream}.{consumer.name}", body)
    if "error" in answer:
        raise ConfigurationError(
            f"{_of(consumer)} can't be brought to its declared form: {_said(answer)}.",
            hint=_WHEN_REFUSED[action],
        )
    _log.log(_level(action), "%s: %s", _of(consumer), action)


def _level(action: str) -> int:
    """Return how much a change is worth saying: that an agent got what it needs is said once, elsewhere."""
    return logging.DEBUG if action.lower() == "create" else logging.INFO


def _of(consumer: ConsumerSpec) -> str:
    return f"consumer {consumer.name} ({consumer.config['description']}) of stream {consumer.stream}"


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
    return any(_differs_in(value, have.get(key)) for key, value in wanted.items())


def _differs_in(wanted: object, have: object) -> bool:
    if isinstance(wanted, dict) and isinstance(have, dict):
        return _differs(wanted, have)  # to metadata the broker adds some of its own
    return (have or None) != (wanted or None)


def _said(answer: dict[str, Any]) -> str:
    return str(answer["error"].get("description", "no reason given"))
