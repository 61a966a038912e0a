# shellcheck shell=bash
# What backup.sh and restore.sh share, read by both: how a mistake is told, where the database is, and PostgreSQL's programs.

# The reason of a failure, for the notice.
# shellcheck disable=SC2034
failure=
# A folder for what is not to stay.
work=

# fail EXIT-CODE MESSAGE [HINT]: 2 is a mistake in what was given, 1 everything else.
fail() {
  failure=$2
  printf 'error: %s\n' "$2" >&2
  [ -z "${3:-}" ] || printf 'hint: %s\n' "$3" >&2
  exit "$1"
}

say() { printf '%s\n' "$*"; }

# attempt WHAT COMMAND…: runs it and fails with the last that it has said. Programs of PostgreSQL name no passwords in errors.
attempt() {
  local what=$1
  shift
  "$@" 2>"$work/said" || fail 1 "$what: $(tail -n 3 "$work/said" | tr '\n' ' ')"
}

# A whole number of its own bounds, or a mistake of the setting NAME.
demand_number() { # NAME VALUE MIN
  if [[ ! $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3)); then fail 2 "$1 must be a whole number, $3 or more"; fi
}

demand_readable() { # NAME PATH
  [ -r "$2" ] || fail 2 "$1 names a file that can't be read: $2"
}

# unescaped TEXT → decoded: percent-decoded, or as it is where a % in it begins no escape: then it was meant plainly.
unescaped() {
  decoded=$1
  [[ ! $1 =~ %([^0-9a-fA-F]|.[^0-9a-fA-F]|.?$) ]] || return 0
  # Backslashes are its own to %b, too.
  decoded=${1//\\/\\\\}
  printf -v decoded '%b' "${decoded//%/\\x}"
}

# read_database_url: DATABASE_URL, or the file that DATABASE_URL_FILE names, into the variables of libpq, so that no password is
# among the arguments of a program. It is read as EdgeMesh reads it: docs/database.md.
read_database_url() {
  local url=${DATABASE_URL:-} account hosts parameters pair name value
  if [ -n "${DATABASE_URL_FILE:-}" ]; then
    [ -z "$url" ] || fail 2 'DATABASE_URL and DATABASE_URL_FILE are both given; leave one of them out'
    demand_readable DATABASE_URL_FILE "$DATABASE_URL_FILE"
    url=$(<"$DATABASE_URL_FILE")
  fi
  # What runs from here on is told where the database is by the variables of libpq.
  unset DATABASE_URL "${!PG@}"
  [ -n "$url" ] || fail 2 'DATABASE_URL is not set' 'DATABASE_URL=postgresql://user:password@host:5432/edgemesh, or DATABASE_URL_FILE'
  [[ $url =~ ^(postgres|postgresql|postgresql\+asyncpg)://(.*)$ ]] || fail 2 'DATABASE_URL must begin with postgresql://'
  url=${BASH_REMATCH[2]}
  # A password may have slashes that nobody has escaped, but no @.
  if [[ $url == *@* ]]; then
    account=${url%%@*}
    url=${url#*@}
    unescaped "${account%%:*}"
    export PGUSER=$decoded
    if [[ $account == *:* ]]; then
      unescaped "${account#*:}"
      export PGPASSWORD=$decoded
    fi
  fi
  parameters=
  if [[ $url == *\?* ]]; then
    parameters=${url#*\?}
    url=${url%%\?*}
  fi
  [[ $url == */?* ]] || fail 2 'DATABASE_URL names no database: end it with /edgemesh'
  unescaped "${url#*/}"
  export PGDATABASE=$decoded
  hosts=${url%%/*}
  read_hosts "$hosts"
  while [ -n "$parameters" ]; do
    pair=${parameters%%&*}
    [[ $parameters == *\&* ]] && parameters=${parameters#*&} || parameters=
    name=${pair%%=*}
    unescaped "${pair#*=}"
    value=$decoded
    case $name in
      host) export PGHOST=$value ;;
      port) export PGPORT=$value ;;
      ssl | sslmode) read_ssl_mode "$value" ;;
      sslrootcert) export PGSSLROOTCERT=$value ;;
      sslcert) export PGSSLCERT=$value ;;
      sslkey) export PGSSLKEY=$value ;;
      connect_timeout) export PGCONNECT_TIMEOUT=$value ;;
      target_session_attrs) export PGTARGETSESSIONATTRS=$value ;;
      application_name | uselibpqcompat) ;;
      *) fail 2 "DATABASE_URL has a parameter that is not known here: $name" ;;
    esac
  done
  [ -n "${PGHOST:-}" ] || fail 2 'DATABASE_URL names no host'
  # EdgeMesh believes the authorities of the system; libpq looks in the home of the user unless it is told.
  local system=/etc/ssl/certs/ca-certificates.crt
  if [[ ${PGSSLMODE:-} == verify-* && -z ${PGSSLROOTCERT:-} && -r $system ]]; then export PGSSLROOTCERT=$system; fi
  export PGCONNECT_TIMEOUT=${PGCONNECT_TIMEOUT:-10} PGAPPNAME="edgemesh ${0##*/}"
}

# read_hosts one:5432,two:5432: an IPv6 address is in brackets, which libpq does not want.
read_hosts() {
  local server servers names=() ports=()
  [ -n "$1" ] || return 0
  IFS=, read -ra servers <<<"$1"
  for server in "${servers[@]}"; do
    [[ $server =~ ^(\[([0-9a-fA-F:.]+)\]|([^]:[]+))(:([0-9]{1,5}))?$ ]] ||
      fail 2 'DATABASE_URL must name its servers as host:5432, or host:5432,host:5432'
    names+=("${BASH_REMATCH[2]:-${BASH_REMATCH[3]}}")
    ports+=("${BASH_REMATCH[5]:-5432}")
  done
  PGHOST=$(IFS=,; echo "${names[*]}")
  PGPORT=$(IFS=,; echo "${ports[*]}")
  export PGHOST PGPORT
}

read_ssl_mode() {
  case ${1,,} in
    disable | false) export PGSSLMODE=disable ;;
    require | verify-ca | verify-full) export PGSSLMODE=${1,,} ;;
    true) export PGSSLMODE=verify-full ;;
    *) fail 2 'ssl of DATABASE_URL must be disable, require, verify-ca or verify-full' ;;
  esac
}

# find_programs PROGRAM…: sets `bin` to the folder of the newest PostgreSQL that has them all, or to what BACKUP_POSTGRES_BIN names.
find_programs() {
  local candidate program
  bin=
  if [ -n "${BACKUP_POSTGRES_BIN:-}" ]; then
    for program; do
      [ -x "$BACKUP_POSTGRES_BIN/$program" ] || fail 2 "BACKUP_POSTGRES_BIN has no $program: $BACKUP_POSTGRES_BIN"
    done
    bin=$BACKUP_POSTGRES_BIN
    return
  fi
  while IFS= read -r candidate; do
    for program; do
      [ -x "$candidate/$program" ] || continue 2
    done
    bin=$candidate
    return
  done < <(printf '%s\n' /usr/lib/postgresql/*/bin /usr/pgsql-*/bin | sort -rV)
  fail 2 "no PostgreSQL with ${*} is on this machine" \
    "apt-get install postgresql-NN of the server's version, or set BACKUP_POSTGRES_BIN to the folder of its programs"
}

# prefer_programs VERSION PROGRAM…: those of the server's own version where they are all here. A dump is read by programs of the version
# that has made it, or newer ones, and who restores has those of the server.
prefer_programs() {
  local folder=/usr/lib/postgresql/$1/bin program
  shift
  [ -z "${BACKUP_POSTGRES_BIN:-}" ] || return 0
  for program; do
    [ -x "$folder/$program" ] || return 0
  done
  bin=$folder
}

# major PROGRAM: 15 of “pg_dump (PostgreSQL) 15.18 (Debian …)”
major() {
  local said
  said=$("$bin/$1" --version)
  [[ $said =~ \)\ ([0-9]+) ]] && echo "${BASH_REMATCH[1]}"
}

# Rows of each table of its own, partitions one by one, as statements for \gexec. Names are quoted as SQL wants them.
# shellcheck disable=SC2034 # read by who reads this file
ours="n.nspname !~ '^pg_' and n.nspname <> 'information_schema' and c.relpersistence <> 't'"
