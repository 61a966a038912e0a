# METADATA
# title: May this operator call this method of the AdminService?
# description: |
#   Ask for `data.edgemesh.admin.decision`; the answer has the shape of `data.edgemesh.authz.decision`. The role comes
#   from the operator's certificate, the method is the name in the contract, such as `ListDevices`.
package edgemesh.admin

# How long an answer may be used again. A refusal is short, so that a promotion is soon felt.
allow_seconds := 3600

deny_seconds := 60

# METADATA
# entrypoint: true
decision := {
	"allow": true,
	"reasons": [],
	"valid_for_seconds": allow_seconds,
	"clock_used": false,
} if {
	allow
} else := {
	"allow": false,
	"reasons": [{
		"code": "OPERATOR_NOT_PERMITTED",
		"field": "operator.role",
		"actual": role,
		"required": concat(" or ", sort(permitted_roles)),
		"message": "The role of the operator does not permit this method.",
	}],
	"valid_for_seconds": deny_seconds,
	"clock_used": false,
}

default allow := false

allow if {
	is_string(input.operator.name)
	input.operator.name != ""
	input.operator.role in permitted_roles
}

default role := "unknown"

role := input.operator.role if is_string(input.operator.role)

# Everyone may look. Operators also run the fleet from day to day. The rest (users, services, grants, the certificate
# authority, settings) is for administrators, and so is whatever method is added later until it is named here. So is
# deleting a device: revoking keeps it out and can be done at any hour of the night, deleting gives its name away to
# whoever enrolls under it next.
permitted_roles contains "admin"

permitted_roles contains some_role if {
	is_string(input.method)
	some some_role in {"operator", "auditor"}
	some verb in {"List", "Get", "Search", "Tail", "Export"}
	startswith(input.method, verb)
}

permitted_roles contains "operator" if input.method in daily_work

daily_work := {
	"ApproveDevice",
	"QuarantineDevice",
	"ReleaseDevice",
	"RevokeDevice",
	"CreateEnrollmentToken",
	"RevokeEnrollmentToken",
	"CloseConnection",
}
