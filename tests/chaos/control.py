"""The control role in a process of its own, so that it can be killed: ``python -m tests.chaos.control``."""

from __future__ import annotations

import asyncio
import logging
import sys

from agentweave_bus.bus.connection import BusAddress, Keeper
from agentweave_bus.bus.streams import claim_stream
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.control.role import ControlRole
from agentweave_bus.envelope import EnvelopeVerifier, control_role
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.identity import ChainVerifier, IdentitySource, SPIFFEIdentityProvider
from agentweave_bus.spiffe_id import SpiffeID
from tests.chaos.broken import apply
from tests.chaos.plan import AGENT, CLIENT, DOMAIN, Settings

_KNOWN = (AGENT, CLIENT)


async def main() -> None:
    settings = Settings.of_environment()
    apply(settings)
    me = control_role(DOMAIN)
    source = IdentitySource(
        SPIFFEIdentityProvider(settings.control_endpoint, me), allowed_trust_domains=(), expected_id=me
    )
    await source.start(15)
    chains = ChainVerifier(source)
    keeper = Keeper(
        source, chains, BusAddress([settings.bus_url], SpiffeID(settings.broker_id)), name="control"
    )
    role = ControlRole(me, keeper=keeper, verifier=EnvelopeVerifier(chains), known=_KNOWN.__contains__)
    async with owned_tasks() as group:
        group.start_soon(source.run)
        async with keeper.open(deadline_s=60):
            group.start_soon(role.run)
            while True:
                try:
                    await role.make(*(claim_stream(one) for one in _KNOWN))
                    break
                except AgentWeaveError as error:
                    logging.getLogger(__name__).warning("the claims are made later: %s", error)
                    await asyncio.sleep(0.5)
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(main())
