"""Mutants of the reader of answers: what a caller takes for the answer to its call."""

from __future__ import annotations

from functools import partial

from tests.security.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

REQUESTS = partial(Mutant, part="answers", file="agentweave_bus/bus/requests.py")
OPEN = partial(REQUESTS, function="Requests._open", put="True")

FIELD = "replies/test_answer_to_another_question.py::test_one_field_that_is_not_this_requests"

MUTANTS = (
    OPEN(
        what="another kind than an answer",
        find="head.kind in (Kind.REPLY, Kind.REFUSAL)",
        tests=(f"{FIELD}[progress]", f"{FIELD}[control]"),
    ),
    OPEN(
        what="an answer by anybody",
        find="head.iss == request.callee",
        tests=("replies/test_forged_answer.py::test_an_answer_signed_by_another",),
    ),
    OPEN(
        what="an answer to anybody",
        find="head.aud == me",
        tests=(f"{FIELD}[another addressee]",),
    ),
    OPEN(
        what="an answer of another capability",
        find="head.cap == request.capability",
        tests=(f"{FIELD}[another capability]",),
    ),
    OPEN(
        what="an answer for another subject",
        find="head.sub == message.subject",
        tests=(f"{FIELD}[another subject]",),
    ),
    OPEN(
        what="an answer to another request",
        find="head.re in call.attempts",
        tests=("replies/test_answer_to_another_question.py::test_the_answer_to_an_earlier_call", FIELD),
    ),
    OPEN(
        what="an answer with links",
        find="not opened.via",
        tests=("replies/test_answer_to_another_question.py::test_an_answer_with_links",),
    ),
    OPEN(
        what="an answer of any time",
        find="check_time_reply(opened.head, now_ms)",
        put="None",
        tests=("replies/test_skewed_answer.py::test_beyond_the_bound",),
    ),
    Mutant(
        part="answers",
        what="the signature of an answer",
        file="agentweave_bus/envelope/verification.py",
        function="EnvelopeVerifier.open",
        find="self.check_proof(parts, sender)",
        put="None",
        tests=("replies/test_altered_answer.py",),
    ),
    REQUESTS(
        what="the status of a message that is not empty",
        function="Requests._on_reply",
        find="not message.data",
        put="True",
        tests=(
            "replies/test_injected_refusal.py::test_an_unsigned_refusal",
            "replies/test_answer_headers.py",
        ),
    ),
    REQUESTS(
        what="the second answer to a call",
        function="Requests._on_reply",
        find="call.is_answered",
        tests=("replies/test_late_answer.py::test_the_first_of_two_counts",),
    ),
    REQUESTS(
        what="attempts that may still be answered, at a refusal",
        function="Requests._all_refused",
        find="all(call.attempts.values())",
        put="True",
        tests=("replies/test_injected_refusal.py::test_one_attempts_refusal_does_not_end_the_other",),
    ),
    REQUESTS(
        what="the end of a call: its subjects are forgotten",
        function="Requests._forget",
        find="self._calls.pop(subject, None)",
        put="None",
        tests=("replies/test_late_answer.py::test_an_answer_again",),
    ),
    REQUESTS(
        what="the id of a call that may have been received",
        function="Requests._call",
        find="call.in_doubt",
        tests=("broker/test_compromised_broker.py::test_nobody_there_and_then_not_ready",),
    ),
)
