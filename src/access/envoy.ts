/**
 * `envoy.service.auth.v3.Authorization/Check`: the decision of `Check`, for a proxy that asks about each request that it
 * is about to pass on.
 *
 * A request's life: what the proxy asks → whose request it is: the device whose certificate the proxy has verified, or, where
 * the proxy runs on the device and shows that certificate itself, the device that calls → limit → does the certificate still
 * stand → decide (`decide.ts`) → audit → answer: pass it on, or a response with the reasons.
 *
 * A proxy lets pass what it is told to let pass when its authorization fails (`failure_mode_allow`). So whatever a client can
 * bring about, such as a header that makes no sense, is a denial; an error is only what is wrong with us, or with how the proxy
 * is configured.
 *
 * Headers are the client's words unless the proxy has made them. Who the device is comes from `source`, which the proxy
 * reads from the TLS connection; `x-forwarded-client-cert` may say which of the device's certificates that was.
 */
import { X509Certificate } from 'node:crypto'
import { callEntry } from '../audit/journal.ts'
import type { Call } from '../caller.ts'
import { Fault, invalidField } from '../fault.ts'
import type { HeaderValueOption } from '../gen/envoy/config/core/v3/base.ts'
import type {
  AttributeContext_HttpRequest as HttpRequest,
  AttributeContext_Peer as SourcePeer,
} from '../gen/envoy/service/auth/v3/attribute_context.ts'
import type { CheckRequest, CheckResponse } from '../gen/envoy/service/auth/v3/external_auth.ts'
import { formatSpiffeId, isSafeId, parseSpiffeId } from '../identity/spiffe-id.ts'
import type { Standing } from '../identity/standing.ts'
import type { AuthorizeDeps } from './authorize.ts'
import { newDecisionId } from './connection-id.ts'
import { decisionEntry } from './decision-records.ts'
import { parseForwardedCertificates } from './forwarded-certificate.ts'
import type { PolicyReason } from './policy-engine.ts'
import { checkQuestion } from './question.ts'
import { UserAssertionRefused } from './user-assertion.ts'

export type EnvoyDeps = Pick<
  AuthorizeDeps,
  'decider' | 'journal' | 'clock' | 'limit' | 'assertions' | 'onDecisions' | 'onDenied'
> & {
  standing: Pick<Standing, 'demandSeen'>
  trustDomain: string
}

/** Context extensions, with which a route of the proxy says what is behind it. */
const serviceExtension = 'edgemesh.service'
const actionExtension = 'edgemesh.action'
const userHeaderExtension = 'edgemesh.user-header'

const assertionHeaderExtension = 'edgemesh.user-assertion-header'

const assertionHeaderDefault = 'x-edgemesh-user-assertion'
const userHeaderDefault = 'x-edgemesh-user'
/** Ours: none of these reaches a service as a client has sent it. */
const ownHeaders = /^x-edgemesh-/i
const headerNamePattern = /^[a-z0-9!#$%&'*+.^_`|~-]{1,64}$/
/** A certificate in PEM, each character of its base64 escaped at worst. */
const certificateCharactersMax = 24 * 1_024
const ok = 0
const permissionDenied = 7

/** What the proxy asks, as it is configured to ask. */
type Asked = {
  source: SourcePeer | undefined
  http: HttpRequest
  service: string
  action: string
  userHeader: string
  assertionHeader: string
}

export function createEnvoyCheck(deps: EnvoyDeps) {
  return async (request: CheckRequest, call: Call): Promise<CheckResponse> => {
    const startedAt = performance.now()
    const asked = askedBy(request)
    /** @param denials the reasons against it; none when it is allowed */
    const counted = (denials: readonly Pick<PolicyReason, 'code'>[] | undefined) => {
      const [allowed, denied] = denials ? [0, 1] : [1, 0]
      deps.onDecisions(allowed as number, denied as number, (performance.now() - startedAt) / 1_000)
      if (denials) deps.onDenied(denials)
    }
    try {
      const seen = deviceSeen(asked, call, deps.trustDomain)
      call.audit.target = `device/${seen.deviceId}`
      await deps.limit(formatSpiffeId({ trustDomain: deps.trustDomain, kind: 'device', id: seen.deviceId }), 1)
      // The certificate of a device that calls by itself has been looked at before the call came here.
      if (seen.fingerprintSha256) await deps.standing.demandSeen(seen.deviceId, seen.fingerprintSha256, deps.clock())
      const { service, action } = asked
      const user = await userOf(asked, call, deps)
      const question = checkQuestion({ id: '', user: user.name, service, action }, seen.deviceId, 'request')
      const { verdict } = await deps.decider.decide(question)
      const decisionId = newDecisionId()
      const decision = decisionEntry(decisionId, call, seen.deviceId, [{ verdict }], deps.clock(), startedAt)
      await deps.journal.append([decision.entry])
      decision.committed?.()
      call.audit.written = true
      counted(verdict.allow ? undefined : verdict.reasons)
      const told = { decisionId: `${decisionId}.0`, policyRevision: verdict.policyRevision }
      return verdict.allow
        ? passOn(asked, seen.deviceId, user, told)
        : respond({ status: 403, reasons: verdict.reasons, ...told })
    } catch (error) {
      if (!(error instanceof Fault) || !broughtAbout.has(error.code)) throw error
      await deps.journal.append([callEntry(call, { code: error.code, reason: error.reason })])
      call.audit.written = true
      counted([{ code: error.reason }])
      return refuse(error)
    }
  }
}

/** Codes of faults that a client can bring about. */
const broughtAbout = new Set(['INVALID_ARGUMENT', 'UNAUTHENTICATED', 'PERMISSION_DENIED', 'RESOURCE_EXHAUSTED'])

/** @throws Fault INVALID_ARGUMENT where the proxy's configuration is wrong */
function askedBy({ attributes }: CheckRequest): Asked {
  const http = attributes?.request?.http
  if (!http)
    throw invalidField('attributes.request.http', 'is missing: use the HTTP filter, envoy.filters.http.ext_authz')
  const { source, contextExtensions } = attributes
  const extension = (name: string) => (Object.hasOwn(contextExtensions, name) ? contextExtensions[name] : undefined)
  const headerNamedBy = (name: string, byDefault: string) => {
    const header = extension(name) ?? byDefault
    if (headerNamePattern.test(header)) return header
    throw invalidField(extensionField(name), 'has to be the name of a header, in lower case')
  }
  const userHeader = headerNamedBy(userHeaderExtension, userHeaderDefault)
  const assertionHeader = headerNamedBy(assertionHeaderExtension, assertionHeaderDefault)
  const service = extension(serviceExtension)
  if (service !== undefined && !isSafeId(service)) {
    throw invalidField(extensionField(serviceExtension), 'has to be the id of a service, such as orders')
  }
  const action = extension(actionExtension) ?? ''
  if (action && !isSafeId(action))
    throw invalidField(extensionField(actionExtension), 'has to be one word, such as connect')
  return { source, http, service: service ?? hostWithoutPort(http.host), action, userHeader, assertionHeader }
}

function extensionField(name: string): string {
  return `attributes.context_extensions["${name}"]`
}

function hostWithoutPort(host: string): string {
  return host.replace(/:\d{0,5}$/, '').toLowerCase()
}

/** The device whose request it is, and which of its certificates the proxy has verified. */
type DeviceSeen = { deviceId: string; fingerprintSha256: string | undefined }

/** @throws Fault PERMISSION_DENIED when that can't be known for sure */
function deviceSeen({ source, http }: Asked, { caller }: Call, trustDomain: string): DeviceSeen {
  // A proxy on the device speaks for the device alone, whatever it says.
  if (caller.kind === 'device') return { deviceId: caller.id, fingerprintSha256: undefined }
  const principal = source?.principal ?? ''
  if (!principal) {
    throw unsure('CLIENT_CERTIFICATE_MISSING', 'the proxy has verified no client certificate: require one')
  }
  const named = parseSpiffeId(principal)
  if (named?.kind !== 'device' || named.trustDomain !== trustDomain) {
    throw unsure('CLIENT_NOT_A_DEVICE', `the client certificate is not that of a device of ${trustDomain}`)
  }
  const fromHeader = hashForwarded(headerOf(http, 'x-forwarded-client-cert'), principal)
  const fromConnection = source?.certificate ? fingerprintOf(source.certificate) : undefined
  const fingerprintSha256 = fromConnection ?? fromHeader
  if (!fingerprintSha256) {
    const message =
      'the proxy does not tell which certificate it has verified: set include_peer_certificate for ext_authz'
    throw unsure('CLIENT_CERTIFICATE_UNKNOWN', message)
  }
  if (fromHeader && fromHeader !== fingerprintSha256) {
    throw unsure('FORWARDED_CERTIFICATE_MISMATCH', 'x-forwarded-client-cert is about another certificate: sanitize it')
  }
  return { deviceId: named.id, fingerprintSha256 }
}

/** SHA-256 of the client's certificate, as the nearest proxy has it in the header. */
function hashForwarded(header: string, principal: string): string | undefined {
  if (!header) return undefined
  const nearest = parseForwardedCertificates(header)?.at(-1)
  if (!nearest)
    throw unsure('FORWARDED_CERTIFICATE_MALFORMED', 'x-forwarded-client-cert is not of the form that Envoy writes')
  const [hash] = nearest.hash
  // A proxy that is configured to forward less leaves the URI out.
  if (nearest.hash.length > 1 || nearest.uri.length > 1 || (nearest.uri[0] ?? principal) !== principal) {
    throw unsure('FORWARDED_CERTIFICATE_MISMATCH', 'x-forwarded-client-cert is about another client: sanitize it')
  }
  return hash?.toLowerCase()
}

/** SHA-256 of the certificate that Envoy has taken from the connection, PEM with URL escapes. */
function fingerprintOf(certificate: string): string {
  try {
    if (certificate.length > certificateCharactersMax) throw new RangeError('too long')
    return new X509Certificate(decodeURIComponent(certificate)).fingerprint256.replaceAll(':', '').toLowerCase()
  } catch (cause) {
    const message = 'attributes.source.certificate is not a certificate in PEM with URL escapes'
    throw new Fault('PERMISSION_DENIED', 'CLIENT_CERTIFICATE_MALFORMED', message, { cause })
  }
}

function unsure(reason: string, message: string): Fault {
  return new Fault('PERMISSION_DENIED', reason, message)
}

type User = { name: string; asserted: boolean }

/** By the user's assertion, or a client's own word, as with `Check`. */
async function userOf(
  { http, userHeader, assertionHeader }: Asked,
  call: Call,
  { assertions }: EnvoyDeps,
): Promise<User> {
  const named = headerOf(http, userHeader)
  const assertion = bearerIn(headerOf(http, assertionHeader), assertionHeader)
  if (assertions?.demanded(assertion, call.caller.kind)) {
    return { name: (await assertions.identify(assertion, [named])).user, asserted: true }
  }
  if (!named) throw invalidField(`request.headers["${userHeader}"]`, 'is missing: it says which user asks')
  return { name: named, asserted: false }
}

/** `authorization` may hold credentials of other kinds, which are none of our business. */
function bearerIn(value: string, header: string): string {
  const bearer = /^bearer +/i
  if (bearer.test(value)) return value.replace(bearer, '')
  return header === 'authorization' ? '' : value
}

function headerOf({ headers }: HttpRequest, name: string): string {
  return Object.hasOwn(headers, name) ? (headers[name] ?? '') : ''
}

type Told = { decisionId: string; policyRevision: string }

/** The request goes on to the service, which reads in its headers what was decided about whom. */
function passOn(
  { http, userHeader, assertionHeader }: Asked,
  deviceId: string,
  user: User,
  { decisionId, policyRevision }: Told,
): CheckResponse {
  const ours = {
    'x-edgemesh-decision-id': decisionId,
    'x-edgemesh-policy-revision': policyRevision,
    'x-edgemesh-device': deviceId,
    ...(user.asserted && { [userHeader]: user.name }),
  }
  const headersToRemove = Object.keys(http.headers).filter(
    name =>
      (ownHeaders.test(name) && name !== userHeader && !Object.hasOwn(ours, name)) ||
      // Whoever has it is the user, for as long as it lasts.
      (user.asserted && name === assertionHeader),
  )
  const value = {
    headers: headersOf(ours),
    headersToRemove,
    dynamicMetadata: undefined,
    responseHeadersToAdd: [],
    queryParametersToSet: [],
    queryParametersToRemove: [],
  }
  return {
    status: { code: ok, message: '', details: [] },
    httpResponse: { $case: 'okResponse', value },
    dynamicMetadata: undefined,
  }
}

function respond(
  denial: Partial<Told> & { status: 403 | 429; reasons: PolicyReason[]; retryAfterMs?: number | undefined },
) {
  const { status, reasons, decisionId, policyRevision, retryAfterMs } = denial
  const headers = headersOf({
    'content-type': 'application/json',
    'cache-control': 'no-store',
    ...(decisionId && { 'x-edgemesh-decision-id': decisionId }),
    ...(policyRevision && { 'x-edgemesh-policy-revision': policyRevision }),
    ...(retryAfterMs !== undefined && { 'retry-after': String(Math.ceil(retryAfterMs / 1_000)) }),
  })
  const body = `${JSON.stringify({ decisionId, policyRevision, reasons })}\n`
  const response: CheckResponse = {
    status: { code: permissionDenied, message: reasons[0]?.code ?? '', details: [] },
    httpResponse: { $case: 'deniedResponse', value: { status: { code: status }, headers, body } },
    dynamicMetadata: undefined,
  }
  return response
}

/** A denial that policy was not asked for. */
function refuse(fault: Fault): CheckResponse {
  const { code, reason, message, violations, retryAfterMs } = fault
  if (fault instanceof UserAssertionRefused) return respond({ status: 403, reasons: [fault.why] })
  const field = violations[0]?.field ?? (code === 'UNAUTHENTICATED' ? 'device.certificate' : 'request')
  const reasons = [{ code: reason, field, actual: 'refused', required: 'in order', message: `${message}.` }]
  return respond({ status: code === 'RESOURCE_EXHAUSTED' ? 429 : 403, reasons, retryAfterMs })
}

/** They replace what a client has sent under the same names: `append` unset would be that in some versions of Envoy only. */
function headersOf(headers: Record<string, string>): HeaderValueOption[] {
  return Object.entries(headers).map(([key, value]) => ({
    header: { key, value, rawValue: Buffer.alloc(0) },
    append: false,
    appendAction: 0,
    keepEmptyValue: false,
  }))
}
