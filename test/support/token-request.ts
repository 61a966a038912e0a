import type { CreateEnrollmentTokenRequest } from '../../src/gen/edgemesh/v1/admin.ts'

/** That asks for nothing in particular. */
export const noTokenRequest: CreateEnrollmentTokenRequest = {
  usesMax: 0,
  lifetime: undefined,
  labels: {},
  deviceType: 0,
  deviceId: '',
  requiresApproval: false,
  reusable: false,
  deviceIdPattern: '',
  sourceNetworks: [],
}
