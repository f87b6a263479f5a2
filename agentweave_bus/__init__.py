"""AgentWeave Bus: signed, authorized agents on a NATS bus."""
