"""Announcing capabilities past all of this package, and seeing what the control role made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import anyio

from agentweave_bus.bus.streams import ConsumerSpec, task_consumer
from agentweave_bus.bus.subjects import announce_subject
from agentweave_bus.envelope import Draft, Kind, Sealer, control_role, encode_payload, new_id
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import Raw, heard_within
from tests.integration.probes import DOMAIN, PATIENCE

CONTROL = control_role(DOMAIN)


def announcement(
    sealer: Sealer,
    agent: SpiffeID,
    capabilities: Iterable[str],
    *,
    ack_wait: float | None = None,
    **changes: Any,
) -> bytes:
    """A frame that announces ``capabilities``, honest but for ``changes`` to its draft."""
    now = clock_ms()
    values: dict[str, Any] = {
        "kind": Kind.CONTROL,
        "id": new_id(now),
        "aud": CONTROL,
        "cap": "announce",
        "sub": announce_subject(agent),
        "iat": now,
        "exp": now + 30_000,
    } | changes
    more = {} if ack_wait is None else {"ack_wait": ack_wait}
    payload = encode_payload({"capabilities": sorted(capabilities), **more})
    return sealer.seal_now(Draft(**values), payload).frame


async def announce(raw: Raw, agent: SpiffeID, *capabilities: str, ack_wait: float | None = None) -> None:
    frame = announcement(raw.sealer, agent, capabilities, ack_wait=ack_wait)
    await raw.send(announce_subject(agent), frame)


async def asked(mallory: Raw, subject: str, body: Any = None) -> dict[str, Any]:
    """What JetStream says to who may ask anything."""
    heard = await mallory.listen("probe.control")
    await mallory.send(subject, b"" if body is None else json.dumps(body).encode(), "probe.control")
    answer: dict[str, Any] = json.loads((await heard_within(heard)).data)
    return answer


async def consumer_info(mallory: Raw, spec: ConsumerSpec) -> dict[str, Any] | None:
    answer = await asked(mallory, f"$JS.API.CONSUMER.INFO.{spec.stream}.{spec.name}")
    return None if "error" in answer else answer


async def served(mallory: Raw, agent: SpiffeID, capability: str) -> None:
    """Wait until ``capability`` of ``agent`` has its consumer."""
    with anyio.fail_after(PATIENCE):
        while await consumer_info(mallory, task_consumer(agent, capability)) is None:  # noqa: ASYNC110 - no event
            await anyio.sleep(0.01)
