"""The parts of a stack on one machine: a real NATS server and a real SPIFFE Workload API.

Modules are imported by name; gRPC is loaded only by :mod:`agentweave_bus.embedded.workload_api`.
"""
