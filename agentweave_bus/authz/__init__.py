"""Authorization and its record: who may do what, decided by a policy, and proof of each decision.

Ask through :class:`Authorizer` and nothing else; it fails closed. ``grants.yaml`` is read by
:class:`Grants`, an engine of your own is an :class:`AuthorizationProvider`, and :class:`AuditLog` writes
what :func:`verify_audit` can check later. The policy engines are ``wasm.EmbeddedEngine`` and
``opa.OpaServerEngine``; they are imported from their modules, so that nobody pays for the one unused.
"""

from __future__ import annotations

from agentweave_bus.authz.audit import AuditEntry, AuditLog, LogWitness
from agentweave_bus.authz.audit_findings import AuditReport
from agentweave_bus.authz.audit_frames import FrameCheck
from agentweave_bus.authz.audit_report import EvidenceCheck, SignedNote, verify_audit
from agentweave_bus.authz.authorizer import DEFAULT_POLICY_PATH, Authorizer
from agentweave_bus.authz.decision import ApprovalTerms, AuthzContext, AuthzDecision
from agentweave_bus.authz.enforcer import OPAEnforcer, PolicyEnforcer
from agentweave_bus.authz.engine import PolicyAnswer, PolicyEngine, Standing
from agentweave_bus.authz.grants import Grant, Grants, Reach
from agentweave_bus.authz.policy_watch import PolicyWatch
from agentweave_bus.authz.provider import AllowAllProvider, AuthorizationProvider

__all__ = [
    "DEFAULT_POLICY_PATH",
    "AllowAllProvider",
    "ApprovalTerms",
    "AuditEntry",
    "AuditLog",
    "AuditReport",
    "AuthorizationProvider",
    "Authorizer",
    "AuthzContext",
    "AuthzDecision",
    "EvidenceCheck",
    "FrameCheck",
    "Grant",
    "Grants",
    "LogWitness",
    "OPAEnforcer",
    "PolicyAnswer",
    "PolicyEnforcer",
    "PolicyEngine",
    "PolicyWatch",
    "Reach",
    "SignedNote",
    "Standing",
    "verify_audit",
]
