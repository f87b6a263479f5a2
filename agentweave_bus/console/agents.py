"""The agents that the page shows: what waits for each at the broker, and the workers that serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agentweave_bus.console.observed import Queues

__all__ = ["agent_rows"]


def agent_rows(
    trust_domain: str,
    queues: Queues,
    workers: Iterable[Mapping[str, Any]],
    letters: Iterable[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each agent that has a queue or a worker, by name.

    A supervisor knows its agents by name, a broker by SPIFFE ID. They are one where the ID's last segment is
    the name. ``letters`` are all dead letters, where they are known one by one: the broker's own count has
    those, too, that were redriven since.
    """
    rows: dict[str, dict[str, Any]] = {}

    def row(agent: str) -> dict[str, Any]:
        return rows.setdefault(agent, _row(agent))

    for queue in queues.queues:
        row(queue.agent)["queues"].append(queue.model_dump(exclude={"agent"}))
    for parked in queues.parked:
        row(parked.agent)["parked"] += parked.waiting
    for counted in queues.letters:
        row(counted.agent)["letters"] += counted.count if letters is None else 0
    for letter in letters or ():
        row(letter["letter"].partition("#")[0])["letters"] += 1
    named = {one["name"]: agent for agent, one in rows.items()}
    for worker in workers:
        name = worker["agent"]
        agent = named.get(name, f"spiffe://{trust_domain}/agent/{name}")
        row(agent)["replicas"].append({key: value for key, value in worker.items() if key != "agent"})
    return sorted(rows.values(), key=lambda one: (one["name"], one["agent"]))


def _row(agent: str) -> dict[str, Any]:
    name = agent.rpartition("/")[2]
    return {"agent": agent, "name": name, "replicas": [], "queues": [], "parked": 0, "letters": 0}
