import test from 'ava'
import fc from 'fast-check'
import { formatSpiffeId, isSafeId, parseSpiffeId, type SpiffeId } from '../../src/identity/spiffe-id.ts'

test('a SPIFFE ID is read into its parts', t => {
  t.deepEqual(parseSpiffeId('spiffe://edgemesh.local/device/sensor-7'), {
    trustDomain: 'edgemesh.local',
    kind: 'device',
    id: 'sensor-7',
  })
})

const refused = {
  'another scheme': 'https://edgemesh.local/device/a',
  'an upper-case scheme': 'SPIFFE://edgemesh.local/device/a',
  'no trust domain': 'spiffe:///device/a',
  'an upper-case trust domain': 'spiffe://Edgemesh.local/device/a',
  'a port': 'spiffe://edgemesh.local:8000/device/a',
  'a user': 'spiffe://root@edgemesh.local/device/a',
  'another kind': 'spiffe://edgemesh.local/admin/a',
  'no id': 'spiffe://edgemesh.local/device/',
  'no path': 'spiffe://edgemesh.local',
  'a third segment': 'spiffe://edgemesh.local/device/a/b',
  'a slash at the end': 'spiffe://edgemesh.local/device/a/',
  'an empty segment': 'spiffe://edgemesh.local//device/a',
  'a dot segment': 'spiffe://edgemesh.local/device/..',
  'an escape': 'spiffe://edgemesh.local/device/%61',
  'a query': 'spiffe://edgemesh.local/device/a?b',
  'a fragment': 'spiffe://edgemesh.local/device/a#b',
  'an upper-case id': 'spiffe://edgemesh.local/device/A',
  'a line break at the end': 'spiffe://edgemesh.local/device/a\n',
  'a NUL': 'spiffe://edgemesh.local/device/a\0b',
  'an id of 65 characters': `spiffe://edgemesh.local/device/${'a'.repeat(65)}`,
  'a trust domain of 256 characters': `spiffe://${'a'.repeat(256)}/device/a`,
  'more than 2048 bytes': `spiffe://${'a'.repeat(2048)}/device/a`,
}

for (const [what, uri] of Object.entries(refused)) {
  test(`refused as a SPIFFE ID: ${what}`, t => {
    t.is(parseSpiffeId(uri), undefined)
  })
}

test('what would not be read back is not written', t => {
  t.throws(() => formatSpiffeId({ trustDomain: 'edgemesh.local', kind: 'device', id: 'a/b' }), {
    instanceOf: RangeError,
  })
  t.throws(() => formatSpiffeId({ trustDomain: '', kind: 'device', id: 'a' }), { instanceOf: RangeError })
})

test('ids have 1 to 64 characters and end in a letter or a digit', t => {
  for (const id of ['a', '0', 'a-b_c.d', 'a'.repeat(64)]) t.true(isSafeId(id), id)
  for (const id of ['', '.', '..', '-a', 'a-', 'a b', 'ä', 'a\n', 'a'.repeat(65)]) t.false(isSafeId(id), id)
})

test('every id of safe parts is read back as it was written', t => {
  const letters = (pattern: RegExp) => fc.stringMatching(pattern)
  fc.assert(
    fc.property(
      letters(/^[a-z0-9._-]{1,60}$/),
      fc.constantFrom<SpiffeId['kind']>('device', 'operator', 'service'),
      letters(/^[a-z0-9]([a-z0-9._-]{0,40}[a-z0-9])?$/),
      (trustDomain, kind, id) => {
        t.deepEqual(parseSpiffeId(formatSpiffeId({ trustDomain, kind, id })), { trustDomain, kind, id })
      },
    ),
  )
})

test('any text is either refused or spelled the one way', t => {
  fc.assert(
    fc.property(
      fc.oneof(
        fc.string(),
        fc.webUrl(),
        fc.string().map(s => `spiffe://a/device/${s}`),
      ),
      text => {
        const id = parseSpiffeId(text)
        t.true(id === undefined || formatSpiffeId(id) === text)
      },
    ),
  )
})
