/**
 * `x-forwarded-client-cert`, in which proxies tell of the client certificates that they have seen.
 *
 *     By=spiffe://a/service/edge;Hash=468e…;Subject="CN=alpha";URI=spiffe://a/device/alpha , Hash=…
 *
 * One element for each proxy that the request has passed, the nearest last; pairs of key and value separated by
 * semicolons. What stands before the last comma may be a client's own words, so nothing is guessed: text that is not
 * of this form from its first character to its last says nothing at all. Otherwise a quote that a client leaves open
 * could swallow what the proxy appends.
 *
 * https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert
 */

/** What one proxy says. Keys that nothing is decided by are left out. */
export type ForwardedCertificate = {
  /** SHA-256 of the certificate, hex as it was written. */
  hash: string[]
  /** URIs of its subject alternative name. */
  uri: string[]
}

/** What Envoy takes of headers altogether; a chain in PEM is about 6 kB. */
const charactersMax = 60 * 1_024
const elementsMax = 16
/** Keys that Envoy knows are seven; DNS names and URIs may be several. */
const pairsMax = 128

/** Key, quoted value, bare value, and what follows. No value has characters that can't be in a header. */
const pairPattern = /([A-Za-z]+)=(?:"((?:[\t !#-[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*)"|([^\s",;=]*)) ?(,|;|$) ?/y

/** The elements in the order in which they stand, or `undefined` for text that is not of this form. */
export function parseForwardedCertificates(header: string): ForwardedCertificate[] | undefined {
  if (header.length > charactersMax) return undefined
  const elements: ForwardedCertificate[] = []
  let element: ForwardedCertificate = { hash: [], uri: [] }
  let at = 0
  for (let pairs = 1; pairs <= pairsMax; pairs++) {
    pairPattern.lastIndex = at
    const [matched, key, quoted, bare, separator] = pairPattern.exec(header) ?? []
    if (matched === undefined || key === undefined) return undefined
    const value = quoted?.replaceAll(/\\(.)/g, '$1') ?? bare ?? ''
    const name = key.toLowerCase()
    if (name === 'hash' || name === 'uri') element[name].push(value)
    at += matched.length
    if (separator === ';') continue
    if (elements.push(element) > elementsMax) return undefined
    if (separator === '') return at === header.length ? elements : undefined
    element = { hash: [], uri: [] }
  }
  return undefined
}
