package grants_test

import data.agentweave.grants
import rego.v1

order := "spiffe://agentweave.io/agent/order"

payment := "spiffe://agentweave.io/agent/payment"

cli := "spiffe://agentweave.io/client/cli"

asks(payload) := {
	"caller_spiffe_id": order,
	"callee_spiffe_id": payment,
	"action": "process_payment",
	"direction": "inbound",
	"context": {"kind": "call", "transport": "bus", "via": [], "payload": payload},
}

changed(change) := object.union(asks({"amount": 5}), change)

grant := {"caller": [order], "callee": [payment], "capabilities": ["process_payment"]}

limited(limits) := object.union(grant, {"limits": limits})

test_nothing_is_allowed_without_grants if {
	not grants.allow with input as asks({}) with data.grants as []
	not grants.allow with input as asks({})
	not grants.decision.allow with input as {} with data.grants as [grant]
	not grants.standing with input as asks({}) with data.grants as []
}

test_a_grant_allows_and_is_named if {
	grants.allow with input as asks({}) with data.grants as [grant]
	decision := grants.decision with input as asks({}) with data.grants as [grant]
	decision == {"allow": true, "reason": "grant 1 allows it", "limits": {}}
}

test_single_names_need_no_list if {
	grants.allow with input as asks({}) with data.grants as [object.union(grant, {"caller": order, "callee": payment})]
}

test_everything_must_match if {
	every patch in [
		{"caller_spiffe_id": "spiffe://agentweave.io/agent/other"},
		{"caller_spiffe_id": "spiffe://other.io/agent/order"},
		{"callee_spiffe_id": "spiffe://agentweave.io/agent/other"},
		{"action": "refund"},
		{"context": {"kind": "event"}},
	] {
		not grants.allow with input as changed(patch) with data.grants as [grant]
		not grants.standing with input as changed(patch) with data.grants as [grant]
	}
	kindless := json.remove(asks({}), ["/context/kind"])
	not grants.allow with input as kindless with data.grants as [grant]
}

test_a_prefix_covers_what_is_below_it_only if {
	wide := object.union(grant, {"caller": ["spiffe://agentweave.io/client/*"]})
	grants.allow with input as changed({"caller_spiffe_id": cli})
		with data.grants as [wide]
	every id in ["spiffe://agentweave.io/client", "spiffe://agentweave.io/clients/a", "spiffe://agentweave.io/agent/x"] {
		not grants.allow with input as changed({"caller_spiffe_id": id})
			with data.grants as [wide]
	}
}

test_a_callee_is_never_a_prefix if {
	wide := object.union(grant, {"callee": ["spiffe://agentweave.io/*"]})
	not grants.allow with input as asks({}) with data.grants as [wide]
}

test_star_covers_capabilities_but_no_operators_act if {
	star := object.union(grant, {"capabilities": ["*"]})
	grants.allow with input as changed({"action": "anything"})
		with data.grants as [star]
	not grants.allow with input as changed({"action": "control:cancel"})
		with data.grants as [star]
}

test_kinds if {
	events := object.union(grant, {"kinds": ["event"]})
	event := {"context": {"kind": "event"}}
	grants.allow with input as changed(event) with data.grants as [events]
	not grants.allow with input as asks({}) with data.grants as [events]
	task := {"context": {"kind": "task"}}
	grants.allow with input as changed(task) with data.grants as [grant]
}

test_limits_are_kept if {
	every case in [
		{"limits": {"max_amount": 1000}, "payload": {"amount": 1000}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "1000"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "999.99"}},
		{"limits": {"max_amount": 0.3}, "payload": {"amount": 0.30}},
		{"limits": {"min_amount": 1}, "payload": {"amount": 1}},
		{"limits": {"min_amount": -5, "max_amount": 5}, "payload": {"amount": "-5"}},
		{"limits": {"max_per_minute": 3}, "payload": {}},
	] {
		grants.allow with input as asks(case.payload) with data.grants as [limited(case.limits)]
	}
}

test_limits_deny_what_they_do_not_understand if {
	every case in [
		{"limits": {"max_amount": 1000}, "payload": {"amount": 1000.01}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "1000.0000000000000000000000000001"}},
		{"limits": {"max_amount": 1000}, "payload": {}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": null}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": true}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": [1]}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": ""}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "1e2"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "0x10"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": " 1"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "1_0"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "--1"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "1.2.3"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "007"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "inf"}},
		{"limits": {"max_amount": 1000}, "payload": {"amount": "5\u0000"}},
		{"limits": {"max_amount": 1000}, "payload": [5]},
		{"limits": {"max_amount": 1000}, "payload": null},
		{"limits": {"min_amount": 1}, "payload": {"amount": 0}},
		{"limits": {"amount": 1000}, "payload": {"amount": 1}},
		{"limits": {"max_amount": null}, "payload": {"amount": 1}},
		{"limits": null, "payload": {"amount": 1}},
	] {
		not grants.allow with input as asks(case.payload) with data.grants as [limited(case.limits)]
	}
}

test_a_denial_names_limit_and_value if {
	decision := grants.decision with input as asks({"amount": 1001}) with data.grants as [limited({"max_amount": 1000})]
	decision == {"allow": false, "reason": "grant 1 has the limit max_amount 1000 and amount is 1001"}
	missing := grants.decision with input as asks({}) with data.grants as [limited({"max_amount": 1000})]
	missing.reason == "grant 1 has the limit max_amount 1000 and the payload has no amount"
	none := grants.decision with input as asks({}) with data.grants as []
	none.reason == "no grant lets spiffe://agentweave.io/agent/order ask spiffe://agentweave.io/agent/payment for process_payment (kind call)"
}

test_any_grant_is_enough if {
	both := [limited({"max_amount": 10}), limited({"max_amount": 100, "max_per_minute": 2})]
	decision := grants.decision with input as asks({"amount": 50}) with data.grants as both
	decision == {"allow": true, "reason": "grant 2 allows it", "limits": {"max_per_minute": 2}}
}

test_on_behalf_of if {
	clients := object.union(grant, {"on_behalf_of": ["spiffe://agentweave.io/client/*"]})
	via := [{"iss": cli, "aud": "spiffe://agentweave.io/agent/gateway", "cap": "route", "kind": "call"}]
	grants.allow with input as changed({"context": {"via": via}})
		with data.grants as [clients]
	not grants.allow with input as asks({}) with data.grants as [clients]
	other := [object.union(via[0], {"iss": order}), via[0]]
	decision := grants.decision with input as changed({"context": {"via": other}})
		with data.grants as [clients]
	decision == {"allow": false, "reason": "grant 1 asks for an origin that on_behalf_of names"}
}

named(principal) := changed({"context": {"principal": principal}})

test_a_principal_needs_an_issuer_that_is_listed if {
	alice := {"iss": "https://login.example", "sub": "alice"}
	not grants.allow with input as named(alice) with data.grants as [grant]
	listing := object.union(grant, {"principals": ["https://login.example"]})
	grants.allow with input as named(alice) with data.grants as [listing]
	grants.allow with input as named({"iss": "x"}) with data.grants as [object.union(grant, {"principals": ["*"]})]
	every principal in [{"iss": "https://other.example"}, {"sub": "alice"}, {}, "alice", 0, ""] {
		not grants.allow with input as named(principal) with data.grants as [listing]
	}
	not grants.allow with input as named(false) with data.grants as [grant]
	grants.allow with input as named(null) with data.grants as [grant]
	decision := grants.decision with input as named(alice) with data.grants as [grant]
	decision.reason == "grant 1 lists no issuer for the principal that is named"
	refused := {"iss": "https://evil.example\n", "sub": "alice"}
	other := grants.decision with input as named(refused) with data.grants as [listing]
	other.reason == `grant 1 does not list "https://evil.example\n"`
	every principal in [{"sub": "alice"}, {}, "alice", 0, ""] {
		nameless := grants.decision with input as named(principal) with data.grants as [listing]
		nameless.reason == "grant 1 does not list a principal without an issuer"
	}
}

test_a_principal_handed_down_is_judged_by_the_grant_of_its_origin if {
	gateway := "spiffe://agentweave.io/agent/gateway"
	via := [
		{"iss": cli, "aud": gateway, "cap": "route", "kind": "call"},
		{"iss": gateway, "aud": order, "cap": "create_order", "kind": "call"},
	]
	origin := {"caller": [cli], "callee": [gateway], "capabilities": ["route"], "principals": ["https://login.example"]}
	nested := changed({"context": {
		"principal": {"iss": "https://login.example", "sub": "alice"},
		"via": via,
	}})
	grants.allow with input as nested with data.grants as [origin, grant]
	not grants.allow with input as nested with data.grants as [grant]
	not grants.allow with input as nested with data.grants as [object.union(origin, {"principals": ["https://other.example"]}), grant]
	not grants.allow with input as nested with data.grants as [object.union(origin, {"capabilities": ["health"]}), grant]
	not grants.allow with input as nested with data.grants as [object.union(origin, {"caller": [order]}), grant]
}

foreign(payload) := object.union(
	asks(payload),
	{"caller_spiffe_id": "spiffe://other.example/agent/billing"},
)

partner_grant := object.union(grant, {"caller": ["spiffe://other.example/agent/billing"]})

partner := {
	"registered_domains": ["other.example"],
	"partner_limits": {"other.example": {"max_transaction": 100, "rate_limit_per_minute": 60, "daily_limit": 900}},
}

test_a_partners_limits_hold_on_top_of_its_grant if {
	decision := grants.decision with input as foreign({"amount": 100}) with data.grants as [partner_grant]
		with data.partner as partner
	decision.allow
	decision.limits == {"rate_limit_per_minute": 60, "daily_limit": 900}
	denied := grants.decision with input as foreign({"amount": "100.01"}) with data.grants as [partner_grant]
		with data.partner as partner
	denied.allow == false
	denied.reason == "the partner other.example has the limit max_transaction 100 and amount is \"100.01\""
	not grants.allow with input as foreign({"amount": "x"}) with data.grants as [partner_grant] with data.partner as partner
	grants.allow with input as foreign({}) with data.grants as [partner_grant] with data.partner as partner
	not grants.allow with input as foreign({"amount": 1}) with data.grants as [grant] with data.partner as partner
	not grants.allow with input as foreign({"amount": 1}) with data.grants as [partner_grant]
		with data.partner.partner_limits as {"other.example": {"max_unknown": 1}}
}

test_own_callers_have_no_partner_limits if {
	own := {"partner_limits": {"agentweave.io": {"max_transaction": 1}}}
	grants.allow with input as asks({"amount": 5}) with data.grants as [grant] with data.partner as own
}

test_a_pattern_covers_events_below_it if {
	events := object.union(grant, {"kinds": ["event"], "capabilities": ["order.*"]})
	grants.allow with input as event_called("order.created") with data.grants as [events]
	grants.allow with input as event_called("order.line.added") with data.grants as [events]
	not grants.allow with input as event_called("order") with data.grants as [events]
	not grants.allow with input as event_called("orders.created") with data.grants as [events]
	not grants.allow with input as event_called("control:cancel") with data.grants as [object.union(events, {"capabilities": ["control.*"]})]
}

test_an_event_is_published_when_somebody_may_receive_it if {
	events := object.union(grant, {"kinds": ["event"], "capabilities": ["order.*"]})
	published := object.union(event_called("order.created"), {"callee_spiffe_id": "spiffe://agentweave.io"})
	grants.allow with input as published with data.grants as [events]
	grants.standing.allow with input as published with data.grants as [events]
	not grants.allow with input as object.union(published, {"action": "invoice.paid"}) with data.grants as [events]
	not grants.allow with input as object.union(published, {"caller_spiffe_id": "spiffe://agentweave.io/agent/other"}) with data.grants as [events]
	not grants.allow with input as object.union(published, {"callee_spiffe_id": "spiffe://other.io"}) with data.grants as [events]
	not grants.allow with input as object.union(published, {"context": {"kind": "call"}}) with data.grants as [object.union(events, {"kinds": ["call", "task"]})]
}

event_called(event) := changed({"action": event, "context": {"kind": "event"}})

test_operators if {
	act := {"action": "control:cancel"}
	by := {"caller_spiffe_id": cli}
	entries := [{"who": [cli], "may": ["control:cancel"]}]
	grants.allow with input as changed(object.union(act, by)) with data.operators as entries
	grants.allow with input as changed(object.union(act, by)) with data.operators as [{"who": "spiffe://agentweave.io/client/*", "may": ["control:cancel"]}]
	not grants.allow with input as changed(act) with data.operators as entries
	other := {"action": "control:revoke"}
	not grants.allow with input as changed(object.union(other, by)) with data.operators as entries
	plain := {"action": "cancel"}
	not grants.allow with input as changed(object.union(plain, by)) with data.operators as [{"who": [cli], "may": ["cancel"]}]
	decision := grants.decision with input as changed(object.union(other, by)) with data.operators as entries
	decision.reason == "no entry of operators lets spiffe://agentweave.io/client/cli do control:revoke"
	not grants.standing with input as changed(object.union(act, by)) with data.operators as entries
}

test_standing_is_for_grants_that_look_into_no_payload if {
	standing := grants.standing with input as asks({}) with data.grants as [limited({"max_per_minute": 7})]
	standing.allow
	standing.cache_seconds == 30
	standing.limits == {"max_per_minute": 7}
	not grants.standing with input as asks({}) with data.grants as [limited({"max_amount": 7})]
	not grants.standing with input as asks({}) with data.grants as [limited({"max_per_minute": 7, "min_amount": 7})]
	not grants.standing with input as asks({}) with data.grants as [limited(null)]
	not grants.standing with input as foreign({}) with data.grants as [partner_grant] with data.partner as partner
	rates := {"partner_limits": {"other.example": {"rate_limit_per_minute": 60}}}
	rated := grants.standing with input as foreign({}) with data.grants as [partner_grant] with data.partner as rates
	rated.limits == {"rate_limit_per_minute": 60}
}

person := "spiffe://agentweave.io/person/anna"

approved(approval) := object.union(grant, {"approval": approval})

large := approved({"by": ["spiffe://agentweave.io/person/*"], "above": {"amount": 1000}, "within": 60})

submitted(change) := object.union(
	asks({"amount": 5000}),
	object.union({"context": {"kind": "task", "transport": "bus", "via": [], "payload": {"amount": 5000}}}, change),
)

test_a_task_above_the_bound_needs_approval if {
	decision := grants.decision with input as submitted({}) with data.grants as [large]
	decision == {
		"allow": false,
		"reason": "grant 1 allows it once it is approved of",
		"require_approval": {"approvers": ["spiffe://agentweave.io/person/*"], "within": 60},
	}
	not grants.allow with input as submitted({}) with data.grants as [large]
	not grants.standing with input as submitted({}) with data.grants as [large]
	not grants.decision.allow with input as asks({"amount": 1000.01}) with data.grants as [large]
}

test_up_to_the_bound_nobody_is_asked if {
	every amount in [1000, "1000.00", -5] {
		grants.allow with input as asks({"amount": amount}) with data.grants as [large]
	}
	every strange in ["1e3", "", null, true, [1]] {
		not grants.allow with input as asks({"amount": strange}) with data.grants as [large]
	}
	not grants.allow with input as asks({}) with data.grants as [large]
}

test_without_a_bound_everything_needs_approval if {
	decision := grants.decision with input as submitted({}) with data.grants as [approved({"by": person})]
	decision.require_approval == {"approvers": [person], "within": 86400}
	not grants.allow with input as asks({"amount": 1}) with data.grants as [approved({"by": person, "above": {}})]
}

test_an_approval_by_who_may_is_one if {
	grants.allow with input as submitted({"context": {"approval": {"by": person}}}) with data.grants as [large]
	every other in [order, "spiffe://agentweave.io/person", "spiffe://other.io/person/anna", null, 7] {
		not grants.allow with input as submitted({"context": {"approval": {"by": other}}}) with data.grants as [large]
	}
	not grants.allow with input as submitted({"context": {"payload": {"approval": {"by": person}}}}) with data.grants as [large]
}

test_limits_hold_for_what_is_approved_of if {
	bounded := object.union(large, {"limits": {"max_amount": 4000}})
	not grants.allow with input as submitted({"context": {"approval": {"by": person}}}) with data.grants as [bounded]
	decision := grants.decision with input as submitted({}) with data.grants as [bounded]
	not decision.require_approval
}

test_who_submits_needs_nobodys_approval_yet if {
	grants.allow with input as submitted({"direction": "outbound"}) with data.grants as [large]
	calls := object.union(asks({"amount": 5000}), {"direction": "outbound"})
	not grants.allow with input as calls with data.grants as [large]
}

test_a_grant_without_approval_is_enough if {
	decision := grants.decision with input as submitted({}) with data.grants as [large, grant]
	decision.reason == "grant 2 allows it"
}

test_partners_limits_hold_before_anybody_is_asked if {
	foreign := object.union(large, {"caller": ["spiffe://partner.io/agent/a"]})
	asked := submitted({"caller_spiffe_id": "spiffe://partner.io/agent/a"})
	decision := grants.decision with input as asked
		with data.grants as [foreign]
		with data.partner.partner_limits as {"partner.io": {"max_transaction": 10}}
	not decision.require_approval
	not decision.allow
}

test_operators_approve if {
	acts := [{"who": [person], "may": ["control:approve"]}]
	act := {"caller_spiffe_id": person, "action": "control:approve", "context": {"kind": "control"}}
	grants.allow with input as changed(act) with data.operators as acts
	not grants.allow with input as changed(object.union(act, {"action": "control:reject"})) with data.operators as acts
	not grants.allow with input as changed(object.union(act, {"caller_spiffe_id": order})) with data.operators as acts
	not grants.allow with input as changed(act) with data.grants as [object.union(grant, {"caller": [person], "capabilities": ["*"]})]
}
