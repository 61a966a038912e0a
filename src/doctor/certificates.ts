/** The authority in the database, and the certificate that the instance on this host shows. */
import { CannotLook, type Check, type Finding, failed, ok, orOk, span, warning } from './finding.ts'
import { nearHost } from './instance-http.ts'
import type { Subject } from './subject.ts'
import { shakeHands, whoIs } from './tls-peer.ts'

const dayMs = 86_400_000
/** As their alerts have it. Below the second, what depends on it breaks before anybody can act. */
const rootMs = { warning: 180 * dayMs, failed: 30 * dayMs }
const issuerMs = { warning: 30 * dayMs, failed: 7 * dayMs }

export const authorityCheck: Check<Subject> = {
  name: 'authority',
  async look(subject) {
    let set: Awaited<ReturnType<Subject['authorities']>>
    try {
      set = await subject.authorities()
    } catch (error) {
      if (error instanceof CannotLook) throw error
      const why = 'no server starts: without its authority it can issue and check no certificate'
      const mend = 'CA_KEY_PASSPHRASE, TRUST_DOMAIN, CA_CERT_FILE and CA_KEY_FILE have to be those of this database'
      return [failed({ what: (error as Error).message, why, mend })]
    }
    if (set === undefined) return [ok('there is none yet; the first server makes one, or takes that of CA_CERT')]
    const { issuing, trusted } = set
    const troubles: Finding[] = []
    if (issuing.issuer.privateKey === undefined) {
      const why = 'a server that can not issue does not start'
      const what = `the key of authority ${issuing.generation} is not here`
      troubles.push(failed({ what, why, mend: 'give CA_CERT_FILE and CA_KEY_FILE to this instance too' }))
    }
    for (const { generation, rootNotAfter, issuer } of trusted) {
      const name =
        generation === issuing.generation ? 'the authority' : `authority ${generation}, which is still trusted,`
      troubles.push(
        ...expiry(`the root of ${name}`, rootNotAfter, rootMs, subject, 'devices trust nobody after it'),
        ...expiry(`the issuer of ${name}`, issuer.notAfter, issuerMs, subject, 'no certificate outlives its issuer'),
      )
    }
    const until = [issuing.rootNotAfter, issuing.issuer.notAfter].map(date => date.toISOString().slice(0, 10))
    return orOk(troubles, `root until ${until[0]}, issuer until ${until[1]}, ${set.rotation}`)
  },
}

function expiry(
  name: string,
  at: Date,
  limits: { warning: number; failed: number },
  { clock }: Subject,
  why: string,
): Finding[] {
  const leftMs = at.getTime() - clock()
  if (leftMs > limits.warning) return []
  const what = leftMs < 0 ? `${name} has expired ${span(leftMs)} ago` : `${name} expires in ${span(leftMs)}`
  const trouble = { what, why, mend: 'edgemesh ca rotate: docs/identity.md' }
  return [leftMs < limits.failed ? failed(trouble) : warning(trouble)]
}

// ── The server's ───────────────────────────────────────────────────────────────────────────────────────────────────

/** A server renews its certificate when a third of the validity is left. */
const renewalShare = 1 / 3
const marginShare = 1 / 6

export const serverCertificateCheck: Check<Subject> = {
  name: 'server-certificate',
  async look(subject) {
    const { api, identity } = subject.settings()
    if (api.port === 0) throw new CannotLook('API_PORT is 0, so nobody knows where an instance would be')
    const host = nearHost(api.host)
    const set = await subject.authorities().catch(() => undefined)
    const roots = set?.trusted.map(({ rootPem }) => rootPem)
    const peer = await shakeHands({ host, port: api.port, roots, trustedProxies: api.trustedProxies }).catch(() => {
      throw new CannotLook(`no TLS server answers at ${host}:${api.port}`)
    })
    peer.socket.destroy()
    const { certificate, problem } = peer
    const leftMs = certificate.validToDate.getTime() - subject.clock()
    const mend =
      'the log of the instance says why it was not renewed: docs/runbooks/identity.md#edgemeshservercertificateexpiring'
    if (leftMs < 0) {
      const what = `the certificate of the instance has expired ${span(leftMs)} ago`
      return [failed({ what, why: 'no device connects', mend })]
    }
    if (problem) {
      const what = `what listens on ${host}:${api.port} is not trusted by devices (${problem}): ${whoIs(certificate)}`
      return [failed({ what, why: 'no device connects', mend: 'see which program has API_PORT: ss -ltnp' })]
    }
    if (leftMs < identity.serverCertValidityMs * (renewalShare - marginShare)) {
      const what = `the certificate of the instance expires in ${span(leftMs)}, and should have been renewed`
      return [warning({ what, why: 'no device connects after that', mend })]
    }
    return [ok(`valid for ${span(leftMs)}, ${certificate.subjectAltName}`)]
  },
}
