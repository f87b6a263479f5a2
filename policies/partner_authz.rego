# The partner's side of a federation: registered domains may have payments taken, within their limits.
# data.partner.registered_domains and data.partner.partner_limits come from partners in grants.yaml.
package partner.authz

import data.agentweave.numbers
import rego.v1

default allow := false

allow if {
	input.action == "process_payment"
	is_registered_partner
	is_valid_request
	within_limit
}

is_registered_partner if caller_domain in data.partner.registered_domains

is_valid_request if {
	present("billing_id")
	present("customer_id")
	amount > 0
}

present(field) if {
	is_string(input.context.payload[field])
	input.context.payload[field] != ""
}

# A partner without an agreed limit may ask for nothing.
within_limit if amount <= limits.max_transaction

limits := data.partner.partner_limits[caller_domain]

amount := numbers.plain(input.context.payload.amount)

caller_domain := split(input.caller_spiffe_id, "/")[2]

# What whoever asked has to count, because a policy has no memory.
uses := {key: bound | some key, bound in limits; key in {"rate_limit_per_minute", "daily_limit"}}

decision := {"allow": true, "reason": "partner.authz allows it", "limits": uses} if {
	allow
} else := {"allow": false, "reason": concat("", [caller_domain, " is no registered partner"])} if {
	not is_registered_partner
} else := {"allow": false, "reason": "a payment needs billing_id, customer_id and an amount above 0"} if {
	input.action == "process_payment"
	not is_valid_request
} else := {"allow": false, "reason": concat("", [
	"the amount is above max_transaction ",
	json.marshal(limits.max_transaction),
	" of ",
	caller_domain,
])} if {
	input.action == "process_payment"
	limits.max_transaction
} else := {"allow": false, "reason": concat("", [caller_domain, " has no max_transaction in partners"])} if {
	input.action == "process_payment"
} else := {"allow": false, "reason": concat("", ["partners may not ask for ", input.action])}
