# ACME's side of a federation: its billing agent pays through a partner's payment agent.
package acme.authz

import data.agentweave.numbers
import rego.v1

default allow := false

# ACME's own clients ask the billing agent.
allow if {
	startswith(input.caller_spiffe_id, "spiffe://acme-corp.io/client/")
	input.callee_spiffe_id == "spiffe://acme-corp.io/agent/billing"
	input.action in ["process_billing", "health"]
}

# The billing agent asks the partner to take a payment.
allow if {
	input.caller_spiffe_id == "spiffe://acme-corp.io/agent/billing"
	input.callee_spiffe_id == "spiffe://partner.com/agent/payment"
	input.action == "process_payment"
	is_valid_amount
	has_billing_id
}

is_valid_amount if {
	amount := numbers.plain(input.context.payload.amount)
	amount > 0
	amount < 1000000
}

# An empty id is no trail.
has_billing_id if {
	is_string(input.context.payload.billing_id)
	input.context.payload.billing_id != ""
}

is_partner_payment if {
	input.callee_spiffe_id == "spiffe://partner.com/agent/payment"
	input.action == "process_payment"
}

decision := {"allow": true, "reason": "acme.authz allows it"} if {
	allow
} else := {"allow": false, "reason": "the amount must be above 0 and below 1000000"} if {
	is_partner_payment
	not is_valid_amount
} else := {"allow": false, "reason": "a payment needs a billing_id"} if {
	is_partner_payment
	not has_billing_id
} else := {"allow": false, "reason": concat("", [
	"acme.authz has no rule that lets ",
	input.caller_spiffe_id,
	" ask ",
	input.callee_spiffe_id,
	" for ",
	input.action,
])}
