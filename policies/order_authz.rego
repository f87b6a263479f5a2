# Orders: asked by the gateway; they ask users, payments and the inventory themselves.
package order.authz

import rego.v1

default allow := false

# The gateway asks for orders.
allow if {
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/gateway"
	input.callee_spiffe_id == "spiffe://agentweave.io/agent/order"
	input.action in ["create_order", "get_order", "list_orders", "cancel_order", "health"]
}

# An order asks the agents that it depends on. What they let it do is theirs to say.
allow if {
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/order"
	input.callee_spiffe_id in [
		"spiffe://agentweave.io/agent/user",
		"spiffe://agentweave.io/agent/payment",
		"spiffe://agentweave.io/agent/inventory",
	]
}

decision := {"allow": true, "reason": "order.authz allows it"} if {
	allow
} else := {"allow": false, "reason": concat("", [
	"order.authz has no rule that lets ",
	input.caller_spiffe_id,
	" ask ",
	input.callee_spiffe_id,
	" for ",
	input.action,
])}

standing := {"allow": true, "cache_seconds": 30} if allow
