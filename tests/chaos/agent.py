"""The agent whose workers are killed. Every handler writes down what it does, at once, in the effects file.

Served by the stock entry point, ``python -m agentweave_bus.worker``. What is done to the build when this module
is imported is told in :mod:`.broken`.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

import anyio

from agentweave_bus import SecureAgent, capability
from agentweave_bus.exceptions import RetryableError
from agentweave_bus.tasks.retry import Retry
from tests.chaos.broken import apply
from tests.chaos.effects import EffectsWriter
from tests.chaos.plan import ATTEMPTS, STEPS, UNDONE, Settings

SETTINGS = Settings.of_environment()
EFFECTS = EffectsWriter(SETTINGS.effects)
RETRY = Retry(attempts=ATTEMPTS, first_delay=0.2, last_delay=1.0)

apply(SETTINGS)


class Chaos(SecureAgent):
    @capability("quick", retry=RETRY)
    async def quick(self, number: int) -> dict[str, Any]:
        self._note("begin", "quick")
        self._note("end")
        return {"number": number}

    @capability("slow", retry=RETRY, concurrency=8)
    async def slow(self, number: int, seconds: float) -> dict[str, Any]:
        self._note("begin", "slow")
        try:
            await anyio.sleep(seconds)
        except BaseException:
            self._note("raise")
            raise
        self._note("end")
        return {"number": number}

    @capability("again", retry=RETRY)
    async def again(self, number: int, times: int) -> dict[str, Any]:
        self._note("begin", "again")
        if self.context.attempt <= times:
            self._note("raise")
            raise RetryableError("not yet")
        self._note("end")
        return {"number": number}

    @capability("fails", retry=RETRY)
    async def fails(self, number: int) -> dict[str, Any]:
        self._note("begin", "fails")
        self._note("raise")
        raise ValueError(f"{number} is none of ours")

    @capability("steps", retry=RETRY, concurrency=8)
    async def steps(self, number: int) -> dict[str, Any]:
        self._note("begin", "steps")
        tokens = {}
        for count, name in enumerate(STEPS):
            await self.context.progress(count / len(STEPS), name)
            token = await self.context.step(name, self._step, name)
            self._note("got", name, token)
            tokens[name] = token
            await anyio.sleep(0.15)
        self._note("end")
        return {"number": number, "tokens": tokens}

    @capability("undo", retry=RETRY, concurrency=8)
    async def undo(self, number: int) -> dict[str, Any]:
        self._note("begin", "undo")
        for name in UNDONE:
            token = await self.context.step(name, self._step, name, compensate=partial(self._undo, name))
            self._note("got", name, token)
            await anyio.sleep(0.1)
        self._note("raise")
        raise ValueError(f"{number} comes to nothing")

    async def _undo(self, name: str, token: str) -> None:
        self._note("undid", name, token)
        await anyio.sleep(0.05)

    async def _step(self, name: str) -> str:
        token = secrets.token_hex(8)
        self._note("ran", name, token)
        await anyio.sleep(0.05)
        return token

    def _note(self, what: str, name: str = "", token: str = "") -> None:
        EFFECTS.note(self.context.task_id or "", self.context.attempt, what, name, token)
