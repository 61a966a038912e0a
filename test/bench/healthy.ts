/** A device with which nothing is wrong. */
import { Posture } from '../../src/gen/edgemesh/v1/types.ts'

export function healthy(): Posture {
  return Posture.fromPartial({
    cpuPercent: 10,
    memoryPercent: 20,
    diskPercent: 30,
    patchesCurrent: true,
    antivirusEnabled: true,
    diskEncrypted: true,
    firewallEnabled: true,
  })
}
