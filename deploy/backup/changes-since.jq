# What was changed after a backup was taken, from the audit log that was shipped elsewhere, as commands to look through and run
# against the restored service. What took something away comes as a command, and so does how a user was left; what gave something
# comes as a comment, for a person to decide, since the audit log does not hold all of it.
#
#   cat audit-*.ndjson | jq --raw-input --slurp --raw-output --arg since 2026-01-31T02:00:00Z -f changes-since.jq > again.sh
#
# $since is what restore.sh has said. A minute more is looked at: a call is on record with when it began. Doing something twice
# does no harm: what is done already, or not there in the backup, is refused and stays as it is.
def again: (.detail.reason // "") | if . == "" then "after a restore" else "\(.), again after a restore" end;
def id: .target | sub("^[^/]*/"; "");
def when: " # \(.at) by \(.actor)";

(($since | fromdateiso8601) - 60 | todateiso8601) as $from
# Lines that are no JSON are what a shipper that was killed has cut off.
| [split("\n")[] | fromjson? | select(.type == "event" and .code == "OK" and .at >= $from)]
| unique_by(.id) | sort_by(.at)[]
| (.method | sub(".*/"; "")) as $call
| (if $call == "RevokeDevice" then "edgemesh device revoke \(id | @sh) --reason \(again | @sh)\(when)"
  elif $call == "QuarantineDevice" then "edgemesh device quarantine \(id | @sh) --reason \(again | @sh)\(when)"
  elif $call == "DeleteDevice" then "edgemesh device delete \(id | @sh)\(when)"
  elif $call == "RevokeEnrollmentToken" then
    "edgemesh token revoke \(id | @sh) --reason \(again | @sh)\(if .detail.devices then " --with-devices" else "" end)\(when)"
  elif $call == "RevokeOperator" then "edgemesh operator revoke \(id | @sh) --reason \(again | @sh)\(when)"
  elif $call == "UpdateUser" and .detail.role then
    "edgemesh user update \(id | @sh) --role \(.detail.role | @sh) --status \(.detail.status | @sh)\(when)"
  elif $call == "DeleteUser" then "edgemesh user delete \(id | @sh)\(when)"
  elif $call == "DeleteService" then "edgemesh service delete \(id | @sh)\(when)"
  elif $call == "DeleteRoleGrant" then "edgemesh grant delete \(id | split("/") | @sh)\(when)"
  # Its uses since then are forgotten: it could be used once more.
  elif $call == "Enroll" and .detail.token then
    "edgemesh token revoke \(.detail.token | @sh) --reason 'used after the backup'\(when)",
    (if .at >= $since then "# \(.target) has enrolled: give it a new token" else empty end)
  elif .at < $since then empty
  elif $call == "RenewCertificate" and (.target | startswith("device/")) then
    "# \(.target) has a newer certificate: edgemesh device delete \(id | @sh), and give it a new token"
  elif $call == "RenewCertificate" then "# \(.target) has a newer certificate: make it anew, edgemesh operator create"
  elif ($call | test("^(Create|Update|Set|Approve|Release|Rotate|Delete)")) then "# by hand: \($call) \(.target) \(.detail // {} | tojson)\(when)"
  else empty
  end)
# Whatever stands in a record, it is one line.
| gsub("[\\r\\n]"; " ")
