"""What a worker process tells those who watch it."""

from __future__ import annotations

import json

import anyio
import anyio.to_thread
import pytest

from tests.integration.probes import ECHO, PATIENCE
from tests.integration.processes import worker_process
from tests.integration.scraping import fetched

pytestmark = pytest.mark.anyio


async def get(url):
    return await anyio.to_thread.run_sync(fetched, url)


async def test_metrics_health_and_readiness_of_a_worker(world, cli):
    async with worker_process(world, ECHO, observability__metrics={"port": 0}) as worker:
        word, url = worker.ready.split()
        assert word == "ready"
        root = url.removesuffix("/metrics")
        for _ in range(3):
            await cli.ask(ECHO, "say", {"text": "x"})
        with pytest.raises(Exception, match="payload"):
            await cli.call(str(ECHO), "say", {"text": 3})
        status, text = await get(url)
        assert status == 200
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        served = 'agentweave_requests_total{capability="say",direction="inbound",status='
        assert lines[served + '"success"}'] == "3.0"
        assert lines[served + '"refused"}'] == "1.0"
        assert lines['agentweave_authz_allowed_total{direction="inbound"}'] == "3.0"
        assert lines['agentweave_admission_refusals_total{reason="refused",step="payload"}'] == "1.0"
        for name in (
            "agentweave_request_duration_seconds_bucket",
            "agentweave_authz_circuit_breaker_state",
            "agentweave_svid_rotation_total",
            "agentweave_svid_rotation_errors_total",
            "agentweave_opa_requests_total",
            "agentweave_opa_errors_total",
            "agentweave_certificate_expiry_timestamp_seconds",
        ):
            assert name in text
        assert (await get(root + "/healthz"))[0] == 200
        status, body = await get(root + "/readyz")
        assert status == 200
        told = json.loads(body)
        assert told["ok"] is told["connected"] is told["identity"] is True
        assert told["policy_revision"]
        await world.stack.nats.kill()
        await ready_is(root, 503)
        assert (await get(root + "/healthz"))[0] == 200  # it will be well again: no reason to be killed
        await world.stack.nats.start()
        await ready_is(root, 200)
        worker.process.terminate()
        assert await worker.wait() == 0


async def ready_is(root, wanted):
    with anyio.fail_after(PATIENCE):
        while (await get(root + "/readyz"))[0] != wanted:  # noqa: ASYNC110 - another process is asked
            await anyio.sleep(0.02)


@pytest.mark.slow  # it starts processes of its own
async def test_two_workers_on_one_port_the_second_says_which_setting_to_change(world):
    async with worker_process(world, ECHO, observability__metrics={"port": 0}) as worker:
        port = int(worker.ready.split()[1].split(":")[2].split("/")[0])
        async with worker_process(world, ECHO, observability__metrics={"port": port}) as second:
            assert await second.wait() == 2
            assert "observability.metrics.port" in second.log.read_text()
