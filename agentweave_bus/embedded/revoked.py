"""What the embedded stack does about the revoked: they lose their connections to the broker.

The broker knows identities, not certificates. Who is revoked as a whole has no user there for as long as
that stands. Where only certificates are revoked, the identity loses its user for a moment, which ends every
connection made with whichever certificate, gets a new certificate from the Workload API, and its user again.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from pathlib import Path

from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.identity import RevocationList, RevocationWatch, RevokedSet
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Revoked"]

_log = logging.getLogger(__name__)


class Revoked:
    """The stack's view of its file of revocations.

    Raises:
        ConfigurationError: the file is not there, or is wrong.

    """

    def __init__(self, path: Path | None) -> None:
        self._watch = RevocationWatch(path)
        self._before = RevokedSet()
        self.put_out: frozenset[str] = frozenset()
        """Who is without a user for a moment only."""

    @property
    def list(self) -> RevocationList:
        """What is revoked now, for who verifies certificates."""
        return self._watch.list

    @property
    def shut_out(self) -> frozenset[str]:
        """Who is to have no user at the broker now."""
        return self._watch.list.revoked.spiffe_ids | self.put_out

    def changed(self) -> bool:
        """Look at the file; return whether other revocations are in force now. Reads files."""
        before = self._watch.list.revoked
        if not self._watch.refresh():
            return False
        self._before = before
        return True

    def note_owners(self, api: WorkloadApiServer) -> None:
        """Find who has to be put out for a moment: owners of certificates that were revoked since."""
        old, new = self._before, self._watch.list.revoked
        renewed = {one for one, ms in new.issued_before.items() if ms > old.issued_before.get(one, 0)}
        owners = (api.owner_of(x5t) for x5t in new.certificates - old.certificates)
        self.put_out |= renewed | {str(owner) for owner in owners if owner is not None}
        _log.warning("revocations: the broker shuts out %s", ", ".join(sorted(self.shut_out)) or "nobody")

    def let_in_again(self, api: WorkloadApiServer) -> bool:
        """Let those in who were put out for a moment, with new certificates; return whether anybody came.

        Whose certificates are revoked as of a time that is still to come stays out until then.
        """
        now_ms = time.time() * 1000
        ready = {one for one in self.put_out if (self._valid_from_ms(one) or 0) <= now_ms}
        for identity in ready & set(api.identities):
            ms = self._valid_from_ms(identity)
            not_before = None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)
            api.rotate(SpiffeID(identity), not_before=not_before)
        self.put_out -= ready
        return bool(ready)

    def begin(self, api: WorkloadApiServer) -> None:
        """Give those whose earlier certificates are revoked ones that are not."""
        self.put_out = frozenset(self._watch.list.revoked.issued_before)
        self.let_in_again(api)

    def _valid_from_ms(self, identity: str) -> int | None:
        """Return when a certificate must begin to be trusted, as the whole seconds that it counts in."""
        ms = self._watch.list.revoked.issued_before.get(identity)
        return None if ms is None else -(-ms // 1000) * 1000
