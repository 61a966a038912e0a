# METADATA
# title: May this device, on behalf of this user, reach this service now?
# description: |
#   Ask for `data.edgemesh.authz.decision`. The answer is one document, whatever the input is:
#
#     allow              true only when every statement of `allow` below holds
#     reasons            everything that stands against it, sorted by code and field; empty when allowed
#     valid_for_seconds  how long the answer may be used again, if nothing in the input changes but the time
#     clock_used         whether the time of day was looked at
#
#   Everything that the policy knows is in `input`: roles, limits and hours are rows of a database, looked up by who
#   asks. So a decision can be replayed from its input alone, and changing a limit needs no new policy.
package edgemesh.authz

# No answer is used for longer than an hour, and no refusal for longer than a minute.
allow_seconds_max := 3600

deny_seconds_max := 60

# METADATA
# entrypoint: true
decision := {
	"allow": true,
	"reasons": [],
	"valid_for_seconds": max([1, min({allow_seconds_max, seconds_until_stale} | seconds_until_clock_matters)]),
	"clock_used": clock_used,
} if {
	allow
} else := {
	"allow": false,
	"reasons": reasons,
	"valid_for_seconds": max([1, min({deny_seconds_max} | seconds_until_clock_matters)]),
	"clock_used": clock_used,
}

# What must hold is stated positively and apart from the reasons: something missing or malformed makes a statement
# undefined, which denies, and a reason that could not be worded can never turn a refusal into an allow. It also spares
# an allow the search for reasons, which is half the work.
default allow := false

allow if {
	device_is_active
	device_is_authenticated
	health_is_known
	health_is_fresh
	user_is_active
	service_is_active
	action_is_named
	role_is_granted
	clock_permits
	every item, _ in required_states { state_is_met(item) }
	every item, _ in limits { limit_is_met(item) }
}

# Sorted by code, then field, so that equal decisions are equal texts.
reasons := [entry[2] | some entry in sort([[refusal.code, refusal.field, refusal] | some refusal in refusals])] if {
	count(refusals) > 0
} else := [reason("INPUT_INVALID", "input", "unknown", "complete", "The question is incomplete or malformed.")]

reason(code, field, actual, required, message) := {
	"code": code,
	"field": field,
	"actual": text(actual),
	"required": text(required),
	"message": message,
}

default text(_) := "unknown"

text(value) := value if {
	is_string(value)
	value != ""
}

text(value) := json.marshal(value) if is_number(value)

text(value) := json.marshal(value) if is_boolean(value)

# The device

device_is_active if input.device.status == "active"

# Each status has a reason of its own: a device has to know whether to wait for an operator or to give up.
other_statuses := {
	"pending": {"code": "DEVICE_PENDING", "message": "The device waits for an operator to approve it."},
	"quarantined": {"code": "DEVICE_QUARANTINED", "message": "The device is quarantined until an operator releases it."},
	"revoked": {"code": "DEVICE_REVOKED", "message": "The device has been revoked."},
	"unknown": {"code": "DEVICE_UNKNOWN", "message": "There is no such device, or no longer."},
}

status_is_known if input.device.status in object.keys(other_statuses)

refusals contains reason(status.code, "device.status", input.device.status, "active", status.message) if {
	status := other_statuses[input.device.status]
}

refusals contains reason(
	"DEVICE_NOT_ACTIVE", "device.status", object.get(input, ["device", "status"], null), "active",
	"The device is not in the active state.",
) if {
	not device_is_active
	not status_is_known
}

device_is_authenticated if input.device.authenticated == true

refusals contains reason(
	"DEVICE_NOT_AUTHENTICATED", "device.authenticated", object.get(input, ["device", "authenticated"], null), true,
	"The device has not proven its identity with a live certificate.",
) if {
	not device_is_authenticated
}

# Its health: known, fresh, and as good as is required

health_is_known if {
	is_number(input.device.health.age_seconds)
	input.device.health.age_seconds >= 0
}

refusals contains reason(
	"HEALTH_UNKNOWN", "device.health", "none", "reported",
	"The device has not reported its health.",
) if {
	not health_is_known
}

seconds_until_stale := floor(input.requirements.health_max_age_seconds - input.device.health.age_seconds)

# A report is stale in the very second in which it reaches its greatest age, which is when an allow must have ended.
health_is_fresh if seconds_until_stale >= 1

refusals contains reason(
	"HEALTH_STALE", "device.health.age_seconds", input.device.health.age_seconds,
	concat(" ", ["<", text(input.requirements.health_max_age_seconds)]),
	"The last health report of the device is too old.",
) if {
	health_is_known
	not health_is_fresh
}

required_states := {
	"patches_current": {
		"code": "PATCHES_NOT_CURRENT",
		"message": "The patches of the device must be current.",
	},
	"antivirus_enabled": {
		"code": "ANTIVIRUS_DISABLED",
		"message": "The antivirus of the device must be enabled.",
	},
	"disk_encrypted": {
		"code": "DISK_NOT_ENCRYPTED",
		"message": "The disk of the device must be encrypted.",
	},
	"firewall_enabled": {
		"code": "FIREWALL_DISABLED",
		"message": "The firewall of the device must be enabled.",
	},
}

state_is_met(item) if input.requirements[item] == false

state_is_met(item) if {
	input.requirements[item] == true
	input.device.health[item] == true
}

refusals contains reason(
	state.code, concat(".", ["device.health", item]),
	object.get(input.device.health, item, null), true,
	state.message,
) if {
	is_object(input.device.health)
	some item, state in required_states
	input.requirements[item] == true
	not state_is_met(item)
}

limits := {
	"cpu_percent": {
		"requirement": "cpu_percent_max",
		"code": "CPU_TOO_HIGH",
		"message": "The processor of the device is too busy.",
	},
	"memory_percent": {
		"requirement": "memory_percent_max",
		"code": "MEMORY_TOO_HIGH",
		"message": "Too much of the memory of the device is in use.",
	},
	"disk_percent": {
		"requirement": "disk_percent_max",
		"code": "DISK_TOO_FULL",
		"message": "The disk of the device is too full.",
	},
}

limit_is_met(item) if input.requirements[limits[item].requirement] == null

limit_is_met(item) if {
	most := input.requirements[limits[item].requirement]
	actual := input.device.health[item]
	is_number(most)
	is_number(actual)
	actual >= 0
	actual < most
}

refusals contains reason(
	limit.code, concat(".", ["device.health", item]),
	object.get(input.device.health, item, null), concat(" ", ["<", text(most)]),
	limit.message,
) if {
	is_object(input.device.health)
	some item, limit in limits
	most := input.requirements[limit.requirement]
	is_number(most)
	not limit_is_met(item)
}

# A requirement that is left out or malformed is not a requirement that is waived. What is left out must read as
# something here: Rego's `not is_number(input.missing)` is undefined, where one would expect it to hold.
requirement(name) := object.get(input, ["requirements", name], "missing")

unusable_requirements contains "health_max_age_seconds" if {
	not is_number(requirement("health_max_age_seconds"))
}

unusable_requirements contains item if {
	some item, _ in required_states
	not is_boolean(requirement(item))
}

unusable_requirements contains limit.requirement if {
	some limit in limits
	value := requirement(limit.requirement)
	value != null
	not is_number(value)
}

refusals contains reason(
	"INPUT_INVALID", concat(".", ["requirements", item]), "unknown", "given",
	"The requirements for the health of the device are incomplete.",
) if {
	some item in unusable_requirements
}

# The user, the service, and what the user's role may do there

user_is_known if is_object(input.user)

refusals contains reason(
	"USER_UNKNOWN", "user", "none", "known",
	"The user is not known here.",
) if {
	not user_is_known
}

user_is_active if input.user.status == "active"

refusals contains reason(
	"USER_DISABLED", "user.status", object.get(input.user, "status", null), "active",
	"The user is not active.",
) if {
	user_is_known
	not user_is_active
}

service_is_known if is_object(input.service)

refusals contains reason(
	"SERVICE_UNKNOWN", "service", "none", "known",
	"The service is not known here.",
) if {
	not service_is_known
}

service_is_active if input.service.status == "active"

refusals contains reason(
	"SERVICE_DISABLED", "service.status", object.get(input.service, "status", null), "active",
	"The service is not active.",
) if {
	service_is_known
	not service_is_active
}

action_is_named if {
	is_string(input.action)
	input.action != ""
}

refusals contains reason(
	"INPUT_INVALID", "action", "unknown", "named",
	"The question does not say what is to be done.",
) if {
	not action_is_named
}

role_is_granted if {
	is_array(input.grants)
	some grant in input.grants
	grant in {"*", input.action}
}

default grants_text := "none"

grants_text := concat(", ", sort([grant | some grant in input.grants; is_string(grant)])) if {
	count([grant | some grant in input.grants; is_string(grant)]) > 0
}

# Who or what is unknown has no grants: to say so again would only hide the cause.
refusals contains reason(
	"ROLE_NOT_GRANTED", "grants", grants_text, input.action,
	"The role of the user does not permit this action on this service.",
) if {
	user_is_known
	service_is_known
	action_is_named
	not role_is_granted
}

# The hours, for all whose role is not exempt

default clock_used := false

clock_used if {
	input.hours != null
	not role_is_exempt
}

role_is_exempt if input.user.role in input.hours.exempt_roles

clock_permits if input.hours == null

clock_permits if role_is_exempt

clock_permits if {
	hours_are_given
	time_is_given
	within_hours
}

# A window lies within one day: from the first minute up to, and without, the last. 1440 is the end of the day.
hours_are_given if {
	is_string(input.hours.timezone)
	is_array(input.hours.days)
	is_whole(input.hours.start_minute)
	is_whole(input.hours.end_minute)
	input.hours.start_minute < input.hours.end_minute
	input.hours.end_minute <= 1440
}

refusals contains reason(
	"INPUT_INVALID", "hours", "unknown", "given",
	"The hours of access are incomplete; without a restriction they must be null.",
) if {
	not clock_permits
	not hours_are_given
}

time_is_given if {
	is_string(input.time.weekday)
	is_whole(input.time.minute)
	is_whole(input.time.second)
	input.time.minute < 1440
	input.time.second < 60
}

is_whole(value) if {
	is_number(value)
	value >= 0
	value == floor(value)
}

refusals contains reason(
	"INPUT_INVALID", "time", "unknown", "given",
	"The time of the question is missing or malformed.",
) if {
	clock_used
	not time_is_given
}

within_hours if {
	input.time.weekday in input.hours.days
	input.hours.start_minute <= input.time.minute
	input.time.minute < input.hours.end_minute
}

refusals contains reason(
	"OUTSIDE_HOURS", "time", time_text, hours_text,
	"Access is limited to certain hours, and this is not one of them.",
) if {
	clock_used
	hours_are_given
	time_is_given
	not within_hours
}

time_text := concat(" ", [input.time.weekday, clock_text(input.time.minute), input.hours.timezone])

hours_text := concat(" ", [
	concat(",", [day | some day in input.hours.days; is_string(day)]),
	concat("-", [clock_text(input.hours.start_minute), clock_text(input.hours.end_minute)]),
	input.hours.timezone,
])

# 615 reads 10:15
clock_text(minute) := concat(":", [two_digits(floor(minute / 60)), two_digits(minute % 60)])

two_digits(number) := substring(format_int(100 + number, 10), 1, 2)

# An answer that rests on the clock ends where the clock could change it: when hours begin or end, or the day does.
seconds_until_clock_matters contains ((boundary - input.time.minute) * 60) - input.time.second if {
	clock_used
	hours_are_given
	time_is_given
	some boundary in {input.hours.start_minute, input.hours.end_minute, 1440}
	boundary > input.time.minute
}
