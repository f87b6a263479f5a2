"""What is said of answers that do not count: once a minute for each callee and reason, however many come."""

from __future__ import annotations

from collections import Counter

import pytest

from agentweave_bus.bus.dropped import DropLog, WhyDropped, dropped_words
from agentweave_bus.exceptions import (
    BundleUnavailableError,
    ChainRefusedError,
    FederationError,
    MalformedEnvelopeError,
    SignatureRefusedError,
    TimeRefusedError,
)
from agentweave_bus.spiffe_id import SpiffeID

CALLEE, OTHER = SpiffeID("spiffe://a.test/agent/x"), SpiffeID("spiffe://a.test/agent/y")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (TimeRefusedError("x"), WhyDropped.TIME),
        (ChainRefusedError("x"), WhyDropped.CHAIN),
        (BundleUnavailableError("x", trust_domain="a.test"), WhyDropped.CHAIN),
        (FederationError("x", trust_domain="a.test"), WhyDropped.CHAIN),
        (SignatureRefusedError("x"), WhyDropped.PROOF),
        (MalformedEnvelopeError("x"), WhyDropped.FORM),
    ],
)
def test_each_error_has_its_reason(error, why):
    assert WhyDropped.of(error) is why


def test_a_flood_of_them_is_one_line_a_minute_for_each_callee_and_reason(caplog):
    now = [0.0]
    log = DropLog(lambda: now[0])
    for _ in range(100):
        log.note(CALLEE, "do", WhyDropped.FORM)
    assert len(caplog.records) == 1
    log.note(CALLEE, "do", WhyDropped.TIME)
    log.note(OTHER, "do", WhyDropped.FORM)
    assert len(caplog.records) == 3
    now[0] = 59.9
    log.note(CALLEE, "do", WhyDropped.FORM)
    assert len(caplog.records) == 3
    now[0] = 60.0
    log.note(CALLEE, "do", WhyDropped.FORM)
    assert len(caplog.records) == 4


def test_what_is_remembered_of_them_is_bounded():
    log = DropLog(lambda: 0.0)
    for number in range(1000):
        log.note(SpiffeID(f"spiffe://a.test/agent/{number}"), "do", WhyDropped.FORM)
    assert len(log._said) == 256


def test_how_many_came_and_why_is_said_in_words():
    assert dropped_words(Counter()) == ""
    words = dropped_words(Counter({WhyDropped.TIME: 2, WhyDropped.FORM: 1}))
    assert "2: its time is too far" in words
    assert "1: it is no envelope" in words
