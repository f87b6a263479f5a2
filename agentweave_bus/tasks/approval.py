"""What records say of approvals: of whom one was asked for, and what somebody decided.

``auth_required`` says who may decide and until when (:class:`Asked`). What follows on it, ``submitted`` or
``rejected``, says who did (:class:`Decided`). A decision counts only if it is by who was named, in time, and
about just that record of just that task; :func:`check_decision` makes sure of it for everybody who reads.

Who takes part in a task (its submitter, and all through whom it was asked for) decides on it only where the
policy names it exactly: a prefix that happens to cover it is not enough.
"""

from __future__ import annotations

from base64 import b64decode
from hashlib import sha256
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agentweave_bus.authz.approval_terms import MOST_APPROVERS
from agentweave_bus.authz.grants import pattern_matches
from agentweave_bus.envelope import decode_payload
from agentweave_bus.exceptions import MalformedEnvelopeError, PayloadError
from agentweave_bus.types import TaskState

__all__ = ["MOST_SHOWN_BYTES", "Approval", "Asked", "Decided", "check_decision"]

MOST_SHOWN_BYTES: Final = 8_192
"""Up to this size a payload is shown to who is to approve of it."""

_MAX_SHOWN: Final = 4 * MOST_SHOWN_BYTES // 3 + 4
_MAX_ID: Final = 2_048
_MAX_REASON: Final = 1_000
_MOST_INVOLVED: Final = 64

_Id = Annotated[str, Field(strict=True, min_length=1, max_length=_MAX_ID)]
_Moment = Annotated[int, Field(strict=True, ge=0, le=2**53 - 1)]


class Asked(BaseModel):
    """Whose approval is asked for: exact SPIFFE IDs, or prefixes that end in ``/*``.

    ``until`` is in milliseconds since the epoch. ``involved`` are those who take part in the task.
    ``payload`` is what the task asks for, in base64, where it is no more than 8 KiB.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    approvers: Annotated[tuple[_Id, ...], Field(strict=False, min_length=1, max_length=MOST_APPROVERS)]
    until: _Moment
    involved: Annotated[tuple[_Id, ...], Field(strict=False, max_length=_MOST_INVOLVED)]
    payload: Annotated[str, Field(strict=True, max_length=_MAX_SHOWN)] | None = None

    def shown(self, pd: str) -> Any:
        """Return the payload, if it is the one whose SHA-256 is ``pd`` (hexadecimal), else ``None``."""
        try:
            data = b64decode(self.payload or "", validate=True)
            return decode_payload(data) if sha256(data).hexdigest() == pd else None
        except (ValueError, PayloadError):
            return None

    def told(self, pd: str) -> dict[str, Any]:
        """Return what people are told of it, as JSON; ``pd`` as of :meth:`shown`."""
        said: dict[str, Any] = {"approvers": list(self.approvers), "until": self.until}
        payload = self.shown(pd)
        return said if payload is None else said | {"payload": payload}

    def refusal(self, who: str, at_ms: int) -> str | None:
        """Return why what ``who`` decides at ``at_ms`` (since the epoch) does not count, or ``None``."""
        named = who in self.approvers
        if not named and not any(pattern_matches(one, who) for one in self.approvers):
            return f"{who} is none of those who may approve: {', '.join(self.approvers)}"
        if not named and who in self.involved:
            return f"{who} takes part in the task, and may approve only where the policy names it exactly"
        return "the time for approving is up" if at_ms > self.until else None


class Decided(BaseModel):
    """What was decided: ``by`` whom, when it was signed (``at``, milliseconds since the epoch), and why.

    ``control`` is the digest of the control message that said so; the agent's audit log keeps its frame.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: _Id
    at: _Moment
    control: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]
    reason: Annotated[str, Field(strict=True, max_length=_MAX_REASON)] = ""

    def facts(self) -> dict[str, Any]:
        """Return what a policy sees of an approval."""
        return {"by": self.by, "at": self.at, "reason": self.reason}


class Approval(NamedTuple):
    """An approval that stands in a task's log; ``begun`` says whether an attempt has begun by it."""

    decided: Decided
    asked: Asked
    begun: bool


def check_decision(
    state: TaskState, asked: Asked | None, decided: Decided | None, *, before: Asked | None
) -> None:
    """Make sure that a record of ``state`` may say this behind one that asked for ``before``.

    Raises:
        MalformedEnvelopeError: it may not.

    """
    if asked is not None and state is not TaskState.AUTH_REQUIRED:
        raise MalformedEnvelopeError("an approval is asked for by a task that does not wait for one")
    if decided is None:
        return
    if before is None or state not in (TaskState.SUBMITTED, TaskState.REJECTED):
        raise MalformedEnvelopeError("a decision that nobody was asked for")
    if (refusal := before.refusal(decided.by, decided.at)) is not None:
        raise MalformedEnvelopeError(f"a decision that does not count: {refusal}")
