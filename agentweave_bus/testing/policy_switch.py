"""A policy engine that can be taken away: what a policy server that is down looks like to an agent."""

from __future__ import annotations

from dataclasses import dataclass

from agentweave_bus.authz import PolicyEngine
from agentweave_bus.authz.engine import PolicyAnswer, Standing
from agentweave_bus.exceptions import PolicyUnavailableError

__all__ = ["PolicySwitch", "SwitchedEngine"]


@dataclass(slots=True)
class PolicySwitch:
    """Whether the engines behind it answer."""

    down: bool = False

    def around(self, engine: PolicyEngine) -> PolicyEngine:
        """Put this switch in front of ``engine``."""
        return SwitchedEngine(engine, self)


class SwitchedEngine:
    """``engine`` while ``switch`` lets it answer; see ``authz.PolicyEngine``."""

    def __init__(self, engine: PolicyEngine, switch: PolicySwitch) -> None:
        self._engine = engine
        self._switch = switch

    @property
    def revision(self) -> str:
        """Name the policy in use."""
        return self._engine.revision

    def has_standing(self, package: str) -> bool:
        """Say whether it is worth asking for a standing answer."""
        return self._engine.has_standing(package)

    async def evaluate(self, package: str, input_json: bytes) -> PolicyAnswer:
        """Ask, if there is anybody to ask."""
        self._check()
        return await self._engine.evaluate(package, input_json)

    async def evaluate_standing(self, package: str, input_json: bytes) -> Standing | None:
        """Ask for a standing answer, if there is anybody to ask."""
        self._check()
        return await self._engine.evaluate_standing(package, input_json)

    async def aclose(self) -> None:
        """Close the engine."""
        await self._engine.aclose()

    def _check(self) -> None:
        if self._switch.down:
            raise PolicyUnavailableError("the policy gave no answer: the test has taken it down")
