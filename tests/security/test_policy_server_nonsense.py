"""Attack: whoever answers in the policy server's place says something that is no clear, current yes."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import AuthorizationError, ConfigurationError
from tests.integration.opa_player import (
    OpaPlayer,
    document,
    dripping,
    hanging_up,
    http,
    raw,
    result,
    silence,
)
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

UNASKED = "the policy could not be asked"
YES = document({"allow": True})


@pytest.fixture(scope="module")
async def player():
    folder = Path(tempfile.mkdtemp(prefix="awopa-"))
    server = OpaPlayer(folder)
    await server.start()
    yield server
    await server.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
async def cast(session_world, player):
    """The callee asks the player, and no number of failures opens its breaker."""
    world = session_world
    settings = {
        "authorization__provider": "opa",
        "authorization__opa_endpoint": player.url,
        "authorization__timeout_ms": 1500,
        "authorization__circuit_breaker": {"failure_threshold": 10_000},
    }
    echo, cli, mallory = await world.agent(ECHO, **settings), await world.client(CLI), await world.raw()
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


def lie(what, play, reason, told=UNASKED):
    mark = refused_by(Step.AUTHORIZATION, f"a policy server that {what}", by=Adversary.POLICY)
    return pytest.param(play, reason, told, id=what, marks=mark)


async def denied(attack):
    with pytest.raises(AuthorizationError) as denial:
        await attack.cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE)
    return denial.value


async def judged(attack, player, play, reason, told):
    """Whoever asks while ``play`` is on is denied; ask again when it is off, and all is well."""
    with player.playing(play):
        denial = await denied(attack)
    record = await attack.refused(reason=reason)
    assert denial.audit_id == record["audit_id"]
    assert (denial.direction, denial.reason) == ("inbound", told)
    assert record["allowed"] is False


NO_VERDICT = "holds no allow that is true or false"
MALFORMED = "limits, reason or require_approval of the policy's answer is malformed"


@pytest.mark.parametrize(
    ("play", "reason", "told"),
    [
        lie('says "true" in place of true', result("true"), NO_VERDICT, None),
        lie("says 1", result(1), NO_VERDICT, None),
        lie("says null", result(None), NO_VERDICT, None),
        lie("says a list that holds true", result([True]), NO_VERDICT, None),
        lie("says an empty object", result({}), NO_VERDICT, None),
        lie("allows in words", result({"allow": "true"}), NO_VERDICT, None),
        lie("allows with 1", result({"allow": 1}), NO_VERDICT, None),
        lie("wraps its answer once more", result({"result": {"allow": True}}), NO_VERDICT, None),
        lie("sends limits that are a list", result({"allow": True, "limits": [1]}), MALFORMED, None),
        lie("gives no sentence as its reason", result({"allow": True, "reason": 1}), MALFORMED, None),
        lie(
            "is unsure if approval is needed",
            result({"allow": True, "require_approval": "no"}),
            MALFORMED,
            None,
        ),
        lie(
            "limits with a word",
            result({"allow": True, "limits": {"max_per_minute": "many"}}),
            "max_per_minute is no whole number",
            None,
        ),
        lie("leaves the answer undefined", raw(http(b'{"provenance":{"bundles":{"b":{"revision":"r1"}}}}')),
            "the policy has no answer to this"),
    ],
)  # fmt: skip
async def test_an_answer_that_is_no_clear_yes(attack, player, play, reason, told):
    reason = f"the policy's answer {reason}" if reason is NO_VERDICT else reason
    if told is None:  # the policy's own answer, of which the caller is told
        with player.playing(play):
            denial = await denied(attack)
        await attack.refused(reason=reason)
        assert reason in denial.reason
    else:
        await judged(attack, player, play, reason, told)


@pytest.mark.parametrize(
    ("play", "reason", "told"),
    [
        lie("sends no JSON", raw(http(b"allow")), "no JSON"),
        lie("sends an empty body", raw(http(b"")), "no JSON"),
        lie("sends a list", raw(http(b"[true]")), "no JSON object"),
        lie("sends a bare true", raw(http(b"true")), "no JSON object"),
        lie("sends half of its JSON", raw(http(YES[:-3])), "no JSON"),
        lie("answers twice in one document", raw(http(YES[:-1] + b',"result":{"allow":true}}')), "no JSON"),
        lie(
            "says no and yes under one key",
            raw(http(document(0).replace(b'"result": 0', b'"result":{"allow":false,"allow":true}'))),
            "no JSON",
        ),
        lie("nests without end", raw(http(b"[" * 500_000)), "no JSON"),
        lie("sends a number of 5,000 digits", raw(http(b'{"result":' + b"9" * 5_000 + b"}")), "no JSON"),
        lie("sends bytes that are no text", raw(http(YES.replace(b"allow", b"\xff\xfe"))), "no JSON"),
        lie("announces two megabytes", raw(b"HTTP/1.1 200 X\r\nContent-Length: 2097152\r\n\r\n"), "too long"),
        lie("gives a negative length", raw(b"HTTP/1.1 200 X\r\nContent-Length: -1\r\n\r\n"), "malformed"),
        lie("gives two lengths", raw(http(YES, 200, "Content-Length: 1")), "two values of Content-Length"),
        lie("gives no length", raw(b"HTTP/1.1 200 X\r\n\r\n" + YES), "missing or malformed"),
        lie("ends within its answer", raw(http(YES)[:-10], close=True), "closed within the answer"),
        lie("ends within its headers", raw(b"HTTP/1.1 200 X\r\nCont", close=True), "closed before"),
        lie("sends headers without end", raw(b"HTTP/1.1 200 X\r\nA: " + b"a" * 40_000), "head is too long"),
        lie("speaks no HTTP", raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "no HTTP/1.1"),
        lie(
            "sends chunks of no length",
            raw(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + YES),
            "malformed",
        ),
        lie(
            "sends chunks longer than they say",
            raw(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" + YES + b"\r\n0\r\n\r\n"),
            "longer than it says",
        ),
        lie(
            "sends chunks without end",
            raw(
                b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"
                + (b"10000\r\n" + b" " * 65_536 + b"\r\n") * 17
            ),
            "too long",
        ),
        lie("redirects", raw(http(YES, 302, "Location: http://127.0.0.1:9/")), "status 302"),
        lie("says yes with status 500", raw(http(YES, 500)), "status 500"),
        lie("says yes with status 401", raw(http(YES, 401)), "status 401"),
        lie("says yes with status 203", raw(http(YES, 203)), "status 203"),
        lie(
            "could not evaluate its policy",
            raw(http(json.dumps({"code": "internal_error", "message": "conflict"}).encode(), 500)),
            "OPA says: conflict",
        ),
        lie("closes at once", hanging_up, "the policy gave no answer"),
    ],
)  # fmt: skip
async def test_an_answer_that_is_none(attack, player, play, reason, told):
    await judged(attack, player, play, reason, told)


@pytest.mark.parametrize(
    ("play", "reason", "told"),
    [
        lie("answers by an old revision", result({"allow": True}, "r0"), "its revision is not its current one"),
        lie("answers by no revision", raw(http(b'{"result":{"allow":true}}')), "its revision is not"),
        lie("answers by an empty revision", result({"allow": True}, ""), "its revision is not"),
        lie(
            "answers by a revision that is no text",
            raw(http(b'{"result":{"allow":true},"provenance":{"bundles":{"b":{"revision":["r1"]}}}}')),
            "its revision is not",
        ),
        lie(
            "answers with one bundle too many",
            raw(
                http(
                    b'{"result":{"allow":true},"provenance":'
                    b'{"bundles":{"b":{"revision":"r1"},"c":{"revision":"r1"}}}}'
                )
            ),
            "its revision is not",
        ),
    ],
)  # fmt: skip
async def test_an_answer_by_another_policy(attack, player, play, reason, told):
    await judged(attack, player, play, reason, told)


@pytest.mark.parametrize(
    ("play", "reason", "told"),
    [
        lie("says nothing", silence, "no answer in time"),
        lie("says yes one byte at a time", dripping(http(YES)), "no answer in time"),
        lie("stops within its answer", raw(http(YES)[:-1]), "no answer in time"),
    ],
)
async def test_an_answer_that_takes_too_long(attack, player, play, reason, told):
    engine = attack.echo.parts.authorizer._engine
    usual = engine._settings
    engine._settings = replace(usual, budget_ms=50)
    try:
        with player.playing(play):
            denial = await denied(attack)
    finally:
        engine._settings = usual
    record = await attack.refused(reason=reason)
    assert (denial.reason, denial.audit_id) == (told, record["audit_id"])


@refused_by(Step.AUTHORIZATION, "a policy server that is not there", by=Adversary.POLICY)
async def test_nobody_who_answers(attack, player):
    await player.stop()
    try:
        denial = await denied(attack)
    finally:
        await player.start()
    assert denial.reason == UNASKED  # and nothing of where the callee's policy server is
    await attack.refused(reason="opa.sock: [Errno 2] No such file or directory")


@refused_by(Step.AUTHORIZATION, "a policy server's socket that others can replace", by=Adversary.INTRUDER)
async def test_a_socket_that_somebody_else_could_have_put_there(attack, player):
    await player.stop()
    player.socket.parent.chmod(0o777)
    try:
        await player.start()
        before = len(player.asked)
        await denied(attack)
        assert len(player.asked) == before  # it was told nothing
    finally:
        player.socket.parent.chmod(0o700)
    await attack.refused(reason="which others than root and this user can change")


@refused_by(
    Layer.CONFIGURATION,
    "a policy server's socket that others can replace, from the start",
    by=Adversary.INTRUDER,
)
async def test_an_agent_does_not_start_on_such_a_socket(session_world, tmp_path):
    """It says which folder, and what to do about it; who never answers would be found out by calls only."""
    (tmp_path / "opa").mkdir()
    (tmp_path / "opa").chmod(0o777)
    address = f"unix://{tmp_path}/opa/opa.sock"
    asks = {"authorization__provider": "opa", "authorization__opa_endpoint": address}
    with pytest.raises(
        ConfigurationError, match=rf"lies in {tmp_path}/opa, which others.*chmod go-w"
    ) as refused:
        await session_world.agent(ECHO, **asks)
    assert refused.value.key == "authorization.opa_endpoint"


@refused_by(Step.AUTHORIZATION, "a yes with a limit that is used up", by=Adversary.CALLER)
async def test_a_limit_of_the_policys_answer_is_counted(attack, player):
    player.limits = {"max_per_minute": 0}
    try:
        denial = await denied(attack)
    finally:
        player.limits = {}
    assert "max_per_minute is 0 and used up" in denial.reason
    await attack.refused(reason="used up")
