/** Every check of `edgemesh doctor`, in the order in which findings are told: what others rest on first. */
import { backupCheck } from './backup.ts'
import { authorityCheck, serverCertificateCheck } from './certificates.ts'
import {
  databaseCheck,
  databaseClockCheck,
  databaseConnectionsCheck,
  databaseDurabilityCheck,
  databaseLatencyCheck,
  databaseNotificationsCheck,
  databaseTlsCheck,
} from './database.ts'
import type { Check } from './finding.ts'
import { instanceCheck, instanceLatencyCheck } from './instance.ts'
import { clockCheck, memoryCheck, nodeCheck, openFilesCheck } from './machine.ts'
import { opaGuardCheck, policyCheck } from './policy.ts'
import { metricsExposureCheck, portsCheck } from './ports.ts'
import { idleCheck, publicAddressCheck } from './public-address.ts'
import { replicasCheck } from './replicas.ts'
import {
  auditWritersCheck,
  clientAddressesCheck,
  databaseRoleCheck,
  migrationsCheck,
  partitionsCheck,
} from './schema.ts'
import { secretFilesCheck, secretsCheck } from './secrets.ts'
import { settingsCheck } from './settings.ts'
import type { Subject } from './subject.ts'

export const checks: readonly Check<Subject>[] = [
  settingsCheck,
  secretsCheck,
  secretFilesCheck,
  nodeCheck,
  memoryCheck,
  openFilesCheck,
  clockCheck,
  databaseCheck,
  databaseTlsCheck,
  databaseDurabilityCheck,
  databaseConnectionsCheck,
  databaseClockCheck,
  databaseLatencyCheck,
  databaseNotificationsCheck,
  migrationsCheck,
  databaseRoleCheck,
  partitionsCheck,
  auditWritersCheck,
  replicasCheck,
  backupCheck,
  policyCheck,
  opaGuardCheck,
  authorityCheck,
  serverCertificateCheck,
  portsCheck,
  metricsExposureCheck,
  instanceCheck,
  instanceLatencyCheck,
  clientAddressesCheck,
  publicAddressCheck,
  idleCheck,
]
