package system.authz_test

import data.system.authz

environment := {"env": {"EDGEMESH_OPA_TOKEN": "right"}}

ask(identity, method, path) := {"identity": identity, "method": method, "path": path}

decision_path := ["v1", "data", "edgemesh", "authz", "decision"]

test_the_token_may_ask if {
	authz.allow with input as ask("right", "POST", decision_path) with opa.runtime as environment
	authz.allow with input as ask("right", "GET", ["v1", "policies"]) with opa.runtime as environment
	authz.allow with input as ask("right", "GET", ["metrics"]) with opa.runtime as environment
}

test_anyone_may_ask_whether_it_lives if {
	authz.allow with input as {"method": "GET", "path": ["health"]} with opa.runtime as {"env": {}}
	not authz.allow with input as {"method": "PUT", "path": ["health"]} with opa.runtime as environment
	not authz.allow with input as {"method": "GET", "path": ["health", "x"]} with opa.runtime as environment
}

test_the_token_may_change_nothing if {
	not authz.allow with input as ask("right", "PUT", ["v1", "policies", "x"]) with opa.runtime as environment
	not authz.allow with input as ask("right", "PUT", decision_path) with opa.runtime as environment
	not authz.allow with input as ask("right", "POST", ["v1", "data", "system"]) with opa.runtime as environment
}

test_nobody_else_may_ask if {
	not authz.allow with input as ask("wrong", "POST", decision_path) with opa.runtime as environment
	not authz.allow with input as {"method": "POST", "path": decision_path} with opa.runtime as environment
	not authz.allow with input as ask("wrong", "GET", ["metrics"]) with opa.runtime as environment
}

test_without_a_token_in_the_environment_nobody_may if {
	not authz.allow with input as ask("", "POST", decision_path) with opa.runtime as {"env": {"EDGEMESH_OPA_TOKEN": ""}}
	not authz.allow with input as ask("", "POST", decision_path) with opa.runtime as {"env": {}}
}
