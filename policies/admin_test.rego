package edgemesh.admin_test

import data.edgemesh.admin

wrong_answers contains c.name if {
	some c in data.cases
	c.entrypoint == "admin"
	decision := admin.decision with input as c.input
	{"allow": decision.allow, "codes": [reason.code | some reason in decision.reasons]} != c.want
}

test_every_case_of_the_table if {
	count([c | some c in data.cases; c.entrypoint == "admin"]) > 30
	wrong_answers == set()
}

test_reason_names_the_roles_that_may if {
	decision := admin.decision with input as {"operator": {"name": "a", "role": "auditor"}, "method": "ApproveDevice"}
	decision.reasons == [{
		"code": "OPERATOR_NOT_PERMITTED",
		"field": "operator.role",
		"actual": "auditor",
		"required": "admin or operator",
		"message": "The role of the operator does not permit this method.",
	}]
	decision.valid_for_seconds == 60
	decision.clock_used == false
}

test_allow_is_valid_for_an_hour if {
	decision := admin.decision with input as {"operator": {"name": "a", "role": "auditor"}, "method": "ListDevices"}
	decision.valid_for_seconds == 3600
	decision.clock_used == false
}

test_there_is_a_decision_without_any_input if {
	admin.decision.allow == false
	admin.decision.reasons[0].actual == "unknown"
}
