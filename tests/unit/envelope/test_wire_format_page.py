"""The page that others implement from says the numbers and names that the code has."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentweave_bus.envelope import DEFAULT_LIMITS, HEAD_TYPE, JSON_CONTENT_TYPE, ROOT_TYPE, Head, Kind
from agentweave_bus.envelope.head import _ANY_KIND, _KEYS

PAGE = (Path(__file__).parents[3] / "docs" / "wire-format.md").read_text()
LIMITS = DEFAULT_LIMITS


@pytest.mark.parametrize(
    "said",
    [
        f"at most {LIMITS.max_frame_bytes:,} bytes",
        f"at most {LIMITS.max_payload_bytes:,} bytes",
        f"1 to {LIMITS.max_head_bytes:,} bytes",
        f"1 to {LIMITS.max_chain_certificates}, at most {LIMITS.max_chain_bytes:,} bytes together",
        f"0 to {LIMITS.max_via_links} links",
        f"1 to {LIMITS.max_signature_bytes} bytes",
        f"1 to {LIMITS.max_batch_heads}",
        f"At\nmost {LIMITS.max_nesting} levels of lists and maps, and {LIMITS.max_items:,} members",
        f"at most {LIMITS.max_number_digits} digits and exponents within ±{LIMITS.max_number_exponent}",
        f"1 to {LIMITS.max_scope_entries} of",
        f"at most {LIMITS.max_map_entries} keys",
        f"1 to {LIMITS.max_value_bytes:,} printable",
        f"{LIMITS.max_call_lifetime_ms // 60_000} minutes for a `call`",
        f"{LIMITS.max_lifetime_ms // 86_400_000} days",
        f"less {LIMITS.clock_slack_ms:,} ms",
        f"{LIMITS.max_age_ms // 1000} s ≤ `iat`",
        f"at most {LIMITS.default_link_grace_ms // 3_600_000} hours before R",
        f"{LIMITS.max_link_grace_ms // 3_600_000} hours at most",
        HEAD_TYPE.decode(),
        ROOT_TYPE.decode(),
        JSON_CONTENT_TYPE,
    ],
)
def test_numbers_and_names(said: str) -> None:
    assert said in PAGE


def test_every_key_and_kind_has_its_row() -> None:
    section = PAGE[PAGE.index("## 4.") : PAGE.index("## 5.")]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in row.replace("`", "").replace(",", "").split()}
    assert set(Head._fields) | {kind.value for kind in Kind} == named


@pytest.mark.parametrize("kind", Kind)
def test_the_keys_of_each_kind(kind: Kind) -> None:
    table = PAGE[PAGE.index("| kind | may have |") : PAGE.index("## 5.")]
    row = next(
        line for line in table.splitlines() if line.split("|")[1:2] and f"`{kind}`" in line.split("|")[1]
    )
    named = {word.strip("`") for word in " ".join(row.split("|")[2:]).split() if word.startswith("`")}
    assert named - {"via"} == _KEYS[kind] - _ANY_KIND
