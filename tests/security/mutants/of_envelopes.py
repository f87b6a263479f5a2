"""Mutants of steps 1 to 5 and 8: frame, certificates, proof, head and time."""

from __future__ import annotations

from functools import partial

from tests.security.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

FRAME = partial(Mutant, file="agentweave_bus/envelope/frame.py")
CODEC = partial(Mutant, file="agentweave_bus/envelope/codec.py", function="unpack_exact")
CHAIN = partial(Mutant, file="agentweave_bus/identity/chain.py", part=3)
HISTORY = partial(Mutant, file="agentweave_bus/identity/retired_file.py", part=3)
REVOKED = partial(
    Mutant,
    part=3,
    file="agentweave_bus/identity/revocation.py",
    function="RevocationList.reason_against",
)
VERIFIER = partial(Mutant, file="agentweave_bus/envelope/verification.py")
HEAD = partial(Mutant, file="agentweave_bus/envelope/head.py", part=5)

OVERSIZED = "test_oversized.py::test_a_frame"
DOWNGRADE = "test_downgrade.py"
LEAF = "test_unlawful_leaf.py::test_a_leaf_that_is_no_svid"
BEHIND = "test_swapped_chain.py::test_other_certificates_behind_a_remembered_leaf"
RETIRED = "test_retired_authority.py"
REVOKED_ONES = "test_revoked.py"
UNVERIFIED = """
from agentweave_bus.identity.chain import VerifiedChain, claimed_spiffe_id, load_certificate
leaf = load_certificate(parts.chain[0])
who = claimed_spiffe_id(parts.chain[0])
return VerifiedChain(who, leaf, leaf.public_key(), sha256(parts.chain[0]), 0, 2**62, b"", (), 0)
"""
POOLED = """
from agentweave_bus.identity.bundle import X509Bundle
own = self._trust.bundle_for(claimed_spiffe_id(chain[0]).trust_domain)
try:
    others = self._trust.bundle_for('partner.test').authorities
except Exception:
    others = ()
return verify_chain(chain, X509Bundle(own.trust_domain, (*own.authorities, *others)), at_ms=at_ms)
"""
# What any reader of msgpack takes from a frame and from a head.
READ_FRAME = """
unpacked = __import__('msgpack').unpackb(data, strict_map_key=False)
version, head, proof, chain, payload, via = unpacked
def read_proof(value):
    return Proof(*value[:3], tuple(value[3]))
links = tuple(Link(one[0], read_proof(one[1]), tuple(one[2])) for one in via)
return Frame(data, head, read_proof(proof), tuple(chain), payload, links)
"""
READ_HEAD = """
value = __import__('msgpack').unpackb(data, strict_map_key=False)
known = {key: value.get(key) for key in Head._fields}
named = {key: SpiffeID(known[key]) for key in ('iss', 'aud')}
scope = known['scope'] and tuple(known['scope'])
return Head(**{**known, **named, 'kind': Kind(known['kind']), 'scope': scope})
"""

MUTANTS = (
    # --- 1. size, 2. frame
    FRAME(
        part=1,
        what="the whole step: a frame of any size",
        function="check_size",
        put="return",
        tests=("test_altered_frame.py::test_beyond_the_size_of_a_frame",),
    ),
    FRAME(
        part=2,
        what="the whole step: a frame as any reader takes it",
        function="decode_frame",
        put=READ_FRAME,
        tests=("test_noncanonical.py::test_a_frame",),
    ),
    CODEC(
        part=2,
        what="more than one encoding of a frame or head",
        find="again != data",
        tests=("test_noncanonical.py::test_a_frame",),
    ),
    CODEC(
        part=2,
        what="extension types in a frame",
        find="_refuse_extension",
        put="msgpack.ExtType",
        tests=("test_noncanonical.py::test_a_frame[extensions]",),
        survives="an extension of no bytes is all that the decoder lets through, and it can't be packed again",
    ),
    FRAME(
        part=2,
        what="another version of the frame",
        function="decode_frame",
        find="type(version) is not int or version != FRAME_VERSION",
        tests=(f"{DOWNGRADE}::test_another_version",),
    ),
    FRAME(
        part=2,
        what="a payload of any size in a frame",
        function="decode_frame",
        find="len(payload) > limits.max_payload_bytes",
        tests=(f"{OVERSIZED}[a payload beyond its bound]",),
    ),
    FRAME(
        part=2,
        what="any number of links",
        function="decode_frame",
        find="len(via) > limits.max_via_links",
        tests=(f"{OVERSIZED}[nine links]",),
        survives="no list of a frame may have more than eight items, as many as there may be links",
    ),
    FRAME(
        part=2,
        what="a head of any size in a frame",
        function="_head",
        find="not 1 <= len(value) <= limits.max_head_bytes",
        tests=(f"{OVERSIZED}[a head beyond its bound]",),
    ),
    FRAME(
        part=2,
        what="a signature of any size",
        function="_proof",
        find="not 1 <= len(signature) <= limits.max_signature_bytes",
        tests=(f"{DOWNGRADE}::test_no_signature_at_all",),
    ),
    FRAME(
        part=2,
        what="a tree of any size",
        function="_proof",
        find="not 1 <= size <= limits.max_batch_heads",
        tests=(f"{DOWNGRADE}::test_a_place_that_no_tree_has",),
    ),
    FRAME(
        part=2,
        what="an index outside of the tree",
        function="_proof",
        find="not 0 <= index < size",
        tests=(f"{DOWNGRADE}::test_a_place_that_no_tree_has",),
    ),
    FRAME(
        part=2,
        what="no certificate, or any number of them",
        function="_chain",
        find="not 1 <= len(value) <= limits.max_chain_certificates",
        tests=(f"{OVERSIZED}[no certificate]",),
    ),
    FRAME(
        part=2,
        what="certificates of any size in all",
        function="_chain",
        find="sum(map(len, value)) > limits.max_chain_bytes",
        tests=(f"{OVERSIZED}[certificates beyond their bound]",),
    ),
    # --- 3. chain
    VERIFIER(
        part=3,
        what="the whole step: a certificate is believed as it stands",
        function="EnvelopeVerifier.check_chain",
        put=UNVERIFIED,
        tests=("test_forged_sender.py::test_an_identity_made_by_another_authority",),
    ),
    VERIFIER(
        part=3,
        what="certificates beside the path",
        function="EnvelopeVerifier.check_chain",
        find="sent != sender.issuers[: len(sent)]",
        tests=(BEHIND,),
    ),
    CHAIN(
        what="a leaf with several names",
        function="_spiffe_id_of",
        find="len(uris) != 1",
        put="not uris",
        tests=(f"{LEAF}[with two URI names]",),
    ),
    CHAIN(
        what="a leaf that names a trust domain",
        function="check_leaf",
        find="not spiffe_id.path",
        tests=(f"{LEAF}[that names the trust domain itself]",),
    ),
    CHAIN(
        what="a leaf that is a CA",
        function="_check_not_ca",
        put="return",
        tests=(f"{LEAF}[that is a CA]",),
    ),
    CHAIN(
        what="a leaf of any key usage",
        function="_check_key_usage",
        put="return",
        tests=(f"{LEAF}[that may not sign]",),
    ),
    CHAIN(
        what="key usage that is not critical",
        function="_check_key_usage",
        find="not extension.critical",
        tests=(f"{LEAF}[whose key usage is not critical]",),
    ),
    CHAIN(
        what="a leaf without digitalSignature",
        function="_check_key_usage",
        find="not usage.digital_signature",
        tests=(f"{LEAF}[that may not sign]",),
    ),
    CHAIN(
        what="a leaf that may sign certificates",
        function="_check_key_usage",
        find="usage.key_cert_sign or usage.crl_sign",
        put="usage.crl_sign",
        tests=(f"{LEAF}[that may sign certificates]",),
    ),
    CHAIN(
        what="a leaf that may sign revocations",
        function="_check_key_usage",
        find="usage.key_cert_sign or usage.crl_sign",
        put="usage.key_cert_sign",
        tests=(f"{LEAF}[that may sign revocations]",),
    ),
    CHAIN(
        what="a leaf for one role only",
        function="_check_extended_key_usage",
        find="not uses >= _BOTH_ROLES",
        tests=(f"{LEAF}[for servers only]", f"{LEAF}[for clients only]"),
    ),
    CHAIN(
        what="a key of any kind",
        function="check_leaf",
        find="not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES)",
        tests=(f"{LEAF}[with an RSA key]", f"{LEAF}[with a P-521 key]"),
    ),
    CHAIN(
        what="the trust domain, compared once more with the bundle's",
        function="verify_chain",
        find="spiffe_id.trust_domain != bundle.trust_domain",
        tests=("test_foreign_authority.py",),
        survives="the verifier has chosen the bundle by that very domain",
    ),
    CHAIN(
        what="bundles of several domains, pooled",
        function="ChainVerifier._verify_anew",
        put=POOLED,
        tests=("test_foreign_authority.py::test_our_id_made_by_the_allowed_domains_authority",),
    ),
    CHAIN(
        what="the validity of the path, looked at once more",
        function="verify_chain",
        find="not verified.valid_at(at_ms)",
        tests=(f"{LEAF}[that has expired]", f"{LEAF}[that is not valid yet]"),
        survives="the library has built the path for that very second",
    ),
    CHAIN(
        what="the time for which a path is built",
        function="_build_path",
        find="datetime.fromtimestamp(at_ms // 1000, UTC)",
        put="leaf.not_valid_before_utc",
        tests=(f"{LEAF}[that has expired]",),
    ),
    CHAIN(
        what="a leaf in the bundle as its own authority",
        function="_build_path",
        find="len(path) < 2",
        tests=("test_unlawful_leaf.py::test_the_authority_itself_as_a_leaf",),
        survives="the bundles of attacks hold authorities only, which the leaf's own rules refuse",
    ),
    CHAIN(
        what="a certificate of any size",
        function="load_certificate",
        find="len(der) > MAX_CERTIFICATE_BYTES",
        tests=("test_oversized.py::test_a_certificate",),
    ),
    CHAIN(
        what="a second encoding of a certificate",
        function="load_certificate",
        find="not der.endswith(b'\\0' + certificate.signature)",
        tests=("test_swapped_chain.py::test_a_second_encoding_of_a_certificate",),
    ),
    CHAIN(
        what="a remembered chain by its leaf alone",
        function="_chain_key",
        find="tuple(chain)",
        put="tuple(chain[:1])",
        tests=(BEHIND,),
    ),
    CHAIN(
        what="the lengths in the key of the memory",
        function="_chain_digest",
        find="len(der).to_bytes(8, 'big')",
        put="b''",
        tests=(BEHIND,),
        survives="what lies beside the path is refused after the memory was asked",
    ),
    CHAIN(
        what="a remembered chain that has expired",
        function="ChainVerifier._recall",
        find="verified.valid_at(at_ms)",
        put="True",
        tests=(
            "test_swapped_chain.py::test_a_remembered_chain_ends_with_the_first_of_its_certificates_that_does",
        ),
    ),
    CHAIN(
        what="a remembered chain whose authority is gone",
        function="ChainVerifier._recall",
        find="verified.authority not in bundle.authority_fingerprints",
        tests=(f"{REVOKED_ONES}::test_an_authority_that_is_gone",),
    ),
    CHAIN(
        what="revocation as a whole",
        function="ChainVerifier.verify",
        find="reason is not None",
        tests=(f"{REVOKED_ONES}::test_a_revoked_identity",),
    ),
    CHAIN(
        what="when an authority left, for what it signed",
        function="ChainVerifier._as_of",
        find="replace(known, not_after_ms=min(known.not_after_ms, left_ms - 1, now_ms - 1))",
        put="known",
        tests=(f"{RETIRED}::test_dated_away_from_its_storing",),
    ),
    CHAIN(
        what="the validity of a chain under an authority that left",
        function="ChainVerifier._as_of",
        find="ended.valid_at(at_ms)",
        put="True",
        tests=(f"{RETIRED}::test_a_link_dated_later",),
    ),
    Mutant(
        part=3,
        what="whether an authority had left by then",
        file="agentweave_bus/identity/retired.py",
        function="RetiredAuthorities._counts",
        find="at_ms < left",
        put="True",
        tests=(f"{RETIRED}::test_a_link_made_up_later",),
    ),
    HISTORY(
        what="who may write the folder of remembered authorities",
        function="AuthorityFolder._locked",
        find="found.st_uid != os.geteuid() or found.st_mode & 0o022",
        tests=(f"{RETIRED}::test_a_folder_that_others_may_write",),
    ),
    HISTORY(
        what="who may write the list of remembered authorities",
        function="_read",
        find="found.st_uid != os.geteuid() or found.st_mode & 0o077",
        tests=(f"{RETIRED}::test_a_history_that_others_may_edit",),
    ),
    REVOKED(
        what="a revoked identity",
        find="spiffe_id in revoked.spiffe_ids",
        tests=(f"{REVOKED_ONES}::test_a_revoked_identity",),
    ),
    REVOKED(
        what="what was issued before a revocation",
        find="issued_ms < revoked.issued_before.get(spiffe_id, issued_ms)",
        tests=(f"{REVOKED_ONES}::test_a_certificate_of_before",),
    ),
    REVOKED(
        what="a revoked certificate",
        find="x5t in revoked.certificates",
        tests=(f"{REVOKED_ONES}::test_a_revoked_certificate",),
    ),
    REVOKED(
        what="a revoked authority",
        find="issuer in revoked.authorities",
        tests=(f"{REVOKED_ONES}::test_a_revoked_authority",),
    ),
    # --- 4. proof
    VERIFIER(
        part=4,
        what="the whole step: nobody looks who signed what",
        function="EnvelopeVerifier.check_proof, EnvelopeVerifier.check_sender",
        put="return",
        tests=("test_forged_sender.py::test_signed_by_another_agent_with_its_own_certificate",),
    ),
    VERIFIER(
        part=4,
        what="no signature is looked at",
        function="EnvelopeVerifier.check_proof",
        put="return",
        tests=("test_forged_sender.py::test_signed_by_another_agent_under_the_victims_certificate",),
    ),
    VERIFIER(
        part=4,
        what="the size of the tree under the signature",
        function="protected_root",
        put="return pae(ROOT_TYPE, root)",
        tests=(
            f"{DOWNGRADE}::test_a_signature_that_covers_something_else",
            f"{DOWNGRADE}::test_another_place_in_the_tree",
        ),
    ),
    VERIFIER(
        part=4,
        what="a remembered signature for any root",
        function="EnvelopeVerifier.check_proof",
        find="(sender.x5t, proof.signature, proof.size, root)",
        put="(sender.x5t, proof.signature, proof.size, b'')",
        tests=("test_altered_frame.py::test_one_bit_of_a_part[head]",),
    ),
    VERIFIER(
        part=4,
        what="a remembered signature for a tree of any size",
        function="EnvelopeVerifier.check_proof",
        find="(sender.x5t, proof.signature, proof.size, root)",
        put="(sender.x5t, proof.signature, 0, root)",
        tests=(f"{DOWNGRADE}::test_another_place_in_the_tree",),
    ),
    VERIFIER(
        part=4,
        what="a remembered signature of any certificate",
        function="EnvelopeVerifier.check_proof",
        find="(sender.x5t, proof.signature, proof.size, root)",
        put="(b'', proof.signature, proof.size, root)",
        tests=("test_swapped_chain.py::test_another_leaf_of_the_same_sender",),
    ),
    VERIFIER(
        part=4,
        what="a head in anybody's name",
        function="EnvelopeVerifier.check_sender",
        find="head.iss != sender.spiffe_id",
        tests=("test_forged_sender.py::test_signed_by_another_agent_with_its_own_certificate",),
    ),
    VERIFIER(
        part=4,
        what="another certificate than the head names",
        function="EnvelopeVerifier.check_sender",
        find="head.x5t != sender.x5t",
        tests=("test_swapped_chain.py::test_another_certificate_for_the_same_key",),
    ),
    VERIFIER(
        part=4,
        what="another payload than the head names",
        function="EnvelopeVerifier.parse_head",
        find="sha256(parts.payload) != head.pd",
        tests=("test_altered_frame.py::test_another_payload_under_the_same_signature",),
    ),
    # --- 5. head
    HEAD(
        what="the whole step: a head as any reader takes it",
        function="parse_head",
        put=READ_HEAD,
        tests=("test_noncanonical.py::test_a_head",),
    ),
    HEAD(
        what="any form of a head",
        function="parse_head",
        find="unpack_exact(data, 'the head', max_items=limits.max_scope_entries, max_bytes=limits.max_head_bytes)",
        put="__import__('msgpack').unpackb(data, strict_map_key=False)",
        tests=("test_noncanonical.py::test_a_head",),
    ),
    HEAD(
        what="unknown keys",
        function="_shape",
        find="tuple((key for key in keys if key not in _REQUIRED))",
        put="tuple(key for key in keys if key not in _REQUIRED and key in _OPTIONAL)",
        tests=(f"{DOWNGRADE}::test_a_head_that_names_an_algorithm",),
    ),
    HEAD(
        what="counts beyond their ends",
        function="_count",
        find="not 0 <= value <= _LARGEST_INT",
        put="False",
        tests=("test_clock_skew.py::test_times_that_are_none",),
    ),
    HEAD(
        what="IDs in another spelling",
        function="_spiffe_id",
        find="SpiffeID(value)",
        put="SpiffeID(value.strip().lower())",
        tests=("test_colliding_names.py::test_another_spelling",),
    ),
    HEAD(
        what="a life of any length",
        function="_check_lifetime",
        put="return",
        tests=("test_clock_skew.py::test_too_long_a_life", "test_clock_skew.py::test_times_that_are_none"),
    ),
    HEAD(
        what="capabilities that are no names",
        function="_check_ends",
        find="kind not in _TO_A_DOMAIN and not CAPABILITY_NAME.fullmatch(cap)",
        tests=("test_colliding_names.py::test_a_capability_that_is_no_token",),
    ),
    HEAD(
        what="scopes of any form",
        function="_scope",
        put="return tuple(value)",
        tests=("test_scope.py::test_entries_that_are_none",),
    ),
    HEAD(
        what="principals of any form",
        function="_principal",
        put="return MappingProxyType(value)",
        tests=("test_principal.py::test_that_is_none",),
    ),
    # --- 8. time
    VERIFIER(
        part=8,
        what="the whole step: a head of any time",
        function="check_time_now",
        put="return",
        tests=("test_time.py::test_a_call_of_another_time",),
    ),
    VERIFIER(
        part=8,
        what="a head of the future",
        function="_check_not_future",
        put="return",
        tests=("test_clock_skew.py::test_just_in_the_future",),
    ),
    VERIFIER(
        part=8,
        what="an old head",
        function="check_time_now",
        find="head.iat < now_ms - limits.max_age_ms",
        tests=("test_clock_skew.py::test_just_too_old",),
    ),
    VERIFIER(
        part=8,
        what="an expired head",
        function="_check_not_expired",
        put="return",
        tests=("test_clock_skew.py::test_at_its_deadline",),
    ),
)
