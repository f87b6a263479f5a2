"""The server engine: policies evaluated by OPA servers, over their REST API.

Any number of endpoints (unix sockets, or HTTPS with the peer's SPIFFE ID checked), asked in order of
priority or in turn; an attempt has a budget (50 ms), a question has two attempts, a breaker guards each
endpoint. Every answer must carry a revision that is accepted: one of those pinned by configuration, or,
without pins, the one that this very endpoint reports as its current one. A question that gets no such
answer raises :class:`PolicyUnavailableError`, which means deny.

The servers must run bundles (only those have revisions): ``policy_bundle.build_bundle`` makes one, and
names in it the packages whose ``standing`` rules it has checked; others are never asked for theirs.

Whoever owns the engine calls :meth:`OpaServerEngine.refresh` about once a second, and
:meth:`OpaServerEngine.drop_connections` when this agent's certificate has changed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from agentweave_bus.authz.circuit_breaker import BreakerSettings, BreakerState, CircuitBreaker
from agentweave_bus.authz.engine import (
    ANSWER_RULES,
    PolicyAnswer,
    Standing,
    package_of,
    read_standing,
    unavailable,
)
from agentweave_bus.authz.opa_http import OpaAddress, OpaConnections, UnusableAnswerError
from agentweave_bus.authz.policy_input import PolicyInput, check_standing_input, parse_strict
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError, PolicyUnavailableError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Collection, Sequence

    from agentweave_bus.authz.circuit_breaker import Permit
    from agentweave_bus.authz.opa_http import HttpAnswer

__all__ = ["CHECKED_DOCUMENT", "FailoverStrategy", "OpaServerEngine", "OpaSettings"]

FailoverStrategy: TypeAlias = Literal["round_robin", "priority"]

CHECKED_DOCUMENT: Final = "agentweave_bundle"
"""The data document in which a bundle says which standing rules were checked."""

_ATTEMPTS: Final = 2
_POLL_SECONDS: Final = 1.0
_NO_REVISION: Final = "unversioned"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpaSettings:
    """How OPA servers are asked.

    Attributes:
        environment: ``development`` or anything else, which counts as production.
        strategy: ``round_robin`` takes turns; ``priority`` asks the first that works.
        budget_ms: for one attempt (milliseconds), with seeing to the revision that came.
        breaker: of each endpoint.
        accepted_revisions: the only revisions to believe; None: whatever an endpoint reports as current.
        require_revision: refuse servers without bundles. Can be switched off in development only.
        connections: in use at once, for each endpoint.

    """

    environment: str = "production"
    strategy: FailoverStrategy = "priority"
    budget_ms: int = 50
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    accepted_revisions: Collection[str] | None = None
    require_revision: bool = True
    connections: int = 16

    @property
    def longest_question_s(self) -> float:
        """How long a question takes at most, in seconds, when every attempt uses its budget up."""
        return len(ANSWER_RULES) * _ATTEMPTS * self.budget_ms / 1000

    def __post_init__(self) -> None:
        if not self.require_revision and self.environment != "development":
            raise ConfigurationError(
                "OPA without revisions can't be used in production.",
                key="authorization.opa_endpoint",
                hint="Let OPA run a bundle.",
            )


@dataclass(slots=True)
class _Endpoint:
    """One server and what is known of it now."""

    address: OpaAddress
    connections: OpaConnections
    breaker: CircuitBreaker
    revision: str = ""
    checked: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Result:
    """An answer of the data API: ``defined`` False if the document is undefined."""

    defined: bool
    value: Any
    revision: str


class _EndpointFailedError(Exception):
    """This endpoint gave no usable answer; another may."""


class OpaServerEngine:
    """Asks OPA servers; see ``engine.PolicyEngine``. Use it from one event loop.

    Args:
        endpoints: addresses, most wanted first.
        settings: how to ask.
        tls: makes the TLS context of a new connection to an ``https`` endpoint; it must check the peer's
            SPIFFE ID in the handshake.
        on_request: told of every attempt that begins (for metrics).
        on_error: told of every attempt that failed, with the endpoint's address.
        on_breaker: told each endpoint's address and the state of its breaker, first and when it changes.
        monotonic_ms: the clock of the breakers.

    Raises:
        ConfigurationError: an address is malformed or not allowed here, or there is none.

    """

    def __init__(
        self,
        endpoints: Sequence[str],
        settings: OpaSettings | None = None,
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        on_request: Callable[[], None] | None = None,
        on_error: Callable[[str], None] | None = None,
        on_breaker: Callable[[str, BreakerState], None] | None = None,
        monotonic_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        self._settings = settings or OpaSettings()
        self.longest_question_s = self._settings.longest_question_s
        self._tls = tls
        self._on_request = on_request
        self._on_error = on_error
        self._on_breaker = on_breaker
        self._now_ms = monotonic_ms
        self._endpoints = [self._endpoint(text) for text in endpoints]
        self._turn = 0
        if not self._endpoints:
            raise ConfigurationError("there is no OPA endpoint.", key="authorization.opa_endpoint")
        if on_breaker is not None:
            for endpoint in self._endpoints:  # else one that never failed would count for nothing
                on_breaker(endpoint.address.text, BreakerState.CLOSED)

    def _endpoint(self, text: str) -> _Endpoint:
        address = OpaAddress.parse(text, environment=self._settings.environment)
        address.check_socket()  # each new connection sees to it again
        if address.is_plain_off_loopback:
            _log.warning("%s is not encrypted: whoever sits between can decide; development only", text)
        connections = OpaConnections(address, tls=self._tls, limit=self._settings.connections)
        return _Endpoint(address, connections, self._breaker(text))

    def _breaker(self, text: str) -> CircuitBreaker:
        def changed(old: BreakerState, new: BreakerState) -> None:
            _log.log(
                logging.WARNING if new is BreakerState.OPEN else logging.INFO,
                "the breaker of %s went from %s to %s",
                text,
                old,
                new,
            )
            if self._on_breaker is not None:
                self._on_breaker(text, new)

        return CircuitBreaker(self._settings.breaker, on_change=changed)

    # --- what is known -------------------------------------------------------------------------------

    @property
    def revision(self) -> str:
        """The revision that all reachable endpoints report; empty while they differ or none answers."""
        known = {endpoint.revision for endpoint in self._endpoints if endpoint.revision}
        return known.pop() if len(known) == 1 else ""

    def has_standing(self, package: str) -> bool:
        """Whether the bundle in use says that the package's standing rule was checked."""
        name = package_of(package)
        current = [endpoint for endpoint in self._endpoints if endpoint.revision]
        return bool(self.revision) and all(name in endpoint.checked for endpoint in current)

    def breaker_states(self) -> dict[str, BreakerState]:
        """Return the state of each endpoint's breaker by its address."""
        now = self._now_ms()
        return {endpoint.address.text: endpoint.breaker.state(now) for endpoint in self._endpoints}

    async def refresh(self) -> None:
        """Learn each endpoint's current revision. An endpoint that does not answer has none.

        Raises:
            PolicyUnavailableError: none answered with a revision.

        """
        self.breaker_states()  # where nobody asks, an open one is seen to cool here
        until = asyncio.get_running_loop().time() + _POLL_SECONDS
        problems = await asyncio.gather(*(self._poll(endpoint, until) for endpoint in self._endpoints))
        if all(problems) and self._settings.require_revision:
            raise unavailable(f"no OPA endpoint is of use: {'; '.join(filter(None, problems))}")

    def drop_connections(self) -> None:
        """Make new connections from now on, with new TLS contexts."""
        for endpoint in self._endpoints:
            endpoint.connections.drop()

    async def aclose(self) -> None:
        """Close all connections."""
        self.drop_connections()

    async def _poll(self, endpoint: _Endpoint, until: float) -> str:
        """Return what is wrong with ``endpoint``; empty if nothing is. ``until`` is on the loop's clock."""
        try:
            async with asyncio.timeout_at(until):
                answer = await endpoint.connections.ask("GET", f"/v1/data/{CHECKED_DOCUMENT}?provenance")
            result = _read(answer)
        except (OSError, UnusableAnswerError, AgentWeaveError, _EndpointFailedError) as error:
            endpoint.revision, endpoint.checked = "", frozenset()
            return f"{endpoint.address.text}: {_words(error)}"
        endpoint.revision = result.revision
        endpoint.checked = _checked_packages(result.value)
        return "" if result.revision else f"{endpoint.address.text}: its policies carry no revision"

    # --- asking ---------------------------------------------------------------------------------------

    async def evaluate(self, package: str, input_json: bytes) -> PolicyAnswer:
        """Ask ``package``; see ``engine.PolicyEngine``."""
        name, question = package_of(package), PolicyInput(input_json)
        revision = None
        for rule in ANSWER_RULES:
            result = await self._ask(f"{name}/{rule}", question)
            if revision not in {None, result.revision}:
                raise unavailable("the policy changed between two questions that belong together")
            revision = result.revision
            if result.defined:
                return PolicyAnswer(True, rule, result.value, revision)
        return PolicyAnswer(False, None, None, revision or "")

    async def evaluate_standing(self, package: str, input_json: bytes) -> Standing | None:
        """Ask for a standing answer; see ``engine.PolicyEngine``."""
        name, question, revision = package_of(package), PolicyInput(input_json), self.revision
        if not self.has_standing(name):
            return None
        check_standing_input(parse_strict(question))
        result = await self._ask(f"{name}/standing", question)
        return read_standing(result.value) if result.revision == revision else None

    async def _ask(self, path: str, question: PolicyInput) -> _Result:
        body = b'{"input":' + question + b"}"
        failures: list[str] = []
        for endpoint in self._order():
            permit = endpoint.breaker.acquire(self._now_ms())
            if permit is None:
                continue
            try:
                return await self._attempt(endpoint, permit, path, body)
            except _EndpointFailedError as error:
                failures.append(f"{endpoint.address.text}: {error}")
            if len(failures) == _ATTEMPTS:
                break
        raise unavailable("; ".join(failures) or "the breakers of all OPA endpoints are open")

    def _order(self) -> list[_Endpoint]:
        """Return the endpoints in the order of attempts; one that stands alone gets both."""
        start = self._turn if self._settings.strategy == "round_robin" else 0
        self._turn = (self._turn + 1) % len(self._endpoints)
        order = self._endpoints[start:] + self._endpoints[:start]
        return order * _ATTEMPTS

    async def _attempt(self, endpoint: _Endpoint, permit: Permit, path: str, body: bytes) -> _Result:
        try:
            result = await self._exchange(endpoint, path, body)
        except _EndpointFailedError:
            endpoint.breaker.failed(permit, self._now_ms())
            if self._on_error is not None:
                self._on_error(endpoint.address.text)
            raise
        except PolicyUnavailableError:  # the server answered; it is the policy that failed
            endpoint.breaker.succeeded(permit, self._now_ms())
            raise
        except BaseException:
            endpoint.breaker.abandoned(permit)
            raise
        endpoint.breaker.succeeded(permit, self._now_ms())
        return result

    async def _exchange(self, endpoint: _Endpoint, path: str, body: bytes) -> _Result:
        if self._on_request is not None:
            self._on_request()
        until = asyncio.get_running_loop().time() + self._settings.budget_ms / 1000
        try:
            async with asyncio.timeout_at(until):
                answer = await endpoint.connections.ask("POST", f"/v1/data/{path}?provenance", body)
        except (OSError, UnusableAnswerError, AgentWeaveError) as error:
            raise _EndpointFailedError(_words(error)) from error
        result = _read(answer)
        return await self._accepted(endpoint, result, until)

    async def _accepted(self, endpoint: _Endpoint, result: _Result, until: float) -> _Result:
        """Return ``result`` if its revision may be believed; there is time ``until`` then to ask for it."""
        pinned = self._settings.accepted_revisions
        if pinned is not None:
            if result.revision not in pinned:
                raise _EndpointFailedError(f"its revision {result.revision!r} is not an accepted one")
        elif not result.revision and not self._settings.require_revision:
            return _Result(result.defined, result.value, _NO_REVISION)
        elif not result.revision or result.revision != endpoint.revision:
            problem = await self._poll(endpoint, until)
            if problem or result.revision != endpoint.revision:
                raise _EndpointFailedError(problem or "its revision is not its current one")
        return result


def _read(answer: HttpAnswer) -> _Result:
    """Read an answer of the data API.

    Raises:
        _EndpointFailedError: it is none.
        PolicyUnavailableError: the server is well, and the policy failed over this question.

    """
    try:
        document = json.loads(answer.body, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _EndpointFailedError(f"status {answer.status} and no JSON") from error
    if not isinstance(document, dict):
        raise _EndpointFailedError(f"status {answer.status} and no JSON object")
    if answer.status == 500 and document.get("code") == "internal_error":  # noqa: PLR2004 - OPA's evaluation errors
        raise unavailable(f"OPA says: {_complaint(document)}")
    if answer.status != 200:  # noqa: PLR2004 - HTTP
        raise _EndpointFailedError(f"status {answer.status}: {_complaint(document)}")
    return _Result("result" in document, document.get("result"), _revision(document))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that says two things under one key: the parser would take the last for its word."""
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("the same key twice")
    return read


def _complaint(document: dict[str, Any]) -> str:
    errors = document.get("errors")
    first = errors[0] if isinstance(errors, list) and errors else document
    return str(first.get("message", "") if isinstance(first, dict) else first)[:300]


def _revision(document: dict[str, Any]) -> str:
    """Return the revision of all bundles in use; empty unless every one has one."""
    provenance = document.get("provenance")
    bundles = provenance.get("bundles") if isinstance(provenance, dict) else None
    if not isinstance(bundles, dict) or not bundles:
        return ""
    named: list[tuple[str, str]] = []
    for name, bundle in sorted(bundles.items()):
        text = bundle.get("revision") if isinstance(bundle, dict) else None
        if not isinstance(text, str) or not text:
            return ""
        named.append((name, text))
    return named[0][1] if len(named) == 1 else ",".join(f"{name}={text}" for name, text in named)


def _checked_packages(value: Any) -> frozenset[str]:
    names = value.get("standing") if isinstance(value, dict) else None
    return (
        frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()
    )


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
