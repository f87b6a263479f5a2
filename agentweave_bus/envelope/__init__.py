"""Envelopes: what every message on the bus is sealed in. Pure values and functions, no I/O, no clock.

A :class:`Sealer` makes frames, an :class:`EnvelopeVerifier` opens them, :func:`verify_delegation` proves
on whose behalf, and a :class:`ReplayFilter` admits each once. The format is written down in
``docs/wire-format.md``; ``tests/vectors/`` holds known answers.
"""

from agentweave_bus.envelope.codec import (
    JsonValue,
    convert_payload,
    decode_payload,
    encode_payload,
    new_id,
    occurrence_id,
    to_json_value,
)
from agentweave_bus.envelope.delegation import (
    REQUESTS,
    Requester,
    VerifiedLink,
    check_rules,
    control_role,
    covers,
    extend_via,
    permits,
    requester,
    verify_delegation,
)
from agentweave_bus.envelope.envelope import (
    DEFAULT_LIMITS,
    FRAME_VERSION,
    HEAD_TYPE,
    JSON_CONTENT_TYPE,
    ROOT_TYPE,
    Draft,
    Head,
    Kind,
    Limits,
    LogWitness,
    head_digest,
    pae,
)
from agentweave_bus.envelope.frame import Frame, Link, Proof, decode_frame, decode_link, encode_link
from agentweave_bus.envelope.head import parse_head
from agentweave_bus.envelope.replay import ReplayFilter, claim_key
from agentweave_bus.envelope.signing import Sealed, Sealer
from agentweave_bus.envelope.verification import (
    EnvelopeVerifier,
    OpenedEnvelope,
    check_time_now,
    check_time_reply,
    check_time_stored,
)

__all__ = [
    "DEFAULT_LIMITS",
    "FRAME_VERSION",
    "HEAD_TYPE",
    "JSON_CONTENT_TYPE",
    "REQUESTS",
    "ROOT_TYPE",
    "Draft",
    "EnvelopeVerifier",
    "Frame",
    "Head",
    "JsonValue",
    "Kind",
    "Limits",
    "Link",
    "LogWitness",
    "OpenedEnvelope",
    "Proof",
    "ReplayFilter",
    "Requester",
    "Sealed",
    "Sealer",
    "VerifiedLink",
    "check_rules",
    "check_time_now",
    "check_time_reply",
    "check_time_stored",
    "claim_key",
    "control_role",
    "convert_payload",
    "covers",
    "decode_frame",
    "decode_link",
    "decode_payload",
    "encode_link",
    "encode_payload",
    "extend_via",
    "head_digest",
    "new_id",
    "occurrence_id",
    "pae",
    "parse_head",
    "permits",
    "requester",
    "to_json_value",
    "verify_delegation",
]
