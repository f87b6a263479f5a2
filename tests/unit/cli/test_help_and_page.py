"""The help of every command and docs/command-line.md say the same, and help is quick to come."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentweave_bus import __version__
from agentweave_bus.cli import COMMANDS, build_parser, main

PAGE = (Path(__file__).parents[3] / "docs" / "command-line.md").read_text()
SECTIONS = dict(re.findall(r"^## (agentweave [a-z ]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    groups = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for child in group.choices.values():
            yield from leaves(child)


COMMAND_PARSERS = {parser.prog: parser for parser in leaves(build_parser([], every=True))}


def names(parser: argparse.ArgumentParser) -> set[str]:
    """What the table of a command must list: its long options, and its positional arguments as shown."""
    actions = [one for one in parser._actions if not isinstance(one, argparse._HelpAction)]
    return {one.option_strings[-1] if one.option_strings else str(one.metavar) for one in actions}


def test_the_page_has_a_section_for_every_command_and_no_other() -> None:
    assert set(SECTIONS) == set(COMMAND_PARSERS)


@pytest.mark.parametrize("command", COMMAND_PARSERS)
def test_a_section_lists_what_the_command_takes(command: str) -> None:
    listed = set(re.findall(r"^\| `([^`]+)` \|", SECTIONS[command], re.MULTILINE))
    assert listed == names(COMMAND_PARSERS[command])


@pytest.mark.parametrize("command", COMMAND_PARSERS)
def test_examples_are_of_that_command_and_can_be_parsed(command: str) -> None:
    help_text = COMMAND_PARSERS[command].epilog or ""
    assert help_text.startswith("Example:")
    in_help = re.findall(r"^  (agentweave (?:.*\\\n)*.*)", help_text, re.MULTILINE)
    in_page = re.findall(r"^\$ (?:.*\| )?(agentweave .*)", SECTIONS[command], re.MULTILINE)
    for examples in (in_help, in_page):
        mine = [one for one in examples if one.startswith(command + " ") or one == command]
        assert mine, f"no example of {command}"
        for example in mine:
            words = shlex.split(re.split(r" (?:>|&&) ", example.replace("\\\n", " "))[0])[1:]
            build_parser(words).parse_args(words)


@pytest.mark.parametrize("command", COMMAND_PARSERS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command.split()[1:], "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "Example:" in text
    assert all(name in text for name in names(COMMAND_PARSERS[command]))


def test_help_of_tail_says_what_it_reads_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["audit", "tail", "--help"])
    assert "(default: .agentweave/audit)" in " ".join(capsys.readouterr().out.split())


def test_help_of_all_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {name} ", text, re.MULTILINE) for name in COMMANDS)
    assert "agentweave new hello && cd hello && agentweave up" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"agentweave {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["call"], ["call", "--tar", "x"], ["authz"], ["up", "--env", "staging"]]
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: agentweave" in capsys.readouterr().err


def test_asking_for_help_loads_no_command() -> None:
    code = (
        "import sys\nfrom agentweave_bus.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('grpc', 'wasmtime', 'nats', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
