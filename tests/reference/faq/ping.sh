agentweave ping spiffe://example.com/agent/my-agent-v2
