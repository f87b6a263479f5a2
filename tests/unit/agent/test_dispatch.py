"""The capability table, and what comes out of handlers that return, raise, hang or are cancelled."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import anyio
import pytest
from anyio import from_thread
from pydantic import BaseModel

from agentweave_bus.agent import (
    BoundCapability,
    CapabilityTable,
    RequestContext,
    bind_context,
    capability,
    current_context,
    requires_federated_peer,
    requires_peer,
    to_result,
)
from agentweave_bus.exceptions import (
    AuthorizationError,
    ConfigurationError,
    PayloadError,
    TaskFailedError,
)
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.types import DataPart, Message, TaskResult

LOGGER = logging.getLogger("agentweave_bus.agents.probe")
CALLER = "spiffe://a.io/agent/order"


def table_of(owner: object) -> CapabilityTable:
    table = CapabilityTable(LOGGER)
    table.add_methods(owner)
    return table


def bound(function: Any, **options: Any) -> BoundCapability:
    table = CapabilityTable(LOGGER)
    table.add_function(capability("probe", **options)(function))
    return table["probe"]


async def run(function: Any, payload: dict[str, Any] | None = None, **options: Any) -> TaskResult:
    made = bound(function, **options)
    return await made.invoke(made.validate(payload or {}))


def deadline_in(seconds: float) -> RequestContext:
    return RequestContext(
        caller_spiffe_id=CALLER, task_id="t-1", deadline_ms=int((time.time() + seconds) * 1000)
    )


# --- the table ---------------------------------------------------------------------------------------


class Shop:
    @capability("quote", safe=True, timeout=5, concurrency=3, retry=Retry(attempts=7))
    async def quote(self, item: str) -> str:
        """Say a price.

        And more.
        """
        return item

    @capability("pay", description="Take money")
    @requires_peer("spiffe://a.io/agent/*")
    def pay(self, amount: Decimal) -> Decimal:
        return amount

    def helper(self) -> None: ...


def test_decorated_methods_are_found() -> None:
    table = table_of(Shop())
    assert list(table) == ["quote", "pay"]
    quote, pay = table["quote"], table["pay"]
    assert (quote.safe, quote.timeout, quote.description) == (True, 5.0, "Say a price.")
    assert (quote.concurrency, quote.retry) == (3, Retry(attempts=7))
    assert (pay.concurrency, pay.retry) == (None, None)
    assert (pay.safe, pay.timeout, pay.description) == (False, None, "Take money")
    assert pay.schema["required"] == ["amount"]
    assert quote.content_type == "application/vnd.agentweave.json+msgpack"
    assert quote.describe().to_json()["schema"]["properties"]["item"]["type"] == "string"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(PayloadError, match=r"no capability 'quotes'.*did you mean 'quote'"):
        table_of(Shop()).resolve("quotes")
    with pytest.raises(PayloadError, match="there are quote, pay"):
        table_of(Shop()).resolve("zzz")


def test_two_methods_of_one_name_are_both_named() -> None:
    class Twice:
        @capability("x")
        def first(self) -> None: ...

        @capability("x")
        def second(self) -> None: ...

    with pytest.raises(ConfigurationError, match=r"Twice\.first and by .*Twice\.second"):
        table_of(Twice())


def test_inherited_capabilities_work() -> None:
    class Branch(Shop):
        @capability("close")
        def close(self) -> None: ...

    assert set(table_of(Branch())) == {"quote", "pay", "close"}


def test_an_override_without_decorators_stays_capability_and_restricted() -> None:
    class Branch(Shop):
        def pay(self, amount: Decimal, tip: Decimal = Decimal(0)) -> Decimal:
            return amount + tip

    pay = table_of(Branch())["pay"]
    assert "Branch.pay" in pay.source
    assert set(pay.schema["properties"]) == {"amount", "tip"}
    assert pay.admits_peer("spiffe://b.io/agent/x")


def test_an_override_can_narrow_but_not_widen_by_omission() -> None:
    class Branch(Shop):
        @capability("pay", safe=True)
        @requires_federated_peer(trust_domains=["a.io", "b.io"])
        def pay(self, amount: Decimal) -> Decimal:
            return amount

    pay = table_of(Branch())["pay"]
    assert pay.safe
    assert pay.admits_peer("spiffe://a.io/agent/x") is None
    assert pay.admits_peer("spiffe://b.io/agent/x")
    assert pay.admits_peer("spiffe://a.io/client/x")


def test_a_subclass_can_take_a_capability_away() -> None:
    class Branch(Shop):
        pay = None  # type: ignore[assignment]

    assert set(table_of(Branch())) == {"quote"}


def test_a_restriction_without_capability_is_a_mistake() -> None:
    class Careless:
        @requires_peer("spiffe://a.io/agent/*")
        def pay(self) -> None: ...

    with pytest.raises(ConfigurationError, match=r"Careless\.pay restricts its callers but is no capability"):
        table_of(Careless())


def test_generators_are_refused() -> None:
    async def stream():
        yield 1

    with pytest.raises(ConfigurationError, match="is a generator"):
        bound(stream)


def test_a_function_needs_its_decorator() -> None:
    with pytest.raises(ConfigurationError, match=r"has no @capability"):
        CapabilityTable(LOGGER).add_function(lambda: None)


def test_the_first_refusing_rule_gives_the_reason() -> None:
    pay = table_of(Shop())["pay"]
    assert pay.admits_peer(CALLER) is None
    assert pay.admits_peer("spiffe://b.io/agent/x") == "pay: it is not open to spiffe://b.io/agent/x"
    assert table_of(Shop())["quote"].admits_peer("spiffe://any.io/x") is None


def test_a_rule_reaches_through_a_wrapping_decorator() -> None:
    def logged(function: Any) -> Any:
        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        return wrapper

    @capability("probe")
    async def probe(x: int) -> int:
        return x

    requires_peer("spiffe://a.io/only")(logged(probe))
    table = CapabilityTable(LOGGER)
    table.add_function(probe)
    assert table["probe"].admits_peer(CALLER)


# --- results -----------------------------------------------------------------------------------------


class Model(BaseModel):
    amount: Decimal
    at: datetime


@dataclass
class Record:
    id: UUID


NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ({"amount": Decimal("1.10"), "at": NOON}, {"amount": "1.10", "at": "2026-01-02T12:00:00+00:00"}),
        (Model(amount=Decimal(2), at=NOON), {"amount": "2", "at": "2026-01-02T12:00:00+00:00"}),
        (Record(UUID(int=1)), {"id": "00000000-0000-0000-0000-000000000001"}),
        ([1, "a", None], [1, "a", None]),
        ("text", "text"),
        (3, 3),
        (None, None),
    ],
)
def test_what_a_handler_returns_becomes_one_data_part(value: Any, data: Any) -> None:
    result = to_result(value)
    assert result.status == "completed"
    assert result.messages == [Message("assistant", [DataPart(data)])]
    assert result.artifacts[0]["data"] == data


def test_a_result_stays_one_with_its_data_as_json() -> None:
    given = TaskResult(
        status="failed",
        messages=[Message("assistant", [DataPart({"at": NOON})])],
        artifacts=[{"type": "t", "data": Decimal(1)}],
        error="no",
    )
    result = to_result(given)
    assert (result.status, result.error) == ("failed", "no")
    assert result.to_json()["artifacts"] == [{"type": "t", "data": "1"}]


# --- running -----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_handlers_get_what_was_validated() -> None:
    async def probe(amount: Decimal, note: str = "none") -> dict[str, Any]:
        return {"double": amount * 2, "note": note}

    assert (await run(probe, {"amount": "1.05"})).data == {"double": "2.10", "note": "none"}


@pytest.mark.anyio
async def test_plain_functions_run_in_a_thread_with_their_context() -> None:
    def probe() -> dict[str, Any]:
        return {"thread": threading.get_ident(), "caller": current_context().caller_spiffe_id}

    with bind_context(deadline_in(10)):
        result = await run(probe)
    assert result.data["thread"] != threading.get_ident()
    assert result.data["caller"] == CALLER


@pytest.mark.anyio
async def test_a_plain_function_can_reach_back_into_the_event_loop() -> None:
    async def inside() -> str:
        return current_context().task_id

    with bind_context(deadline_in(10)):
        assert (await run(lambda: from_thread.run(inside))).data == "t-1"


@pytest.mark.anyio
async def test_a_wrapped_coroutine_is_awaited() -> None:
    async def inner() -> int:
        return 7

    def probe():
        return inner()

    assert (await run(probe)).data == 7


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [KeyError("secret"), AuthorizationError("secret"), ExceptionGroup("secret", [OSError()])]
)
async def test_an_exception_is_told_as_a_number_and_logged_in_full(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def probe() -> None:
        raise error

    with bind_context(deadline_in(10)):
        result = await run(probe)
    assert result.status == "failed"
    assert "secret" not in str(result.to_json())
    (record,) = caplog.records
    assert result.error == f"internal error; correlation id {record.correlation_id}"
    assert (record.capability, record.caller, record.task_id) == ("probe", CALLER, "t-1")
    assert record.exc_info[1] is error


@pytest.mark.anyio
async def test_an_exception_in_a_thread_is_treated_alike(caplog: pytest.LogCaptureFixture) -> None:
    def probe() -> None:
        raise StopIteration("secret")

    result = await run(probe)
    assert result.error.startswith("internal error; correlation id ")
    assert "secret" in caplog.text


@pytest.mark.anyio
async def test_a_failure_that_is_meant_for_the_caller_is_told() -> None:
    async def probe() -> None:
        raise TaskFailedError("user u-1 not found")

    result = await run(probe)
    assert (result.status, result.error) == ("failed", "user u-1 not found")


@pytest.mark.anyio
@pytest.mark.parametrize("value", [float("nan"), object(), b"x", Decimal("1E+40")])
async def test_a_value_without_json_form_is_the_authors_error(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def probe() -> Any:
        return {"value": value}

    result = await run(probe)
    assert result.error.startswith("internal error; correlation id ")
    assert caplog.records[0].correlation_id in result.error


@pytest.mark.anyio
async def test_the_deadline_of_the_caller_ends_a_handler(caplog: pytest.LogCaptureFixture) -> None:
    ended = []

    async def probe() -> None:
        try:
            await anyio.sleep(60)
        finally:
            ended.append(True)

    with anyio.fail_after(30), bind_context(deadline_in(0.1)):
        result = await run(probe)
    assert ended == [True]
    assert result.status == "failed"
    assert result.error == f"deadline exceeded; correlation id {caplog.records[0].correlation_id}"


@pytest.mark.anyio
async def test_the_deadline_ends_the_wait_for_a_thread() -> None:
    release = threading.Event()
    with anyio.fail_after(30), bind_context(deadline_in(0.1)):
        result = await run(lambda: release.wait(10))
    release.set()
    assert result.error.startswith("deadline exceeded")


@pytest.mark.anyio
async def test_a_capability_may_have_a_shorter_limit() -> None:
    async def probe() -> None:
        await anyio.sleep(60)

    with anyio.fail_after(30), bind_context(deadline_in(60)):
        result = await run(probe, timeout=0.05)
    assert result.error.startswith("deadline exceeded")


@pytest.mark.anyio
async def test_nothing_runs_after_the_deadline() -> None:
    ran = []

    async def probe() -> None:
        ran.append(1)

    with bind_context(deadline_in(-1)):
        assert (await run(probe)).error.startswith("deadline exceeded")
    assert ran == []


@pytest.mark.anyio
async def test_a_handlers_own_timeout_is_its_own_failure() -> None:
    async def probe() -> None:
        with anyio.fail_after(0.01):
            await anyio.sleep(5)

    with bind_context(deadline_in(10)):
        assert (await run(probe)).error.startswith("internal error")


@pytest.mark.anyio
async def test_awaiting_something_cancelled_is_a_failure_not_a_cancellation() -> None:
    async def probe() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    assert (await run(probe)).error.startswith("internal error")


@pytest.mark.anyio
async def test_cancellation_from_outside_goes_through() -> None:
    began = anyio.Event()

    async def probe() -> None:
        began.set()
        await anyio.sleep(60)

    async with anyio.create_task_group() as group:
        group.start_soon(run, probe)
        with anyio.fail_after(30):
            await began.wait()
        group.cancel_scope.cancel()
    assert group.cancel_scope.cancelled_caught
