"""What a worker process tells a collector and its log: spans as OTLP, and lines that name the request."""

from __future__ import annotations

import json
import socket

import anyio
import anyio.to_thread
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.integration.otlp_receiver import Receiver, said
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.processes import worker_process

pytestmark = pytest.mark.anyio

SECRET = "a payload that nobody may write down"


def telling(endpoint, **logging):
    return {
        "klass": "live_agents:Telling",
        "observability__tracing": {"enabled": True, "otlp_endpoint": endpoint},
        "observability__logging": logging,
    }


def lines_of(worker):
    return [json.loads(line) for line in worker.log.read_text().splitlines()]


async def until_logged(worker, message, times=1):
    with anyio.fail_after(PATIENCE):
        while sum(one["message"] == message for one in lines_of(worker)) < times:  # noqa: ASYNC110 - its file
            await anyio.sleep(0.02)


async def test_spans_and_log_lines_of_a_call_a_task_and_an_event_name_one_another(world, cli):
    levels = {"shop": "DEBUG", "agentweave.agents": "WARNING"}
    with Receiver().running() as receiver:
        async with worker_process(world, ECHO, **telling(receiver.url, loggers=levels)) as worker:
            await cli.ask(ECHO, "tell", {"secret": SECRET})
            task = await cli.client.submit(ECHO, "tell", {"secret": SECRET})
            await task.result(PATIENCE)
            await cli.client.publish("order.made", {"secret": SECRET})
            await until_logged(worker, "heard")
            worker.process.terminate()  # what was not sent yet is sent at the end
            assert await worker.wait() == 0
    lines = lines_of(worker)
    assert not [one for one in lines if one["message"] == "not told"]  # below the level of its logger
    told = [one for one in lines if one["logger"] == "shop.order"]
    assert [one["level"] for one in told] == ["DEBUG"] * 3
    assert {one["caller"] for one in told} == {str(CLI)}
    handled = {
        span.span_id.hex(): (span, resource)
        for resource, span in receiver.spans
        if span.name.startswith("handle ") and span.name != "handle health"
    }
    assert {one["span_id"] for one in told} == set(handled)
    for one in told:
        span, resource = handled[one["span_id"]]
        assert span.trace_id.hex() == one["trace_id"]
        assert said(span)["agentweave.task.id"] == one["task_id"]
        assert resource["service.name"] == "echo"
        assert resource["agentweave.spiffe_id"] == str(ECHO)
        assert resource["process.pid"] == worker.process.pid
    kinds = {span.kind for _, span in receiver.spans}
    assert kinds == {Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CONSUMER, Span.SPAN_KIND_INTERNAL}
    assert SECRET not in worker.log.read_text() + "".join(str(span) for _, span in receiver.spans)


async def test_a_collector_that_is_not_there_is_told_of_once_and_holds_up_nothing(world, cli, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        async with worker_process(world, ECHO, **telling(endpoint)) as worker:
            await cli.ask(ECHO, "tell", {"secret": SECRET})
            told = f"spans can't be delivered to {endpoint}/v1/traces and are dropped until they can"
            await until_logged(worker, told)
            for _ in range(3):
                await cli.ask(ECHO, "tell", {"secret": SECRET})
                await anyio.sleep(0.1)  # for a batch each
            worker.process.terminate()
            assert await worker.wait() == 0
    assert [one["message"] for one in lines_of(worker) if one["level"] != "INFO"] == [told]


@pytest.mark.slow
async def test_a_collector_that_hangs_does_not_keep_a_worker_from_ending(world, cli, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with Receiver(silent=True).running() as receiver:
        async with worker_process(world, ECHO, **telling(receiver.url)) as worker:
            await cli.ask(ECHO, "tell", {"secret": SECRET})
            assert await anyio.to_thread.run_sync(receiver.asked.wait, PATIENCE)
            await cli.ask(ECHO, "tell", {"secret": SECRET})
            worker.process.terminate()
            with anyio.fail_after(30):
                assert await worker.wait() == 0
