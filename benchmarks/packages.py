"""Packages that are installed for one peer, and that others would load because they are there."""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["leave_out_others"]

_ITS_OWN: Final = {"taskiq": ("aiohttp",)}
"""What a peer brings. nats-py loads aiohttp where it is installed, for WebSockets: 10 MB for nothing."""


def leave_out_others(peer: str) -> None:
    """Let this process find no package that another than ``peer`` brought. Before anything imports one."""
    for owner, names in _ITS_OWN.items():
        for name in names if owner != peer else ():
            sys.modules[name] = None  # type: ignore[assignment] # so an import finds nothing
