"""The authorizer: the only way anyone asks a policy, and it fails closed.

In this order:

1. a standing answer that still holds (:mod:`agentweave_bus.authz.standing`) is used again;
2. otherwise the policy is asked over the full input, within a time limit. An exception, a timeout, an
   undefined result or an answer of the wrong shape is a denial with a reason;
3. limits that can be counted here are counted, on every use (:mod:`agentweave_bus.authz.limiter`);
4. in development only, ``default_action`` may let a denied action through, loudly.

It writes no audit records: whoever asked does, and sets ``audit_id`` on the decision.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from agentweave_bus.authz.approval_terms import read_require_approval
from agentweave_bus.authz.decision import AuthzDecision, new_decision_id
from agentweave_bus.authz.engine import PolicyAnswer, package_of
from agentweave_bus.authz.limiter import DAY_SECONDS, LocalLimiter
from agentweave_bus.authz.policy_input import InputTooLargeError, write_input
from agentweave_bus.authz.provider import AllowAllProvider, AuthorizationProvider
from agentweave_bus.authz.standing import Asked, StandingCache, standing_key
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from agentweave_bus.authz.decision import AuthzContext
    from agentweave_bus.authz.engine import PolicyEngine, Standing
    from agentweave_bus.authz.grants import Grants
    from agentweave_bus.authz.policy_watch import PolicyWatch
    from agentweave_bus.authz.standing import StandingKey

__all__ = ["DEFAULT_POLICY_PATH", "Authorizer", "DefaultAction"]

DefaultAction: TypeAlias = Literal["deny", "log-only", "allow"]

DEFAULT_POLICY_PATH: Final = "agentweave/grants"
DEFAULT_TIMEOUT_S: Final = 1.0
"""How long one question may take in all (seconds); engines have tighter budgets of their own."""
POLL_SECONDS: Final = 1.0
"""How often a changed policy or grants file is looked for."""

_log = logging.getLogger(__name__)


class Authorizer:
    """Asks one engine, for one agent. Use it from one event loop.

    Args:
        engine: a policy engine, or an :class:`AuthorizationProvider` of your own.
        policy_path: the agent's policy package (``order/authz``); providers don't get it.
        grants: what the grants say, for the cheap look before something costly; None: no such look.
        watch: the policy directory to follow; ``grants`` are then taken from there.
        environment: ``development`` or anything else, which counts as production.
        default_action: ``deny``. ``log-only`` lets every denied action through and logs it, ``allow``
            lets through what the policy has no answer for; both in development only.
        timeout_s: for one question; must be more than the engine's own budgets for it.
        refresh: called by :meth:`reload` and every second by :meth:`run`, for engines that follow
            their policy themselves (``OpaServerEngine.refresh``). When it raises, every standing
            answer is dropped.
        on_decision: told of every decision (for metrics).
        on_alarm: told, in one sentence, when a new policy was refused or the engine can't be polled.
        monotonic: the clock of standing answers and limits a minute (seconds).
        wall: seconds since the epoch, for limits a day.

    Raises:
        ConfigurationError: ``default_action`` is not allowed here.

    """

    def __init__(
        self,
        engine: PolicyEngine | AuthorizationProvider,
        *,
        policy_path: str = DEFAULT_POLICY_PATH,
        grants: Grants | None = None,
        watch: PolicyWatch | None = None,
        environment: str = "production",
        default_action: DefaultAction = "deny",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        refresh: Callable[[], Awaitable[None]] | None = None,
        on_decision: Callable[[AuthzContext, AuthzDecision], None] | None = None,
        on_alarm: Callable[[str], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        _check_default_action(default_action, environment)
        _check_provider(engine, environment)
        self._engine = engine
        # Told apart here, because each use of a standing answer asks for the revision.
        self._policy = None if isinstance(engine, AuthorizationProvider) else engine
        self._package = package_of(policy_path)
        self._own_grants = grants
        self._watch = watch
        self._default_action = default_action
        self._timeout_s = timeout_s
        self._refresh = refresh
        self._on_decision = on_decision
        self._on_alarm = on_alarm
        self._monotonic = monotonic
        self._wall = wall
        self._standing = StandingCache()
        self._limiter = LocalLimiter()
        self._epoch = 0
        self._alarm = ""
        self._answering = refresh is None

    @property
    def answering(self) -> bool:
        """Whether the engine can be asked, as of the last look: one that is no server always can."""
        return self._answering

    @property
    def grants(self) -> Grants | None:
        """The grants in use, if there are any."""
        return self._own_grants if self._watch is None else self._watch.grants

    @property
    def revision(self) -> str:
        """Names the policy in use; empty for a provider of your own."""
        return "" if self._policy is None else self._policy.revision

    async def authorize(self, context: AuthzContext) -> AuthzDecision:
        """Decide whether the action may happen. Never raises for trouble with the policy: it denies."""
        key = standing_key(context)
        decision = self._standing.get(key, self._now())
        if decision is None:
            decision = await self._ask(context, key)
        return self._used(context, decision)

    async def authorize_all(self, contexts: Sequence[AuthzContext]) -> list[AuthzDecision]:
        """Do as :meth:`authorize` for each, at the same time."""
        now = self._now()
        standing = [self._standing.get(standing_key(context), now) for context in contexts]
        decisions = [decision for decision in standing if decision is not None]
        if len(decisions) == len(contexts):  # nobody needs to be asked, or waited for
            return [self._used(*one) for one in zip(contexts, decisions, strict=True)]
        if len(contexts) == 1:
            return [await self.authorize(contexts[0])]
        asked = [asyncio.create_task(self.authorize(context)) for context in contexts]
        try:
            return [await one for one in asked]
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _used(self, context: AuthzContext, decision: AuthzDecision) -> AuthzDecision:
        """Return what a decision comes to at this use of it: within its limits, and told to who listens."""
        if decision.allowed and decision.limits:
            decision = self._within_limits(context, decision)
        if not decision.allowed and self._default_action != "deny":
            decision = self._softened(context, decision)
        if self._on_decision is not None:
            self._on_decision(context, decision)
        return decision

    def permits_quickly(self, context: AuthzContext) -> bool:
        """Say, without asking anyone, whether a standing answer or the grants speak for the action.

        For a first look before something costly. A False says only that the full decision has to come
        first; a True is no permission.
        """
        if self.standing_allows(context):
            return True
        grants = self.grants
        if grants is None:
            return False
        # A principal was checked where the delegation began; its origin alone may name one.
        principal = None if context.via else context.principal
        return grants.permits(
            context.caller,
            context.callee,
            context.action,
            context.kind,
            origin=context.origin,
            principal_issuer=None if principal is None else str(principal.get("iss", "")),
        )

    def standing_allows(self, context: AuthzContext) -> bool:
        """Say whether a kept standing answer allows the action now. Uses up no limit."""
        return self._standing.get(standing_key(context), self._now()) is not None

    def stands_without_limits(self, context: AuthzContext) -> bool:
        """Say whether a kept standing answer allows the action now and nothing is counted against it.

        Then the full decision can only be yes, so that what it takes may begin before it is made.
        """
        decision = self._standing.get(standing_key(context), self._now())
        return decision is not None and not decision.limits

    async def allows_action_in_general(self, context: AuthzContext) -> bool:
        """Say whether the caller may take this action at all, whatever the payload.

        Decides who is told what is wrong with a payload. Uses up no limit; trouble with the policy
        is a no.
        """
        if self.permits_quickly(context):
            return True
        engine = self._engine
        if isinstance(engine, AuthorizationProvider):
            return False
        return await self._ask_standing(engine, context) is not None

    async def run(self) -> None:
        """Follow changes of the policy and the grants until cancelled. The caller owns this task."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.reload(force=False)

    async def reload(self, *, force: bool = True) -> bool:
        """Bring policy and grants up to date, also when nothing seems changed (``force``).

        On a mistake both stay as they were, ``on_alarm`` is told (once), and the result is False.
        """
        fresh = await self._refreshed() and await self._read_again(force)
        if fresh:
            self._alarm = ""
        return fresh

    def forget_standing(self) -> None:
        """Drop every standing answer, also those being asked for now. For revocations."""
        self._epoch += 1
        self._standing.clear()

    async def _refreshed(self) -> bool:
        try:
            if self._refresh is not None:
                await self._refresh()
        except Exception as problem:  # noqa: BLE001 - whatever it is, the agent goes on
            self._answering = False
            self.forget_standing()  # nobody knows whether what stood still does
            self._raise_alarm(f"the policy's revision is unknown: {_told(problem)}", problem)
            return False
        self._answering = True
        return True

    async def _read_again(self, force: bool) -> bool:
        try:
            if self._watch is not None and await self._watch.refresh(force=force):
                self.forget_standing()
                _log.info("policy and grants read again, revision %s", self.revision)
        except Exception as problem:  # noqa: BLE001 - a slip in a file must not end an agent that runs
            sentence = f"the new policy was refused, the old one stays: {_told(problem)}"
            self._raise_alarm(sentence, problem)
            return False
        return True

    def _now(self) -> Asked:
        return Asked(self._monotonic(), self._generation())

    def _generation(self) -> tuple[int, str]:
        return self._epoch, self.revision

    async def _ask(self, context: AuthzContext, key: StandingKey) -> AuthzDecision:  # noqa: PLR0911 - one a trouble
        engine, asked = self._engine, self._now()
        try:
            async with asyncio.timeout(self._timeout_s):
                if isinstance(engine, AuthorizationProvider):
                    return _checked(await engine.authorize(context), context)
                answer = await engine.evaluate(self._package, write_input(context.to_input()))
        except TimeoutError:
            return self._no_answer(context, f"the policy gave no answer within {self._timeout_s:g} s")
        except InputTooLargeError as problem:
            return await self._unseen(context, key, problem)
        except AgentWeaveError as problem:
            return self._no_answer(context, str(problem))
        except (Exception, asyncio.CancelledError) as problem:  # whatever an engine raises is a denial
            if _being_cancelled(problem):
                raise
            _log.error("the authorization engine failed", exc_info=problem)
            return self._no_answer(context, f"the authorization engine failed ({type(problem).__name__})")
        if not answer.defined:
            return self._no_answer(context, "the policy has no answer to this")
        decision = _read(answer, context)
        if decision.allowed and context.approval is None:  # what was approved of is approved once
            await self._keep_standing(engine, context, key, decision, asked)
        return decision

    async def _unseen(
        self, context: AuthzContext, key: StandingKey, problem: InputTooLargeError
    ) -> AuthzDecision:
        """Decide on a payload that is too large for the policy: by its standing answer, which sees none."""
        engine, asked, standing = self._engine, self._now(), None
        if not isinstance(engine, AuthorizationProvider):
            standing = await self._ask_standing(engine, context)
        if standing is None:
            reason = f"{problem}, and it has no standing answer that needs no payload"
            return AuthzDecision(allowed=False, reason=reason, revision=self.revision)
        decision = AuthzDecision(
            allowed=True, reason=standing.reason, limits=standing.limits, revision=asked.generation[1]
        )
        if context.approval is None:
            self._standing.keep(key, decision, standing.cache_seconds, asked)
        return replace(decision, standing=True)

    async def _keep_standing(
        self,
        engine: PolicyEngine,
        context: AuthzContext,
        key: StandingKey,
        decision: AuthzDecision,
        asked: Asked,
    ) -> None:
        known = decision.revision and decision.revision == asked.generation[1]  # not swapped meanwhile
        if not known or self._standing.is_known_not_to_stand(key, asked):
            return
        standing = await self._ask_standing(engine, context)
        if standing is None:
            self._standing.keep_none(key, asked)
        else:
            kept = replace(decision, limits=standing.limits, reason=standing.reason or decision.reason)
            self._standing.keep(key, kept, standing.cache_seconds, asked)

    async def _ask_standing(self, engine: PolicyEngine, context: AuthzContext) -> Standing | None:
        try:
            if not engine.has_standing(self._package):
                return None
            async with asyncio.timeout(self._timeout_s):
                question = write_input(context.standing_input())
                return await engine.evaluate_standing(self._package, question)
        except (TimeoutError, AgentWeaveError) as problem:
            _log.warning("no standing answer: %s", problem)
        except (Exception, asyncio.CancelledError) as problem:  # no standing answer is a safe answer
            if _being_cancelled(problem):
                raise
            _log.error("the authorization engine failed over a standing answer", exc_info=problem)
        return None

    def _within_limits(self, context: AuthzContext, decision: AuthzDecision) -> AuthzDecision:
        refusal = self._limiter.take(
            context, decision.limits, now_s=int(self._monotonic()), today=int(self._wall() // DAY_SECONDS)
        )
        return decision if refusal is None else replace(decision, allowed=False, reason=refusal)

    def _no_answer(self, context: AuthzContext, reason: str) -> AuthzDecision:
        if self._default_action == "allow":
            _log.warning("default_action 'allow' lets %s by: %s", context.action, reason)
            return AuthzDecision(allowed=True, reason=f"allowed by default_action: {reason}")
        return AuthzDecision(allowed=False, reason=reason, revision=self.revision, answered=False)

    def _softened(self, context: AuthzContext, decision: AuthzDecision) -> AuthzDecision:
        if self._default_action != "log-only":
            return decision
        _log.warning(
            "log-only: %s of %s by %s would be denied: %s",
            context.action,
            context.callee,
            context.caller,
            decision.reason,
        )
        return replace(decision, allowed=True, reason=f"log-only: would be denied: {decision.reason}")

    def _raise_alarm(self, sentence: str, problem: Exception) -> None:
        if sentence == self._alarm:
            return
        self._alarm = sentence
        _log.error("%s", sentence, exc_info=None if _is_foreseen(problem) else problem)
        if self._on_alarm is not None:
            self._on_alarm(sentence)


def _is_foreseen(problem: Exception) -> bool:
    return isinstance(problem, AgentWeaveError | OSError)


def _told(problem: Exception) -> str:
    return str(problem) if _is_foreseen(problem) else type(problem).__name__


def _being_cancelled(problem: BaseException) -> bool:
    """Say whether it is us who are cancelled, and not something that the engine awaited."""
    task = asyncio.current_task()
    return isinstance(problem, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _check_provider(engine: object, environment: str) -> None:
    """Refuse, wherever it was made, an engine that is for development."""
    if isinstance(engine, AllowAllProvider) and environment != "development":
        raise ConfigurationError(
            f"Security violation: AllowAllProvider not allowed in {environment} environment.",
            key="authorization.provider",
            hint="Leave authz_provider out, so that the grants decide, or set AGENTWEAVE_ENV=development.",
        )


def _check_default_action(action: str, environment: str) -> None:
    if action not in ("deny", "log-only", "allow"):
        raise ConfigurationError(
            f"authorization.default_action is {action!r}.",
            key="authorization.default_action",
            hint="Write deny (in development also log-only or allow).",
        )
    if action != "deny" and environment != "development":
        raise ConfigurationError(
            f"Security violation: {action!r} mode not allowed in {environment} environment.",
            key="authorization.default_action",
            hint="Set authorization.default_action to deny.",
        )


def _checked(decision: object, context: AuthzContext) -> AuthzDecision:
    if not isinstance(decision, AuthzDecision):
        return AuthzDecision(
            allowed=False, reason=f"the provider answered with a {type(decision).__name__}, not a decision"
        )
    return _approved(decision, context)


def _approved(decision: AuthzDecision, context: AuthzContext) -> AuthzDecision:
    """Make what needs approval a denial that says what to do."""
    if not decision.require_approval or (decision.approval is None and not decision.allowed):
        return decision
    needs = "needs a person's approval"
    if decision.approval is None:
        needs += ", and the policy names nobody who could give it"
    elif context.kind == "call":
        needs += "; submit it as a task"
    elif context.direction == "outbound":
        needs += ", which only the policy of the agent that is asked can ask for (direction inbound)"
    return replace(decision, allowed=False, reason=f"{needs}: {decision.reason}")


def _read(answer: PolicyAnswer, context: AuthzContext) -> AuthzDecision:
    """Read a policy's answer. Only ``true`` is a yes: not 1, not "true", not a non-empty object."""
    if isinstance(answer.result, bool):
        said = "allows it" if answer.result else "does not allow it"
        return AuthzDecision(allowed=answer.result, reason=f"the policy {said}", revision=answer.revision)
    return _read_object(answer.result, answer, context)


def _read_object(result: Any, answer: PolicyAnswer, context: AuthzContext) -> AuthzDecision:
    if not isinstance(result, dict) or not isinstance(result.get("allow"), bool):
        return _denied("the policy's answer holds no allow that is true or false", answer)
    limits, reason = result.get("limits", {}), result.get("reason", "")
    try:
        required, approval = read_require_approval(result.get("require_approval", False))
    except ValueError:
        limits = None
    if not (isinstance(limits, dict) and isinstance(reason, str)):
        return _denied("limits, reason or require_approval of the policy's answer is malformed", answer)
    fallback = "the policy allows it" if result["allow"] else "the policy does not allow it"
    return _approved(
        AuthzDecision(
            allowed=result["allow"],
            reason=reason or fallback,
            limits=limits,
            revision=answer.revision,
            require_approval=required,
            decision_id=new_decision_id(),
            approval=approval,
        ),
        context,
    )


def _denied(reason: str, answer: PolicyAnswer) -> AuthzDecision:
    return AuthzDecision(allowed=False, reason=reason, revision=answer.revision)
