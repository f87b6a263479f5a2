"""A configuration that pins the revisions of OPA's bundle believes no other answer."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.opa_server import OpaServer
from tests.integration.probes import CLI, ECHO
from tests.integration.test_opa_servers import GRANTS, asks

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(find_opa() is None, reason="no opa binary: 'make tools' builds the server to ask"),
]


@pytest.fixture
async def opa():
    folder = Path(tempfile.mkdtemp(prefix="awopa-"))
    server = OpaServer(folder)
    yield server
    await server.aclose()
    shutil.rmtree(folder)


async def test_only_revisions_that_are_pinned_count(world, echo, opa):
    await opa.start(GRANTS)
    free = await world.client(CLI, **asks(opa))
    await free.ask(ECHO, "say", {"text": "x"})
    revision = free.parts.authorizer.revision
    for pinned, counts in (([revision], True), (["another"], False)):
        cli = await world.client(CLI, **asks(opa, authorization__opa_revisions=pinned))
        if counts:
            assert await cli.ask(ECHO, "say", {"text": "x"}) == {"said": "x"}
        else:
            with pytest.raises(AuthorizationError, match="not an accepted one"):
                await cli.ask(ECHO, "say", {"text": "x"})
