import type { Posture } from '../../src/gen/edgemesh/v1/types.ts'

/** Of a device with which nothing is wrong. */
export const healthy: Partial<Posture> = {
  cpuPercent: 10,
  memoryPercent: 20,
  diskPercent: 30,
  patchesCurrent: true,
  antivirusEnabled: true,
  diskEncrypted: true,
  firewallEnabled: true,
}
