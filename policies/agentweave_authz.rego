# Callers listed in data.allowed_callers, by callee; and, for those who want it, only in business hours:
#
#     business_hours: {from: 9, to: 17, time_zone: Europe/Berlin}     # in data.yaml
#
# Business hours narrow what is allowed, they never widen it. The last hour counts whole (17:59 is in).
package agentweave.authz

import rego.v1

default allow := false

allow if {
	is_allowed_caller
	time_permits
}

is_allowed_caller if input.caller_spiffe_id in data.allowed_callers[input.callee_spiffe_id]

default business_hours := null

business_hours := data.business_hours

time_permits if business_hours == null

time_permits if {
	hour := time.clock([time.now_ns(), object.get(business_hours, "time_zone", "UTC")])[0]
	hour >= business_hours.from
	hour <= business_hours.to
}

decision := {"allow": true, "reason": "agentweave.authz allows it"} if {
	allow
} else := {"allow": false, "reason": concat("", [
	input.caller_spiffe_id,
	" is not among data.allowed_callers of ",
	input.callee_spiffe_id,
])} if {
	not is_allowed_caller
} else := {"allow": false, "reason": "it is outside of business hours"}
