"""The connection to the broker: one keeper, and the sessions that it keeps up.

A :class:`Session` is one authenticated connection and all that lives and dies with it: its instance
token, its two inboxes, what it serves and waits for. The :class:`Keeper` owns the current
session and replaces it when the identity rotates, when the broker goes away, or when the client
library closes for good. There is one path for all three: connect anew, subscribe anew, then retire
the old session, which is closed when its last request in flight is answered. The client library's own
reconnection is switched off, because it keeps the old certificate and gives up on some errors. Nor is its
word awaited that a connection is dead, because closing can fail or block over the last bytes to be written:
a session is over when the library's reader or writer is.

What arrives is passed on as it came; nothing here decodes or trusts a message.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import string
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import anyio
import nats.errors
from anyio.abc import TaskGroup
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from agentweave_bus.bus.subjects import api_inbox, reply_inbox
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.exceptions import BusError, IdentityError, UnreachableError
from agentweave_bus.identity import ChainVerifier, IdentitySource, PeerRefusedError, client_context
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "BrokerClient",
    "BusAddress",
    "Keeper",
    "NotPermittedError",
    "PermissionListener",
    "Session",
    "too_late",
]

_log = logging.getLogger(__name__)

DEFAULT_MAX_MESSAGE_BYTES: Final = 1024 * 1024

_TOKEN_ALPHABET: Final = string.ascii_letters + string.digits
_TOKEN_LENGTH: Final = 22  # 131 bits: an inbox that can't be guessed
_MAX_PENDING_MESSAGES: Final = 8192  # per subscription, then the client library drops and reports
_MAX_PENDING_BYTES: Final = 64 * 1024 * 1024
_NEVER_WAITS_BYTES: Final = 1024 * 1024  # buffered by the client library; above two of them publishing waits
_RETIRE_SECONDS: Final = 630.0  # the longest call and its slack; then a retired session is cut
_FIRST_DELAY_SECONDS: Final = 0.05
_PING_SECONDS: Final = 10.0  # a broker that answers no ping for three of them is taken for dead
_PINGS_OUTSTANDING: Final = 2
_CLOSE_SECONDS: Final = 2.0
_RENEW_FIRST_S: Final = 45.0  # who subscribes again by itself has done so by then
_RENEW_LAST_S: Final = 600.0
_PERMISSION: Final = re.compile(
    r"permissions violation for (publish|subscription) to \"([^\"]+)\"", re.IGNORECASE
)

_EXPECTED: Final = (OSError, TimeoutError, IdentityError, BusError, nats.errors.Error)

Handler = Callable[[Msg], Awaitable[None]]
PermissionListener = Callable[[str, str], None]
"""Called with ``publish`` or ``subscription`` and the subject that the broker refused."""


@dataclass(frozen=True, slots=True)
class BusAddress:
    """Where the broker is and who it must be.

    ``servers`` are ``tls://host:port`` addresses, tried in turn; ``server_id`` is the SPIFFE ID that
    the server's certificate must carry; ``connect_timeout`` is in seconds, for one attempt; ``longest_wait``
    is the longest pause between two attempts, in seconds.
    """

    servers: Sequence[str]
    server_id: SpiffeID
    connect_timeout: float = 5.0
    longest_wait: float = 2.0


class BrokerClient(Client):
    """The library's client, whose :meth:`flush` covers all that was sent before it.

    The library writes a ping past its buffer, so the first answer may come before what was buffered has been
    sent; the second can't. Draining a subscription rests on it, too: with one, the broker would go on sending
    to a subscription that is forgotten here, and those calls would be lost.
    """

    async def flush(self, timeout: int = 10) -> None:  # noqa: ASYNC109 - the library's signature
        """Wait until the broker has processed what was sent; ``timeout`` seconds for each round trip."""
        await super().flush(timeout)
        await super().flush(timeout)


class NotPermittedError(BusError):
    """The broker's permissions do not let this identity publish to ``subject``."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"the broker does not let this identity publish to {subject}")
        self.subject = subject


class Session:
    """One live connection. Made by :class:`Keeper`; others subscribe, publish and ask through it."""

    def __init__(self, me: SpiffeID, client: Client) -> None:
        self.me = me
        self.instance = _token()
        self.closed = asyncio.Event()
        self._client = client
        self._serving: list[Subscription] = []
        self._taken_back: set[str] = set()
        self._answers: dict[str, tuple[str, asyncio.Future[Msg]]] = {}  # by where the answer goes
        self._waiting: set[asyncio.Future[Any]] = set()
        self._api = api_inbox(me, self.instance)
        self._secret = _token()  # the instance's token is known to peers; this is known to the broker alone
        self._asked = 0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._retired = False
        self._over = asyncio.Event()
        self.opened_at = asyncio.get_running_loop().time()  # in seconds

    async def open(self) -> None:
        """Subscribe to the inbox of the broker's own answers."""
        await self._subscribe(f"{self._api}.*", "", self._on_api_answer)

    @property
    def usable(self) -> bool:
        """Whether new work may start on this session."""
        return not self._retired and not self.closed.is_set()

    async def until_over(self) -> None:
        """Wait until no new work may start here: the session retires, or its connection is lost."""
        await self._over.wait()

    @property
    def in_flight(self) -> int:
        """How many requests hold this session open."""
        return self._in_flight

    @property
    def max_message_bytes(self) -> int:
        """The largest message that the broker takes."""
        return self._client.max_payload

    async def serve(
        self, subject: str, queue: str, handler: Handler, pending_bytes: int = _MAX_PENDING_BYTES
    ) -> None:
        """Subscribe for as long as the session is current; ended first when it retires.

        At most ``pending_bytes`` wait for ``handler``; what comes on top is dropped. A subscription to
        ``subject`` that the broker took back gives way to this one.

        Raises:
            BusError: the connection is lost.

        """
        try:
            if subject.lower() in self._taken_back:
                await self._forget(subject)
            self._serving.append(await self._subscribe(subject, queue, handler, pending_bytes))
        except nats.errors.Error as error:
            raise BusError("the connection to the broker is lost") from error

    def hears(self, subject: str) -> bool:
        """Say whether what is served on ``subject`` gets here, as far as the broker has said."""
        served = any(one.subject == subject for one in self._serving)
        return served and self.usable and subject.lower() not in self._taken_back

    @property
    def deaf(self) -> bool:
        """Whether the broker has taken back something that is served here."""
        return any(one.subject.lower() in self._taken_back for one in self._serving)

    def no_longer_heard(self, subject: str) -> bool:
        """Note that the broker takes back the subscription to ``subject``, or never made it.

        Return whether that is the first one of those that are served here.
        """
        before = self.deaf
        self._taken_back.add(subject.lower())  # the client library gives the broker's words in lower case
        return self.deaf and not before

    async def receive_replies(self, handler: Handler) -> None:
        """Subscribe to the inbox of peers' answers; kept until the session closes."""
        await self._subscribe(f"{reply_inbox(self.me, self.instance)}.*", "", handler)

    async def receive_pulled(self, inbox: str, handler: Handler) -> Callable[[], Awaitable[None]]:
        """Subscribe to an inbox for what a consumer gives out; return what ends that.

        The inbox must lie below ``subjects.pull_inbox``, and nobody else may be able to guess it.

        Raises:
            BusError: the connection is lost.

        """
        try:
            subscription = await self._subscribe(inbox, "", handler)
        except nats.errors.Error as error:
            raise BusError("the connection to the broker is lost") from error

        async def end() -> None:
            with suppress(nats.errors.Error):  # with the connection it has ended, too
                await subscription.unsubscribe()

        return end

    async def publish(
        self, subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Hand a message to the connection.

        Raises:
            BusError: the connection is gone, or the message is larger than the broker takes.

        """
        try:
            await self._client.publish(subject, data, reply, dict(headers) if headers else None)
        except nats.errors.MaxPayloadError as error:
            raise BusError(f"a message of {len(data)} bytes is larger than the broker takes") from error
        except nats.errors.Error as error:
            raise BusError("the connection to the broker is lost") from error

    async def publish_within(
        self,
        timeout_s: float,
        subject: str,
        data: bytes,
        reply: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Do as :meth:`publish`, and wait at most so many seconds for room in the connection's buffer.

        Raises:
            TimeoutError: there was none.

        """
        if self._client.pending_data_size + len(data) <= _NEVER_WAITS_BYTES:
            await self.publish(subject, data, reply, headers)  # needs no timer: there is room
            return
        async with asyncio.timeout(timeout_s):
            await self.publish(subject, data, reply, headers)

    async def post(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None
    ) -> asyncio.Future[Msg]:
        """Ask the broker itself; its answer is the future's result.

        An answer counts only when it was delivered on the very subject that was asked with. The
        caller awaits the future with a deadline or cancels it; either way it is forgotten then.

        Raises:
            BusError: the connection is lost. The future raises it too, if that happens later.
            NotPermittedError: the broker does not let this identity ask that; the future alone raises it.

        """
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        reply = self._expect(subject, answer)
        answer.add_done_callback(partial(self._no_longer_asked, reply))
        try:
            await self.publish(subject, data, reply, headers)
        except BaseException:
            answer.cancel()
            raise
        return answer

    async def ask(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout_s: float
    ) -> Msg:
        """Ask the broker itself, as :meth:`post` does, and wait up to ``timeout_s`` seconds for its answer.

        Raises:
            BusError: the connection is lost.
            NotPermittedError: the broker does not let this identity ask that.
            TimeoutError: no answer in time.

        """
        # Each task asks several times: this is post() without callbacks, and with one timer for everything.
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()
        timer = loop.call_later(timeout_s, too_late, answer)
        reply = self._expect(subject, answer)
        try:
            await self.publish_within(timeout_s, subject, data, reply, headers)
            return await answer
        finally:
            timer.cancel()
            answer.cancel()
            self._no_longer_asked(reply, answer)

    async def ask_all(
        self, questions: Sequence[tuple[str, bytes]], *, timeout_s: float
    ) -> list[Msg | BusError | TimeoutError]:
        """Ask the broker several things at once, each a subject and data, with one deadline for all.

        Returns for each its answer, or what :meth:`ask` would raise.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        answers: list[asyncio.Future[Msg]] = []
        replies: list[str] = []
        timer = loop.call_at(until, _all_too_late, answers)
        try:
            for subject, data in questions:
                answer: asyncio.Future[Msg] = loop.create_future()
                answers.append(answer)
                replies.append(self._expect(subject, answer))
                if loop.time() >= until:  # the timer may have gone off before this one was there
                    too_late(answer)
                    continue
                try:
                    await self.publish_within(until - loop.time(), subject, data, replies[-1])
                except (BusError, TimeoutError) as error:
                    if not answer.done():
                        answer.set_exception(error)
            return [await _answer(one) for one in answers]
        finally:
            timer.cancel()
            for reply, answer in zip(replies, answers, strict=True):
                answer.cancel()
                self._no_longer_asked(reply, answer)

    async def flush(self, timeout_s: float) -> None:
        """Wait until the broker has processed all that was sent so far."""
        try:
            with anyio.fail_after(timeout_s):  # the library's own timeout does not cover the writing
                await self._client.flush(timeout=max(1, int(timeout_s)))
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise BusError("the broker does not answer") from error

    def not_permitted(self, subject: str) -> bool:
        """Tell those who wait for an answer on ``subject`` that the broker does not let them ask there.

        Return whether anybody did.
        """
        told = False
        for asked_on, answer in list(self._answers.values()):
            # The client library gives the broker's words in lower case.
            if asked_on.lower() == subject.lower() and not answer.done():
                answer.set_exception(NotPermittedError(asked_on))
                told = True
        return told

    def watch(self, future: asyncio.Future[Any]) -> None:
        """Keep the session open until :meth:`unwatch`; ``future`` fails with ``BusError`` if it dies."""
        self._waiting.add(future)
        self._hold_for(future)

    def unwatch(self, future: asyncio.Future[Any]) -> None:
        """Let the session go, as far as ``future`` is concerned. Once for each :meth:`watch`."""
        self._waiting.discard(future)
        self._let_go_of(future)

    def _expect(self, subject: str, answer: asyncio.Future[Msg]) -> str:
        """Have ``answer`` get the broker's answer to what is asked on ``subject``; return where to."""
        self._asked += 1
        reply = f"{self._api}.{self._secret}{self._asked:x}"
        self._answers[reply] = subject, answer
        self._hold_for(answer)
        return reply

    def _hold_for(self, future: asyncio.Future[Any]) -> None:
        self.take_hold()
        if self.closed.is_set():
            future.set_exception(BusError("the connection to the broker is lost"))

    def _no_longer_asked(self, reply: str, answer: asyncio.Future[Msg]) -> None:
        del self._answers[reply]
        self._let_go_of(answer)

    def _let_go_of(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled():
            future.exception()  # now it counts as seen, should its owner have failed already
        self.release_hold()

    def take_hold(self) -> None:
        """Keep the session open, although retired, until :meth:`release_hold`. Holds are counted."""
        self._in_flight += 1
        self._idle.clear()

    def release_hold(self) -> None:
        """Give back one hold."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    async def retire(self, deadline_s: float = _RETIRE_SECONDS) -> None:
        """Take no new work, let what is in flight finish for ``deadline_s`` seconds, then close."""
        self._retire()
        try:
            with anyio.move_on_after(deadline_s):
                await self.finish()
        finally:
            await self.close()

    async def finish(self) -> None:
        """Take no more messages to serve; return when nothing holds the session, or it is lost.

        What is being served may still use it, for its answers and for calls of its own.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(_then_cancel, self.closed, group.cancel_scope)
            await self._stop_serving()
            await self._idle.wait()
            group.cancel_scope.cancel()

    def _retire(self) -> None:
        self._retired = True
        self._over.set()

    async def _stop_serving(self) -> None:
        try:
            while self._serving:
                await self._serving.pop().drain()  # type: ignore[no-untyped-call]
        except nats.errors.Error:
            _log.debug("the connection was gone before it was drained")

    async def close(self) -> None:
        """Close the connection now."""
        self._retire()
        await _abandon(self._client)
        self.mark_closed()

    def mark_closed(self) -> None:
        """Record that the connection is gone; everyone who waits on it is told."""
        self._retire()
        self.closed.set()
        for future in (*self._waiting, *(answer for _, answer in self._answers.values())):
            if not future.done():
                future.set_exception(BusError("the connection to the broker is lost"))

    async def _subscribe(
        self, subject: str, queue: str, handler: Handler, pending_bytes: int = _MAX_PENDING_BYTES
    ) -> Subscription:
        return await self._client.subscribe(
            subject,
            queue=queue,
            cb=handler,
            pending_msgs_limit=_MAX_PENDING_MESSAGES,
            pending_bytes_limit=pending_bytes,
        )

    async def _forget(self, subject: str) -> None:
        self._taken_back.discard(subject.lower())
        for one in [one for one in self._serving if one.subject == subject]:
            self._serving.remove(one)
            await one.unsubscribe()

    async def _on_api_answer(self, message: Msg) -> None:
        asked = self._answers.get(message.subject)
        if asked is not None and not asked[1].done():
            asked[1].set_result(message)


class _LastSession(Session):
    """A session that serves nothing: for what is still in flight while its keeper drains."""

    async def serve(
        self, subject: str, queue: str, handler: Handler, pending_bytes: int = _MAX_PENDING_BYTES
    ) -> None:
        """Do not subscribe: what comes there is for others."""


SessionListener = Callable[[Session], Awaitable[None]]


class Keeper:
    """Keeps one session up for as long as its block lasts.

    Enter it with ``async with keeper.open(deadline_s=10):``; the first session stands when the block
    begins. ``on_session`` listeners run for each new session before it becomes the current one.

    A session of which the broker takes a subscription back, because the grants changed, is followed by
    another one after 45 s, in case the grants have changed again, and after up to 10 minutes as long as that
    does not help.
    """

    def __init__(
        self,
        source: IdentitySource,
        chains: ChainVerifier,
        address: BusAddress,
        *,
        metrics: Metrics | None = None,
        name: str = "",
        new_client: Callable[[], Client] = BrokerClient,
    ) -> None:
        self._metrics = metrics if metrics is not None else Metrics.create()
        self._source = source
        self._chains = chains
        self._address = address
        self._name = name
        self._new_client = new_client
        self._listeners: list[SessionListener] = []
        self._permission_listeners: list[PermissionListener] = []
        self._current: Session | None = None
        self._retiring: set[Session] = set()
        self._arrived = asyncio.Event()
        self._rotated = asyncio.Event()
        self._next_server = 0
        self._draining = asyncio.Event()
        self._renew_s = _RENEW_FIRST_S
        self._renewal: asyncio.TimerHandle | None = None

    def on_session(self, listener: SessionListener) -> None:
        """Have ``listener`` subscribe on each new session. Call before :meth:`open`."""
        self._listeners.append(listener)

    def on_permission_error(self, listener: PermissionListener) -> None:
        """Have ``listener`` told of each subject that the broker refuses to this identity."""
        self._permission_listeners.append(listener)

    @property
    def connected(self) -> bool:
        """Whether there is a usable session at this moment."""
        return self._current is not None and self._current.usable

    def hears(self, subject: str) -> bool:
        """Say whether what is served on ``subject`` gets here now, as far as the broker has said."""
        return self._current is not None and self._current.hears(subject)

    @property
    def connected_s(self) -> float:
        """For how many seconds the current session has stood; 0 without one."""
        current = self._current
        if current is None or not current.usable:
            return 0.0
        return asyncio.get_running_loop().time() - current.opened_at

    @property
    def max_message_bytes(self) -> int:
        """The largest message that the broker takes; its default while there is no connection."""
        current = self._current
        return DEFAULT_MAX_MESSAGE_BYTES if current is None else current.max_message_bytes

    async def session(self, timeout_s: float) -> Session:
        """Return the current session, waiting up to ``timeout_s`` seconds for one.

        Raises:
            UnreachableError: the broker could not be reached in time.

        """
        if self._current is not None and self._current.usable:
            return self._current
        with anyio.move_on_after(max(0.0, timeout_s)):
            while True:
                await self._arrived.wait()
                if self._current is not None and self._current.usable:
                    return self._current
                self._arrived.clear()
        raise UnreachableError(f"not connected to the broker at {', '.join(self._address.servers)}")

    async def ask(self, subject: str, data: bytes, *, timeout_s: float) -> Msg:
        """Ask the broker itself; ``timeout_s`` seconds are for everything, also for having a session.

        Raises:
            UnreachableError: the broker could not be reached in time.
            BusError, TimeoutError: as of :meth:`Session.ask`.

        """
        if self._current is not None and self._current.usable:
            return await self._current.ask(subject, data, timeout_s=timeout_s)
        async with asyncio.timeout(timeout_s):
            session = await self.session(timeout_s)
            return await session.ask(subject, data, timeout_s=timeout_s)

    @asynccontextmanager
    async def open(self, *, deadline_s: float) -> AsyncIterator[Keeper]:
        """Connect, keep connected, and close at the end of the block.

        Raises:
            BusError: no session could be had within ``deadline_s`` seconds; the cause is named.

        """
        with _quieter_asyncio():
            unsubscribe = self._source.subscribe(lambda _snapshot: self._rotated.set())
            try:
                async with owned_tasks() as group:
                    await self._first(deadline_s)
                    group.start_soon(self._keep_until_draining, group)
                    yield self
                    group.cancel_scope.cancel()
            finally:
                unsubscribe()
                if self._renewal is not None:
                    self._renewal.cancel()
                if self._current is not None:
                    await self._current.close()

    async def drain(self, deadline_s: float, *others: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Take no more calls and wait up to ``deadline_s`` seconds for those in flight. For shutdown.

        ``others`` is what else there is to wait for. Until it ends all may make calls of their own; a
        connection that is lost meanwhile is replaced by one that serves nothing. At the end the connection
        is closed.
        """
        self._draining.set()
        if self._current is None:
            return
        with anyio.move_on_after(deadline_s):
            async with owned_tasks() as keeping:
                keeping.start_soon(self._keep_while_draining)
                async with anyio.create_task_group() as group:
                    for session in [*self._retiring, self._current]:
                        group.start_soon(session.finish)
                    for other in others:
                        group.start_soon(other)
                # Those of a retired session may have called through the current one meanwhile.
                await self._current.finish()
                keeping.cancel_scope.cancel()
        await self._current.close()

    async def _first(self, deadline_s: float) -> None:
        give_up = anyio.current_time() + deadline_s
        delay = _FIRST_DELAY_SECONDS
        while True:
            try:
                self._adopt(await self._connect())
            except BusError:
                if anyio.current_time() + delay > give_up:
                    raise
            else:
                return
            await anyio.sleep(delay)
            delay = min(delay * 2, self._address.longest_wait)

    async def _keep_until_draining(self, group: TaskGroup) -> None:
        async with anyio.create_task_group() as keeping:
            keeping.start_soon(_then_cancel, self._draining, keeping.cancel_scope)
            await self._keep(group)
            keeping.cancel_scope.cancel()

    async def _keep_while_draining(self) -> None:
        """Replace a lost connection; a rotated identity is let be, as what is in flight soon ends."""
        while True:
            lost = self._current
            assert lost is not None
            await lost.closed.wait()
            fresh = await self._reconnect(lost)
            self._metrics.bus_reconnects.inc()
            self._adopt(fresh)

    async def _keep(self, group: TaskGroup) -> None:
        while True:
            old = self._current
            assert old is not None
            await self._lost_or_rotated(old)
            if self._draining.is_set():
                return
            self._rotated.clear()
            fresh = await self._reconnect(old)
            if self._draining.is_set():
                await fresh.close()
                return
            self._metrics.bus_reconnects.inc()
            self._adopt(fresh)
            self._retiring.add(old)
            group.start_soon(self._retire, old)

    async def _retire(self, session: Session) -> None:
        try:
            await session.retire()
        finally:
            self._retiring.discard(session)

    async def _lost_or_rotated(self, session: Session) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(_then_cancel, self._rotated, group.cancel_scope)
            await session.closed.wait()
            group.cancel_scope.cancel()

    async def _reconnect(self, old: Session) -> Session:
        """Connect until it works; the old session, if it lives, serves meanwhile."""
        delay = _FIRST_DELAY_SECONDS
        while True:
            try:
                return await self._connect()
            except BusError as error:
                level = logging.INFO if old.usable else logging.WARNING
                _log.log(level, "no connection to the broker yet: %s", error)
            await anyio.sleep(delay * (0.5 + secrets.randbelow(1000) / 2000))
            delay = min(delay * 2, self._address.longest_wait)

    def _adopt(self, session: Session) -> None:
        self._current = session
        self._arrived.set()

    async def _connect(self) -> Session:
        server = self._address.servers[self._next_server % len(self._address.servers)]
        self._next_server += 1
        client = self._new_client()
        try:
            me = self._source.current.svid.spiffe_id
            session = (_LastSession if self._draining.is_set() else Session)(me, client)
            with anyio.fail_after(self._address.connect_timeout):
                await self._dial(client, server, session)
                await session.open()
                for listener in self._listeners:
                    await listener(session)
                await session.flush(self._address.connect_timeout)
        except Exception as error:
            # Any exception: the library lets through what its own parsing stumbles over, and that must
            # not end whoever keeps the connection.
            await _abandon(client)
            if not isinstance(error, _EXPECTED):
                _log.exception("connecting failed in an unexpected way")
            if isinstance(error, PeerRefusedError):
                self._metrics.handshake_ended(accepted=False)
            raise BusError(f"can't connect to the broker at {server}: {_cause(error)}") from error
        except BaseException:
            await _abandon(client)
            raise
        self._metrics.handshake_ended(accepted=True)
        return session

    async def _dial(self, client: Client, server: str, session: Session) -> None:
        async def closed() -> None:
            session.mark_closed()

        connecting = True

        async def failed(error: Exception) -> None:
            if connecting:
                # The first failure ends this attempt. Left alone, the library swallows it, waits 2 s and
                # tries again, until the time is up and nobody can tell what was wrong.
                raise error
            await self._on_error(error, session)

        await client.connect(
            server,
            name=self._name or str(session.me),
            tls=client_context(self._source, self._address.server_id, verifier=self._chains),  # TLS 1.3
            tls_hostname=server.partition("://")[2].rpartition(":")[0],
            tls_handshake_first=True,
            allow_reconnect=False,
            connect_timeout=max(1, int(self._address.connect_timeout)),
            ping_interval=_PING_SECONDS,  # type: ignore[arg-type]  # it is only slept
            max_outstanding_pings=_PINGS_OUTSTANDING,
            error_cb=failed,
            closed_cb=closed,
        )
        connecting = False
        _when_either_end_dies(client, session.mark_closed)

    async def _on_error(self, error: Exception, session: Session) -> None:
        match = _PERMISSION.search(str(error))
        if match is None:
            _log.warning("the broker connection reports: %s", _cause(error))
            return
        verb, subject = match.group(1).lower(), match.group(2)
        told = verb == "publish" and session.not_permitted(subject)
        level = logging.INFO if told else logging.WARNING  # who was told says it in words of its own
        _log.log(level, "the broker does not allow %s to %s", verb, subject)
        if verb != "publish" and session.no_longer_heard(subject):
            self._renew_later(session)
        for listener in self._permission_listeners:
            listener(verb, subject)

    def _renew_later(self, session: Session) -> None:
        """Have another session follow one that does not hear all that it should."""
        loop = asyncio.get_running_loop()
        if loop.time() - session.opened_at > _RENEW_LAST_S:
            self._renew_s = _RENEW_FIRST_S
        pause_s, self._renew_s = self._renew_s, min(_RENEW_LAST_S, 2 * self._renew_s)
        _log.warning("another connection is made in %g s: the grants may have changed by then", pause_s)

        def renew() -> None:
            if session is self._current and session.deaf:
                self._rotated.set()

        if self._renewal is not None:
            self._renewal.cancel()
        self._renewal = loop.call_later(pause_s, renew)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Tell asyncio's warning about TLS streams apart: the client library causes it at every orderly close."""
    return not record.getMessage().startswith("returning true from eof_received()")


class _Quiet:
    """How many keepers want asyncio's logger filtered; they may run on several threads."""

    users = 0
    lock = threading.Lock()


@contextmanager
def _quieter_asyncio() -> Iterator[None]:
    """Filter asyncio's logger for as long as at least one keeper is open."""
    logger = logging.getLogger("asyncio")
    with _Quiet.lock:
        _Quiet.users += 1
        logger.addFilter(_is_worth_saying)  # the same one a second time does nothing
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.users -= 1
            if _Quiet.users == 0:
                logger.removeFilter(_is_worth_saying)


async def _abandon(client: Client) -> None:
    """Close a connection, in good order if that is quick; whatever comes of that, its socket is gone then."""
    with anyio.CancelScope(shield=True):
        try:
            with anyio.move_on_after(_CLOSE_SECONDS):
                await client.close()
        except Exception as error:  # noqa: BLE001 - of a client that never connected, or whose peer is gone
            _log.debug("a connection could not be closed in good order: %s", _cause(error))
        # Always: the library says that it is closed before it closes, and can get stuck in between.
        _cut(client)


def _when_either_end_dies(client: Client, tell: Callable[[], None]) -> None:
    """Have ``tell`` called when nothing more can come in or go out, whatever the reason.

    The library's own ``closed_cb`` is not called when its closing raises, blocks, or is not begun because
    its reader ended over an exception. There is no public way to see reader and writer; without them the
    connection is refused here, so that a change of the library shows.
    """
    for task in (client._reading_task, client._flusher_task):  # noqa: SLF001
        if task is None:
            raise BusError("the client library has no reader or no writer")
        task.add_done_callback(partial(_library_task_ended, tell))


def _library_task_ended(tell: Callable[[], None], task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.debug("a task of the client library ended: %s", _cause(error))
    tell()


def _cut(client: Client) -> None:
    """Drop the connection's socket without a word, for nobody answers there, and end what waits for messages.

    The library has no public way to do either; its writer and its waiting tasks are reached through private
    names. It ends those tasks itself, but not where its closing raised or got stuck before.
    """
    writer = getattr(getattr(client, "_transport", None), "_io_writer", None)
    if isinstance(writer, asyncio.StreamWriter):
        writer.transport.abort()
    for subscription in getattr(client, "_subs", {}).values():
        waiting = getattr(subscription, "_wait_for_msgs_task", None)
        if waiting is not None and waiting is not asyncio.current_task():
            waiting.cancel()


async def _then_cancel(event: asyncio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def too_late(answer: asyncio.Future[Any]) -> None:
    """Have whoever waits for ``answer`` wait no more: for a timer, where it is all that can block."""
    if not answer.done():
        answer.set_exception(TimeoutError())


def _all_too_late(answers: Sequence[asyncio.Future[Any]]) -> None:
    for answer in answers:
        too_late(answer)


async def _answer(asked: asyncio.Future[Msg]) -> Msg | BusError | TimeoutError:
    try:
        return await asked
    except (BusError, TimeoutError) as error:
        return error


def _cause(error: BaseException) -> str:
    text = str(error).strip()
    return text or type(error).__name__


def _token() -> str:
    return "".join(secrets.choice(_TOKEN_ALPHABET) for _ in range(_TOKEN_LENGTH))
