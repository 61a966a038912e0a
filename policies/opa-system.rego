# METADATA
# title: Who may talk to this OPA server?
# description: |
#   Only who knows the token, and only to ask what EdgeMesh and Prometheus ask: a decision, which policies are loaded,
#   the metrics. The token can't be used to change a policy. Whether the server lives is told to anyone: probes of
#   Docker and Kubernetes know no token. OPA consults this package when it is started with
#
#     EDGEMESH_OPA_TOKEN=... opa run --server --authentication=token --authorization=basic ...
#
#   It is no part of the compiled artefact, since WebAssembly has no environment to read.
package system.authz

default allow := false

allow if {
	token_is_right
	request_is_ours
}

allow if {
	input.method == "GET"
	input.path == ["health"]
}

# Without a token in the environment nobody is let in.
token_is_right if {
	expected := opa.runtime().env.EDGEMESH_OPA_TOKEN
	expected != ""
	input.identity == expected
}

request_is_ours if {
	input.method == "POST"
	array.slice(input.path, 0, 3) == ["v1", "data", "edgemesh"]
}

request_is_ours if {
	input.method == "GET"
	input.path in {["v1", "policies"], ["metrics"]}
}
