agentweave serve config.dev.yaml --env development
