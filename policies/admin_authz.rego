# The admin agent: operators' clients ask it, it may change what others may not.
package admin.authz

import rego.v1

default allow := false

allow if {
	startswith(input.caller_spiffe_id, "spiffe://agentweave.io/client/")
	input.callee_spiffe_id == "spiffe://agentweave.io/agent/admin"
	input.caller_spiffe_id in data.admin_clients
}

allow if {
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/gateway"
	input.callee_spiffe_id == "spiffe://agentweave.io/agent/admin"
	input.action == "health"
}

allow if {
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/admin"
	[input.callee_spiffe_id, input.action] in [
		["spiffe://agentweave.io/agent/user", "update_tier"],
		["spiffe://agentweave.io/agent/user", "get_user"],
		["spiffe://agentweave.io/agent/inventory", "change_stock"],
		["spiffe://agentweave.io/agent/inventory", "check_availability"],
		["spiffe://agentweave.io/agent/payment", "refund"],
	]
}

decision := {"allow": true, "reason": "admin.authz allows it"} if {
	allow
} else := {"allow": false, "reason": concat("", [
	"admin.authz has no rule that lets ",
	input.caller_spiffe_id,
	" ask ",
	input.callee_spiffe_id,
	" for ",
	input.action,
	" (data.admin_clients lists the clients that may ask it)",
])}

standing := {"allow": true, "cache_seconds": 30} if allow
