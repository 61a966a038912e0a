#!/usr/bin/env bash
# A backup of EdgeMesh's database that is known to restore: dumped, restored into a server of its own, counted, encrypted, uploaded.
#
# docs/backup.md tells what to keep beside it, and how to come back. Settings, by the environment:
#
#   DATABASE_URL             or DATABASE_URL_FILE: as for EdgeMesh. A role that only reads will do (pg_read_all_data)
#   BACKUP_DIR               where backups are kept: edgemesh_20260131T020000Z.dump and .manifest (/var/backups/edgemesh)
#   BACKUP_KEEP_DAYS         older ones are deleted after one that succeeded (30)
#   BACKUP_AGE_RECIPIENTS_FILE  public keys of age to encrypt for, one a line; unset: not encrypted
#   BACKUP_AGE_IDENTITY_FILE    the private key, to try that it can be decrypted; better kept elsewhere
#   BACKUP_UPLOAD_COMMAND    run by sh with each file as "$1": aws s3 cp "$1" s3://bucket/edgemesh/
#   BACKUP_NOTIFY_COMMAND    run by sh when it failed, with what happened on its standard input
#   BACKUP_METRICS_DIR       where node-exporter looks for text files; unset: no metrics
#   BACKUP_SCRATCH_DIR       where it is restored for the test, with room for the whole database (BACKUP_DIR)
#   BACKUP_POSTGRES_BIN      PostgreSQL's programs (the newest of /usr/lib/postgresql)
#
# Exit codes: 0 there is a new backup, 1 there is none, or it was not uploaded; 2 a setting is wrong; 3 another backup is running.
set -Eeuo pipefail
umask 077
# shellcheck source-path=SCRIPTDIR source=postgres.sh
. "$(dirname "${BASH_SOURCE[0]}")/postgres.sh"

step='reading the settings'
programs=(pg_dump pg_restore psql createdb initdb pg_ctl)
scratch=
socket=

finish() {
  local status=$?
  trap - EXIT
  # A signal that comes meanwhile would leave half of this behind.
  trap '' INT TERM HUP
  stop_scratch "$scratch"
  [ -z "$work" ] || rm -rf "$work"
  [ -z "$scratch" ] || rm -rf "$scratch"
  [ -z "$socket" ] || rm -rf "$socket"
  if [ "$status" -ne 0 ]; then notify "$status" "${failure:-failed while $step}"; fi
  exit "$status"
}
trap finish EXIT
# A program that is gone is told by what it has not answered.
trap '' PIPE
# The trap above sees these as failures of their own.
trap 'fail 1 "was interrupted while $step"' INT TERM HUP

notify() {
  [ -n "${failure:-}" ] || printf 'error: %s\n' "$2" >&2
  [ -n "${BACKUP_NOTIFY_COMMAND:-}" ] || return 0
  printf 'EdgeMesh backup failed on %s (exit code %s): %s\n' "$HOSTNAME" "$1" "$2" |
    sh -c "$BACKUP_NOTIFY_COMMAND" >&2 || printf 'error: BACKUP_NOTIFY_COMMAND has failed, too\n' >&2
}

stop_scratch() { # FOLDER
  [ -n "$1" ] && [ -e "$1/data/postmaster.pid" ] || return 0
  "$bin/pg_ctl" stop -D "$1/data" -m immediate -w -t 60 >/dev/null 2>&1 || true
}

main() {
  local started=$SECONDS
  read_settings
  take_lock
  sweep
  step='connecting to the database'
  open_snapshot
  step='counting the rows'
  count_source
  step='dumping the database'
  dump
  close_snapshot
  step='restoring the dump to see that it can be'
  verify
  step='encrypting the dump'
  encrypt
  step='keeping the backup'
  keep
  step='uploading the backup'
  upload
  step='deleting old backups'
  prune
  step='writing the metrics'
  write_metrics $((SECONDS - started))
  say "$name: $bytes bytes, $(wc -l <"$work/source") tables, $rows rows, restored and counted, $((SECONDS - started)) s"
}

read_settings() {
  [ "$(id -u)" -ne 0 ] || fail 2 'PostgreSQL refuses to be run by root, and this restores into a PostgreSQL' \
    'run it as a user of its own: docs/backup.md'
  directory=${BACKUP_DIR:-/var/backups/edgemesh}
  keep_days=${BACKUP_KEEP_DAYS:-30}
  demand_number BACKUP_KEEP_DAYS "$keep_days" 1
  demand_folder BACKUP_DIR "$directory"
  scratch_directory=${BACKUP_SCRATCH_DIR:-$directory}
  demand_folder BACKUP_SCRATCH_DIR "$scratch_directory"
  recipients=${BACKUP_AGE_RECIPIENTS_FILE:-}
  identity=${BACKUP_AGE_IDENTITY_FILE:-}
  [ -z "$recipients" ] || demand_readable BACKUP_AGE_RECIPIENTS_FILE "$recipients"
  if [ -n "$identity" ]; then
    [ -n "$recipients" ] || fail 2 'BACKUP_AGE_IDENTITY_FILE is given without BACKUP_AGE_RECIPIENTS_FILE: nothing is encrypted'
    demand_readable BACKUP_AGE_IDENTITY_FILE "$identity"
  fi
  [ -z "$recipients" ] || command -v age >/dev/null || fail 2 'BACKUP_AGE_RECIPIENTS_FILE needs age' 'apt-get install age'
  metrics=${BACKUP_METRICS_DIR:-}
  [ -z "$metrics" ] || demand_folder BACKUP_METRICS_DIR "$metrics"
  read_database_url
  find_programs "${programs[@]}"
}

demand_folder() { # NAME PATH
  if [ ! -d "$2" ] || [ ! -w "$2" ]; then
    fail 2 "$1 is no folder that $(id -un) may write to: $2" "install -d -m 700 -o $(id -un) $2"
  fi
}

take_lock() {
  exec {lock}>"$directory/.lock"
  flock --nonblock "$lock" || fail 3 "another backup is running into $directory"
}

# What one that was killed has left. Whoever holds the lock is alone.
sweep() {
  local left
  for left in "$directory"/.work.* "$scratch_directory"/.scratch.*; do
    [ -d "$left" ] || continue
    stop_scratch "$left"
    if [ -L "$left/socket" ]; then rm -rf "$(readlink "$left/socket")"; fi
    rm -rf "$left"
  done
  work=$(mktemp -d "$directory/.work.XXXXXXXX")
}

# A transaction that is kept open: what it has counted is what pg_dump sees, however much is written meanwhile. Its locks keep
# partitions from being dropped, and nobody from reading and writing.
open_snapshot() {
  local server dumps
  coproc PSQL { exec "$bin/psql" -XqAt -F $'\t' -v ON_ERROR_STOP=1 --no-password {lock}>&- 2>"$work/said"; }
  # Bash forgets these once it has seen that psql has gone.
  psql_pid=${PSQL_PID:-} to_psql=${PSQL[1]:-} from_psql=${PSQL[0]:-}
  ask 'set statement_timeout = 0; set idle_in_transaction_session_timeout = 0; set lock_timeout = 60000;'
  ask "select current_setting('server_version_num')::int / 10000;"
  server=$answer
  prefer_programs "$server" "${programs[@]}"
  dumps=$(major pg_dump)
  ((dumps >= server)) || fail 1 "pg_dump $dumps can't dump a PostgreSQL $server: $bin" \
    "apt-get install postgresql-$server, or set BACKUP_POSTGRES_BIN to programs of version $server or newer"
  ask "select count(*) from pg_class c join pg_namespace n on n.oid = c.relnamespace where $ours and c.relname = 'devices';"
  [ "$answer" != 0 ] || fail 1 "the database $PGDATABASE has no table devices: it is not EdgeMesh's" 'see DATABASE_URL'
  ask "select 'lock table ' || string_agg(format('%I.%I', nspname, relname), ', ') || ' in access share mode;'
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where $ours and c.relkind in ('r', 'p');"
  ask "begin isolation level repeatable read read only; $answer"
  ask 'select pg_export_snapshot();'
  snapshot=$answer
  database=$PGDATABASE
  # The moment of the snapshot, by the database's clock.
  ask "select extract(epoch from now())::bigint;"
  taken=$answer
  ask 'show server_encoding;'
  encoding=$answer
  ask 'show server_version;'
  printf 'server\t%s\n' "$answer" >"$work/facts"
  ask "select name from migrations order by id desc limit 1;"
  printf 'migration\t%s\n' "$answer" >>"$work/facts"
}

# ask STATEMENT → answer: the rows, of one column as they are, of several with tabs.
ask() {
  local line end='-- that was all --'
  answer=
  # Not \echo, whose output psql keeps until there is more.
  { printf "%s\nselect '%s';\n" "$1" "$end" >&"$to_psql"; } 2>/dev/null || lost_psql
  while IFS= read -r line <&"$from_psql"; do
    [ "$line" != "$end" ] || return 0
    answer+=${answer:+$'\n'}$line
  done
  lost_psql
}

lost_psql() {
  wait "$psql_pid" 2>/dev/null || true
  fail 1 "the database has failed: $(tail -n 3 "$work/said" | tr '\n' ' ')"
}

close_snapshot() {
  ask 'rollback;'
  exec {to_psql}>&- {from_psql}<&-
  wait "$psql_pid" 2>/dev/null || true
}

counting="select format('select %L, count(*) from only %1\$s', format('%I.%I', nspname, relname)) from pg_class c
  join pg_namespace n on n.oid = c.relnamespace where $ours and c.relkind = 'r' order by nspname, relname"

count_source() {
  ask "$counting \\gexec"
  printf '%s\n' "$answer" >"$work/source"
  rows=$(awk -F '\t' '{ sum += $2 } END { print sum + 0 }' "$work/source")
  # Whom rights are given to. Dumps have the rights, but not the roles.
  ask "select distinct r.rolname from (
      select relowner as owner, relacl as acl, relnamespace as schema from pg_class
      union all select c.relowner, a.attacl, c.relnamespace from pg_attribute a join pg_class c on c.oid = a.attrelid where a.attacl is not null
      union all select proowner, proacl, pronamespace from pg_proc
      union all select nspowner, nspacl, oid from pg_namespace
    ) o cross join lateral aclexplode(o.acl) a join pg_namespace n on n.oid = o.schema
    join pg_roles r on r.oid = a.grantee and r.oid <> o.owner
    where n.nspname !~ '^pg_' and n.nspname <> 'information_schema' and r.rolname !~ '^pg_' order by 1;"
  [ -z "$answer" ] || while IFS= read -r role; do printf 'role\t%s\n' "$role"; done <<<"$answer" >>"$work/facts"
}

dump() {
  attempt 'pg_dump has failed' "$bin/pg_dump" --format=custom --compress=6 --snapshot="$snapshot" --lock-wait-timeout=60000 \
    --no-password --file="$work/dump"
}

# Restored whole, into a server that nobody but us can reach, and that is gone afterwards.
verify() {
  scratch=$(mktemp -d "$scratch_directory/.scratch.XXXXXXXX")
  # The path of a socket has room for 107 bytes.
  socket=$(mktemp -d /tmp/edgemesh-backup.XXXXXXXX)
  ln -s "$socket" "$scratch/socket"
  attempt 'no server could be made to restore into' at_scratch initdb -D "$scratch/data" --username=postgres --auth=trust \
    --locale=C --encoding="$encoding" --no-sync >/dev/null
  local options="-c listen_addresses='' -c unix_socket_directories=$socket -c unix_socket_permissions=0700 -c fsync=off"
  options+=" -c full_page_writes=off -c wal_level=minimal -c max_wal_senders=0 -c autovacuum=off -c max_connections=10"
  # All in one transaction: as many locks as a year of partitions needs.
  options+=" -c max_locks_per_transaction=4096"
  # It must not keep our lock if we are killed.
  at_scratch pg_ctl start -D "$scratch/data" -w -t 120 -l "$scratch/log" -o "$options" >/dev/null 2>&1 {lock}>&- ||
    fail 1 "the server to restore into has not started: $(tail -n 3 "$scratch/log" | tr '\n' ' ')"
  local role
  while IFS=$'\t' read -r _ role; do
    at_scratch psql -Xq -v role="$role" <<<'create role :"role"' >"$work/said" 2>&1 ||
      fail 1 "the role $role could not be made for the test: $(tail -n 3 "$work/said" | tr '\n' ' ')"
  done < <(grep '^role' "$work/facts" || true)
  at_scratch createdb restored --template=template0 2>"$work/said" ||
    fail 1 "the dump has nowhere to be restored into: $(tail -n 3 "$work/said" | tr '\n' ' ')"
  attempt 'the dump can not be restored' at_scratch pg_restore --exit-on-error --no-owner --dbname=restored "$work/dump"
  attempt 'the restored rows can not be counted' at_scratch psql -XqAt -F $'\t' -v ON_ERROR_STOP=1 -d restored \
    <<<"$counting \\gexec" >"$work/restored"
  cmp -s "$work/source" "$work/restored" ||
    fail 1 "what was restored is not what was dumped: $(diff "$work/source" "$work/restored" | grep '^[<>]' | head -n 6 | tr '\n\t' '; ')"
  stop_scratch "$scratch"
  rm -rf "$scratch" "$socket"
  scratch=
  socket=
}

at_scratch() (
  program=$1
  shift
  unset "${!PG@}"
  export PGHOST=$socket PGUSER=postgres PGDATABASE=postgres
  exec "$bin/$program" "$@"
)

encrypt() {
  name=edgemesh_$(date -u -d "@$taken" +%Y%m%dT%H%M%SZ)
  file=$name.dump
  [ -n "$recipients" ] || return 0
  attempt 'age could not encrypt' age --encrypt --recipients-file "$recipients" --output "$work/encrypted" "$work/dump"
  if [ -n "$identity" ]; then
    attempt 'age could not decrypt what it has encrypted' age --decrypt --identity "$identity" --output "$work/decrypted" "$work/encrypted"
    cmp -s "$work/dump" "$work/decrypted" || fail 1 'what age has decrypted is not what it was given'
    rm "$work/decrypted"
  fi
  mv "$work/encrypted" "$work/dump"
  file=$name.dump.age
}

# The manifest comes last: what has one is whole.
keep() {
  bytes=$(stat -c %s "$work/dump")
  if [ -e "$directory/$file" ] || [ -e "$directory/$name.manifest" ]; then fail 1 "there is a $name already"; fi
  {
    printf 'edgemesh-backup\t1\n'
    printf 'file\t%s\nsha256\t%s\nbytes\t%s\n' "$file" "$(sha256sum <"$work/dump" | cut -d ' ' -f 1)" "$bytes"
    printf 'taken\t%s\ndatabase\t%s\n' "$(date -u -d "@$taken" +%Y-%m-%dT%H:%M:%SZ)" "$database"
    cat "$work/facts"
    sed 's/^/table\t/' "$work/source"
  } >"$work/manifest"
  sync "$work/dump" "$work/manifest"
  mv "$work/dump" "$directory/$file"
  mv "$work/manifest" "$directory/$name.manifest"
  sync "$directory"
}

upload() {
  [ -n "${BACKUP_UPLOAD_COMMAND:-}" ] || return 0
  local each
  for each in "$directory/$file" "$directory/$name.manifest"; do
    # It has no need of the database's password.
    (unset "${!PG@}" && exec sh -c "$BACKUP_UPLOAD_COMMAND" upload "$each" {lock}>&-) >&2 ||
      fail 1 "BACKUP_UPLOAD_COMMAND has failed for $each" 'the backup is whole, but only here'
  done
}

# By the moment in the name: a copy has another date.
prune() {
  local oldest old stamp
  oldest=$(date -u -d "@$((taken - keep_days * 86400))" +%Y%m%dT%H%M%SZ)
  # A manifest goes before its dump, so that what has one is whole.
  for old in "$directory"/edgemesh_*Z.manifest "$directory"/edgemesh_*Z.dump "$directory"/edgemesh_*Z.dump.age; do
    [[ ${old##*/} =~ ^edgemesh_([0-9]{8}T[0-9]{6}Z)\. ]] || continue
    stamp=${BASH_REMATCH[1]}
    if [[ $stamp < $oldest ]]; then
      rm -f "$old"
      say "deleted ${old##*/}, which is older than $keep_days days"
    fi
  done
}

write_metrics() { # SECONDS
  [ -n "$metrics" ] || return 0
  local next=$metrics/.edgemesh_backup.$$
  cat >"$next" <<METRICS
# HELP edgemesh_backup_last_success_timestamp_seconds Of when the newest backup is that was restored, counted and uploaded.
# TYPE edgemesh_backup_last_success_timestamp_seconds gauge
edgemesh_backup_last_success_timestamp_seconds $taken
# HELP edgemesh_backup_size_bytes How large it is, compressed.
# TYPE edgemesh_backup_size_bytes gauge
edgemesh_backup_size_bytes $bytes
# HELP edgemesh_backup_rows Rows in it.
# TYPE edgemesh_backup_rows gauge
edgemesh_backup_rows $rows
# HELP edgemesh_backup_duration_seconds How long it took, the test included.
# TYPE edgemesh_backup_duration_seconds gauge
edgemesh_backup_duration_seconds $1
METRICS
  # node-exporter is another user.
  chmod 644 "$next"
  mv "$next" "$metrics/edgemesh_backup.prom"
}

# For edgemesh-backup-failed.service: however the backup has ended, what it has said and how systemd calls that.
tell_failed() {
  trap - EXIT
  printf 'EdgeMesh backup failed on %s (%s): the last it has said is\n%s\n' "$HOSTNAME" "${MONITOR_SERVICE_RESULT:-failed}" \
    "$(journalctl --unit=edgemesh-backup.service --lines=10 --output=cat --no-pager 2>&1 || true)" |
    sh -c "${BACKUP_NOTIFY_COMMAND:-cat}"
}

case $# in
  0) main ;;
  *) if [ "$*" = --tell-failed ]; then tell_failed; else fail 2 "it takes no arguments, but settings from the environment: see $0"; fi ;;
esac
