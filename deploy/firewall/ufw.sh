#!/usr/bin/env bash
# The firewall of a host, with ufw: ufw.sh ROLE..., where a host may have several roles:
#
#   balancer     devices come from anywhere to 8000
#   api          8000 from balancers, 9090 (metrics, readiness) from balancers and monitoring, 8282 (OPA) from monitoring
#   database     5432 from API and database servers, 9187 (postgres-exporter) from monitoring
#   monitoring   3000 (Grafana), 9090 (Prometheus) and 9093 (Alertmanager) from administrators
#
# Everything else that comes in is refused; what goes out is let go. SSH is let in from ADMIN_NETWORK before the firewall closes, so
# set it right: from elsewhere nobody gets in any more. Run again, it changes nothing. --dry-run shows what would be done.
#
#   ADMIN_NETWORK       10.0.0.0/24
#   API_NETWORK         10.0.1.0/24, database servers too
#   MONITORING_NETWORK  10.0.2.0/24
#   BALANCER_NETWORK    10.0.3.0/24
#   SSH_PORT            22
set -euo pipefail
usage() {
  sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "$0"
  exit "${1:-0}"
}
admin=${ADMIN_NETWORK:-10.0.0.0/24}
api=${API_NETWORK:-10.0.1.0/24}
monitoring=${MONITORING_NETWORK:-10.0.2.0/24}
balancer=${BALANCER_NETWORK:-10.0.3.0/24}
ufw=(ufw)
roles=()
for word in "$@"; do
  case $word in
    -h | --help) usage ;;
    --dry-run) ufw=(echo ufw) ;;
    balancer | api | database | monitoring) roles+=("$word") ;;
    *)
      echo "error: '$word' is no role: balancer, api, database, monitoring" >&2
      exit 2
      ;;
  esac
done
[ ${#roles[@]} -gt 0 ] || usage 2 >&2
for network in "$admin" "$api" "$monitoring" "$balancer"; do
  [[ $network =~ ^[0-9a-fA-F.:]+/[0-9]{1,3}$ ]] || {
    echo "error: '$network' is no network such as 10.0.1.0/24" >&2
    exit 2
  }
done
if [ "${ufw[0]}" = ufw ]; then
  command -v ufw >/dev/null || { echo 'error: ufw is not installed: apt install ufw' >&2; exit 1; }
  [ "$(id -u)" = 0 ] || { echo 'error: only root changes the firewall: sudo' >&2; exit 1; }
fi
from() { # NETWORK PORT COMMENT
  "${ufw[@]}" allow proto tcp from "$1" to any port "$2" comment "$3"
}

"${ufw[@]}" default deny incoming
"${ufw[@]}" default deny routed
"${ufw[@]}" default allow outgoing
from "$admin" "${SSH_PORT:-22}" 'SSH'
from "$monitoring" 9100 'node-exporter'
for role in "${roles[@]}"; do
  case $role in
    balancer) "${ufw[@]}" allow 8000/tcp comment 'EdgeMesh' ;;
    api)
      from "$balancer" 8000 'EdgeMesh'
      from "$balancer" 9090 'EdgeMesh readiness'
      from "$monitoring" 9090 'EdgeMesh metrics'
      from "$monitoring" 8282 'OPA metrics'
      ;;
    database)
      from "$api" 5432 'PostgreSQL'
      from "$monitoring" 9187 'postgres-exporter'
      ;;
    monitoring)
      from "$admin" 3000 'Grafana'
      from "$admin" 9090 'Prometheus'
      from "$admin" 9093 'Alertmanager'
      ;;
  esac
done
"${ufw[@]}" --force enable
