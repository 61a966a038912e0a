#!/usr/bin/env bash
# Brings EdgeMesh's database back from a backup of backup.sh: all of it, counted, or nothing. docs/backup.md tells it step by step.
#
#   restore.sh FILE                     into a database that is empty, as the owner of the tables to be
#   restore.sh --replace DATABASE FILE  into one that has something in it, which is gone then: its name says that you mean it
#   restore.sh --check FILE             only looks whether the file is whole and can be read
#
# FILE is edgemesh_….dump or edgemesh_….dump.age, with its .manifest beside it. Settings, by the environment:
#
#   DATABASE_URL              or DATABASE_URL_FILE: the database to restore into, as the owner of the tables
#   BACKUP_AGE_IDENTITY_FILE  the private key for .age
#   BACKUP_POSTGRES_BIN       PostgreSQL's programs (the newest of /usr/lib/postgresql)
#
# Exit codes: 0 restored, 1 not, and nothing has changed; 2 what was given is wrong.
set -Eeuo pipefail
umask 077
# shellcheck source-path=SCRIPTDIR source=postgres.sh
. "$(dirname "${BASH_SOURCE[0]}")/postgres.sh"

trap '[ -z "$work" ] || rm -rf "$work"' EXIT
trap 'fail 1 "was interrupted; nothing has changed"' INT TERM HUP
trap '' PIPE

usage='usage: restore.sh [--check] [--replace DATABASE] FILE'

main() {
  read_arguments "$@"
  [ -n "$check_only" ] || read_database_url
  find_programs pg_restore psql
  # Not /tmp, where there may be no room: a dump that has to be decrypted is as large as the file.
  work=$(mktemp -d "${TMPDIR:-/var/tmp}/edgemesh-restore.XXXXXXXX")
  check_file
  if [ -n "$check_only" ]; then
    say "$file is whole: $tables tables and $rows rows, as of $taken"
    return
  fi
  check_target
  restore
  tell_what_is_left
}

read_arguments() {
  check_only=
  replace=
  file=
  while [ $# -gt 0 ]; do
    case $1 in
      --check) check_only=yes ;;
      --replace)
        [ $# -gt 1 ] || fail 2 '--replace needs the name of the database' "$usage"
        replace=$2
        shift
        ;;
      -h | --help)
        sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$0"
        exit 0
        ;;
      -*) fail 2 "$1 is not known" "$usage" ;;
      *)
        [ -z "$file" ] || fail 2 'more than one file is given' "$usage"
        file=$1
        ;;
    esac
    shift
  done
  [ -n "$file" ] || fail 2 'no file is given' "$usage"
  [[ $file =~ ^(.*)\.dump(\.age)?$ ]] || fail 2 "$file is no dump of backup.sh: they end with .dump or .dump.age"
  manifest=${BASH_REMATCH[1]}.manifest
  encrypted=${BASH_REMATCH[2]}
  demand_readable FILE "$file"
  [ -r "$manifest" ] || fail 1 "$manifest is not there: a backup without it was never finished, or was copied without it" \
    'copy the manifest from where the backup is'
}

# fact NAME: what the manifest says.
fact() { awk -F '\t' -v name="$1" '$1 == name { print $2 }' "$manifest"; }

check_file() {
  [ "$(head -n 1 "$manifest")" = $'edgemesh-backup\t1' ] || fail 1 "$manifest is not a manifest of this version of backup.sh"
  [ "$(sha256sum <"$file" | cut -d ' ' -f 1)" = "$(fact sha256)" ] ||
    fail 1 "$file is not as backup.sh has left it: its SHA-256 is another than in its manifest" 'copy it anew, or take another backup'
  dump=$file
  if [ -n "$encrypted" ]; then
    command -v age >/dev/null || fail 2 "$file is encrypted, and age is not on this machine" 'apt-get install age'
    [ -n "${BACKUP_AGE_IDENTITY_FILE:-}" ] || fail 2 "$file is encrypted: BACKUP_AGE_IDENTITY_FILE must name the private key"
    demand_readable BACKUP_AGE_IDENTITY_FILE "$BACKUP_AGE_IDENTITY_FILE"
    dump=$work/dump
    attempt "$file can not be decrypted" age --decrypt --identity "$BACKUP_AGE_IDENTITY_FILE" --output "$dump" "$file"
  fi
  "$bin/pg_restore" --list "$dump" >/dev/null 2>"$work/said" ||
    fail 1 "$file can not be read by pg_restore of $bin: $(tail -n 3 "$work/said" | tr '\n' ' ')" \
      "it is of a PostgreSQL $(fact server): install its programs or newer ones, or name them by BACKUP_POSTGRES_BIN"
  taken=$(fact taken)
  tables=$(grep -c '^table' "$manifest")
  rows=$(awk -F '\t' '$1 == "table" { sum += $3 } END { print sum + 0 }' "$manifest")
}

query() { "$bin/psql" -XqAt -F $'\t' -v ON_ERROR_STOP=1 --no-password "$@"; }

check_target() {
  local others before server missing=() role
  # Of several servers the one that takes writes.
  export PGTARGETSESSIONATTRS=read-write
  attempt "the database can not be reached" query <<<"select current_setting('server_version_num')::int / 10000, current_database()" >"$work/target"
  IFS=$'\t' read -r server database <"$work/target"
  before=$(fact server)
  ((server >= ${before%%.*})) ||
    fail 1 "the backup is of a PostgreSQL $before, and this is a PostgreSQL $server, which is older" 'restore into that version or a newer one'

  while IFS= read -r role; do
    [ "$(query -v role="$role" <<<"select count(*) from pg_roles where rolname = :'role'")" = 1 ] || missing+=("$role")
  done < <(fact role)
  if [ ${#missing[@]} -gt 0 ]; then
    fail 1 "roles that have rights in the backup are not here: ${missing[*]}" \
      "dumps have no roles and no passwords: as a superuser, create role ${missing[0]} login, then \\password ${missing[0]}"
  fi

  # Whoever goes on meanwhile would go on from what is not there any more. A monitor that only looks may stay.
  sessions="from pg_stat_activity s left join pg_roles r on r.oid = s.usesysid
    where s.datname = current_database() and s.pid <> pg_backend_pid() and s.backend_type = 'client backend'
      and (r.rolsuper or not pg_has_role(s.usesysid, 'pg_monitor', 'member'))"
  others=$(query <<<"select string_agg(distinct s.usename, ', ') $sessions")
  [ -z "$others" ] || fail 1 "$database is in use, by: $others" 'stop all instances of EdgeMesh and everybody else: docs/backup.md'

  if [ "$(query <<<"select count(*) from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where $ours and c.relkind in ('r', 'p', 'v', 'm', 'S', 'f')
      and not exists (select from pg_depend d where d.objid = c.oid and d.classid = 'pg_class'::regclass and d.deptype = 'e')")" = 0 ]; then
    replace=
  elif [ -z "$replace" ]; then
    fail 1 "$database is not empty" "to give up all that is in it: restore.sh --replace $database $file"
  elif [ "$replace" != "$database" ]; then
    fail 2 "--replace names $replace, and DATABASE_URL names $database"
  fi
}

# One transaction: whoever looks sees what was there before, or all of the backup. It ends only after the last has been counted:
# if pg_restore or we die, there is no commit.
restore() {
  say "restoring $file, as of $taken, into $database"
  {
    printf 'begin;\nset client_min_messages = error;\n' &&
      clear_if_replaced &&
      "$bin/pg_restore" --no-owner --file=- "$dump" &&
      count_restored &&
      printf 'commit;\n'
  } 2>"$work/read" | query >/dev/null 2>"$work/said" || fail_restored
  attempt "$database is restored, but not analyzed; run analyze in it" query <<<'set client_min_messages = error; analyze'
}

fail_restored() {
  local hint=
  if grep -q 'max_locks_per_transaction' "$work/said"; then
    hint="set max_locks_per_transaction to $((tables + 64)) in postgresql.conf, restart PostgreSQL, and do this again"
  fi
  # What psql says first is the cause; the rest follows from it.
  fail 1 "nothing was restored and nothing has changed: $(grep -hv '^CONTEXT' "$work/read" "$work/said" | head -n 3 | tr '\n' ' ')" "$hint"
}

# Schemas go with all that is in them, and public comes back as PostgreSQL makes it; what it is allowed is in the dump.
clear_if_replaced() {
  [ -n "$replace" ] || return 0
  cat <<'SQL'
do $clear$
declare
  old record;
begin
  for old in
    select n.nspname as name, n.nspowner::regrole::text as owner from pg_namespace n
    where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
      and not exists (select from pg_depend d where d.objid = n.oid and d.classid = 'pg_namespace'::regclass and d.deptype = 'e')
  loop
    execute format('drop schema %I cascade', old.name);
    if old.name = 'public' then
      execute format('create schema public authorization %s', old.owner);
      grant usage on schema public to public;
    end if;
  end loop;
end $clear$;
SQL
}

count_restored() {
  printf 'create temp table backup_expects (name text, rows bigint) on commit drop;\ncopy pg_temp.backup_expects from stdin;\n'
  # COPY reads a backslash as the beginning of an escape.
  awk -F '\t' '$1 == "table" { gsub(/\\/, "\\\\", $2); print $2 "\t" $3 }' "$manifest"
  cat <<SQL
\\.
do \$count\$
declare
  expected record;
  found bigint;
begin
  for expected in select * from pg_temp.backup_expects loop
    execute format('select count(*) from only %s', expected.name) into found;
    if found <> expected.rows then
      raise exception 'table % has % rows, and had % when the backup was taken', expected.name, found, expected.rows;
    end if;
  end loop;
  if exists (select $sessions) then
    raise exception 'somebody has connected to the database meanwhile: stop all instances of EdgeMesh';
  end if;
end \$count\$;
SQL
}

tell_what_is_left() {
  cat <<TEXT
restored: $tables tables and $rows rows, each counted, as of $taken

What is left to do, before devices reach an instance (docs/backup.md):
  1. edgemesh migrate up     as the owner of the tables: their schema, and what the servers' role may do
  2. edgemesh audit verify   the log is whole, up to $taken
  3. take back again what was taken back since then: devices, operators and tokens that were revoked count as good in here
  4. start the instances, all of them anew; then take a backup
TEXT
}

main "$@"
