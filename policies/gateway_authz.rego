# The gateway: clients ask it, it asks every agent of its own trust domain.
package gateway.authz

import rego.v1

default allow := false

# The gateway may ask any internal agent; each of them has a policy of its own.
allow if {
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/gateway"
	startswith(input.callee_spiffe_id, "spiffe://agentweave.io/agent/")
}

# Clients may ask the gateway.
allow if {
	startswith(input.caller_spiffe_id, "spiffe://agentweave.io/client/")
	input.callee_spiffe_id == "spiffe://agentweave.io/agent/gateway"
	input.action in ["route", "health"]
}

decision := {"allow": true, "reason": "gateway.authz allows it"} if {
	allow
} else := {"allow": false, "reason": concat("", [
	"gateway.authz has no rule that lets ",
	input.caller_spiffe_id,
	" ask ",
	input.callee_spiffe_id,
	" for ",
	input.action,
])}

standing := {"allow": true, "cache_seconds": 30} if allow
