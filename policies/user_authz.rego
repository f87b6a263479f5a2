# Users. Only the admin agent may change a tier.
package user.authz

import rego.v1

default allow := false

# The gateway creates and shows users, and lets them sign in.
allow if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/gateway"
	input.action in ["create_user", "get_user", "authenticate", "get_profile", "update_profile", "health"]
}

# Orders look users up.
allow if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/order"
	input.action == "get_user"
}

# Only the admin agent changes tiers.
allow if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/admin"
	input.action in ["update_tier", "get_user"]
}

is_callee if input.callee_spiffe_id == "spiffe://agentweave.io/agent/user"

decision := {"allow": true, "reason": "user.authz allows it"} if {
	allow
} else := {"allow": false, "reason": "only the admin agent may update a tier"} if {
	input.action == "update_tier"
} else := {"allow": false, "reason": concat("", [
	"user.authz has no rule that lets ",
	input.caller_spiffe_id,
	" ask ",
	input.callee_spiffe_id,
	" for ",
	input.action,
])}

standing := {"allow": true, "cache_seconds": 30} if allow
