import test from 'ava'
import fc from 'fast-check'
import { parseForwardedCertificates } from '../../src/access/forwarded-certificate.ts'

const hash = '468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688'
const uri = 'spiffe://edgemesh.local/device/alpha'

test('what Envoy writes about a device is read', t => {
  const header = `By=spiffe://edgemesh.local/service/edge;Hash=${hash};Subject="CN=alpha";URI=${uri};DNS=a.test;DNS=b.test`
  t.deepEqual(parseForwardedCertificates(header), [{ hash: [hash], uri: [uri] }])
})

test('several proxies stand in the order in which the request has passed them', t => {
  const elements = parseForwardedCertificates(`Hash=aa;URI=${uri},By=spiffe://b;Hash=bb;URI=spiffe://c, hash=cc`)
  t.deepEqual(elements, [
    { hash: ['aa'], uri: [uri] },
    { hash: ['bb'], uri: ['spiffe://c'] },
    { hash: ['cc'], uri: [] },
  ])
})

test('quoted values keep separators and escaped quotes', t => {
  const header = `Subject="O=\\"a, b\\";CN=x,URI=spiffe://other";URI="${uri}";Chain="-----BEGIN%20CERTIFICATE-----"`
  t.deepEqual(parseForwardedCertificates(header), [{ hash: [], uri: [uri] }])
})

const malformed = {
  'nothing at all': '',
  'no key': uri,
  'an empty element': `Hash=aa,,Hash=bb`,
  'a separator at the end': `Hash=${hash};`,
  'a quote that is left open': `Subject="CN=alpha;URI=${uri}`,
  'text behind a quote': `Subject="CN=alpha"x;URI=${uri}`,
  'a quote within a value': `Hash=a"b`,
  'an equals sign within a value': `Hash=a=b`,
  'blanks within a value': `Hash=a b`,
  'a line break within a quote': `Subject="a\nb"`,
  'more elements than proxies': Array(17).fill('Hash=aa').join(','),
  'more pairs than a certificate has names': Array(129).fill('DNS=a').join(';'),
  'more than a header may be': `Hash=${'a'.repeat(60 * 1_024)}`,
}

for (const [what, header] of Object.entries(malformed)) {
  test(`a header with ${what} says nothing`, t => {
    t.is(parseForwardedCertificates(header), undefined)
  })
}

test('the largest header that is allowed is read, and one full of escapes in no more time than it is long', t => {
  t.is(parseForwardedCertificates(`Subject="${'\\"'.repeat(30_000)}"`)?.length, 1)
  t.is(parseForwardedCertificates(`Subject="${'\\"'.repeat(30_000)}`), undefined)
})

const written = fc.record({
  hash: fc.stringMatching(/^[0-9a-f]{64}$/),
  uri: fc.stringMatching(/^spiffe:\/\/[a-z]{1,8}\/device\/[a-z0-9]{1,8}$/),
  subject: fc.string({ unit: fc.constantFrom(...'CN=a;,"\\ '), maxLength: 12 }),
})
type Written = typeof written extends fc.Arbitrary<infer T> ? T : never

/** As Envoy writes it. */
const elementOf = ({ hash, uri, subject }: Written) =>
  `By=spiffe://a/service/b;Hash=${hash};Subject="${subject.replaceAll(/["\\]/g, '\\$&')}";URI=${uri}`

test('whatever Envoy writes is read back', t => {
  fc.assert(
    fc.property(fc.array(written, { minLength: 1, maxLength: 16 }), elements => {
      const parsed = parseForwardedCertificates(elements.map(elementOf).join(','))
      t.deepEqual(
        parsed,
        elements.map(({ hash, uri }) => ({ hash: [hash], uri: [uri] })),
      )
    }),
  )
})

test('whatever a client sends first, the last element is the one that the proxy has appended, or there is none', t => {
  const pieces = ['"', '\\', ',', ';', '=', 'Hash=', 'URI=', 'Subject="', 'a', ' ', uri, hash]
  const sent = fc.oneof(
    fc.string(),
    fc.array(fc.constantFrom(...pieces), { maxLength: 12 }).map(some => some.join('')),
  )
  // A subject of ours is CN and an id.
  const appended = written.map(element => ({ ...element, subject: 'CN=alpha' }))
  fc.assert(
    fc.property(sent, appended, (sent, own) => {
      const parsed = parseForwardedCertificates(`${sent},${elementOf(own)}`)
      if (parsed) t.deepEqual(parsed.at(-1), { hash: [own.hash], uri: [own.uri] })
    }),
    { numRuns: 5_000 },
  )
  t.pass()
})
