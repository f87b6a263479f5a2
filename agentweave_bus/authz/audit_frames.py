"""Checking kept frames: each must still be what somebody signed, under the digest of its head.

Reads the segments that :mod:`agentweave_bus.authz.frames` writes. It opens no frame itself: the
``frame_check`` passed in does (the envelope part knows how).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from agentweave_bus.authz.audit_findings import Finding
from agentweave_bus.authz.frames import frames_in
from agentweave_bus.exceptions import AgentWeaveError, BundleUnavailableError, FederationError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["FrameCheck", "FramesChecked", "check_frames"]

FrameCheck: TypeAlias = Callable[[bytes, int], bytes]
"""Verifies a frame, which was kept at so many milliseconds since the epoch, and returns its head's digest.

It raises ``FederationError`` or ``BundleUnavailableError`` where it can't tell, for want of a bundle, and
any other ``AgentWeaveError`` where nobody signed this frame."""


class FramesChecked(NamedTuple):
    """What became of a check: the faults, and how many frames could not be checked for want of a bundle."""

    faults: list[Finding]
    unchecked: int


def check_frames(segments: Iterable[Path], check: FrameCheck) -> FramesChecked:
    """Check every frame of these files.

    Raises:
        OSError: one can't be read.

    """
    faults: list[Finding] = []
    unchecked = 0
    for path in segments:
        end = 0
        for kept in frames_in(path):
            end = kept.end
            try:
                wrong = _wrong(check(kept.frame, kept.kept_ms), kept.digest)
            except (FederationError, BundleUnavailableError):
                unchecked += 1
                continue
            except AgentWeaveError as problem:
                wrong = f"does not verify, it was changed or damaged: {problem}"
            if wrong:
                sentence = f"the frame kept as {kept.digest.hex()} {wrong}"
                faults.append(Finding("changed", path.name, 0, sentence))
        if end != path.stat().st_size:
            sentence = f"after byte {end} there is no whole frame: the process died, or it was cut here"
            faults.append(Finding("cut", path.name, 0, sentence))
    return FramesChecked(faults, unchecked)


def _wrong(found: bytes, digest: bytes) -> str:
    return "" if found == digest else f"is another one, whose head has the digest {found.hex()}"
