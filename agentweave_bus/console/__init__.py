"""A page for people: agents and their workers, tasks, queues, dead letters, decisions, one task's story.

It shows what others tell it and decides nothing. Three sources, each of which may be missing: the control
role, which reads the agents' streams for operators; the supervisor; the audit logs of this machine. What
comes from them is data, and goes to the browser as JSON and nothing else.

Needs the extra ``console`` (Starlette, uvicorn); this package alone imports them.
"""

from agentweave_bus.console.opening import Console, open_console

__all__ = ["Console", "open_console"]
