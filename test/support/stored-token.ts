import type { Token } from '../../src/identity/token-rules.ts'

/** A token as the database has it: good for one use by any device, until `expiresAt`. */
export function storedToken(overrides: Partial<Token> & Pick<Token, 'expiresAt'>): Token {
  return {
    id: '0123456789ab',
    secretHash: Buffer.alloc(32),
    usesMax: 1,
    uses: 0,
    revokedAt: null,
    labels: {},
    deviceType: null,
    deviceId: null,
    deviceIdPattern: null,
    sourceNetworks: [],
    requiresApproval: false,
    ...overrides,
  }
}
