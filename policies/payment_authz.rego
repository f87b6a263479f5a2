# Payments: only for an order, only on behalf of a client that came through the gateway, within a limit.
# data.payment_limits.max_amount raises or lowers the limit. Above data.payment_limits.approve_above, where that
# is set, one of data.payment_limits.approvers has to approve first; for that it is submitted as a task.
package payment.authz

import data.agentweave.numbers
import rego.v1

default allow := false

allow if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/order"
	input.action == "process_payment"
	came_through_gateway
	amount > 0
	amount <= max_amount
	not needs_approval
}

allow if {
	is_callee
	input.caller_spiffe_id in ["spiffe://agentweave.io/agent/order", "spiffe://agentweave.io/agent/admin"]
	input.action == "refund"
}

allow if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/gateway"
	input.action in ["get_payment", "health"]
}

is_callee if input.callee_spiffe_id == "spiffe://agentweave.io/agent/payment"

# Who really asked whom is proved by the signed chain, so it can be relied on.
came_through_gateway if {
	some link in input.context.via
	link.iss == "spiffe://agentweave.io/agent/gateway"
	link.aud == "spiffe://agentweave.io/agent/order"
	startswith(input.context.via[0].iss, "spiffe://agentweave.io/client/")
}

amount := numbers.plain(input.context.payload.amount)

default max_amount := 10000

max_amount := data.payment_limits.max_amount

approve_above := data.payment_limits.approve_above

needs_approval if {
	approve_above
	not is_small
	not is_approved
	not is_outbound_task
}

is_small if amount <= approve_above

is_approved if input.context.approval.by in data.payment_limits.approvers

# Whoever submits can't know yet who will approve.
is_outbound_task if {
	input.direction == "outbound"
	input.context.kind == "task"
}

decision := {"allow": true, "reason": "payment.authz allows it"} if {
	allow
} else := {
	"allow": false,
	"reason": concat("", ["the amount is above ", json.marshal(approve_above)]),
	"require_approval": {"approvers": data.payment_limits.approvers, "within": 86400},
} if {
	is_callee
	input.caller_spiffe_id == "spiffe://agentweave.io/agent/order"
	input.action == "process_payment"
	came_through_gateway
	amount <= max_amount
	needs_approval
} else := {"allow": false, "reason": "a payment needs an order that a client asked for through the gateway"} if {
	input.action == "process_payment"
	not came_through_gateway
} else := {"allow": false, "reason": concat("", [
	"the amount must be a number above 0 and at most max_amount ",
	json.marshal(max_amount),
])} if {
	input.action == "process_payment"
} else := {"allow": false, "reason": concat("", [
	"payment.authz has no rule that lets ",
	input.caller_spiffe_id,
	" ask ",
	input.callee_spiffe_id,
	" for ",
	input.action,
])}
