"""Durable tasks: stored until they are done, their course written down, their outcome recorded once."""
