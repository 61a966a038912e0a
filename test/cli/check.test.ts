/** `edgemesh check` with an assertion of the user. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { shared } from '../support/edgemesh.ts'
import { assertionBy, audience, issuer, issuerKey, keySetOf } from '../support/user-issuer.ts'
import { laptopAndOrders } from './laptop-and-orders.ts'

const scene = shared(test, async file => {
  const key = await issuerKey('one')
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-assertion-'))
  file.teardown(() => rm(folder, { recursive: true }))
  const path = join(folder, 'ada.jwt')
  const text = await assertionBy(key)
  await writeFile(path, `${text}\n`)
  const { edgemesh } = await laptopAndOrders(file, {
    USER_ASSERTION: 'required',
    USER_ASSERTION_ISSUER: issuer,
    USER_ASSERTION_AUDIENCE: audience,
    USER_ASSERTION_JWKS: JSON.stringify(keySetOf(key)),
  })
  return { edgemesh, path, text }
})

const about = ['--service', 'orders', '--device', 'laptop-7']

test('an operator asks with the assertion of a user, from a file, and its text shows nowhere', async t => {
  const { edgemesh, path, text } = scene()
  const allowed = await edgemesh('check', ...about, '--user-assertion-file', path)
  t.is(allowed.exitCode, 0, allowed.stderr)
  t.regex(allowed.stdout, /^allowed: the user of the assertion may connect to orders on laptop-7/)
  const other = await edgemesh('check', ...about, '--user', 'bob', '--user-assertion-file', path, '--explain')
  t.is(other.exitCode, 1, other.stderr)
  t.regex(other.stdout, /USER_ASSERTION_WRONG_USER +user +bob +ada/)
  t.false((allowed.stdout + allowed.stderr + other.stdout + other.stderr).includes(text))
})

test('a file that can not be read is told, and no question is asked without a user', async t => {
  const { edgemesh } = scene()
  const unread = await edgemesh('check', ...about, '--user-assertion-file', '/nowhere/ada.jwt')
  t.is(unread.exitCode, 1)
  t.regex(unread.stderr, /^error: \/nowhere\/ada.jwt can not be read \(ENOENT\)\nhint: /)
  t.is((await edgemesh('check', ...about)).exitCode, 2)
})
