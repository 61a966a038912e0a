/** What a person can do about a call that was refused, with the command for it. */
import type { DescribedError } from '../client/channel.ts'
import { startTyped } from './typed.ts'

export function hintFor({ code, reason, retryAfterMs }: Pick<DescribedError, 'code' | 'reason' | 'retryAfterMs'>) {
  const retry = retryAfterMs === undefined ? undefined : `try again in ${Math.ceil(retryAfterMs / 1_000)} s`
  return hints[reason] ?? retry ?? hintsWhereNoTimeIsNamed[reason] ?? hintsByCode[code]
}

const anotherToken = 'make another with: edgemesh token create'
const enrollAgain =
  'enroll it again: make a token with edgemesh token create, and start its agent with that in EDGEMESH_TOKEN; ' +
  'where the agent says that it has none, empty its --state folder first'
const enrollAnew = `have an operator remove it: edgemesh device delete ID, and ${enrollAgain}`
const setClock = 'set the clock of this host, and see that it is kept right (NTP)'
const signAnew = 'get a new challenge with GetChallenge and sign a new request; edgemesh agent does so by itself'
const strongKey =
  'make a key with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out device.key, and sign the ' +
  'request with SHA-256'
const wrongAddress =
  'see that --server names the right server; the name that is called has to be one of its SERVER_NAMES'

/** By the reason that the server or the agent gives. */
const hints: Readonly<Record<string, string>> = {
  // Tokens
  TOKEN_MISSING: 'make one with: edgemesh token create',
  TOKEN_MALFORMED: 'copy it whole, from "em1." on; if it is lost, make another with: edgemesh token create',
  TOKEN_UNKNOWN: anotherToken,
  TOKEN_SECRET_WRONG: `copy it whole; if that is what you have done, somebody has guessed: edgemesh token revoke ID, and ${anotherToken}`,
  TOKEN_EXPIRED: anotherToken,
  TOKEN_REVOKED: anotherToken,
  TOKEN_USED_UP: anotherToken,
  TOKEN_OTHER_KEY:
    'this device may have lost its --state folder; if not, see who has used it: edgemesh token show ID, and take that ' +
    'back with: edgemesh token revoke ID --with-devices --reason TEXT',
  TOKEN_FOR_OTHER_DEVICE:
    'give the device the id that the token is for: edgemesh agent --id ID; or make another token for it',
  TOKEN_FOR_OTHER_TYPE: 'say what the device is: edgemesh agent --type TYPE; or make another token for it',
  TOKEN_FOR_OTHER_NETWORK:
    'use it from a network that it is for, or make another: edgemesh token create --network CIDR',

  // Enrollment
  ENROLLMENT_REJECTED: 'an operator has refused this device: ask why, and have a new token made for it',
  DEVICE_EXISTS:
    'give the device another id, or have an operator remove the one that has it: edgemesh device delete ID',
  DEVICE_REVOKED:
    'it is out for good; enroll the machine as another device: another --state folder, another --id, a new token',
  DEVICE_DELETED: enrollAgain,
  DEVICE_QUARANTINED: 'have an operator let it out first: edgemesh device release ID',
  DEVICE_KEY_SUPERSEDED: `renew with its newest certificate, if it is still there; if not, ${enrollAnew}`,
  DEVICE_CERTIFICATE_EXPIRED: `come back with that certificate: edgemesh agent with its --state folder; if it is lost, ${enrollAnew}`,

  // Certificate requests
  CSR_CHALLENGE_MISSING: signAnew,
  CSR_CHALLENGE_UNKNOWN: signAnew,
  CSR_CHALLENGE_STALE: signAnew,
  CSR_REPLAYED: signAnew,
  CSR_TOO_LARGE: 'leave names and extensions out of the request: only its key is used',
  CSR_MALFORMED: 'make the request with: openssl req -new -key device.key -subj / -outform DER',
  CSR_SIGNATURE_INVALID: 'sign the request with the key that is in it: openssl req -new -key device.key',
  CSR_KEY_WEAK: strongKey,
  CSR_KEY_UNSUPPORTED: strongKey,
  CSR_ALGORITHM_WEAK: strongKey,
  CSR_ALGORITHM_UNSUPPORTED: strongKey,

  // Certificates
  CERTIFICATE_MISSING: 'enroll first: edgemesh agent for a device; edgemesh operator create for an operator',
  CERTIFICATE_EXPIRED:
    'a device comes back with edgemesh agent, within CERT_RECOVERY_DAYS; an operator is made anew beside the ' +
    'database: edgemesh operator create NAME --role ROLE --out FOLDER',
  CERTIFICATE_NOT_YET_VALID: setClock,
  CERTIFICATE_REVOKED:
    'a device enrolls again with a new token; an operator is made anew: edgemesh operator create --help',
  CERTIFICATE_RETIRED:
    'its certificate authority was replaced: a device enrolls again with a new token, an operator is made anew: ' +
    'edgemesh operator create --help',
  CERTIFICATE_UNTRUSTED:
    'these credentials are of another certificate authority: see that --server and --credentials belong together; if ' +
    'the authority was replaced meanwhile, a device enrolls again with a new token, an operator is made anew: edgemesh ' +
    'operator create --help',
  CERTIFICATE_UNKNOWN:
    'the server has no record of this certificate, as after a restored backup that is older: a device enrolls again with ' +
    'a new token, an operator is made anew: edgemesh operator create --help',
  CERTIFICATE_PURPOSE: 'use the certificate of a device or an operator, not that of a server',
  CERTIFICATE_IDENTITY:
    'these credentials are of another trust domain: see that --server and --credentials belong together',
  CERTIFICATE_UNUSABLE:
    'the server has answered with a certificate that is not right: see its log, and edgemesh ca show',

  // Operators
  OPERATOR_IS_CALLER: 'have another administrator do it, with --credentials of their own',
  OPERATOR_NOT_FOUND: 'see the names of those who call with: edgemesh audit search',

  // Coming back with a certificate that has expired
  RECOVERY_NEEDS_APPROVAL:
    'have an operator let it in again: edgemesh device approve ID; the agent asks by itself until then',
  RECOVERY_WINDOW_OVER: `it was away for longer than CERT_RECOVERY_DAYS; ${enrollAnew}`,
  RECOVERY_SUPERSEDED: `its identity has been renewed with a newer certificate, perhaps by a copy of its --state folder; ${enrollAnew}`,

  // The certificate authority
  ROTATION_NOT_READY:
    'see who is behind with: edgemesh ca progress --behind; go on without them with: edgemesh ca rotate --force',

  // Users
  USER_ASSERTION_MISSING: 'hand over an assertion of the user: edgemesh check --user-assertion-file FILE',
  USER_ASSERTION_EXPIRED: "have the user's issuer sign another one; it lasts as long as its exp says",
  USER_ASSERTION_KEYS_UNAVAILABLE: 'see that the server reaches USER_ASSERTION_JWKS_URL, and try again',

  // The server, as a client sees it
  SERVER_NOT_PINNED:
    'check the address, and that the token was made by this server: edgemesh token create --server HOST:PORT',
  SERVER_UNTRUSTED:
    'see that --server names the server that these credentials are for; if its authority was replaced meanwhile, a ' +
    'device enrolls again with a new token, an operator is made anew: edgemesh operator create --help',
  SERVER_NAME_WRONG: wrongAddress,
  SERVER_CERTIFICATE_EXPIRED:
    'see that the clock of this host is right; if it is, the server has to renew its certificate: restart it',
  SERVER_CERTIFICATE_NOT_YET_VALID: setClock,
  CLOCK_WRONG: setClock,

  // What is kept here
  STATE_BROKEN: 'put the files back, or empty the folder and enroll with a new token: edgemesh token create',
  WRONG_CALLER: 'use credentials of the right kind: --credentials FOLDER of an operator, --state FOLDER of a device',
}

/** Where trouble passes, but the server has not said when. */
const hintsWhereNoTimeIsNamed: Readonly<Record<string, string>> = {
  RATE_LIMITED: 'wait a minute, and do not repeat it faster than the limit that the message names',
  POLICY_UNAVAILABLE: 'see that the policy engine runs (OPA_URL), and try again',
  DATABASE_UNAVAILABLE: 'the server has lost its database: see its log, and try again',
  CONNECTION_NOT_HELD: 'the connection has ended: ask for it anew',
}

const hintsByCode: Readonly<Record<string, string>> = {
  UNAUTHENTICATED: 'these credentials may be for another server, revoked or expired',
  PERMISSION_DENIED: 'use credentials of an operator whose role permits it: --credentials FOLDER',
  UNAVAILABLE: `see that the server runs and that --server names it; ${startTyped} starts one`,
  DEADLINE_EXCEEDED: 'see that the server runs and that --server names it',
}
