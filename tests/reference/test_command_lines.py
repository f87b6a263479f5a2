"""Every ``agentweave`` command line of the reference documents is one that the command line takes.

Those of the walk-throughs are typed into a shell in ``test_ecommerce.py`` and ``test_federation.py``.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from agentweave_bus.cli import build_parser

SCRIPTS = sorted(Path(__file__).parent.rglob("*.sh"))
FROM_NAMES = [  # options that the table of names lists and no document shows in use
    "agentweave call --target spiffe://a.io/agent/b --capability c --data @x.json --timeout 5 --config c.yaml",
    "agentweave call --target spiffe://a.io/agent/b --capability c --data -",
    """agentweave authz check --caller spiffe://a.io/agent/b --target spiffe://a.io/agent/c --action d \\
        --payload '{"amount": 1}' --direction outbound""",
]


def test_there_are_six() -> None:
    assert len(SCRIPTS) == 6


@pytest.mark.parametrize("line", [path.read_text() for path in SCRIPTS] + FROM_NAMES)
def test_it_parses(line: str) -> None:
    program, *words = shlex.split(line.replace("\\\n", " "))
    assert program == "agentweave"
    options = build_parser(words).parse_args(words)
    assert callable(options.run)
    if words[0] == "call" and options.data[0] == "{":
        assert isinstance(json.loads(options.data), dict)


def test_what_no_command_takes_is_refused() -> None:
    with pytest.raises(SystemExit):
        build_parser(["call"]).parse_args(["call", "--target", "x", "--task-type", "y"])
