package edgemesh.authz_test

import data.edgemesh.authz

# The table that every engine has to answer alike, and alike with this.
wrong_answers contains c.name if {
	some c in data.cases
	c.entrypoint == "authz"
	decision := authz.decision with input as c.input
	{"allow": decision.allow, "codes": [reason.code | some reason in decision.reasons]} != c.want
}

test_every_case_of_the_table if {
	count([c | some c in data.cases; c.entrypoint == "authz"]) > 60
	wrong_answers == set()
}

good := case_named("everything as it should be")

case_named(name) := c.input if {
	some c in data.cases
	c.name == name
}

with_health(changes) := object.union(good, {"device": {"health": changes}})

at(weekday, minute, second) := object.union(good, {"time": {"weekday": weekday, "minute": minute, "second": second}})

test_there_is_a_decision_without_any_input if {
	authz.decision.allow == false
	count(authz.decision.reasons) > 0
}

test_allow_ends_when_health_is_stale if {
	authz.decision.valid_for_seconds == 288 with input as good
	authz.decision.valid_for_seconds == 1 with input as with_health({"age_seconds": 299})
}

test_allow_ends_with_the_hours if {
	authz.decision.valid_for_seconds == 48 with input as at("mon", 1079, 12)
	authz.decision.valid_for_seconds == 1 with input as at("mon", 1079, 59)
}

test_allow_ends_after_an_hour if {
	patient := object.union(good, {"hours": null, "requirements": {"health_max_age_seconds": 86400}})
	authz.decision.valid_for_seconds == 3600 with input as patient
}

test_deny_ends_after_a_minute_or_when_hours_begin if {
	authz.decision.valid_for_seconds == 60 with input as with_health({"disk_encrypted": false})
	authz.decision.valid_for_seconds == 20 with input as at("mon", 479, 40)
	authz.decision.valid_for_seconds == 1 with input as at("sun", 1439, 59)
}

test_clock_is_used_only_where_hours_bind if {
	authz.decision.clock_used == true with input as good
	authz.decision.clock_used == false with input as object.union(good, {"hours": null})
	authz.decision.clock_used == false with input as object.union(good, {"user": {"role": "admin"}})
}

test_reasons_name_field_actual_and_required if {
	authz.decision.reasons == [
		{
			"code": "CPU_TOO_HIGH",
			"field": "device.health.cpu_percent",
			"actual": "91.5",
			"required": "< 90",
			"message": "The processor of the device is too busy.",
		},
		{
			"code": "DISK_NOT_ENCRYPTED",
			"field": "device.health.disk_encrypted",
			"actual": "unknown",
			"required": "true",
			"message": "The disk of the device must be encrypted.",
		},
	] with input as with_health({"cpu_percent": 91.5, "disk_encrypted": null})
}

test_hours_are_worded_for_a_person if {
	some reason in authz.decision.reasons with input as at("sat", 485, 0)
	reason.actual == "sat 08:05 UTC"
	reason.required == "mon,tue,wed,thu,fri 08:00-18:00 UTC"
}

test_grants_are_listed_in_order if {
	some reason in authz.decision.reasons with input as object.union(good, {"grants": ["write", 7, "list"]})
	reason.actual == "list, write"
	reason.required == "connect"
}

# The statements of `allow` and the reasons are written apart; on no case do they contradict each other.
allowed contains c.name if {
	some c in data.cases
	authz.allow with input as c.input
}

unopposed contains c.name if {
	some c in data.cases
	refusals := authz.refusals with input as c.input
	count(refusals) == 0
}

test_allow_and_refusals_never_contradict if allowed == unopposed

test_a_deny_without_refusals_still_has_a_reason if {
	decision := authz.decision with input as good with authz.allow as false
	decision.allow == false
	[reason.code | some reason in decision.reasons] == ["INPUT_INVALID"]
}

# The explanation and the decision are written apart too; they agree on every case.
test_a_question_is_allowed_exactly_when_every_rule_of_its_explanation_holds if {
	every c in authz_cases {
		explanation := authz.explanation with input as c.input
		count(explanation) == 18
		failing := [finding | some finding in explanation; not finding.holds]
		count(failing) == 0 == c.want.allow
	}
}

authz_cases := [c | some c in data.cases; c.entrypoint == "authz"; is_object(c.input)]

# `requirements.x` and `hours` are facts that make another rule fail: the one that they are for.
unexplained contains [c.name, refusal.field] if {
	some c in authz_cases
	explanation := authz.explanation with input as c.input
	refusals := authz.refusals with input as c.input
	some refusal in refusals
	not startswith(refusal.field, "requirements.")
	refusal.field != "hours"
	not refusal.field in {finding.field | some finding in explanation; not finding.holds}
}

test_what_stands_against_an_allow_fails_in_its_explanation if unexplained == set()

found(field, question) := finding if {
	explanation := authz.explanation with input as question
	some finding in explanation
	finding.field == field
}

test_an_explanation_names_what_is_required_and_what_there_is if {
	found("device.health.cpu_percent", good) == {
		"field": "device.health.cpu_percent", "actual": "31.5", "required": "< 90", "holds": true,
	}
	found("device.health.disk_encrypted", with_health({"disk_encrypted": null})) == {
		"field": "device.health.disk_encrypted", "actual": "unknown", "required": "true", "holds": false,
	}
	found("time", at("sat", 485, 0)) == {
		"field": "time", "actual": "sat 08:05 UTC", "required": "mon,tue,wed,thu,fri 08:00-18:00 UTC", "holds": false,
	}
}

test_an_explanation_says_what_is_not_required if {
	found("device.health.disk_percent", good).required == "anything"
	found("device.health.firewall_enabled", with_health({"firewall_enabled": false})) == {
		"field": "device.health.firewall_enabled", "actual": "false", "required": "anything", "holds": true,
	}
	found("time", object.union(good, {"hours": null})).required == "any"
	found("time", object.union(good, {"hours": null})).actual == "mon 10:15"
	found("time", object.union(good, {"user": {"role": "admin"}})).required == "any, as role admin"
}

test_an_explanation_says_what_is_not_given if {
	bare := {"device": {}, "requirements": {}, "hours": {}}
	every field in {"device.health.age_seconds", "device.health.disk_encrypted", "device.health.cpu_percent", "time"} {
		found(field, bare).required == "given, and it is not"
		found(field, bare).holds == false
	}
}
