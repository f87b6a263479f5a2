"""Calling agents from programs that are not agents.

:class:`AgentWeaveClient` is an asynchronous context manager; :class:`SyncAgentWeaveClient` is the same for
scripts without an event loop. Both have an identity, a policy and an audit log of their own, like every
participant: there is no anonymous way in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from agentweave_bus.authz import AuthorizationProvider
from agentweave_bus.client import TaskOptions
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.envelope import occurrence_id
from agentweave_bus.exceptions import AgentWeaveError, ConnectionLostError
from agentweave_bus.identity import IdentityProvider
from agentweave_bus.runtime.surroundings import REAL, Surroundings
from agentweave_bus.runtime.sync_tasks import SyncTaskHandle
from agentweave_bus.runtime.wiring import Connected, connected
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.handle import TaskHandle, TaskReference
from agentweave_bus.tasks.pipelining import pipelined
from agentweave_bus.tasks.publishing import DEFAULT_EVENT_SECONDS, PublishedEvent
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.tasks.task_times import milliseconds_of
from agentweave_bus.types import TaskResult

__all__ = ["AgentWeaveClient", "SyncAgentWeaveClient"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_STOP_SECONDS: Final = 10.0
_NOT_CONNECTED: Final = "the client is not connected: use it inside its `with` block"


class AgentWeaveClient:
    """Calls agents as the identity that its configuration names.

    ``async with AgentWeaveClient("client.yaml") as client: await client.call(target, "name", {...})``

    ``config`` is a configuration, the path of one, or ``None`` for ``AGENTWEAVE_CONFIG``. The constructor
    does no I/O but reading that file; entering the block connects.

    Raises:
        ConfigurationError: the configuration is wrong; the message says where and the way out.

    """

    def __init__(
        self,
        config: AgentConfig | str | Path | None = None,
        *,
        identity_provider: IdentityProvider | None = None,
        authz_provider: AuthorizationProvider | None = None,
        connect_deadline_s: float = 10.0,
        surroundings: Surroundings = REAL,
    ) -> None:
        self.config = config if isinstance(config, AgentConfig) else load_config(config)
        self._identity_provider = identity_provider
        self._authz_provider = authz_provider
        self._connect_deadline_s = connect_deadline_s
        self._surroundings = surroundings
        self._stack: AsyncExitStack | None = None
        self._parts: Connected | None = None

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            IdentityError: there is no identity, or not the configured one.
            PolicyError: the policy can't be loaded.
            AuditError: the audit log can't be written.
            BusError: the broker can't be reached.

        """
        if self._stack is not None:
            raise AgentWeaveError("this client is in use already; make another one")
        self._stack = AsyncExitStack()
        try:
            self._parts = await self._stack.enter_async_context(
                connected(
                    self.config,
                    identity_provider=self._identity_provider,
                    authz_provider=self._authz_provider,
                    connect_deadline_s=self._connect_deadline_s,
                    surroundings=self._surroundings,
                )
            )
        except BaseException:
            self._stack = None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack, self._parts = self._stack, None, None
        if stack is not None:
            await stack.__aexit__(kind, error, trace)

    @property
    def spiffe_id(self) -> SpiffeID:
        """The identity as which this client calls."""
        return self._connected().me

    async def call(
        self,
        target: str,
        capability: str,
        payload: Any = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it travels in the envelope, too
        principal: Mapping[str, str] | None = None,
        scope: Sequence[str] | None = None,
        safe: bool = False,
    ) -> TaskResult:
        """Ask the agent ``target`` (a SPIFFE ID) for ``capability``; see ``client.Client.call``.

        ``timeout`` is in seconds; without it ``bus.call_timeout`` holds.

        Raises:
            AgentCallError: the call ended without a result; subclasses say why.
            AgentWeaveError: the client is not connected.

        """
        seconds = self.config.bus.call_timeout if timeout is None else timeout
        return await self._connected().client.call(
            target, capability, payload, timeout=seconds, principal=principal, scope=scope, safe=safe
        )

    async def submit(
        self,
        target: str,
        capability: str,
        payload: Any = None,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        delay: float | None = None,
        at: datetime | None = None,
        every: str | None = None,
        priority: int | None = None,
        retry: Retry | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as of call()
        principal: Mapping[str, str] | None = None,
        scope: Sequence[str] | None = None,
    ) -> TaskHandle:
        """Have a durable task stored for the agent ``target``; see ``client.Client.submit``.

        It is accepted when this returns: what becomes of it is asked of the handle, here or, by the handle's
        ``reference``, in another process. It is due now, in ``delay`` seconds or ``at`` a time (with its
        zone), 31 days ahead at most; ``deadline`` (seconds from then, a day without it) is until when it may
        be begun. With ``every`` ("1h", or five fields of cron in UTC) it comes again until its deadline, 31
        days at most; see :meth:`occurrence`. ``priority`` is 0 to 9, of which 7 to 9 go before others and 0
        to 3 behind. ``timeout`` is for the storing alone; without it ``bus.call_timeout`` holds. ``retry``
        may ask for fewer attempts and longer waits than the capability has.

        Raises:
            AgentCallError: it was not stored (with ``CallTimeoutError``: perhaps not); subclasses say why.
            AgentWeaveError: the client is not connected.

        """
        said = self._said(
            idempotency_key=idempotency_key,
            deadline=deadline,
            delay=delay,
            at=at,
            every=every,
            priority=priority,
            retry=retry,
            timeout=timeout,
            principal=principal,
            scope=scope,
        )
        parts = self._connected()
        return parts.handles.of(*await parts.client.submit(target, capability, payload, said))

    def submit_many(
        self,
        target: str,
        capability: str,
        payloads: Iterable[Any],
        *,
        idempotency_key: Callable[[Any], str] | None = None,
        **options: Any,
    ) -> AsyncGenerator[TaskHandle, None]:
        """Submit a task for each of ``payloads``, many at once, and yield their handles in that order.

        Each is accepted when its handle comes; 64 come at once, when the last of these is stored. At most 256
        are under way, so ``payloads`` may be endless, and whoever takes handles slowly submits slowly.
        ``idempotency_key`` returns a payload's key; the other options are those of :meth:`submit`. What it
        raises for one of them is raised in its place; those that are under way behind it may have been
        stored, so to try again safely give them keys.
        """
        said = self._said(**options)
        keyed = ((one, None if idempotency_key is None else idempotency_key(one)) for one in payloads)
        return pipelined(partial(self._submit_all, target, capability, said), keyed)

    def _said(
        self,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        delay: float | None = None,
        at: datetime | None = None,
        every: str | None = None,
        priority: int | None = None,
        retry: Retry | None = None,
        timeout: float | None = None,
        principal: Mapping[str, str] | None = None,
        scope: Sequence[str] | None = None,
    ) -> TaskOptions:
        return TaskOptions(
            idempotency_key=idempotency_key,
            deadline=deadline,
            delay=delay,
            at=at,
            every=every,
            priority=priority,
            retry=None if retry is None else retry.to_map(),
            timeout=self.config.bus.call_timeout if timeout is None else timeout,
            principal=principal,
            scope=scope,
        )

    async def _submit_all(
        self, target: str, capability: str, said: TaskOptions, payloads: Sequence[tuple[Any, str | None]]
    ) -> list[TaskHandle | Exception]:
        """Submit some at once; return their handles, and errors in the place of those that failed."""
        parts = self._connected()
        outcomes = await parts.client.submit_all(target, capability, payloads, said)
        return [one if isinstance(one, Exception) else parts.handles.of(*one) for one in outcomes]

    async def publish(
        self,
        name: str,
        data: Any = None,
        *,
        key: str | None = None,
        deadline: float = DEFAULT_EVENT_SECONDS,
        timeout: float | None = None,  # noqa: ASYNC109 - as of call()
    ) -> PublishedEvent:
        """Publish the event ``name`` for whoever may receive it; it is stored when this returns.

        ``data`` is an object with what its handlers take, ``key`` says what it is about (an order's id), and
        ``deadline`` (seconds from now) is until when it is handled. ``timeout`` is for the storing alone;
        without it ``bus.call_timeout`` holds.

        Raises:
            AgentCallError: it was not stored (with ``CallTimeoutError``: perhaps not); subclasses say why.
            AgentWeaveError: the client is not connected.

        """
        seconds = self.config.bus.call_timeout if timeout is None else timeout
        return await self._connected().publisher.publish(
            name, data, key=key, deadline=deadline, timeout=seconds
        )

    def occurrence(self, task: TaskHandle, at: datetime) -> TaskHandle:
        """Return the handle of that occurrence of a recurring task which is due at exactly this time.

        Nobody is asked yet whether there is such an occurrence, or will be.

        Raises:
            AgentWeaveError: the client is not connected.

        """
        named = TaskReference.parse(task.reference)
        occurrence = occurrence_id(named.id, milliseconds_of(at))
        return self.task(str(named._replace(id=occurrence)))

    def task(self, reference: str) -> TaskHandle:
        """Return the handle of a task that this identity submitted, by its ``reference``.

        Nobody is asked yet whether there is such a task.

        Raises:
            ConfigurationError: the text names no task.
            AgentWeaveError: the client is not connected.

        """
        return self._connected().handles.named(reference)

    def _connected(self) -> Connected:
        if self._parts is None:
            raise AgentWeaveError(_NOT_CONNECTED)
        return self._parts


class SyncAgentWeaveClient:
    """:class:`AgentWeaveClient` for scripts: ``with SyncAgentWeaveClient("client.yaml") as client: …``.

    It runs an event loop on a thread of its own. Calls may come from any thread.

    Should the client itself fail while it is in use, calls under way raise
    :class:`~agentweave_bus.exceptions.ConnectionLostError` and later ones
    :class:`~agentweave_bus.exceptions.AgentWeaveError`; their cause is what it failed with.
    """

    def __init__(self, config: AgentConfig | str | Path | None = None, **options: Any) -> None:
        self._client = AgentWeaveClient(config, **options)
        self._thread: _ClientThread | None = None

    def __enter__(self) -> Self:
        """Connect; raises as :meth:`AgentWeaveClient.__aenter__` does."""
        thread = _ClientThread(self._client)
        thread.start()
        self._thread = thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect. What the block raised goes on as it is; else what the client failed with is raised."""
        thread, self._thread = self._thread, None
        failure = None if thread is None else thread.leave()
        if failure is None:
            return
        if error is None and isinstance(failure, AgentWeaveError):
            raise failure
        if error is None:
            raise _ended_with(failure) from failure
        if error.__cause__ is not failure:  # else the block's own error tells of it
            _log.error("the client failed, too", exc_info=failure)

    @property
    def spiffe_id(self) -> SpiffeID:
        """The identity as which this client calls."""
        self._connected().require_open()
        return self._client.spiffe_id

    def call(self, target: str, capability: str, payload: Any = None, **options: Any) -> TaskResult:
        """Do what :meth:`AgentWeaveClient.call` does, blocking. Same arguments, same errors."""
        return self._run(lambda: self._client.call(target, capability, payload, **options))

    def submit(self, target: str, capability: str, payload: Any = None, **options: Any) -> SyncTaskHandle:
        """Do what :meth:`AgentWeaveClient.submit` does, blocking. Same arguments, same errors."""
        handle = self._run(lambda: self._client.submit(target, capability, payload, **options))
        return SyncTaskHandle(handle, self._run)

    def submit_many(
        self, target: str, capability: str, payloads: Iterable[Any], **options: Any
    ) -> list[SyncTaskHandle]:
        """Submit many, and return when all are stored; as :meth:`AgentWeaveClient.submit_many`."""

        async def submit() -> list[TaskHandle]:
            return [one async for one in self._client.submit_many(target, capability, payloads, **options)]

        return [SyncTaskHandle(handle, self._run) for handle in self._run(submit)]

    def publish(self, name: str, data: Any = None, **options: Any) -> PublishedEvent:
        """Do what :meth:`AgentWeaveClient.publish` does, blocking. Same arguments, same errors."""
        return self._run(lambda: self._client.publish(name, data, **options))

    def occurrence(self, task: SyncTaskHandle, at: datetime) -> SyncTaskHandle:
        """Do what :meth:`AgentWeaveClient.occurrence` does."""

        async def of() -> TaskHandle:
            return self._client.occurrence(task.handle, at)  # on the loop's thread, where its lock belongs

        return SyncTaskHandle(self._run(of), self._run)

    def task(self, reference: str) -> SyncTaskHandle:
        """Do what :meth:`AgentWeaveClient.task` does."""

        async def named() -> TaskHandle:
            return self._client.task(reference)  # on the loop's thread, where its lock belongs

        return SyncTaskHandle(self._run(named), self._run)

    def _run(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._connected().run(start)

    def _connected(self) -> _ClientThread:
        if self._thread is None:
            raise AgentWeaveError(_NOT_CONNECTED)
        return self._thread


class _ClientThread:
    """A thread with an event loop that holds the connection of ``client`` from beginning to end.

    The loop ends before it is told to when the client fails. Then nobody waits for an answer that never
    comes, and all who ask are told what the client failed with.
    """

    def __init__(self, client: AgentWeaveClient) -> None:
        self._client = client
        self._thread = threading.Thread(target=self._live, name="agentweave-client", daemon=True)
        self._entered: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._ending = False  # nothing is begun any more
        self._failure: BaseException | None = None
        self._known = threading.Event()  # whether there was a failure is known
        self._ended: Future[None] = Future()  # nothing will be done any more

    def start(self) -> None:
        """Connect; raises what keeps the client from it."""
        self._thread.start()
        self._entered.result()

    def leave(self) -> BaseException | None:
        """Disconnect, and return what the client failed with, now or before."""
        loop, left = self._entered.result()
        with suppress(RuntimeError):  # its loop has ended already
            loop.call_soon_threadsafe(left.set)
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            _log.error("the client has not disconnected within %g s; its thread is left", _STOP_SECONDS)
        return self._failure

    def require_open(self) -> None:
        """Raise an error, with what the client failed with as its cause, when nothing is begun any more."""
        if self._ending:
            failure = self._cause()
            raise AgentWeaveError(_NOT_CONNECTED) if failure is None else _ended_with(failure) from failure

    def run(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do it on the loop, and return or raise what came of it."""
        self.require_open()
        loop, _ = self._entered.result()
        doing = start()
        try:
            future = asyncio.run_coroutine_threadsafe(doing, loop)
        except RuntimeError:  # the loop has ended just now
            doing.close()
            self.require_open()
            raise
        either: tuple[Future[Any], ...] = (future, self._ended)
        wait(either, return_when=FIRST_COMPLETED)
        if future.done():
            try:
                return future.result()
            except CancelledError:  # the loop's end broke it off
                pass
            except AgentWeaveError as error:
                # A client that goes after a failure only says that the connection is lost, or is none.
                if type(error) not in {AgentWeaveError, ConnectionLostError} or self._cause() is None:
                    raise
        failure = self._cause()
        told = "" if failure is None else f": {_told(failure)}"
        raise ConnectionLostError(
            f"the client ended while this was under way, so it may have been done{told}"
        ) from failure

    def _cause(self) -> BaseException | None:
        if self._ending:
            self._known.wait(_STOP_SECONDS)
        return self._failure

    def _live(self) -> None:
        try:
            asyncio.run(self._hold())
        except BaseException as error:  # noqa: BLE001 - it is raised where the client is used
            self._failed(error)
        finally:
            self._ending = True
            self._known.set()
            self._ended.set_result(None)

    async def _hold(self) -> None:
        """Hold the connection in one task from beginning to end, as its task groups need."""
        left = asyncio.Event()
        try:
            async with self._client:
                self._entered.set_result((asyncio.get_running_loop(), left))
                try:
                    await left.wait()
                finally:
                    self._ending = True
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            self._known.set()

    def _failed(self, error: BaseException) -> None:
        self._failure = error
        if not self._entered.done():
            self._entered.set_exception(error)


def _ended_with(failure: BaseException) -> AgentWeaveError:
    return AgentWeaveError(f"the client is not connected any more, it ended with {_told(failure)}")


def _told(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {failure}"
