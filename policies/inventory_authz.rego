# Stock: orders look and reserve, the admin agent changes it.
package inventory.authz

import rego.v1

default allow := false

allow if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/order"
	input.action in ["check_availability", "reserve_items", "release_items"]
}

allow if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/gateway"
	input.action in ["check_availability", "health"]
}

allow if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/admin"
	input.action in ["check_availability", "change_stock"]
}

is_callee if input.callee_spiffe_id == "spiffe://agentweave.io/agent/inventory"

decision := {"allow": true, "reason": "inventory.authz allows it"} if {
	allow
} else := {"allow": false, "reason": concat("", [
	"inventory.authz has no rule that lets ",
	input.caller_spiffe_id,
	" ask ",
	input.callee_spiffe_id,
	" for ",
	input.action,
])}

standing := {"allow": true, "cache_seconds": 30} if allow
