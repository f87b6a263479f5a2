"""What a test's bus is: agents, clients and grants in one process, and faults to try them with.

There are two, with one interface: :class:`~agentweave_bus.testing.MemoryBus` (fixture ``bus``), whose broker
lives in memory, and that of the fixture ``durable_bus``, whose broker is a real nats-server. Either way every
call is signed, verified, authorized and audited by the code that does so in service.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import anyio.to_thread
import yaml

from agentweave_bus.agent import SecureAgent
from agentweave_bus.authz import Grants
from agentweave_bus.authz.audit_format import LogName
from agentweave_bus.authz.grants import Grant
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.identity import IdentityProvider
from agentweave_bus.runtime import AgentWeaveClient, Connected
from agentweave_bus.runtime.surroundings import Surroundings
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing.clock import Clock
from agentweave_bus.testing.configuration import agent_config, named_after
from agentweave_bus.testing.participants import HeldAgent, HeldClient, Participant
from agentweave_bus.testing.policy_switch import PolicySwitch
from agentweave_bus.testing.trust import DEFAULT_TRUST_DOMAIN

__all__ = ["Bus", "reconnects"]

A = TypeVar("A", bound=SecureAgent)

_PATIENCE: Final = 15.0
"""Seconds after which something that should happen at once counts as missing."""


class Bus(ABC):
    """A bus for one test. Nothing is allowed on it until :meth:`grant` says so.

    Whoever takes part is named by a SPIFFE ID, or by its path in the bus's ``trust_domain``: ``agent/hello``
    is ``spiffe://test.local/agent/hello``. ``policy`` is a policy directory or a grants file to begin with,
    which is copied: tests change nothing of yours. It opens at its first use and must be closed on the event
    loop where it was used; the fixtures see to that, elsewhere use it as an async context manager.
    """

    def __init__(self, trust_domain: str = DEFAULT_TRUST_DOMAIN, *, policy: Path | str | None = None) -> None:
        self.trust_domain = trust_domain
        self.folder = Path(tempfile.mkdtemp(prefix="agentweave-test-"))
        self._policy = self.folder / "policy"
        self._grants_file = _copy_policy(policy, self._policy)
        self._switch = PolicySwitch()
        self._held: list[Participant] = []
        self._open = False

    @property
    @abstractmethod
    def clock(self) -> Clock:
        """The clock that everyone here goes by."""

    # --- names and grants --------------------------------------------------------------------------------

    def id(self, who: object) -> SpiffeID:
        """Return the SPIFFE ID of an agent, a client, a path in this trust domain, or a SPIFFE ID.

        Raises:
            AgentWeaveError: it is a name and no path: whose, ``agent/hello`` or ``client/hello``?
            InvalidSpiffeIdError: it is none.

        """
        if isinstance(who, SecureAgent | AgentWeaveClient):
            return who.config.agent.spiffe_id
        if isinstance(who, type):
            return SpiffeID.of(self.trust_domain, "agent", named_after(who))
        text = str(who)
        if text.startswith("spiffe://"):
            return SpiffeID(text.removesuffix("/*"))
        if "/" not in text:
            raise AgentWeaveError(self._no_path(text, f"agent/{text}", f"client/{text}"))
        return SpiffeID.of(self.trust_domain, *text.split("/"))

    async def grant(self, caller: object, callee: object, *capabilities: str, **more: Any) -> None:
        """Let ``caller`` ask ``callee`` for ``capabilities`` (``*``: all). It holds when this returns.

        ``more`` is what a grant may say beside: ``limits``, ``kinds``, ``principals``, ``on_behalf_of``.

        Raises:
            AgentWeaveError: it grants no capability, or to whom is not clear (see :meth:`id`).
            pydantic.ValidationError: it is no grant.

        """
        if not capabilities:
            raise AgentWeaveError(
                "a grant names what it lets the caller ask for:"
                ' bus.grant(caller, callee, "greet"), or "*" for all capabilities'
            )
        entry = Grant.model_validate(
            {"caller": self._pattern(caller), "callee": self.id(callee), "capabilities": capabilities, **more}
        )
        grants = self.grants
        await self.set_grants(grants.model_copy(update={"grants": (*grants.grants, entry)}))

    async def set_grants(self, grants: Grants | Mapping[str, Any]) -> None:
        """Replace all grants, partners and operators. It holds when this returns.

        Raises:
            pydantic.ValidationError: an entry is wrong.

        """
        checked = grants if isinstance(grants, Grants) else Grants.model_validate(grants)
        self._write(checked)
        if self._open:
            await self._follow_grants()
            for parts in self._connected():
                await parts.authorizer.reload()

    @property
    def grants(self) -> Grants:
        """The grants that hold."""
        return Grants.load(self._grants_file)

    # --- taking part -------------------------------------------------------------------------------------

    async def start(
        self, agent: type[A] | A, *, name: str | None = None, config: Path | str | None = None
    ) -> A:
        """Serve an agent in this process and return it, when it takes calls.

        ``agent`` is a class or an object. A class is made with the configuration file ``config``, or called
        ``name``, by default after itself: ``OrderDeskAgent`` is ``agent/order-desk``. Where it would find its
        broker, identity, policy and audit log is replaced by this bus's.

        Raises:
            AgentWeaveError: it is no agent, or what would keep it from running in service, too.

        """
        _check_agent(agent)
        await self.open()
        given = agent.config if isinstance(agent, SecureAgent) else config
        made_of = self._config(given, name=name, kind=agent if isinstance(agent, type) else type(agent))
        await self._enter(made_of.agent.spiffe_id)
        served = agent(made_of) if isinstance(agent, type) else agent
        served.config = made_of
        if served.identity_provider is None:
            served.identity_provider = self._provider(made_of)
        held = HeldAgent(served)
        with self._holding(held):
            await held.start(self._surroundings(held))
        return served

    @asynccontextmanager
    async def running(self, agent: type[A] | A, **options: Any) -> AsyncIterator[A]:
        """Serve an agent for the length of the block; arguments are those of :meth:`start`."""
        served = await self.start(agent, **options)
        try:
            yield served
        finally:
            await self.stop(served)

    async def stop(self, agent: SecureAgent) -> None:
        """Stop an agent in order, as SIGTERM does: what is in flight ends first."""
        held = self._of(agent)
        self._held.remove(held)
        await held.stop()

    async def kill_worker(self, agent: SecureAgent) -> None:
        """End an agent in the middle of what it does: nothing is finished or answered.

        It runs in this process, so this is as near to a crash as a task can come: its code is cancelled.
        """
        held = self._of(agent)
        self._held.remove(held)
        await held.kill()

    async def client(
        self, identity: object = "client/cli", *, identity_provider: IdentityProvider | None = None
    ) -> AgentWeaveClient:
        """Connect a client and return it. ``identity_provider`` replaces where its SVID comes from.

        Raises:
            AgentWeaveError: ``identity`` is a name and no path (see :meth:`id`), or it can't connect.

        """
        if isinstance(identity, str) and "/" not in identity:
            raise AgentWeaveError(self._no_path(identity, f"client/{identity}"))
        await self.open()
        spiffe_id = self.id(identity)
        config = self._config(None, identity=spiffe_id)
        await self._enter(spiffe_id)
        provider = identity_provider if identity_provider is not None else self._provider(config)
        held = HeldClient(
            lambda: AgentWeaveClient(
                config, identity_provider=provider, surroundings=self._surroundings(held)
            )
        )
        with self._holding(held):
            return await held.start()

    # --- what was written down ---------------------------------------------------------------------------

    def audit(self, who: object, **wanted: Any) -> list[dict[str, Any]]:
        """Return the records in somebody's audit log, in order, of which each of ``wanted`` holds.

        ``bus.audit("agent/hello", event="refusal")`` are the calls that it refused.
        """
        records: list[dict[str, Any]] = []
        for file in LogName.of(self._audit_path(self.id(who))).files():
            records += [json.loads(line) for line in file.read_text().splitlines()]
        records.sort(key=lambda one: (one["ts"], one["seq"]))
        return [one for one in records if all(one.get(key) == value for key, value in wanted.items())]

    # --- faults ------------------------------------------------------------------------------------------

    @contextmanager
    def opa_down(self) -> Iterator[None]:
        """Let no policy answer for the length of the block: every decision is a denial.

        It is for those who take part in this process with the bus's policy, not with a provider of their own.
        """
        self._switch.down = True
        for parts in self._connected():
            parts.authorizer.forget_standing()  # as when a policy server can't be polled
        try:
            yield
        finally:
            self._switch.down = False

    @abstractmethod
    async def rotate_ca(self) -> None:
        """Replace the trust domain's authority, as SPIRE does: nobody loses a call by it.

        First the new one is trusted, then everyone gets an SVID that it signed, then the old one is dropped.
        """

    # --- opening and closing -----------------------------------------------------------------------------

    async def open(self) -> Self:
        """Open the bus; opening it twice does no harm."""
        if not self._open:
            if not self.folder.is_dir():
                raise AgentWeaveError("this bus is closed; make another one")
            self._open = True
            await anyio.to_thread.run_sync(_keep_shipped_policy)
            await self._start_broker()
        return self

    async def aclose(self) -> None:
        """End everyone who takes part, and the broker. Raises what had gone wrong with an agent."""
        failures: list[Exception] = []
        try:
            while self._held:
                try:
                    await self._held.pop().kill()
                except Exception as error:  # noqa: BLE001 - the others must end all the same
                    failures.append(error)
            if self._open:
                self._open = False
                await self._stop_broker()
        finally:
            self.discard()
        if failures:
            raise failures[0]

    def discard(self) -> None:
        """Remove what the bus has written. Raises AgentWeaveError when it was not closed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._open:
            raise AgentWeaveError(
                "this bus was opened and not closed: use it in a test that is a coroutine, or as"
                " `async with bus:`"
            )

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # --- for the two kinds -------------------------------------------------------------------------------

    @abstractmethod
    async def _start_broker(self) -> None: ...

    @abstractmethod
    async def _stop_broker(self) -> None: ...

    @abstractmethod
    async def _enter(self, identity: SpiffeID) -> None:
        """Let an identity take part: the broker must know it."""

    @abstractmethod
    async def _follow_grants(self) -> None:
        """Bring the broker in line with the grants."""

    @abstractmethod
    def _provider(self, config: AgentConfig) -> IdentityProvider | None: ...

    @abstractmethod
    def _surroundings(self, participant: Participant) -> Surroundings: ...

    @abstractmethod
    def _place(self, identity: SpiffeID) -> dict[str, Any]:
        """Return what a configuration must say to find this bus."""

    async def _until(self, check: Callable[[], bool], what: str) -> None:
        """Wait for what announces itself to nobody."""
        async with asyncio.timeout(_PATIENCE):
            try:
                while not check():  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                raise AgentWeaveError(f"{what}: not within {_PATIENCE:g} s") from None

    @contextmanager
    def _holding(self, held: Participant) -> Iterator[None]:
        """Hold somebody who starts; who can't is told so here and not again at the end."""
        self._held.append(held)
        try:
            yield
        except Exception:
            self._held.remove(held)
            raise

    def _connected(self) -> list[Connected]:
        return [one.parts for one in self._held if one.parts is not None and not one.ended]

    def _of(self, agent: SecureAgent) -> HeldAgent:
        for held in self._held:
            if isinstance(held, HeldAgent) and held.agent is agent:
                return held
        raise AgentWeaveError(f"the agent {agent.name} is not running on this bus")

    def _config(
        self,
        given: AgentConfig | Path | str | None,
        *,
        name: str | None = None,
        kind: type[SecureAgent] | None = None,
        identity: SpiffeID | None = None,
    ) -> AgentConfig:
        if identity is None and given is None:
            assert kind is not None
            identity = SpiffeID.of(self.trust_domain, "agent", name or named_after(kind))
        return agent_config(given, identity, self._settings)

    def _settings(self, identity: SpiffeID) -> dict[str, Any]:
        """Return what replaces a configuration's own places."""
        return {
            **self._place(identity),
            "authorization.provider": "embedded",
            "authorization.bundle": str(self._policy),
            "authorization.audit.enabled": True,
            "authorization.audit.destination": str(self._audit_path(identity)),
            "identity.authority_history": str(self.folder / "authorities"),
            "observability.metrics.enabled": False,
        }

    def _audit_path(self, identity: SpiffeID) -> Path:
        name = f"{identity.trust_domain}{identity.path}".replace("/", "+")
        return self.folder / "audit" / f"{name}.jsonl"

    def _pattern(self, who: object) -> str:
        if not (isinstance(who, str) and who.endswith("/*")):
            return self.id(who)
        above = who.removesuffix("/*")
        if "/" not in above:  # everything below a path of one segment: client/*
            above = SpiffeID.of(self.trust_domain, above)
        return f"{self.id(above)}/*"

    def _no_path(self, name: str, *meant: str) -> str:
        paths = " or ".join(repr(path) for path in meant)
        whole = f"spiffe://{self.trust_domain}/{name}"
        return f"{name!r} is a name, not a path: did you mean {paths}? If it is {whole}, write all of that."

    def _write(self, grants: Grants) -> None:
        draft = self._grants_file.with_suffix(".new")
        draft.write_text(yaml.safe_dump(grants.model_dump(mode="json", exclude_none=True)))
        draft.replace(self._grants_file)


def _check_agent(agent: object) -> None:
    """Say of something else what is wanted. Raises AgentWeaveError."""
    if isinstance(agent, SecureAgent) or (isinstance(agent, type) and issubclass(agent, SecureAgent)):
        return
    given = (
        f"the class {agent.__name__}" if isinstance(agent, type) else f"an object of {type(agent).__name__}"
    )
    raise AgentWeaveError(f"bus.start takes a subclass of SecureAgent or an agent, not {given}")


@cache
def _keep_shipped_policy() -> EmbeddedEngine:
    """Keep the shipped policy compiled from the first bus on: every participant would wait for it anew."""
    return EmbeddedEngine.from_directory(None)


def reconnects(parts: Connected) -> float:
    """Return how often somebody has connected anew."""
    return parts.metrics.registry.get_sample_value("agentweave_bus_reconnects_total") or 0.0


def _copy_policy(source: Path | str | None, target: Path) -> Path:
    """Copy a policy directory or a grants file; return where the grants are."""
    given = None if source is None else Path(source)
    if given is not None and given.is_dir():
        shutil.copytree(given, target)
    else:
        target.mkdir()
        if given is not None:
            shutil.copyfile(given, target / "grants.yaml")
    found = grants_file(target)
    if found is None:
        found = target / "grants.yaml"
        found.write_text("grants: []\n")
    return found
