/**
 * Names of those who hold a certificate: `spiffe://<trust-domain>/<kind>/<id>`.
 *
 * The grammar is that of the SPIFFE-ID standard, section 2, made narrower: the path has exactly two segments, and the
 * second is an id as `isSafeId` has it. There is one spelling of every name, so two names are equal when their text
 * is, and nothing is ever decoded or normalised.
 *
 * https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md
 */
export type SpiffeKind = 'device' | 'operator' | 'service'

export type SpiffeId = { trustDomain: string; kind: SpiffeKind; id: string }

/** SPIFFE-ID section 2.3: longer ones need not be supported, so none is made or accepted. */
const spiffeIdBytesMax = 2048

/** SPIFFE-ID section 2.1: lower-case letters, digits, dots, dashes and underscores; no port, no user, no escapes. */
const trustDomainPattern = /^[a-z0-9._-]{1,255}$/

const safeIdPattern = /^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$/

const spiffeIdPattern = /^spiffe:\/\/([^/]+)\/(device|operator|service)\/([^/]+)$/

/**
 * Whether `id` may name a device, an operator or a service: 1 to 64 characters of `a-z`, `0-9`, `.`, `_` and `-`, the
 * first and the last a letter or a digit. Such an id is safe as it is in a URI, a file name, a log line and a
 * certificate's common name (64 characters at most, RFC 5280 appendix A.1), and never `.` or `..`.
 */
export function isSafeId(id: string): boolean {
  return safeIdPattern.test(id)
}

/** The same for people, behind the name of a field. */
export const safeIdRule =
  'has to be of 1 to 64 characters of a-z, 0-9, ".", "_" and "-", the first and the last a letter or a digit'

/** Whether `name` may be the trust domain of a SPIFFE ID. */
export function isTrustDomain(name: string): boolean {
  return trustDomainPattern.test(name)
}

/** The parts of a SPIFFE ID of ours, or `undefined` for any other text. */
export function parseSpiffeId(uri: string): SpiffeId | undefined {
  // Every character that the patterns let through is one byte, so for those the length in characters is the one meant.
  if (uri.length > spiffeIdBytesMax) return undefined
  const [, trustDomain, kind, id] = spiffeIdPattern.exec(uri) ?? []
  if (trustDomain === undefined || id === undefined || !isTrustDomain(trustDomain) || !isSafeId(id)) return undefined
  return { trustDomain, kind: kind as SpiffeKind, id }
}

/** The one spelling of a SPIFFE ID. @throws RangeError for parts that `parseSpiffeId` would not give back */
export function formatSpiffeId({ trustDomain, kind, id }: SpiffeId): string {
  const uri = `spiffe://${trustDomain}/${kind}/${id}`
  if (parseSpiffeId(uri) === undefined) throw new RangeError(`not a SPIFFE ID: ${JSON.stringify(uri)}`)
  return uri
}
