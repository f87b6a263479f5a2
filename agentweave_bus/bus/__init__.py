"""The bus: signed envelopes over NATS, in and out, and the gate in front of every handler."""
