from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from agentweave_bus.authz import (
    AllowAllProvider,
    AuthorizationProvider,
    Authorizer,
    AuthzContext,
    AuthzDecision,
    Grants,
    OPAEnforcer,
    PolicyAnswer,
    PolicyEnforcer,
    PolicyWatch,
    Standing,
)
from agentweave_bus.authz.limiter import LocalLimiter
from agentweave_bus.authz.policy_input import parse_strict
from agentweave_bus.authz.standing import MAX_STANDING_ENTRIES, Asked, StandingCache, standing_key
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.exceptions import ConfigurationError, PolicyUnavailableError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

GATEWAY = "spiffe://agentweave.io/agent/gateway"
ORDER = "spiffe://agentweave.io/agent/order"
PAYMENT = "spiffe://agentweave.io/agent/payment"
PARTNER = "spiffe://other.example/agent/billing"
CLI = "spiffe://agentweave.io/client/cli"

SHOP = f"""
grants:
  - {{caller: {GATEWAY}, callee: {ORDER}, capabilities: [get_order]}}
  - {{caller: {GATEWAY}, callee: {ORDER}, capabilities: [create_order], limits: {{max_amount: 1000}}}}
  - {{caller: {GATEWAY}, callee: {ORDER}, capabilities: [ping], limits: {{max_per_minute: 3}}}}
  - {{caller: {ORDER}, callee: {PAYMENT}, capabilities: [pay], on_behalf_of: {GATEWAY}}}
  - {{caller: {PARTNER}, callee: {PAYMENT}, capabilities: ["*"]}}
partners:
  other.example: {{max_transaction: 600, rate_limit_per_minute: 4, daily_limit: 1000}}
operators:
  - {{who: {CLI}, may: [control:cancel]}}
"""


def asking(
    action: str = "get_order", caller: str = GATEWAY, callee: str = ORDER, **more: Any
) -> AuthzContext:
    return AuthzContext(caller=caller, callee=callee, action=action, direction="inbound", **more)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class ScriptedEngine:
    """An engine whose answers a test writes; it counts what it is asked."""

    result: Any = True
    standing: Standing | None = None
    revision: str = "r1"
    answered_revision: str | None = None
    asked: list[bytes] = field(default_factory=list)
    standing_asked: list[bytes] = field(default_factory=list)
    gate: asyncio.Event | None = None

    def has_standing(self, package: str) -> bool:
        return True

    async def evaluate(self, package: str, input_json: bytes) -> PolicyAnswer:
        self.asked.append(input_json)
        revision = self.revision
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.result, BaseException):
            raise self.result
        rule = "allow" if isinstance(self.result, bool) else "decision"
        return PolicyAnswer(
            self.result is not None,
            rule,
            self.result,
            revision if self.answered_revision is None else self.answered_revision,
        )

    async def evaluate_standing(self, package: str, input_json: bytes) -> Standing | None:
        self.standing_asked.append(input_json)
        return self.standing

    async def aclose(self) -> None: ...


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "grants.yaml").write_text(SHOP)
    return tmp_path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authorizer(shop: Path, clock: Clock) -> Authorizer:
    engine = EmbeddedEngine()
    return Authorizer(engine, watch=PolicyWatch(shop, engine.load), monotonic=clock, wall=lambda: 86400.0 * 5)


class TestWithTheShippedPolicy:
    async def test_grants_decide(self, authorizer: Authorizer) -> None:
        allowed = await authorizer.authorize(asking())
        assert (allowed.allowed, allowed.reason) == (True, "grant 1 allows it")
        assert allowed.revision == authorizer.revision != ""
        denied = await authorizer.authorize(asking("delete_order"))
        assert not denied.allowed
        assert "no grant lets" in denied.reason

    async def test_a_payload_limit_is_named_and_nothing_stands(self, authorizer: Authorizer) -> None:
        for amount, allowed in ((Decimal(1000), True), (Decimal("1000.01"), False), (5, True), (2000, False)):
            decision = await authorizer.authorize(asking("create_order", payload={"amount": amount}))
            assert decision.allowed is allowed
            assert decision.standing is False
            assert allowed or "max_amount 1000" in decision.reason

    async def test_a_grant_without_payload_limits_stands_for_30_seconds(
        self, authorizer: Authorizer, clock: Clock
    ) -> None:
        first = await authorizer.authorize(asking(task_id="1"))
        again = await authorizer.authorize(asking(task_id="2", payload={"other": 1}))
        assert (first.standing, again.standing) == (False, True)
        assert again.decision_id == first.decision_id
        clock.now += 29.9
        assert (await authorizer.authorize(asking())).standing is True
        clock.now += 0.2
        later = await authorizer.authorize(asking())
        assert later.standing is False
        assert later.decision_id != first.decision_id

    async def test_uses_are_limited_also_when_the_answer_stands(
        self, authorizer: Authorizer, clock: Clock
    ) -> None:
        found = [await authorizer.authorize(asking("ping")) for _ in range(4)]
        assert [decision.allowed for decision in found] == [True, True, True, False]
        assert [decision.standing for decision in found] == [False, True, True, True]
        assert "max_per_minute is 3" in found[3].reason
        assert (await authorizer.authorize(asking())).allowed, "another action has its own count"
        clock.now += 61
        assert (await authorizer.authorize(asking("ping"))).allowed

    async def test_a_partner_has_limits_of_transaction_rate_and_day(
        self, authorizer: Authorizer, clock: Clock
    ) -> None:
        async def pay(amount: int) -> AuthzDecision:
            return await authorizer.authorize(asking("pay", PARTNER, PAYMENT, payload={"amount": amount}))

        assert "max_transaction" in (await pay(601)).reason
        assert (await pay(600)).allowed
        assert (await pay(400)).allowed
        over = await pay(1)
        assert (over.allowed, "daily_limit is 1000" in over.reason) == (False, True)
        assert (await pay(0)).allowed
        assert (await pay(0)).allowed
        over = await pay(0)
        assert (over.allowed, "rate_limit_per_minute is 4" in over.reason) == (False, True)
        clock.now += 61
        assert (await pay(0)).allowed

    async def test_before_a_claim_only_grants_and_standing_count(self, authorizer: Authorizer) -> None:
        assert authorizer.permits_quickly(asking())
        assert authorizer.permits_quickly(asking("create_order", payload={"amount": 9999}))
        assert not authorizer.permits_quickly(asking("delete_order"))
        assert not authorizer.permits_quickly(asking(kind="event"))
        assert not authorizer.permits_quickly(asking("pay", ORDER, PAYMENT))
        assert authorizer.permits_quickly(asking("pay", ORDER, PAYMENT, via=[{"iss": GATEWAY}]))
        assert not authorizer.permits_quickly(asking(principal={"iss": "https://login.example"}))
        assert authorizer.permits_quickly(asking("control:cancel", CLI))

    async def test_who_may_be_told_about_a_bad_payload(self, authorizer: Authorizer) -> None:
        assert await authorizer.allows_action_in_general(asking("create_order"))
        assert not await authorizer.allows_action_in_general(asking("delete_order"))

    async def test_the_reference_enforcer(self, authorizer: Authorizer) -> None:
        enforcer = OPAEnforcer(authorizer, ORDER)
        assert isinstance(enforcer, PolicyEnforcer)
        assert (await enforcer.check_inbound(GATEWAY, "get_order", {"task_id": "t"})).allowed
        over = await enforcer.check_inbound(GATEWAY, "create_order", {"payload": {"amount": 1001}})
        assert not over.allowed
        assert not (await enforcer.check_inbound(PAYMENT, "get_order")).allowed
        assert (await enforcer.check_outbound(GATEWAY, ORDER, "get_order")).allowed
        assert not (await enforcer.check_outbound(GATEWAY, PAYMENT, "get_order")).allowed


class TestReload:
    async def test_a_change_swaps_policy_and_grants_and_forgets_what_stood(
        self, authorizer: Authorizer, shop: Path
    ) -> None:
        assert (await authorizer.authorize(asking())).allowed
        before = authorizer.revision
        (shop / "grants.yaml").write_text(SHOP.replace("get_order", "get_orders"))
        assert await authorizer.reload(force=False)
        assert authorizer.revision != before
        assert not (await authorizer.authorize(asking())).allowed
        assert not authorizer.permits_quickly(asking())
        assert authorizer.permits_quickly(asking("get_orders"))

    async def test_a_bad_file_keeps_the_old_one_and_alarms_once(self, shop: Path) -> None:
        engine, alarms = EmbeddedEngine(), []
        authorizer = Authorizer(engine, watch=PolicyWatch(shop, engine.load), on_alarm=alarms.append)
        (shop / "grants.yaml").write_text(SHOP.replace("callee:", "calee:"))
        assert not await authorizer.reload(force=False)
        assert not await authorizer.reload(force=False)
        assert len(alarms) == 1
        assert "did you mean 'callee'?" in alarms[0]
        assert (await authorizer.authorize(asking())).allowed
        (shop / "grants.yaml").write_text(SHOP)
        assert await authorizer.reload(force=False)

    async def test_a_fault_that_nobody_foresaw_keeps_the_old_one_too(
        self, shop: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine, alarms = EmbeddedEngine(), []
        watch = PolicyWatch(shop, engine.load)
        authorizer = Authorizer(engine, watch=watch, on_alarm=alarms.append)

        def fails(*_: object) -> None:
            raise KeyError("a secret of the file")

        with monkeypatch.context() as patch:
            patch.setattr(Grants, "load", fails)
            (shop / "grants.yaml").write_text(SHOP.replace("get_order", "get_orders"))
            assert not await authorizer.reload(force=False)
        assert not await authorizer.reload(force=False)  # until it changes again
        with monkeypatch.context() as patch:
            patch.setattr(watch, "_fingerprint", fails)
            assert not await authorizer.reload(force=False)
        assert [one.rpartition("(")[2].rpartition(" ")[2] for one in alarms] == ["KeyError)", "KeyError"]
        traced = [record.exc_info[0] for record in caplog.records if record.exc_info]
        assert traced == [KeyError, KeyError]
        assert (await authorizer.authorize(asking())).allowed
        (shop / "grants.yaml").write_text(SHOP)
        assert await authorizer.reload(force=False)

    async def test_run_outlives_a_refresh_that_fails_in_any_way(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def refresh() -> None:
            raise KeyError("revision")

        alarms: list[str] = []
        authorizer = Authorizer(ScriptedEngine(), refresh=refresh, on_alarm=alarms.append)
        assert not await authorizer.reload(force=False)
        assert alarms == ["the policy's revision is unknown: KeyError"]
        assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError]

    async def test_run_follows_the_files(
        self, authorizer: Authorizer, shop: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("agentweave_bus.authz.authorizer.POLL_SECONDS", 0.01)
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(authorizer.run())
            await asyncio.sleep(0)
            before = authorizer.revision
            (shop / "grants.yaml").write_text(SHOP.replace("get_order", "get_orders"))
            while authorizer.revision == before:  # noqa: ASYNC110  there is no event for it
                await asyncio.sleep(0.01)
            watching.cancel()

    async def test_an_engine_that_follows_its_policy_itself_can_alarm(self) -> None:
        async def refresh() -> None:
            raise PolicyUnavailableError("the revision can't be polled")

        alarms: list[str] = []
        engine = ScriptedEngine(standing=Standing(30, "", {}))
        authorizer = Authorizer(engine, refresh=refresh, on_alarm=alarms.append)
        await authorizer.authorize(asking())
        assert authorizer.standing_allows(asking())
        assert not await authorizer.reload()
        assert not authorizer.standing_allows(asking()), "a failed poll drops what stood"
        assert "can't be polled" in alarms[0]


class TestFailClosed:
    @pytest.mark.parametrize(
        "result",
        [
            None,
            False,
            1,
            "true",
            [],
            {},
            {"allow": 1},
            {"allow": "true"},
            {"allow": None},
            {"allow": True, "limits": []},
            {"allow": True, "reason": 7},
            {"allow": True, "require_approval": "no"},
            {"allow": True, "require_approval": None},
            {"allow": True, "require_approval": True},
            {"allow": True, "limits": {"max_per_minute": "many"}},
            {"allow": True, "limits": {"max_per_minute": True}},
            {"allow": True, "limits": {"daily_limit": "much"}},
            PolicyUnavailableError("all endpoints are down"),
            RuntimeError("a bug"),
            TimeoutError(),
            RecursionError(),
        ],
    )
    async def test_only_a_clear_yes_is_one(self, result: object) -> None:
        decision = await Authorizer(ScriptedEngine(result)).authorize(asking())
        assert decision.allowed is False
        assert decision.reason

    async def test_a_clear_yes_is_one(self) -> None:
        for result in (True, {"allow": True}, {"allow": True, "limits": {"of_our_own": 1}}):
            assert (await Authorizer(ScriptedEngine(result)).authorize(asking())).allowed

    async def test_a_bug_is_told_to_the_log_and_not_to_the_caller(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        decision = await Authorizer(ScriptedEngine(RuntimeError("secret path"))).authorize(asking())
        assert "secret path" not in decision.reason
        assert "secret path" in caplog.text

    async def test_approval_is_not_permission(self) -> None:
        engine = ScriptedEngine({"allow": True, "require_approval": True, "reason": "large order"})
        decision = await Authorizer(engine).authorize(asking())
        assert (decision.allowed, decision.require_approval) == (False, True)
        assert "large order" in decision.reason

    async def test_an_engine_without_an_answer_in_time_denies(self) -> None:
        authorizer = Authorizer(ScriptedEngine(gate=asyncio.Event()), timeout_s=0.05)
        decision = await authorizer.authorize(asking())
        assert not decision.allowed
        assert "no answer within 0.05 s" in decision.reason

    async def test_an_input_that_is_no_json_denies_unasked(self) -> None:
        engine = ScriptedEngine()
        assert not (await Authorizer(engine).authorize(asking(payload=float("nan")))).allowed
        assert engine.asked == []

    async def test_cancelling_the_asker_is_no_denial(self) -> None:
        task = asyncio.create_task(Authorizer(ScriptedEngine(gate=asyncio.Event())).authorize(asking()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_every_decision_is_announced(self) -> None:
        seen: list[tuple[str, bool]] = []
        authorizer = Authorizer(
            ScriptedEngine(standing=Standing(30, "", {})),
            on_decision=lambda context, decision: seen.append((context.action, decision.standing)),
        )
        await authorizer.authorize(asking())
        await authorizer.authorize(asking())
        assert seen == [("get_order", False), ("get_order", True)]


class TestStanding:
    async def test_the_rule_is_asked_with_the_reduced_input_only(self) -> None:
        engine = ScriptedEngine(standing=Standing(30, "", {}))
        await Authorizer(engine).authorize(asking(payload={"secret": 1}, task_id="t"))
        assert parse_strict(engine.asked[0])["context"]["payload"] == {"secret": 1}
        assert parse_strict(engine.standing_asked[0]) == asking().standing_input()

    async def test_never_longer_than_60_seconds_and_from_when_it_was_asked(self, clock: Clock) -> None:
        engine = ScriptedEngine(standing=Standing(3600, "", {}), gate=asyncio.Event())
        authorizer = Authorizer(engine, monotonic=clock, timeout_s=60)
        asked = asyncio.create_task(authorizer.authorize(asking()))
        await asyncio.sleep(0)
        clock.now += 50
        assert engine.gate is not None
        engine.gate.set()
        await asked
        clock.now += 9
        assert (await authorizer.authorize(asking())).standing
        clock.now += 2
        assert not (await authorizer.authorize(asking())).standing

    @pytest.mark.parametrize(
        "other",
        [
            {"caller": PAYMENT},
            {"callee": PAYMENT},
            {"action": "x"},
            {"kind": "task"},
            {"transport": "a2a"},
            {"scope": []},
            {"principal": {"admin": True}},
            {"via": [{"iss": GATEWAY, "aud": ORDER, "cap": "a", "kind": "call"}]},
        ],
    )
    async def test_an_answer_holds_only_for_its_own_input(self, other: dict[str, Any]) -> None:
        engine = ScriptedEngine(standing=Standing(30, "", {}))
        authorizer = Authorizer(engine)
        await authorizer.authorize(asking())
        assert not (await authorizer.authorize(asking(**other))).standing
        assert len(engine.asked) == 2

    async def test_values_that_python_calls_equal_are_told_apart(self) -> None:
        keys = {standing_key(asking(principal={"admin": value})) for value in (True, 1, "1", 1.0)}
        assert len(keys) == 4

    async def test_a_slow_old_answer_does_not_fill_a_new_cache(self) -> None:
        engine = ScriptedEngine(standing=Standing(30, "", {}), gate=asyncio.Event())
        authorizer = Authorizer(engine)
        slow = asyncio.create_task(authorizer.authorize(asking()))
        await asyncio.sleep(0)
        authorizer.forget_standing()
        assert engine.gate is not None
        engine.gate.set()
        assert (await slow).allowed
        assert not authorizer.standing_allows(asking())

    @pytest.mark.parametrize(("current", "answered"), [("r1", "r0"), ("", "r0"), ("r1", ""), ("", "")])
    async def test_an_answer_of_another_or_no_revision_is_not_kept(self, current: str, answered: str) -> None:
        engine = ScriptedEngine(standing=Standing(30, "", {}), revision=current, answered_revision=answered)
        authorizer = Authorizer(engine)
        await authorizer.authorize(asking())
        assert not authorizer.standing_allows(asking())

    async def test_a_new_revision_or_a_revocation_ends_what_stood(self) -> None:
        engine = ScriptedEngine(standing=Standing(30, "", {}))
        authorizer = Authorizer(engine)
        for end in (authorizer.forget_standing, lambda: setattr(engine, "revision", "r2")):
            await authorizer.authorize(asking())
            assert authorizer.standing_allows(asking())
            end()
            assert not authorizer.standing_allows(asking())
            assert not (await authorizer.authorize(asking())).standing

    async def test_a_denial_never_stands(self) -> None:
        engine = ScriptedEngine(False, standing=Standing(30, "", {}))
        authorizer = Authorizer(engine)
        await authorizer.authorize(asking())
        assert not (await authorizer.authorize(asking())).allowed
        assert len(engine.asked) == 2
        assert engine.standing_asked == []

    async def test_that_nothing_stands_is_remembered_for_a_minute(self, clock: Clock) -> None:
        engine = ScriptedEngine()
        authorizer = Authorizer(engine, monotonic=clock)
        for _ in range(3):
            assert not (await authorizer.authorize(asking())).standing
        assert (len(engine.asked), len(engine.standing_asked)) == (3, 1)
        clock.now += 61
        await authorizer.authorize(asking())
        assert len(engine.standing_asked) == 2

    def test_the_cache_is_bounded(self) -> None:
        cache, now = StandingCache(), Asked(0.0, (0, ""))
        for number in range(MAX_STANDING_ENTRIES + 10):
            cache.keep((number,), AuthzDecision(allow=True), 30, now)
        assert len(cache) == MAX_STANDING_ENTRIES
        assert cache.get((0,), now) is None
        assert cache.get((MAX_STANDING_ENTRIES,), now) is not None


class TestLimiter:
    def test_never_more_than_the_limit_in_any_minute(self) -> None:
        limiter, limit = LocalLimiter(), {"max_per_minute": 10}
        taken = [
            now
            for now in (number // 3 for number in range(900))
            if limiter.take(asking(), limit, now_s=now, today=0) is None
        ]
        assert all(sum(1 for use in taken if start <= use < start + 60) <= 10 for start in range(300))
        assert len(taken) >= 40

    def test_a_refused_use_counts_against_none_of_its_limits(self) -> None:
        limiter = LocalLimiter()
        both = {"max_per_minute": 2, "daily_limit": 10}
        over, fits = asking(payload={"amount": 11}), asking(payload={"amount": "5"})
        assert [limiter.take(over, both, now_s=0, today=0) is None for _ in range(3)] == [False] * 3
        assert [limiter.take(fits, both, now_s=0, today=0) is None for _ in range(3)] == [True, True, False]

    def test_a_day_ends_and_amounts_below_zero_give_nothing_back(self) -> None:
        limiter, limit = LocalLimiter(), {"daily_limit": Decimal(10)}

        def take(amount: object, today: int = 0) -> bool:
            return limiter.take(asking(payload={"amount": amount}), limit, now_s=0, today=today) is None

        assert take(10)
        assert take(-5)
        assert not take(1)
        assert not take("NaN")
        assert not take(None)
        assert not take(True)
        assert take(Decimal("9.99"), today=1)
        assert not take(0.02, today=1)

    @pytest.mark.parametrize(
        "amount",
        [
            "1E+999999999", "1e-999999999", "1E+5", "1_000", " 5", "5\n", "\uff11\uff12", "\u0663", "+5", "05", ".5", "5.", "",
            "1" * 65, "9" * 5000, "sNaN", "Infinity", Decimal("1E+999999999"), Decimal("0E+999999999"),
            Decimal("1E-999999999"), 10**5000,
        ],
        ids=lambda value: repr(value)[:20] if isinstance(value, str) else "",
    )  # fmt: skip
    def test_an_amount_that_is_not_plainly_a_number_is_refused(self, amount: object) -> None:
        limiter, bound = LocalLimiter(), {"daily_limit": 10}
        refusal = limiter.take(asking(payload={"amount": amount}), bound, now_s=0, today=0)
        assert refusal == "daily_limit applies and the payload's amount is no number"
        assert limiter.take(asking(payload={"amount": "10.0"}), bound, now_s=0, today=0) is None

    def test_amounts_that_are_plainly_numbers_count(self) -> None:
        for amount in ("7", "0.50", "-3", 7, 0.5, 1e-7, Decimal("7E+0"), Decimal("0.000")):
            payload = {"amount": amount}
            limiter = LocalLimiter()
            assert limiter.take(asking(payload=payload), {"daily_limit": 7}, now_s=0, today=0) is None

    def test_when_all_counters_are_in_use_strangers_wait(self) -> None:
        limiter = LocalLimiter(max_keys=2)

        def take(caller: str, now: int) -> bool:
            return limiter.take(asking(caller=caller), {"max_per_minute": 5}, now_s=now, today=0) is None

        assert take("a", 0)
        assert take("b", 0)
        assert not take("c", 30)
        assert take("a", 30)
        assert take("c", 61)


class OwnProvider(AuthorizationProvider):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def authorize(self, context: AuthzContext) -> AuthzDecision:
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer == "forever":
            await asyncio.Event().wait()
        return self.answer  # type: ignore[no-any-return]


class TestOwnProviders:
    async def test_its_decision_counts_each_time(self) -> None:
        authorizer = Authorizer(OwnProvider(AuthzDecision(allow=True, reason="custom_allowlist")))
        assert (await authorizer.authorize(asking())).reason == "custom_allowlist"
        assert not (await authorizer.authorize(asking())).standing
        assert authorizer.revision == ""

    @pytest.mark.parametrize("answer", [True, None, {"allow": True}, KeyError("x"), "forever"])
    async def test_exceptions_timeouts_and_non_decisions_deny(self, answer: object) -> None:
        decision = await Authorizer(OwnProvider(answer), timeout_s=0.05).authorize(asking())
        assert decision.allowed is False
        assert decision.reason

    async def test_its_limits_are_counted_and_grants_still_precede_claims(self) -> None:
        provider = OwnProvider(AuthzDecision(allow=True, limits={"max_per_minute": 1}))
        authorizer = Authorizer(provider, grants=Grants.parse(SHOP))
        assert (await authorizer.authorize(asking())).allowed
        assert not (await authorizer.authorize(asking())).allowed
        assert authorizer.permits_quickly(asking())
        assert not authorizer.permits_quickly(asking("delete_order"))
        assert not await authorizer.allows_action_in_general(asking("delete_order"))

    async def test_a_half_written_provider_can_not_be_made(self) -> None:
        class Half(AuthorizationProvider): ...

        with pytest.raises(TypeError, match="authorize"):
            Half()  # type: ignore[abstract]

    async def test_allow_all_is_for_development(self) -> None:
        for environment in ("production", "staging", ""):
            with pytest.raises(ConfigurationError, match="AllowAllProvider not allowed"):
                AllowAllProvider(environment=environment)
        with pytest.raises(ConfigurationError):
            AllowAllProvider()
        made = AllowAllProvider(environment="development")
        with pytest.raises(ConfigurationError, match="AllowAllProvider not allowed in production"):
            Authorizer(made)
        authorizer = Authorizer(made, environment="development")
        assert (await authorizer.authorize(asking("anything"))).allowed


class TestDefaultAction:
    @pytest.mark.parametrize("action", ["log-only", "allow"])
    @pytest.mark.parametrize("environment", ["production", "staging", "Development"])
    def test_production_refuses_to_start(self, action: Any, environment: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Authorizer(ScriptedEngine(), default_action=action, environment=environment)
        said = f"Security violation: '{action}' mode not allowed in {environment} environment"
        assert said in str(caught.value)
        assert caught.value.key == "authorization.default_action"

    def test_an_unknown_one_is_refused(self) -> None:
        with pytest.raises(ConfigurationError):
            Authorizer(ScriptedEngine(), default_action="deney", environment="development")  # type: ignore[arg-type]

    async def test_log_only_lets_by_and_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ScriptedEngine({"allow": False, "reason": "too much"})
        authorizer = Authorizer(engine, default_action="log-only", environment="development")
        with caplog.at_level(logging.WARNING):
            decision = await authorizer.authorize(asking())
        assert decision.allowed
        assert "would be denied: too much" in decision.reason
        assert "would be denied: too much" in caplog.text

    async def test_allow_lets_by_only_where_there_is_no_answer(self) -> None:
        for result, allowed in ((None, True), (PolicyUnavailableError("down"), True), (False, False)):
            authorizer = Authorizer(ScriptedEngine(result), default_action="allow", environment="development")
            assert (await authorizer.authorize(asking())).allowed is allowed


class TestSeveralAtOnce:
    async def test_what_does_not_stand_is_asked_for_at_the_same_time(self) -> None:
        engine = ScriptedEngine(gate=asyncio.Event())
        assert engine.gate is not None
        payloads = [{"n": n} for n in range(3)]
        deciding = asyncio.create_task(
            Authorizer(engine).authorize_all([asking(payload=payload) for payload in payloads])
        )
        async with asyncio.timeout(5):
            while len(engine.asked) < 3:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0)
        engine.gate.set()
        assert [one.allowed for one in await deciding] == [True] * 3
        assert [parse_strict(one)["context"]["payload"] for one in engine.asked] == payloads

    async def test_what_fails_is_raised_as_it_is_and_leaves_nothing_running(self) -> None:
        def heard(context: AuthzContext, _decision: AuthzDecision) -> None:
            raise RuntimeError(context.action)

        authorizer = Authorizer(ScriptedEngine(), on_decision=heard)
        before = asyncio.all_tasks()
        for contexts in ([asking("one")], [asking("one"), asking("two")]):
            with pytest.raises(RuntimeError, match="one"):
                await authorizer.authorize_all(contexts)
        assert asyncio.all_tasks() == before

    async def test_each_use_counts_also_of_what_stands(self, authorizer: Authorizer) -> None:
        found = [
            *await authorizer.authorize_all([asking("ping")] * 2),
            *await authorizer.authorize_all([asking("ping")] * 2),
        ]
        assert [decision.allowed for decision in found] == [True, True, True, False]
        assert [decision.standing for decision in found][2:] == [True, True]

    async def test_one_that_does_not_stand_lets_none_be_decided_before_it(self) -> None:
        """What stood when several were asked for may be revoked before the policy has answered."""
        engine = ScriptedEngine(standing=Standing(30, "", {}))
        authorizer = Authorizer(engine)
        await authorizer.authorize(asking())
        engine.gate, engine.result, engine.standing = asyncio.Event(), False, None
        deciding = asyncio.create_task(authorizer.authorize_all([asking(), asking("other")]))
        await asyncio.sleep(0)
        authorizer.forget_standing()
        engine.gate.set()
        assert [one.allowed for one in await deciding] == [False, False]
