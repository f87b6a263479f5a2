# Numbers as requests carry them. Evaluators differ over odd texts ("1e3", "0x10", " 1"), so those are none.
package agentweave.numbers

import rego.v1

# A number, or a text that is one in plain digits; anything else is undefined.
plain(value) := value if is_number(value)

plain(value) := to_number(value) if {
	is_string(value)
	count(value) <= 64
	parts := split(trim_prefix(value, "-"), ".")
	count(parts) in {1, 2}
	every part in parts {
		part != ""
		trim(part, "0123456789") == ""
	}
	parts[0] in {"0", trim_left(parts[0], "0")}
}
