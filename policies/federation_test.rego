# Two organizations: ACME's billing agent and the partner's payment agent.
package federation_test

import rego.v1

billing := "spiffe://acme-corp.io/agent/billing"

payment := "spiffe://partner.com/agent/payment"

good := {"billing_id": "b-1", "customer_id": "c-1", "amount": "99.99", "currency": "USD", "description": "x"}

pays(payload) := {
	"caller_spiffe_id": billing,
	"callee_spiffe_id": payment,
	"action": "process_payment",
	"direction": "outbound",
	"context": {"kind": "call", "transport": "bus", "via": [], "payload": payload},
}

changed(key, value) := pays(object.union(good, {key: value}))

test_acme_lets_its_clients_ask_billing if {
	bills := object.union(pays({"amount": "99.99"}), {
		"caller_spiffe_id": "spiffe://acme-corp.io/client/cli",
		"callee_spiffe_id": billing,
		"action": "process_billing",
	})
	data.acme.authz.allow with input as bills
	not data.acme.authz.allow with input as object.union(bills, {"caller_spiffe_id": "spiffe://partner.com/client/cli"})
	not data.acme.authz.allow with input as object.union(bills, {"action": "process_payment"})
}

test_acme_lets_billing_pay_within_bounds if {
	data.acme.authz.allow with input as pays(good)
	data.acme.authz.allow with input as changed("amount", 999999.99)
	every amount in [0, -1, 1000000, "1000000.00", "x", "", null, "1e3"] {
		not data.acme.authz.allow with input as changed("amount", amount)
	}
	every id in ["", null, false, 0] {
		not data.acme.authz.allow with input as changed("billing_id", id)
	}
	decision := data.acme.authz.decision with input as changed("billing_id", "")
	decision.reason == "a payment needs a billing_id"
}

registered := {
	"registered_domains": ["acme-corp.io", "other-partner.io"],
	"partner_limits": {"acme-corp.io": {"max_transaction": 1000, "daily_limit": 10000, "rate_limit_per_minute": 100}},
}

test_partner_takes_payments_of_registered_domains if {
	decision := data.partner.authz.decision with input as pays(good) with data.partner.registered_domains as registered.registered_domains
		with data.partner.partner_limits as registered.partner_limits
	decision == {
		"allow": true,
		"reason": "partner.authz allows it",
		"limits": {"daily_limit": 10000, "rate_limit_per_minute": 100},
	}
	not data.partner.authz.allow with input as pays(good)
	none := data.partner.authz.decision with input as pays(good)
	none == {"allow": false, "reason": "acme-corp.io is no registered partner"}
}

test_a_partners_denial_names_the_limit if {
	decision := data.partner.authz.decision with input as changed("amount", 1000.01)
		with data.partner.registered_domains as registered.registered_domains
		with data.partner.partner_limits as registered.partner_limits
	decision == {"allow": false, "reason": "the amount is above max_transaction 1000 of acme-corp.io"}
}

test_a_partner_without_limits_may_ask_for_nothing if {
	decision := data.partner.authz.decision with input as pays(good)
		with data.partner.registered_domains as registered.registered_domains
		with data.partner.partner_limits as {}
	decision == {"allow": false, "reason": "acme-corp.io has no max_transaction in partners"}
}

test_a_partners_request_must_be_whole if {
	every change in [["billing_id", ""], ["customer_id", null], ["amount", 0], ["amount", "-1"], ["amount", "1e2"]] {
		not data.partner.authz.allow with input as changed(change[0], change[1])
			with data.partner.registered_domains as registered.registered_domains
			with data.partner.partner_limits as registered.partner_limits
	}
	not data.partner.authz.allow with input as object.union(pays(good), {"action": "refund"})
		with data.partner.registered_domains as registered.registered_domains
		with data.partner.partner_limits as registered.partner_limits
}
