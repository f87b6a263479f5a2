# The smallest policy of one's own: one caller, two actions.
package company.authz

import rego.v1

default allow := false

allow if {
	input.caller_spiffe_id == "spiffe://company.com/agent/orchestrator"
	input.action in ["search", "index"]
}
