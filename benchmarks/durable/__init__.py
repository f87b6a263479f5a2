"""Durable tasks measured beside bare JetStream and a task queue on NATS."""
