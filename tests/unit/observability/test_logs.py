"""Records as lines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import anyio
import pytest

from agentweave_bus.config import LoggingConfig
from agentweave_bus.observability.logs import configure_logging, current_log_context, log_context

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

Lines = Callable[[], list[str]]


@pytest.fixture
def logged() -> Iterator[Callable[..., Lines]]:
    undo: list[Callable[[], None]] = []

    def configure(**options) -> Lines:
        stream = io.StringIO()
        undo.append(configure_logging(LoggingConfig.model_validate(options), stream=stream))
        return lambda: stream.getvalue().splitlines()

    yield configure
    for step in reversed(undo):
        step()


def test_a_record_is_one_json_object(logged) -> None:
    lines = logged()
    logging.getLogger("shop.order").info(
        "Routing %s", "request", extra={"service": "user", "count": 3, "tags": {"a": (1, float("nan"))}}
    )
    entry = json.loads(lines()[0])
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "INFO",
        "logger": "shop.order",
        "message": "Routing request",
        "service": "user",
        "count": 3,
        "tags": {"a": [1, "nan"]},
    }


def test_ids_are_bound_once_and_only_inside(logged) -> None:
    lines = logged()
    log = logging.getLogger("x")
    with log_context(trace=TRACE, caller="spiffe://a.io/agent/x"):
        with log_context(task="t-1"):
            log.info("inside")
        log.info("between")
    log.info("outside")
    inside, between, outside = (json.loads(line) for line in lines())
    assert inside["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert inside["task_id"] == "t-1"
    assert inside["caller"] == between["caller"] == "spiffe://a.io/agent/x"
    assert "task_id" not in between
    assert not {"trace_id", "task_id", "caller"} & set(outside)


@pytest.mark.anyio
async def test_requests_at_the_same_time_keep_their_own_ids() -> None:
    seen = {}
    both_bound = anyio.Event()

    async def request(name: str) -> None:
        with log_context(task=name):
            if name == "second":
                both_bound.set()
            await both_bound.wait()
            seen[name] = current_log_context().task_id

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(request, "first")
            group.start_soon(request, "second")
    assert seen == {"first": "first", "second": "second"}


def test_a_malformed_trace_is_not_logged() -> None:
    with log_context(trace='00-"evil"') as bound:
        assert bound.trace_id is None


def test_extras_can_not_pose_as_the_records_own_fields(logged) -> None:
    lines = logged()
    with log_context(caller="spiffe://a.io/agent/x"):
        logging.getLogger("x").info("hello", extra={"caller": "forged", "level": "forged"})
    entry = json.loads(lines()[0])
    assert entry["caller"] == "spiffe://a.io/agent/x"
    assert entry["level"] == "INFO"
    assert entry["caller_"] == "forged"


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_extra_that_says_the_same_is_not_shown_twice(logged, form: str) -> None:
    lines = logged(format=form)
    with log_context(task="t-1", caller="spiffe://a.io/agent/x"):
        logging.getLogger("x").info("hello", extra={"caller": "spiffe://a.io/agent/x", "task_id": "t-2"})
    (line,) = lines()
    if form == "json":
        entry = json.loads(line)
        assert (entry["caller"], entry["task_id"], entry["task_id_"]) == (
            "spiffe://a.io/agent/x",
            "t-1",
            "t-2",
        )
        assert "caller_" not in entry
    else:
        assert line.endswith("x: hello task_id=t-1 caller=spiffe://a.io/agent/x task_id_=t-2")


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_message_can_not_write_a_line_of_its_own(logged, form: str) -> None:
    lines = logged(format=form)
    logging.getLogger("x").info("bad\nINFO forged\r\x1b[2J\u2028", extra={"note": "a\nb"})
    assert len(lines()) == 1
    assert "\x1b" not in lines()[0]


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_is_kept(logged, form: str) -> None:
    lines = logged(format=form)
    try:
        raise ValueError("why\nforged line")
    except ValueError:
        logging.getLogger("x").exception("It failed.")
    if form == "json":
        assert "ValueError: why" in json.loads(lines()[0])["exception"]
    else:
        assert lines()[0].endswith("x: It failed.")
        assert "    ValueError: why" in lines()
        assert all(line.startswith("    ") for line in lines()[1:])


def test_text_shows_ids_and_extras(logged) -> None:
    lines = logged(format="text")
    with log_context(task="t-1"):
        logging.getLogger("x").warning("Slow.", extra={"seconds": 3})
    assert lines()[0].endswith("WARNING x: Slow. task_id=t-1 seconds=3")


def test_levels_by_name_reach_this_packages_loggers(logged) -> None:
    lines = logged(level="WARNING", loggers={"agentweave.authz": "DEBUG", "shop": "INFO"})
    logging.getLogger("agentweave_bus.authz.engine").debug("shown")
    logging.getLogger("agentweave_bus.bus").info("hidden")
    logging.getLogger("shop.order").info("shown, too")
    logging.getLogger("shop.order").debug("hidden")
    assert [json.loads(line)["message"] for line in lines()] == ["shown", "shown, too"]


def test_everything_is_put_back() -> None:
    root, own = logging.getLogger(), logging.getLogger("agentweave_bus.authz")
    before = (root.level, root.handlers[:], own.level)
    restore = configure_logging(
        LoggingConfig(level="DEBUG", loggers={"agentweave.authz": "ERROR"}), stream=io.StringIO()
    )
    assert own.level == logging.ERROR
    restore()
    assert (root.level, root.handlers[:], own.level) == before
