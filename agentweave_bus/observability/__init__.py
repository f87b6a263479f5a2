"""Logs, metrics and traces: what a process tells about itself.

Import the part that is needed (``agentweave_bus.observability.metrics``); tracing and the listener
are left out of processes that don't use them.
"""
