"""Authorization and its record: who may do what, decided by a policy, and proof of each decision."""
