"""Opening frames that an audit log kept, long after they came."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentweave_bus.authz import FrameCheck
    from agentweave_bus.envelope import EnvelopeVerifier

__all__ = ["frame_check"]


def frame_check(verifier: EnvelopeVerifier) -> FrameCheck:
    """Return what ``authz.verify_audit`` needs to check kept frames: steps 1 to 5 of admission.

    Each is verified with the bundles that ``verifier`` has, as of when it was kept. The returned function
    raises ``AgentWeaveError`` for what does not verify.
    """

    def check(frame: bytes, kept_ms: int) -> bytes:
        return verifier.open(frame, now_ms=kept_ms).digest

    return check
