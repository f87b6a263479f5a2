"""Examples: agents that are written with the public names of ``agentweave_bus`` alone."""
