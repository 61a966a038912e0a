# What does each rule make of a question, those included that it meets?
#
# Ask for `data.edgemesh.authz.explanation`: every statement of `allow` with the fact that it looks at, what that is,
# what it would have to be, and whether the statement holds. A question is allowed when all of them hold. The decision
# itself never comes here, so explaining costs only who asks for it.
package edgemesh.authz

# METADATA
# entrypoint: true
explanation := [finding |
	some rule in rules
	finding := {
		"field": rule.field,
		"actual": text(rule.actual),
		"required": text(rule.required),
		"holds": rule.field in holding,
	}
] if {
	is_object(input)
}

# In the order in which a person would look: the device, its health, the user, the service, what the one may do there.
rules := array.concat(
	array.concat(
		[
			{"field": "device.status", "actual": fact(["device", "status"]), "required": "active"},
			{"field": "device.authenticated", "actual": fact(["device", "authenticated"]), "required": true},
			{"field": "device.health", "actual": health_found, "required": "reported"},
			{
				"field": "device.health.age_seconds",
				"actual": fact(["device", "health", "age_seconds"]),
				"required": below(fact(["requirements", "health_max_age_seconds"])),
			},
		],
		health_rules,
	),
	[
		{"field": "user", "actual": fact(["user", "id"]), "required": "known"},
		{"field": "user.status", "actual": fact(["user", "status"]), "required": "active"},
		{"field": "service", "actual": fact(["service", "id"]), "required": "known"},
		{"field": "service.status", "actual": fact(["service", "status"]), "required": "active"},
		{"field": "action", "actual": fact(["action"]), "required": "named"},
		{"field": "grants", "actual": grants_text, "required": fact(["action"])},
		{"field": "time", "actual": time_found, "required": time_required},
	],
)

# Sorted, since engines go through a set in orders of their own.
health_rules := array.concat(
	[{"field": health_field(item), "actual": fact(["device", "health", item]), "required": state_required(item)} |
		some item in sort(object.keys(required_states))
	],
	[{"field": health_field(item), "actual": fact(["device", "health", item]), "required": limit_required(item)} |
		some item in sort(object.keys(limits))
	],
)

fact(path) := object.get(input, path, null)

health_field(item) := concat(".", ["device.health", item])

default health_found := "none"

health_found := "reported" if is_object(input.device.health)

# What is not required is said to be so. What the requirements leave out is required, and nothing can meet it.
default below(_) := "given, and it is not"

below(most) := concat(" ", ["<", text(most)]) if is_number(most)

default state_required(_) := "given, and it is not"

state_required(item) := requirement(item) if requirement(item) == true

state_required(item) := "anything" if requirement(item) == false

default limit_required(_) := "given, and it is not"

limit_required(item) := below(requirement(limits[item].requirement)) if {
	is_number(requirement(limits[item].requirement))
}

limit_required(item) := "anything" if requirement(limits[item].requirement) == null

default time_found := "unknown"

time_found := concat(" ", [input.time.weekday, clock_text(input.time.minute)]) if {
	time_is_given
	not is_string(object.get(input, ["hours", "timezone"], null))
}

time_found := time_text if time_is_given

default time_required := "given, and it is not"

time_required := "any" if input.hours == null

time_required := concat(" ", ["any, as role", input.user.role]) if role_is_exempt

time_required := hours_text if {
	clock_used
	hours_are_given
}

# The statements of `allow`, by the fact that they look at.

holding contains "device.status" if device_is_active

holding contains "device.authenticated" if device_is_authenticated

holding contains "device.health" if health_is_known

holding contains "device.health.age_seconds" if {
	health_is_known
	health_is_fresh
}

holding contains health_field(item) if {
	some item, _ in required_states
	state_is_met(item)
}

holding contains health_field(item) if {
	some item, _ in limits
	limit_is_met(item)
}

holding contains "user" if user_is_known

holding contains "user.status" if user_is_active

holding contains "service" if service_is_known

holding contains "service.status" if service_is_active

holding contains "action" if action_is_named

holding contains "grants" if role_is_granted

holding contains "time" if clock_permits
