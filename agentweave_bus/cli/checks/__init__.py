"""What ``agentweave doctor`` looks at: one subject a module, judgements apart from what they read."""
