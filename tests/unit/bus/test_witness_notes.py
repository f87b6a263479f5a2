"""What a peer says of its own log is noted once, until it says something new."""

from __future__ import annotations

from agentweave_bus.bus.records import WitnessNotes
from agentweave_bus.envelope import Head, Kind, LogWitness
from agentweave_bus.spiffe_id import SpiffeID

ALICE, BOB = SpiffeID("spiffe://a.io/alice"), SpiffeID("spiffe://a.io/bob")


def head(log: LogWitness | None, iss: SpiffeID = ALICE) -> Head:
    return Head(
        kind=Kind.CALL,
        id="0",
        iss=iss,
        x5t=b"",
        aud=BOB,
        cap="c",
        sub="s",
        iat=0,
        exp=1,
        pd=b"",
        ct="c/t",
        log=log,
    )


def test_the_same_statement_is_news_once() -> None:
    notes = WitnessNotes()
    assert notes.is_news(head(("chain", 5, b"h")))
    assert not notes.is_news(head(("chain", 5, b"h")))
    assert notes.is_news(head(("chain", 6, b"i")))


def test_another_hash_another_chain_and_another_sender_are_news() -> None:
    notes = WitnessNotes()
    notes.is_news(head(("chain", 5, b"h")))
    assert notes.is_news(head(("chain", 5, b"other")))
    assert notes.is_news(head(("fresh", 5, b"h")))
    assert notes.is_news(head(("chain", 5, b"other"), BOB))


def test_no_statement_is_none() -> None:
    assert not WitnessNotes().is_news(head(None))


def test_what_could_not_be_recorded_is_news_again() -> None:
    notes = WitnessNotes()
    notes.is_news(head(("chain", 5, b"h")))
    notes.forget(head(("chain", 5, b"h")))
    assert notes.is_news(head(("chain", 5, b"h")))


def test_what_is_remembered_is_bounded() -> None:
    notes = WitnessNotes()
    for n in range(5_000):
        notes.is_news(head((f"chain {n}", 0, b"h")))
    assert len(notes._noted) == 4_096
    assert not notes.is_news(head(("chain 4999", 0, b"h")))
    assert notes.is_news(head(("chain 0", 0, b"h")))
