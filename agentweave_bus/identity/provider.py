"""Where identities come from: the protocol that every provider fulfils.

A provider hands out the current SVID and trust bundles and announces changes. It decides nothing about
trust: which domains are allowed and whether a chain verifies is settled in
:mod:`agentweave_bus.identity.rotation` and :mod:`agentweave_bus.identity.chain`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import anyio

if TYPE_CHECKING:
    from agentweave_bus.identity.bundle import X509Bundle
    from agentweave_bus.identity.svid import X509Svid

__all__ = ["IdentityProvider"]

_SHORTEST_WAIT: Final = 1.0
_LONGEST_WAIT: Final = 60.0


class IdentityProvider(ABC):
    """A source of one workload's identity.

    Only the three ``get_`` methods must be written. A provider that learns of changes overrides
    :meth:`wait_for_update`; one that holds a connection overrides :meth:`start`, :meth:`restart` and
    :meth:`aclose`.
    """

    @abstractmethod
    async def get_svid(self) -> X509Svid:
        """Return the current SVID.

        Raises:
            SvidUnavailableError: there is none now; asking again later may help.
            IdentityError: there is none, and asking again won't help.

        """

    @abstractmethod
    async def get_trust_bundle(self, trust_domain: str) -> X509Bundle:
        """Return the bundle of ``trust_domain``.

        Raises:
            BundleUnavailableError: there is none.

        """

    @abstractmethod
    def get_spiffe_id(self) -> str:
        """Return the SPIFFE ID of the SVID last handed out, or the one configured.

        Raises:
            SvidUnavailableError: it is not known yet.

        """

    async def start(self) -> None:  # noqa: B027 - a provider with nothing to open need not override it
        """Open what the provider needs. Called once, before anything else."""

    async def restart(self) -> None:
        """Give up whatever connection there is and make a new one: the SVID is overdue."""
        await self.aclose()
        await self.start()

    async def aclose(self) -> None:  # noqa: B027 - likewise
        """Release everything. Closing twice does no harm."""

    async def wait_for_update(self) -> None:
        """Return when something changed or may have.

        Unless overridden this waits for half of the SVID's remaining lifetime, 1 to 60 seconds.
        """
        svid = await self.get_svid()
        half = (svid.expiry.timestamp() - time.time()) / 2
        await anyio.sleep(min(max(half, _SHORTEST_WAIT), _LONGEST_WAIT))
