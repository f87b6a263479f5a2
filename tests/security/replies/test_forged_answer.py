"""Attack: an answer by somebody else than who was asked. Nobody but the callee can sign for the callee."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from agentweave_bus.envelope import Kind, encode_payload
from agentweave_bus.envelope.frame import encode_frame
from agentweave_bus.identity import Authority
from tests.integration.callee import reply_to, result_of
from tests.integration.probes import CLI, ECHO, FRONT, MALLORY, OTHER
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(
            OTHER,
            marks=refused_by(
                Layer.CALLER, "an answer signed by an agent that was not asked", by=Adversary.AGENT
            ),
            id="other agent",
        ),
        pytest.param(
            FRONT,
            marks=refused_by(
                Layer.CALLER, "an answer by the callee's colleague of another identity", by=Adversary.AGENT
            ),
            id="colleague",
        ),
        pytest.param(
            MALLORY,
            marks=refused_by(
                Layer.CALLER, "an answer by the broker, signed with its own key", by=Adversary.BROKER
            ),
            id="broker",
        ),
        pytest.param(
            CLI,
            marks=refused_by(Layer.CALLER, "the caller's own signature as an answer", by=Adversary.BROKER),
            id="caller itself",
        ),
    ],
)
async def test_an_answer_signed_by_another(question, who):
    forged = reply_to(question.message, question.world.issue(who))
    await question.answer(forged.frame)
    await question.all_dropped()


@refused_by(Layer.CALLER, "an answer that another authority's copy of the callee signed", by=Adversary.DOMAIN)
async def test_an_answer_of_an_impostor_authority(question):
    impostor = Authority("demo.test").issue(ECHO, lifetime=timedelta(hours=1))
    await question.answer(reply_to(question.message, impostor).frame)
    await question.all_dropped()


@refused_by(Layer.CALLER, "an unsigned answer on the right subject", by=Adversary.BROKER)
async def test_an_answer_without_a_signature(question):
    """What any program would say on this subject, and frames whose proof is empty."""
    payload = encode_payload(result_of({"answer": "forged"}))
    genuine = reply_to(question.message, question.world.issue(ECHO))
    forged = reply_to(question.message, question.world.issue(MALLORY))
    # The head is in the callee's name and with its chain; only the signature is somebody else's.
    dressed = replace(genuine.link, proof=forged.link.proof)
    wrong = [payload, b"", b'{"status":"completed"}', encode_frame(dressed, payload, ())]
    for data in wrong:
        await question.answer(data)
    await question.all_dropped(len(wrong))


@refused_by(Layer.CALLER, "a refusal signed by somebody else than the callee", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [OTHER, FRONT, MALLORY], ids=["other", "colleague", "broker"])
async def test_a_refusal_in_the_callees_place(question, who):
    body = {"step": "authorization", "reason": "no", "audit_id": "a-1"}
    forged = reply_to(question.message, question.world.issue(who), body, kind=Kind.REFUSAL)
    await question.answer(forged.frame)
    await question.all_dropped()
