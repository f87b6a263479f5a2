# The policies of the example's agents: what the example needs, and that nothing beside it passes.
package agents_test

import rego.v1

agent(name) := concat("", ["spiffe://agentweave.io/agent/", name])

cli := "spiffe://agentweave.io/client/cli"

asks(caller, callee, action) := {
	"caller_spiffe_id": caller,
	"callee_spiffe_id": callee,
	"action": action,
	"direction": "inbound",
	"context": {"kind": "call", "transport": "bus", "via": [], "payload": {}},
}

test_gateway if {
	data.gateway.authz.allow with input as asks(cli, agent("gateway"), "route")
	data.gateway.authz.allow with input as asks(agent("gateway"), agent("order"), "create_order")
	data.gateway.authz.decision.allow with input as asks(cli, agent("gateway"), "health")
	not data.gateway.authz.allow with input as asks(cli, agent("gateway"), "shutdown")
	not data.gateway.authz.allow with input as asks(cli, agent("order"), "route")
	not data.gateway.authz.allow with input as asks(agent("gateway"), "spiffe://other.io/agent/order", "create_order")
	not data.gateway.authz.allow with input as asks("spiffe://other.io/client/cli", agent("gateway"), "route")
}

test_order if {
	data.order.authz.allow with input as asks(agent("gateway"), agent("order"), "create_order")
	data.order.authz.allow with input as asks(agent("gateway"), agent("order"), "health")
	data.order.authz.allow with input as asks(agent("order"), agent("user"), "get_user")
	data.order.authz.standing.allow with input as asks(agent("gateway"), agent("order"), "get_order")
	not data.order.authz.allow with input as asks(agent("user"), agent("order"), "create_order")
	not data.order.authz.allow with input as asks(agent("order"), agent("admin"), "anything")
	not data.order.authz.standing with input as asks(agent("user"), agent("order"), "create_order")
	decision := data.order.authz.decision with input as asks(cli, agent("order"), "create_order")
	contains(decision.reason, "no rule that lets spiffe://agentweave.io/client/cli ask")
}

test_only_admin_updates_tiers if {
	data.user.authz.allow with input as asks(agent("gateway"), agent("user"), "create_user")
	data.user.authz.allow with input as asks(agent("order"), agent("user"), "get_user")
	data.user.authz.allow with input as asks(agent("admin"), agent("user"), "update_tier")
	every name in ["order", "gateway", "user", "payment"] {
		not data.user.authz.allow with input as asks(agent(name), agent("user"), "update_tier")
	}
	decision := data.user.authz.decision with input as asks(agent("order"), agent("user"), "update_tier")
	decision == {"allow": false, "reason": "only the admin agent may update a tier"}
	not data.user.authz.allow with input as asks(agent("admin"), agent("order"), "update_tier")
}

test_inventory if {
	data.inventory.authz.allow with input as asks(agent("order"), agent("inventory"), "reserve_items")
	data.inventory.authz.allow with input as asks(agent("admin"), agent("inventory"), "change_stock")
	not data.inventory.authz.allow with input as asks(agent("order"), agent("inventory"), "change_stock")
	not data.inventory.authz.decision.allow with input as asks(agent("gateway"), agent("inventory"), "reserve_items")
}

test_admin if {
	data.admin.authz.allow with input as asks(agent("admin"), agent("user"), "update_tier")
	not data.admin.authz.allow with input as asks(agent("admin"), agent("user"), "create_user")
	not data.admin.authz.allow with input as asks(cli, agent("admin"), "update_tier")
	data.admin.authz.allow with input as asks(cli, agent("admin"), "update_tier") with data.admin_clients as [cli]
	not data.admin.authz.allow with input as asks(agent("order"), agent("admin"), "update_tier")
		with data.admin_clients as [agent("order")]
}

through_gateway := [
	{"iss": cli, "aud": agent("gateway"), "cap": "route", "kind": "call"},
	{"iss": agent("gateway"), "aud": agent("order"), "cap": "create_order", "kind": "call"},
]

pays(amount, via) := object.union(
	asks(agent("order"), agent("payment"), "process_payment"),
	{"context": {"kind": "call", "transport": "bus", "via": via, "payload": {"amount": amount}}},
)

test_payment_needs_the_clients_order_and_a_proper_amount if {
	data.payment.authz.allow with input as pays("39.98", through_gateway)
	data.payment.authz.allow with input as pays(10000, through_gateway)
	not data.payment.authz.allow with input as pays(10001, through_gateway)
	not data.payment.authz.allow with input as pays(10001, through_gateway) with data.payment_limits.max_amount as 10000
	data.payment.authz.allow with input as pays(10001, through_gateway) with data.payment_limits.max_amount as 20000
	every amount in [0, -1, "", "abc", null, true, "1e3"] {
		not data.payment.authz.allow with input as pays(amount, through_gateway)
	}
	not data.payment.authz.allow with input as pays(1, [])
	not data.payment.authz.allow with input as pays(1, [through_gateway[0]])
	not data.payment.authz.allow with input as pays(1, [through_gateway[1]])
	decision := data.payment.authz.decision with input as pays(1, [])
	decision.reason == "a payment needs an order that a client asked for through the gateway"
	limit := data.payment.authz.decision with input as pays(10001, through_gateway)
	limit.reason == "the amount must be a number above 0 and at most max_amount 10000"
	not data.payment.authz.standing with input as pays(1, through_gateway)
	data.payment.authz.allow with input as asks(agent("order"), agent("payment"), "refund")
	not data.payment.authz.allow with input as asks(agent("user"), agent("payment"), "refund")
}

test_payment_of_much_needs_approval if {
	anna := "spiffe://agentweave.io/person/anna"
	limits := {"approve_above": 5000, "approvers": [anna]}
	task := object.union(pays(5000.01, through_gateway), {"context": {"kind": "task"}})
	data.payment.authz.allow with input as pays(5000, through_gateway) with data.payment_limits as limits
	not data.payment.authz.allow with input as task with data.payment_limits as limits
	decision := data.payment.authz.decision with input as task with data.payment_limits as limits
	decision.require_approval == {"approvers": [anna], "within": 86400}
	approved := object.union(task, {"context": {"approval": {"by": anna}}})
	data.payment.authz.allow with input as approved with data.payment_limits as limits
	other := object.union(task, {"context": {"approval": {"by": agent("order")}}})
	not data.payment.authz.allow with input as other with data.payment_limits as limits
	data.payment.authz.allow with input as object.union(task, {"direction": "outbound"}) with data.payment_limits as limits
	much := object.union(approved, {"context": {"payload": {"amount": 10001}}})
	refused := data.payment.authz.decision with input as much with data.payment_limits as limits
	not refused.allow
	not refused.require_approval
}

test_company if {
	orchestrator := "spiffe://company.com/agent/orchestrator"
	data.company.authz.allow with input as asks(orchestrator, agent("x"), "search")
	not data.company.authz.allow with input as asks(orchestrator, agent("x"), "delete")
	not data.company.authz.allow with input as asks(agent("x"), orchestrator, "search")
}

listed := {"spiffe://agentweave.io/agent/order": [cli]}

at(hour) := hour * 3600000000000

test_allowed_callers if {
	data.agentweave.authz.allow with input as asks(cli, agent("order"), "x") with data.allowed_callers as listed
	not data.agentweave.authz.allow with input as asks(cli, agent("user"), "x") with data.allowed_callers as listed
	not data.agentweave.authz.allow with input as asks(agent("user"), agent("order"), "x") with data.allowed_callers as listed
	not data.agentweave.authz.allow with input as asks(cli, agent("order"), "x")
}

test_business_hours_narrow_and_never_widen if {
	every hour in [9, 12, 17] {
		data.agentweave.authz.allow with input as asks(cli, agent("order"), "x") with data.allowed_callers as listed
			with data.business_hours as {"from": 9, "to": 17}
			with time.now_ns as at(hour)
		not data.agentweave.authz.allow with input as asks(agent("user"), agent("order"), "x")
			with data.allowed_callers as listed
			with data.business_hours as {"from": 9, "to": 17}
			with time.now_ns as at(hour)
	}
	every hour in [0, 8, 18, 23] {
		decision := data.agentweave.authz.decision with input as asks(cli, agent("order"), "x")
			with data.allowed_callers as listed
			with data.business_hours as {"from": 9, "to": 17}
			with time.now_ns as at(hour)
		decision == {"allow": false, "reason": "it is outside of business hours"}
	}
}

test_business_hours_have_a_time_zone_and_fail_closed if {
	tokyo := {"from": 9, "to": 17, "time_zone": "Asia/Tokyo"}
	data.agentweave.authz.allow with input as asks(cli, agent("order"), "x") with data.allowed_callers as listed
		with data.business_hours as tokyo
		with time.now_ns as at(1)
	not data.agentweave.authz.allow with input as asks(cli, agent("order"), "x") with data.allowed_callers as listed
		with data.business_hours as tokyo
		with time.now_ns as at(12)
	every broken in [{}, {"from": 0}, {"from": 0, "to": 23, "time_zone": "Nowhere/Else"}] {
		not data.agentweave.authz.allow with input as asks(cli, agent("order"), "x") with data.allowed_callers as listed
			with data.business_hours as broken
			with time.now_ns as at(12)
	}
}
