"""The grants as the control role has them: followed in their file, and whom they name.

Off the embedded stack who takes part at a broker is who the grants name exactly. Where a grant's caller is a
prefix, nobody is known from it; whoever runs the control role lists them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from agentweave_bus.authz import Grants
from agentweave_bus.authz.grants import pattern_matches
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["GrantsWatch", "participants", "unlisted_prefixes"]

_log = logging.getLogger(__name__)

_OWN_PATH = "/agentweave/"
"""Where brokers and control roles have their identities; they are nobody's agents."""


class GrantsWatch:
    """The grants, read again when their file changes; a mistake there keeps the last good ones.

    Raises:
        ConfigurationError: the file is not there, or is wrong.

    """

    def __init__(self, source: Path | None) -> None:
        self._source = source
        self._stamp = self._stat()
        self.current = self._read()

    def changed(self) -> bool:
        """Read the file again if it changed, came or went; return whether there are new grants."""
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            self.current = self._read()
        except ConfigurationError as error:
            _log.error("the grants stay as they were: %s", error)
            return False
        except Exception:  # noqa: BLE001 - a slip in a file must not end what runs
            _log.exception("the grants stay as they were: reading them failed in a way that nobody foresaw")
            return False
        return True

    def _read(self) -> Grants:
        path = grants_file(self._source)
        return Grants() if path is None else Grants.load(path)

    def _stat(self) -> tuple[Path, int, int] | None:
        path = grants_file(self._source)
        try:
            found = None if path is None else path.stat()
        except OSError:
            return None
        return None if path is None or found is None else (path, found.st_mtime_ns, found.st_size)


def participants(
    grants: Grants, domains: Collection[str], besides: Iterable[SpiffeID] = ()
) -> frozenset[SpiffeID]:
    """Return who has a user at a broker: the agents and clients of ``domains`` that the grants name exactly.

    ``besides`` are those who have one, too, such as those below a prefix in the grants.
    """
    found = {SpiffeID(one) for one in _named(grants) if not one.endswith("/*")}
    agents = (
        one
        for one in found
        if one.trust_domain in domains and one.path and not one.path.startswith(_OWN_PATH)
    )
    return frozenset((*agents, *besides))


def unlisted_prefixes(
    grants: Grants, domains: Collection[str], besides: Iterable[SpiffeID] = ()
) -> tuple[str, ...]:
    """Return a sentence for each prefix in the grants below which nobody has a user at a broker."""
    everyone = participants(grants, domains, besides)
    prefixes = sorted({one for one in _named(grants) if one.endswith("/*")})
    return tuple(
        f"nobody below {one} has a user: list under identities who is to have one"
        for one in prefixes
        if SpiffeID(one.removesuffix("/*")).trust_domain in domains
        and not any(pattern_matches(one, agent) for agent in everyone)
    )


def _named(grants: Grants) -> Iterator[str]:
    for grant in grants.grants:
        yield from grant.caller
        yield from grant.callee
        yield from () if grant.approval is None else grant.approval.by
    for operator in grants.operators:
        yield from operator.who
