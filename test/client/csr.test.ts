import { execFileSync } from 'node:child_process'
import { createPublicKey } from 'node:crypto'
import test from 'ava'
import { createKey, signingRequestFor } from '../../src/client/csr.ts'
import { checkCsr } from '../../src/identity/csr.ts'

test('openssl verifies the request and finds an empty subject', t => {
  const csrDer = signingRequestFor(createKey())
  const parameters = ['req', '-inform', 'DER', '-verify', '-noout', '-subject', '-text']
  const text = execFileSync('openssl', parameters, { input: csrDer, encoding: 'utf8', stdio: 'pipe' })
  t.regex(text, /subject=\s*\n/)
  t.regex(text, /ASN1 OID: prime256v1/)
  t.regex(text, /Signature Algorithm: ecdsa-with-SHA256/)
})

test('the server accepts the request, and reads from it the key that stays here', t => {
  const keyPem = createKey()
  const csrDer = signingRequestFor(keyPem)
  const { spki, keyType } = checkCsr(csrDer)
  t.is(keyType, 'P-256')
  t.deepEqual(spki, createPublicKey(keyPem).export({ format: 'der', type: 'spki' }))
})

test('the same key asks for the same identity again', t => {
  const keyPem = createKey()
  const csrDer = signingRequestFor(keyPem)
  t.is(checkCsr(signingRequestFor(keyPem)).publicKeySha256, checkCsr(csrDer).publicKeySha256)
})
