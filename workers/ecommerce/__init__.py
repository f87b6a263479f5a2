"""A shop of six agents: user, order, payment, inventory, gateway and admin.

``README.md`` tells how to run it.

Each agent is a file with its YAML beside it and keeps its state in a database of its own, so that
every replica sees it and no agent reads another's. Who may ask whom for what stands in
``grants.yaml``, once.
"""
