"""What a stack's files say that can't be so: found by looking, before anything is started.

An agent's class is imported in a process of its own, as its worker would: two agents may have modules of
one name, and what a module does when it is imported is not done here. Run as
``python -m agentweave_bus.cli.stack_check FILE [MODULE:CLASS]`` it is that process.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from agentweave_bus.authz import Grants
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.config import StackConfig, load_config
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.plans import PlannedAgent
from agentweave_bus.worker import find_agent

__all__ = ["capabilities_of", "stack_warnings"]

_IMPORT_SECONDS: Final = 30.0
_PLACE: Final = re.compile(r'^  File "([^"\n<]+)", line (\d+)', re.MULTILINE)


def stack_warnings(
    config: StackConfig, agents: Sequence[PlannedAgent], environment: str | None
) -> Iterator[str]:
    """Yield a sentence for each thing that would not start or could never match.

    Raises:
        ConfigurationError: the grants are wrong.

    """
    capabilities: dict[str, list[str]] = {}
    for agent in agents:
        try:
            capabilities[str(agent.spiffe_id)] = capabilities_of(agent, environment)
        except ConfigurationError as error:
            yield f"{agent.config.agent.name}: {error}"
    source = config.policy_source
    for agent in agents:
        yield from _package_warnings(agent, source)
    if (file := grants_file(source)) is not None:
        grants = Grants.load(file)
        for text in (*grants.warnings(capabilities), *_strangers(grants, config, agents)):
            yield f"{file}: {text}"


# --- classes ---------------------------------------------------------------------------------------------


def capabilities_of(agent: PlannedAgent, environment: str | None) -> list[str]:
    """Return the names of an agent's capabilities. Raises ConfigurationError: it can't be made."""
    command = [sys.executable, "-m", __name__, str(agent.entry.config.absolute())]
    command += [agent.entry.class_ or "", environment or ""]
    try:
        done = subprocess.run(  # noqa: S603 - this module
            command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(f"importing its class took more than {_IMPORT_SECONDS:g} s.") from error
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0:
        said = lines[-1] if lines else f"importing ended with code {done.returncode}."
        raise ConfigurationError(f"{said}{_where(done.stderr, agent)}")
    names: list[str] = json.loads(lines[-1])
    return names


def _where(traceback: str, agent: PlannedAgent) -> str:
    """Say which line of the agent's own files a traceback is about, else the last one of others'."""
    places = [(Path(file), line) for file, line in _PLACE.findall(traceback)]
    folders = (agent.entry.config.absolute().parent, Path.cwd())
    own = [place for place in places if any(place[0].is_relative_to(one) for one in folders)]
    own = [place for place in own if "site-packages" not in place[0].parts] or places
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""


def _main(file: str, class_path: str, environment: str) -> int:
    config = load_config(file, environment=environment or None)
    sys.path.append(str(Path(file).parent))  # as a worker does
    try:
        agent = find_agent(config, class_path or None)
    except AgentWeaveError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 2
    print("\n" + json.dumps(list(agent.capability_table)))
    return 0


# --- packages --------------------------------------------------------------------------------------------


def _package_warnings(agent: PlannedAgent, source: Path | None) -> Iterator[str]:
    settings = agent.config.authorization
    try:
        known = asyncio.run(_packages(settings.bundle or source))
    except AgentWeaveError as error:
        yield f"{agent.config.agent.name}: {error}"
        return
    if settings.policy_package not in known:
        yield (
            f"{agent.config.agent.name}: authorization.policy_path names no package of"
            f" {settings.bundle or source}: {settings.policy_package}{_meant(settings.policy_package, known)}"
        )


async def _packages(source: Path | None) -> frozenset[str]:
    engine = EmbeddedEngine()
    try:
        engine.load(source)
        return engine.packages
    finally:
        await engine.aclose()


# --- grants ----------------------------------------------------------------------------------------------


def _strangers(grants: Grants, config: StackConfig, agents: Iterable[PlannedAgent]) -> Iterator[str]:
    """Yield who is named in grants, of the stack's own domain, and not in the stack."""
    clients = [str(SpiffeID.of(config.trust_domain, "client", name)) for name in config.clients]
    everyone = [*(str(agent.spiffe_id) for agent in agents), *clients]
    for index, grant in enumerate(grants.grants):
        for text in grant.strangers(config.trust_domain, everyone):
            yield f"grants[{index}]: {text}"


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:4]))
