"""Mutants of steps 6, 7 and 9 to 12: where a request arrived, for whom, whether again, and whether allowed."""

from __future__ import annotations

from functools import partial

from tests.security.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

ADMISSION = partial(Mutant, file="agentweave_bus/bus/admission.py")
BINDING = partial(ADMISSION, part=6, function="Admission._binding_fault")
RULES = partial(Mutant, part=7, file="agentweave_bus/envelope/delegation.py")
CLAIMS = partial(Mutant, part=9, file="agentweave_bus/bus/claims.py")
CODEC = partial(Mutant, part=10, file="agentweave_bus/envelope/codec.py")
ARGUMENTS = partial(Mutant, part=10, file="agentweave_bus/agent/arguments.py")
AUTHORIZER = partial(Mutant, part=11, file="agentweave_bus/authz/authorizer.py")
STANDING = partial(Mutant, part=11, file="agentweave_bus/authz/standing.py")

SWAPPED = "test_swapped.py"
BROKEN = "test_broken_delegation.py"
CARRIED = f"{BROKEN}::test_changed_by_whoever_carries_it"
SPLICED = f"{BROKEN}::test_spliced_by_an_agent_on_the_way"
KEPT = "test_scope.py::test_a_scope_that_is_not_kept"
STOOD = "test_standing_answers.py"
NO_YES = "test_policy_server_nonsense.py::test_an_answer_that_is_no_clear_yes"
TWO_WAYS = "test_two_readings.py::test_what_could_be_read_in_two_ways"
READ_PAYLOAD = """
from agentweave_bus.agent.arguments import ValidatedCall
value = __import__('msgpack').unpackb(request.payload, strict_map_key=False)
return ValidatedCall(value, value)
"""

MUTANTS = (
    # --- 6. binding
    ADMISSION(
        part=6,
        what="the whole step: whatever arrived, for whomever",
        function="Admission._bind",
        put="return self._capabilities.get(request.head.cap) or self._capabilities['work']",
        tests=(SWAPPED,),
    ),
    BINDING(what="the whole comparison with the arrival", put="return None", tests=(SWAPPED,)),
    BINDING(
        what="another kind than a call",
        find="head.kind not in _CALL_KINDS",
        tests=(f"{SWAPPED}::test_another_kind_than_a_call",),
    ),
    BINDING(
        what="another recipient",
        find="head.aud != self._me",
        tests=(f"{SWAPPED}::test_addressed_to_another_agent",),
    ),
    BINDING(
        what="another subject than it arrived on",
        find="head.sub != arrival.subject",
        tests=(f"{SWAPPED}::test_delivered_on_another_capabilitys_subject",),
    ),
    BINDING(
        what="a subject that is not the capability's",
        find="head.sub != call_subject(self._me, head.cap)",
        tests=(f"{SWAPPED}::test_a_capability_that_is_not_the_subjects",),
    ),
    BINDING(
        what="a call without a reply subject",
        find="head.reply is None",
        tests=(f"{SWAPPED}::test_another_reply_subject_than_the_signed_one",),
        survives="the subject made without a token is none on which a caller asks to be answered",
    ),
    BINDING(
        what="another reply subject",
        find="arrival.reply != reply_subject(head.iss, head.reply, head.id)",
        tests=(f"{SWAPPED}::test_another_reply_subject_than_the_signed_one",),
    ),
    ADMISSION(
        part=6,
        what="another content type",
        function="Admission._bind",
        find="head.ct not in (capability.content_type, also)",
        tests=(f"{SWAPPED}::test_another_content_type",),
    ),
    # --- 7. delegation
    ADMISSION(
        part=7,
        what="the whole step: links that nobody verifies",
        function="Admission._delegation",
        put="return ()",
        tests=(f"{BROKEN}::test_a_link_in_anothers_name",),
    ),
    RULES(
        what="rule 1, links that are no requests",
        function="_parsed",
        find="head.kind not in REQUESTS",
        tests=(f"{SPLICED}[the answer to a request]", f"{SPLICED}[a control message]"),
    ),
    RULES(
        what="rule 1, a request that is none",
        function="_check_rule_1",
        find="head.kind not in REQUESTS",
        tests=(SWAPPED, BROKEN),
        survives="step 6 lets nothing but calls come so far",
    ),
    RULES(
        what="rule 1, any number of links",
        function="_check_rule_1",
        find="len(via) > limits.max_via_links",
        tests=("test_oversized.py::test_a_frame[nine links]",),
        survives="no frame with more of them is decoded (step 2)",
    ),
    RULES(
        what="rule 2, links that are not the parents",
        function="_check_rule_2",
        find="heads[-1].par != link.digest",
        tests=(f"{CARRIED}[its last link cut off]",),
    ),
    RULES(
        what="rule 2, an origin cut off",
        function="_check_rule_2",
        find="heads[-1].par is not None",
        tests=(f"{CARRIED}[its origin cut off]",),
    ),
    RULES(
        what="rule 2, a parent without links",
        function="check_rules",
        find="head.par is not None",
        tests=(f"{CARRIED}[all of its links cut off]",),
    ),
    RULES(
        what="rule 2, a principal named on the way",
        function="_check_rule_2",
        find="any(one.prn is not None for one in heads[:-1])",
        tests=("test_principal.py::test_named_in_the_middle",),
    ),
    RULES(
        what="rule 3, a request to somebody else",
        function="_check_rule_3",
        find="parent.aud != child.iss",
        tests=("test_grafted_delegation.py::test_nobody_else_may",),
    ),
    RULES(
        what="rule 3, a reissue without its task",
        function="_check_rule_3",
        find="parent.kind is Kind.REISSUE and before_parent is None",
        tests=(f"{SPLICED}[a reissue without its task]",),
    ),
    RULES(
        what="rule 3, an event on anybody's subject",
        function="_check_event_link",
        put="return",
        tests=(f"{SPLICED}[an event on another agent's subject]",),
    ),
    RULES(
        what="rule 3, a reissue of anything",
        function="_check_reissue",
        find="task.kind is not Kind.TASK",
        tests=(f"{SPLICED}[a call that was reissued]",),
    ),
    RULES(
        what="rule 3, a reissue by anybody",
        function="_check_reissue",
        find="reissue.iss != control_role(reissue.aud.trust_domain)",
        tests=(f"{SPLICED}[a task that its own sender reissued]",),
    ),
    RULES(
        what="rule 4, time that goes back",
        function="_check_rule_4",
        find="child.iat < parent.iat - limits.clock_slack_ms",
        tests=(f"{SPLICED}[a request of later]",),
    ),
    RULES(
        what="rule 4, a request that had expired",
        function="_check_rule_4",
        find="child.iat >= parent.exp",
        tests=(f"{SPLICED}[an old request that has expired]",),
    ),
    RULES(
        what="rule 4, a call that outlives its parent",
        function="_check_rule_4",
        find="child.kind is Kind.CALL and child.exp > parent.exp",
        tests=(f"{BROKEN}::test_a_call_that_outlives_its_request",),
    ),
    RULES(
        what="rule 5, links that nobody signed",
        function="_check_rule_5",
        find="verifier.verify_link(link, now_ms=now_ms, stored_at_ms=at.there_ms)",
        put="verifier.check_chain(link, at_ms=link.head.iat)",
        tests=(f"{BROKEN}::test_a_link_in_anothers_name",),
    ),
    RULES(
        what="rule 5, links as old as they say of themselves",
        function="_check_rule_5",
        find="at.there_ms",
        put="link.head.iat",
        tests=(
            "test_retired_authority.py::test_a_link_made_up_later",
            "test_retired_authority.py::test_a_link_of_a_live_call",
        ),
    ),
    RULES(
        what="rule 5, signers that expired long ago",
        function="_check_rule_5",
        find="sender.not_after_ms + link_grace_ms < at.reference_ms",
        tests=("test_stolen_key.py::test_beyond_the_grace",),
    ),
    Mutant(
        part=7,
        what="rule 5, links in anybody's name",
        file="agentweave_bus/envelope/verification.py",
        function="EnvelopeVerifier.verify_link",
        find="self.check_sender(link.head, sender)",
        put="None",
        tests=(f"{BROKEN}::test_a_link_in_anothers_name",),
    ),
    Mutant(
        part=7,
        what="rule 5, certificates of now for a link of then",
        file="agentweave_bus/envelope/verification.py",
        function="EnvelopeVerifier.verify_link",
        find="link.head.iat",
        put="int(__import__('time').time() * 1000)",
        tests=("test_backdated_request.py::test_before_its_signers_certificate_began",),
    ),
    RULES(
        what="rule 6, a principal without a scope",
        function="_check_rule_6",
        find="heads[0].prn is not None and heads[0].scope is None",
        tests=("test_principal.py::test_named_without_a_scope",),
    ),
    RULES(
        what="rule 6, requests outside of their scope",
        function="_check_rule_6",
        find="head.scope is not None and not permits(head.scope, head.aud, head.cap)",
        tests=(f"{KEPT}[that does not reach so far]", f"{KEPT}[that its own request is outside of]"),
    ),
    RULES(
        what="rule 6, a scope dropped",
        function="_check_narrower",
        find="if child.scope is None:\n"
        "    raise DelegationRefusedError(f'{child.iss} dropped the scope of the request before it', rule=6)",
        put="if child.scope is None:\n    return",
        tests=(f"{KEPT}[dropped on the way]",),
    ),
    RULES(
        what="rule 6, a scope widened",
        function="_check_narrower",
        find="not any((covers(one, entry) for one in scope))",
        tests=(f"{KEPT}[widened by a capability]",),
    ),
    # --- 9. replay
    ADMISSION(
        part=9,
        what="the whole step: calls that came before",
        function="Admission._filter, Admission._check_claim",
        put="return",
        tests=("test_replay_same_process.py::test_the_same_frame_again",),
    ),
    ADMISSION(
        part=9,
        what="the filter of this process",
        function="Admission._filter",
        put="return",
        tests=("test_replay_same_process.py::test_a_safe_call_again",),
    ),
    ADMISSION(
        part=9,
        what="the claim across replicas",
        function="Admission._check_claim",
        put="return",
        tests=("test_replay_replica.py::test_a_second_replica",),
    ),
    ADMISSION(
        part=9,
        what="the claim, where no answer stands",
        function="Admission._claim",
        put="return",
        tests=(
            "test_replay_replica.py::test_a_second_replica",
            "test_replay_restart.py::test_a_restarted_worker_process",
        ),
    ),
    ADMISSION(
        part=9,
        what="a claim that somebody holds",
        function="Admission._check_claim",
        find="outcome is ClaimOutcome.CLAIMED",
        tests=("test_replay_same_process.py::test_the_same_id_under_another_signature",),
    ),
    ADMISSION(
        part=9,
        what="a claim that is not clear",
        function="Admission._check_claim",
        find="outcome is not ClaimOutcome.HELD",
        tests=("broker/test_false_acknowledgement.py::test_no_answer",),
    ),
    ADMISSION(
        part=9,
        what="claims younger than the call",
        function="Admission._begin_claim",
        find="head.iat <= created_ms + _NEW_STREAM_MS",
        tests=("broker/test_false_stream_age.py::test_an_age_in_the_future",),
    ),
    ADMISSION(
        part=9,
        what="claims of one sender that come too fast",
        function="Admission._begin_claim",
        find="not self._rates.take(head.iss, now_ms)",
        tests=("test_too_many_claims.py",),
    ),
    ADMISSION(
        part=9,
        what="claims of no known age",
        function="Admission._begin_claim",
        find="if created_ms is None:\n"
        "    raise self._not_ready(request, 'the claim stream does not answer', 1.0)",
        put="created_ms = created_ms or 0",
        tests=("broker/test_false_stream_age.py::test_an_age_that_is_none",),
    ),
    CLAIMS(
        what="a duplicate as an acknowledgement",
        function="_outcome",
        find="answer.get('duplicate')",
        tests=("broker/test_false_acknowledgement.py::test_an_answer_that_is_no_clear_yes",),
    ),
    CLAIMS(
        what="acknowledgements without a sequence number",
        function="_outcome",
        find="type(sequence) is not int or sequence < 1 or answer.get('duplicate')",
        put="(sequence := sequence if type(sequence) is int else 1) < 0 or answer.get('duplicate')",
        tests=("broker/test_false_acknowledgement.py::test_an_answer_that_is_no_clear_yes",),
    ),
    CLAIMS(
        what="sequence numbers that do not grow",
        function="Claims.judge",
        find="sequence > age.highest",
        put="True",
        tests=("broker/test_false_acknowledgement.py::test_a_sequence_that_does_not_grow",),
    ),
    CLAIMS(
        what="the stream's age after a session's first claim",
        function="Claims.judge",
        find="sequence > age.highest and age.confirmed",
        put="sequence > age.highest",
        tests=("test_replay_new_claims.py::test_a_process_that_has_claimed_nothing",),
    ),
    Mutant(
        part=9,
        what="the sender in the key of a claim",
        file="agentweave_bus/envelope/replay.py",
        function="_claim_prefix",
        find="_with_length(iss) + _with_length(aud) + _with_length(cap)",
        put="_with_length(aud) + _with_length(cap)",
        tests=("test_burned_id.py::test_by_who_may_call",),
    ),
    Mutant(
        part=9,
        what="the capability in the key of a claim",
        file="agentweave_bus/envelope/replay.py",
        function="_claim_prefix",
        find="_with_length(iss) + _with_length(aud) + _with_length(cap)",
        put="_with_length(iss) + _with_length(aud)",
        tests=("test_burned_id.py::test_by_the_same_id_at_another_capability",),
    ),
    Mutant(
        part=9,
        what="the lengths in the key of a claim",
        file="agentweave_bus/envelope/replay.py",
        function="_with_length",
        find="len(data).to_bytes(4, 'big') + data",
        put="data",
        tests=("test_colliding_names.py",),
    ),
    # --- 10. payload
    ADMISSION(
        part=10,
        what="the whole step: a payload as any reader takes it",
        function="Admission._validate",
        put=READ_PAYLOAD,
        tests=(TWO_WAYS,),
    ),
    ARGUMENTS(
        what="arguments as they come",
        function="Arguments.validate",
        put="return ValidatedCall(dict(value), dict(value))",
        tests=(TWO_WAYS,),
    ),
    CODEC(
        what="more than one encoding of a payload",
        function="decode_payload",
        find="_pack_payload(value) != data",
        tests=(
            "test_noncanonical.py::test_a_payload_with_a_number",
            f"{TWO_WAYS}[the amount twice, the small one first]",
        ),
    ),
    CODEC(
        what="payloads of any depth",
        function="_Budget.spend",
        find="depth > self.limits.max_nesting",
        tests=("test_oversized.py::test_a_payload[a payload nested 33 deep]",),
    ),
    CODEC(
        what="payloads of any number of items",
        function="_Budget.spend",
        find="self.items_left < 0",
        tests=("test_oversized.py::test_a_payload[a payload of too many numbers]",),
    ),
    CODEC(
        what="numbers that are none",
        function="_check_float",
        put="return value",
        tests=("test_two_readings.py::test_numbers_where_any_json_is_taken", f"{TWO_WAYS}[not a number]"),
    ),
    ARGUMENTS(
        what="unknown arguments",
        function="Arguments.validate",
        find="extra and self._check_extra is None",
        tests=(f"{TWO_WAYS}[an argument that nobody takes]",),
    ),
    ARGUMENTS(
        what="other types than the handler's",
        function="_Check.__call__",
        find="(self._all if len(text) < _LARGE_BYTES else self._first)(text, strict=True)",
        put="(self._all if len(text) < _LARGE_BYTES else self._first)(text, strict=False)",
        tests=(f"{TWO_WAYS}[an integer as text]",),
    ),
    ARGUMENTS(
        what="defaults, as the policy sees them",
        function="Arguments._call",
        find="self._defaults.copy()",
        put="{}",
        tests=("test_two_readings.py::test_a_field_left_out", "test_evaluator.py::test_an_argument_left_out"),
    ),
    # --- 11. authorization
    ADMISSION(
        part=11,
        what="the whole step: a no is no refusal",
        function="Admission._allowed",
        put="return decision",
        tests=("test_burned_id.py::test_by_who_may_not_call",),
    ),
    ADMISSION(
        part=11,
        what="the callers to whom a capability is open",
        function="Admission._claim_and_authorize",
        find="(reason := capability.admits_peer(request.head.iss)) is not None",
        tests=("test_not_open_to.py",),
    ),
    AUTHORIZER(
        what="answers that are no clear yes",
        function="_read_object",
        find="not isinstance(result, dict) or not isinstance(result.get('allow'), bool)",
        tests=(NO_YES,),
    ),
    AUTHORIZER(
        what="answers that are not there",
        function="Authorizer._ask",
        find="not answer.defined",
        tests=(NO_YES,),
    ),
    AUTHORIZER(
        what="a policy that takes too long",
        function="Authorizer._ask",
        find="asyncio.timeout(self._timeout_s)",
        put="asyncio.timeout(3600)",
        tests=("test_providers_that_fail.py::test_an_engine_that_hangs",),
    ),
    AUTHORIZER(
        what="an engine that raises",
        function="Authorizer._no_answer",
        find="AuthzDecision(allowed=False, reason=reason, revision=self.revision, answered=False)",
        put="AuthzDecision(allowed=True, reason=reason)",
        tests=("test_providers_that_fail.py::test_an_engine_that_raises",),
    ),
    AUTHORIZER(
        what="a provider's answer of any type",
        function="_checked",
        put="return decision",
        tests=("test_providers_that_fail.py::test_an_answer_that_is_no_decision",),
    ),
    AUTHORIZER(
        what="a yes that needs approval",
        function="_approved",
        put="return decision",
        tests=("test_providers_that_fail.py::test_a_yes_that_wants_approval",),
    ),
    AUTHORIZER(
        what="limits",
        function="Authorizer._used",
        find="decision.allowed and decision.limits",
        tests=(f"{STOOD}::test_a_limit_counts_every_use",),
    ),
    AUTHORIZER(
        what="standing: forgetting what stood when the policy can't be asked",
        function="Authorizer._refreshed",
        find="self.forget_standing()",
        put="None",
        tests=("test_late_answers.py::test_nothing_stands_when_nobody_knows_if_it_still_does",),
        survives="the revision is unknown then, and what stood is of another one",
    ),
    AUTHORIZER(
        what="standing: the policy's change while it was asked",
        function="Authorizer._generation",
        put="return (0, '')",
        tests=("test_late_answers.py::test_a_late_standing_answer_fills_no_new_cache",),
    ),
    AUTHORIZER(
        what="standing: what was forgotten while it was asked",
        function="Authorizer.forget_standing",
        find="self._epoch += 1",
        put="pass",
        tests=("test_late_answers.py::test_a_late_standing_answer_fills_no_new_cache[revocation]",),
    ),
    STANDING(
        what="standing: the generation of a kept answer",
        function="StandingCache._current",
        find="entry.generation == now.generation",
        put="True",
        tests=("test_late_answers.py::test_a_late_standing_answer_fills_no_new_cache",),
    ),
    STANDING(
        what="standing: the end of a kept answer",
        function="StandingCache.keep",
        find="min(seconds, MAX_CACHE_SECONDS)",
        put="seconds",
        tests=(f"{STOOD}::test_no_answer_stands_for_longer_than_a_minute",),
        survives="the policy's answer is cut to a minute where it is read, too",
    ),
    STANDING(
        what="standing: for any caller",
        function="standing_key",
        find="context.caller",
        put="None",
        tests=(f"{STOOD}::test_another_caller",),
    ),
    STANDING(
        what="standing: for any capability",
        function="standing_key",
        find="context.action",
        put="None",
        tests=(
            f"{STOOD}::test_a_standing_rule_that_would_not_hold",
            f"{STOOD}::test_an_answer_of_an_older_revision",
            STOOD,
        ),
    ),
    STANDING(
        what="standing: for any origin of a delegation",
        function="standing_key",
        find="link.get('iss')",
        put="None",
        tests=(f"{STOOD}::test_another_origin_of_the_delegation",),
    ),
    STANDING(
        what="standing: for any capability in a delegation",
        function="standing_key",
        find="link.get('cap')",
        put="None",
        tests=(f"{STOOD}::test_another_capability_in_the_delegation",),
    ),
    STANDING(
        what="standing: for any principal",
        function="standing_key",
        find="None if principal is None else json.dumps(principal, sort_keys=True, default=repr)",
        put="None",
        tests=(f"{STOOD}::test_another_principal",),
    ),
    STANDING(
        what="standing: for any scope",
        function="standing_key",
        find="None if scope is None else tuple(scope)",
        put="None",
        tests=(f"{STOOD}::test_another_scope",),
    ),
    # --- 12. audit
    ADMISSION(
        part=12,
        what="the whole step: calls that nobody records",
        function="Admission._record_admission",
        put="return 'unrecorded'",
        tests=("test_replay_restart.py::test_a_restarted_worker_process",),
    ),
    ADMISSION(
        part=12,
        what="calls that can't be recorded",
        function="Admission._record_admission",
        find="raise AdmissionRefusedError(Step.AUDIT, str(error), told='not able to record the call', "
        "request=request) from error",
        put="return 'unrecorded'",
        tests=("test_audit_write_fails.py::test_a_record_that_can_not_be_written",),
    ),
    ADMISSION(
        part=12,
        what="envelopes that are not kept",
        function="Admission._record_admission",
        find="(request.digest, request.frame) if keep else None",
        put="None",
        tests=("test_audit_write_fails.py::test_an_envelope_that_can_not_be_kept",),
    ),
)
