# The policy that most agents use: it reads grants.yaml and adds nothing of its own.
#
# What is allowed is said once, as data: who may ask whom for what, within which limits. Everything
# here is written so that what is missing, misspelled or of the wrong type denies: a limit has to be
# kept, it is not enough that it isn't seen to be broken.
package agentweave.grants

import data.agentweave.numbers
import rego.v1

default allow := false

allow if decision.allow

# --- the answer ------------------------------------------------------------------------------------

default decision := {"allow": false, "reason": "the grants could not be applied to this request"}

decision := {
	"allow": true,
	"reason": concat("", [at_once[0].name, " allows it"]),
	"limits": object.union(at_once[0].uses, partner_uses),
} if {
	count(at_once) > 0
	partner_limits_kept
} else := {
	"allow": false,
	"reason": concat("", [passing[0].name, " allows it once it is approved of"]),
	"require_approval": {
		"approvers": listed(passing[0].terms.approval.by),
		"within": object.get(passing[0].terms.approval, "within", 86400),
	},
} if {
	count(passing) > 0
	partner_limits_kept
} else := {
	"allow": true,
	"reason": concat("", ["an entry of operators allows ", input.action]),
	"limits": {},
} if {
	operator_may
} else := {"allow": false, "reason": concat("; ", sort(objections))} if {
	count(objections) > 0
} else := {"allow": false, "reason": no_match}

no_match := concat("", [
	"no entry of operators lets ",
	input.caller_spiffe_id,
	" do ",
	input.action,
]) if {
	operators_act
} else := concat("", [
	"no grant lets ",
	input.caller_spiffe_id,
	" ask ",
	input.callee_spiffe_id,
	" for ",
	input.action,
	" (kind ",
	input.context.kind,
	")",
])

# An answer that holds for every payload: only where no limit looks into one.
standing := {
	"allow": true,
	"cache_seconds": 30,
	"reason": concat("", [free[0].name, " allows it, whatever the payload"]),
	"limits": object.union(free[0].uses, partner_uses),
} if {
	count(free) > 0
	every key, _ in partner_terms {
		key == "rate_limit_per_minute"
	}
}

# --- which grants speak about this request -----------------------------------------------------------

# Grants for this caller, callee, capability and kind, in the order of the file.
candidates := [{"name": concat("", ["grant ", format_int(i + 1, 10)]), "terms": grant, "uses": uses(grant)} |
	some i, grant in data.grants
	addressed(grant)
	covers(grant.capabilities)
	some caller in listed(grant.caller)
	matches(caller, input.caller_spiffe_id)
	input.context.kind in object.get(grant, "kinds", ["call", "task"])
]

acceptable := [candidate |
	some candidate in candidates
	origin_accepted(candidate.terms)
	principal_accepted(candidate.terms)
]

passing := [candidate |
	some candidate in acceptable
	every key, bound in object.get(candidate.terms, "limits", {}) {
		kept(key, bound)
	}
]

free := [candidate |
	some candidate in acceptable
	every key, _ in object.get(candidate.terms, "limits", {}) {
		key == "max_per_minute"
	}
	not candidate.terms.approval
]

# Of the grants that pass, those for which nobody has to approve, or somebody has.
at_once := [candidate |
	some candidate in passing
	needs_no_approval(candidate.terms)
]

# The limits that whoever asked has to count, because a policy has no memory.
uses(grant) := {key: bound | some key, bound in object.get(grant, "limits", {}); key == "max_per_minute"}

listed(names) := names if is_array(names)

listed(name) := [name] if is_string(name)

matches(pattern, id) if pattern == id

matches(pattern, id) if {
	endswith(pattern, "/*")
	startswith(id, trim_suffix(pattern, "*"))
}

addressed(grant) if input.callee_spiffe_id in listed(grant.callee)

# Who publishes an event asks for that its own trust domain: it is allowed when somebody may receive it.
addressed(_) if {
	input.context.kind == "event"
	input.callee_spiffe_id == concat("", ["spiffe://", caller_domain])
}

# "*" stands for capabilities and events, never for an operator's act; "order.*" for events below "order".
covers(capabilities) if input.action in capabilities

covers(capabilities) if {
	some pattern in capabilities
	endswith(pattern, ".*")
	startswith(input.action, trim_suffix(pattern, "*"))
	not operators_act
}

covers(capabilities) if {
	"*" in capabilities
	not operators_act
}

# --- on whose behalf -----------------------------------------------------------------------------------

origin_accepted(grant) if object.get(grant, "on_behalf_of", null) == null

origin_accepted(grant) if {
	some pattern in grant.on_behalf_of
	matches(pattern, input.context.via[0].iss)
}

names_principal if input.context.principal != null

principal_accepted(_) if not names_principal

principal_accepted(grant) if accepts_issuer(grant)

# Handed down from the origin: it is enough that the origin's own grant let it name that issuer.
principal_accepted(_) if {
	some grant in data.grants
	some caller in listed(grant.caller)
	matches(caller, input.context.via[0].iss)
	input.context.via[0].aud in listed(grant.callee)
	some capability in grant.capabilities
	capability in {"*", input.context.via[0].cap}
	accepts_issuer(grant)
}

accepts_issuer(grant) if input.context.principal.iss in grant.principals

accepts_issuer(grant) if "*" in grant.principals

# --- limits on the payload ------------------------------------------------------------------------------

default payload := {}

payload := input.context.payload if is_object(input.context.payload)

kept("max_per_minute", _) := true

kept(key, bound) if {
	startswith(key, "max_")
	key != "max_per_minute"
	numbers.plain(payload[trim_prefix(key, "max_")]) <= numbers.plain(bound)
}

kept(key, bound) if {
	startswith(key, "min_")
	numbers.plain(payload[trim_prefix(key, "min_")]) >= numbers.plain(bound)
}

# --- approval by a person -----------------------------------------------------------------------------------

needs_no_approval(grant) if not grant.approval

# Whoever submits can't know yet who will approve: the agent that is asked has it approved of.
needs_no_approval(_) if {
	input.direction == "outbound"
	input.context.kind == "task"
}

needs_no_approval(grant) if {
	count(object.get(grant.approval, "above", {})) > 0
	every field, bound in grant.approval.above {
		numbers.plain(payload[field]) <= numbers.plain(bound)
	}
}

needs_no_approval(grant) if {
	some pattern in listed(grant.approval.by)
	matches(pattern, input.context.approval.by)
}

# --- partners: other trust domains -----------------------------------------------------------------------

caller_domain := split(input.caller_spiffe_id, "/")[2]

callee_domain := split(input.callee_spiffe_id, "/")[2]

default partner_limits := {}

partner_limits := data.partner.partner_limits

# What was agreed with the caller's domain; nothing for callers of our own.
partner_terms := {} if {
	caller_domain == callee_domain
} else := object.get(partner_limits, caller_domain, {})

partner_uses := {key: bound |
	some key, bound in partner_terms
	key in {"rate_limit_per_minute", "daily_limit"}
}

partner_limits_kept if {
	every key, bound in partner_terms {
		partner_kept(key, bound)
	}
}

partner_kept(key, _) if key in {"rate_limit_per_minute", "daily_limit"}

partner_kept("max_transaction", bound) if numbers.plain(payload.amount) <= numbers.plain(bound)

# What carries no amount is no transaction.
partner_kept("max_transaction", _) if not "amount" in object.keys(payload)

# --- operators ---------------------------------------------------------------------------------------------

operators_act if startswith(input.action, "control:")

operator_may if {
	operators_act
	some entry in data.operators
	some who in listed(entry.who)
	matches(who, input.caller_spiffe_id)
	input.action in entry.may
}

# --- why not -------------------------------------------------------------------------------------------------

objections contains concat("", [candidate.name, " asks for an origin that on_behalf_of names"]) if {
	some candidate in candidates
	not origin_accepted(candidate.terms)
}

objections contains concat("", [candidate.name, " lists no issuer for the principal that is named"]) if {
	some candidate in candidates
	not candidate.terms.principals
	not principal_accepted(candidate.terms)
}

objections contains concat("", [candidate.name, " does not list ", issuer_named]) if {
	some candidate in candidates
	candidate.terms.principals
	not principal_accepted(candidate.terms)
}

default issuer_named := "a principal without an issuer"

issuer_named := json.marshal(input.context.principal.iss)

objections contains concat("", [candidate.name, " has the limit ", key, " ", json.marshal(bound), " and ", seen(key)]) if {
	some candidate in candidates
	some key, bound in candidate.terms.limits
	not kept(key, bound)
}

objections contains concat("", [
	"the partner ",
	caller_domain,
	" has the limit ",
	key,
	" ",
	json.marshal(bound),
	" and ",
	seen("max_amount"),
]) if {
	count(passing) > 0
	some key, bound in partner_terms
	not partner_kept(key, bound)
}

seen(key) := concat("", [field, " is ", json.marshal(payload[field])]) if {
	field := substring(key, 4, -1)
	numbers.plain(payload[field]) == numbers.plain(payload[field])
} else := concat("", [field, " is no number in plain digits"]) if {
	field := substring(key, 4, -1)
	field in object.keys(payload)
} else := concat("", ["the payload has no ", substring(key, 4, -1)])
