"""A broker in memory: routing, permissions, and JetStream as far as the bus needs it.

It lives on one event loop and delivers at once: what is published has been routed when ``publish`` returns.
It is compared with a real nats-server by a test that runs the same scripts against both
(``tests/integration/test_testing_tools.py``). Differences that are meant: a queue group takes turns instead
of choosing at random; what JetStream would leave unanswered because there is no such verb is an error that
says so; what is too old is gone at once; and there is no limit on connections or subscriptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, cast

import nats.errors
from nats.aio.msg import Msg

from agentweave_bus.testing.memory_client import MemoryClient, MemorySubscription
from agentweave_bus.testing.memory_jetstream import JetStream
from agentweave_bus.testing.memory_subjects import has_wildcard, matches, matches_any

if TYPE_CHECKING:
    from nats.aio.client import Client

__all__ = ["MemoryBroker"]

_MAX_PAYLOAD: Final = 1024 * 1024


@dataclass(slots=True)
class _Rights:
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()


@dataclass(slots=True)
class _Turns:
    """Whose turn it is in each queue group."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def choose(self, key: tuple[str, str], members: list[MemorySubscription]) -> MemorySubscription:
        count = self.counts.get(key, 0)
        self.counts[key] = count + 1
        return members[count % len(members)]


class _Listeners:
    """Who is subscribed to what, found by subject."""

    def __init__(self) -> None:
        self._exact: dict[str, dict[MemorySubscription, None]] = {}
        self._patterns: dict[MemorySubscription, None] = {}

    def add(self, one: MemorySubscription) -> None:
        self._place(one.subject)[one] = None

    def remove(self, one: MemorySubscription) -> None:
        self._place(one.subject).pop(one, None)
        if not self._exact.get(one.subject, True):
            del self._exact[one.subject]

    def to(self, subject: str) -> list[MemorySubscription]:
        patterns = [one for one in self._patterns if matches(one.subject, subject)]
        return [*self._exact.get(subject, ()), *patterns]

    def _place(self, subject: str) -> dict[MemorySubscription, None]:
        return self._patterns if has_wildcard(subject) else self._exact.setdefault(subject, {})


class MemoryBroker:
    """The broker. ``time_ns`` (since the epoch) is what stored messages are stamped with."""

    def __init__(self, time_ns: Callable[[], int], *, max_payload: int = _MAX_PAYLOAD) -> None:
        self.max_payload = max_payload
        self.clients: list[MemoryClient] = []
        self.jetstream = JetStream(self, time_ns)
        self._listeners = _Listeners()
        self._rights: dict[str, _Rights] = {}
        self._turns = _Turns()

    def set_users(self, users: Iterable[Mapping[str, Any]]) -> None:
        """Replace the users, in the form of the server's configuration (``control.broker.broker_users``).

        Who is connected and no user any more loses its connection; subscriptions no longer allowed end.
        """
        self._rights = {
            user["user"]: _Rights(
                tuple(user["permissions"]["publish"]["allow"]),
                tuple(user["permissions"]["subscribe"]["allow"]),
            )
            for user in users
        }
        for client in list(self.clients):
            if client.user is not None and client.user not in self._rights:
                client.cut()
            for one in list(client.subscriptions):
                if not self._may_subscribe(one):
                    client.forget(one)

    def attach(self, client: MemoryClient) -> None:
        """Let a connection in.

        Raises:
            nats.errors.AuthorizationError: its user is not known.

        """
        if client.user is not None and client.user not in self._rights:
            raise nats.errors.AuthorizationError
        self.clients.append(client)

    def detach(self, client: MemoryClient) -> None:
        """Forget a connection and what it was subscribed to."""
        if client in self.clients:
            self.clients.remove(client)
            for one in client.subscriptions:
                self._listeners.remove(one)

    def subscribed(self, subscription: MemorySubscription) -> bool:
        """Take note of a subscription; a forbidden one is reported to its connection and not kept."""
        if self._may_subscribe(subscription):
            self._listeners.add(subscription)
            return True
        self._refuse(subscription.client, "subscription", subscription.subject)
        return False

    def unsubscribed(self, subscription: MemorySubscription) -> None:
        """Take note of the end of a subscription."""
        self._listeners.remove(subscription)

    def publish(
        self, sender: MemoryClient, subject: str, data: bytes, reply: str, headers: dict[str, str] | None
    ) -> None:
        """Route what a connection sends."""
        if sender.user is not None and not matches_any(self._rights[sender.user].publish, subject):
            self._refuse(sender, "publish", subject)
            return
        heard = self.route(subject, data, reply, headers)
        taken = self.jetstream.received(subject, data, reply, headers)
        if not (heard or taken) and reply:
            message = Msg(sender.as_client(), reply, headers={"Status": "503", "Nats-Subject": subject})
            self._deliver([one for one in self._listeners.to(reply) if one.client is sender], message)

    async def close(self) -> None:
        """End every connection and timer."""
        self.jetstream.close()
        for client in list(self.clients):
            await client.close()

    def route(
        self,
        subject: str,
        data: bytes,
        reply: str = "",
        headers: dict[str, str] | None = None,
        *,
        shown: str | None = None,
    ) -> int:
        """Deliver to whoever listens to ``subject``; the message says ``shown``. Return how many heard it."""
        listeners = self._listeners.to(subject)
        if not listeners:
            return 0
        return self._deliver(listeners, Msg(cast("Client", None), shown or subject, reply, data, headers))

    def is_heard(self, subject: str) -> bool:
        """Say whether anybody listens to ``subject``."""
        return bool(self._listeners.to(subject))

    def _deliver(self, listeners: list[MemorySubscription], message: Msg) -> int:
        groups: dict[tuple[str, str], list[MemorySubscription]] = {}
        receivers: list[MemorySubscription] = []
        for one in listeners:
            if one.queue:
                groups.setdefault((one.subject, one.queue), []).append(one)
            else:
                receivers.append(one)
        receivers += [self._turns.choose(key, members) for key, members in groups.items()]
        for one in receivers:
            headers = None if message.headers is None else dict(message.headers)
            one.put(replace(message, _client=one.client.as_client(), headers=headers))
        return len(receivers)

    def _may_subscribe(self, subscription: MemorySubscription) -> bool:
        user = subscription.client.user
        if user is None:
            return True
        rights = self._rights.get(user)
        return rights is not None and matches_any(rights.subscribe, subscription.subject)

    @staticmethod
    def _refuse(client: MemoryClient, verb: str, subject: str) -> None:
        # In lower case, as the client library hands the server's words on.
        words = f'nats: permissions violation for {verb} to "{subject}"'.lower()
        client.report(nats.errors.Error(words))
