import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { keyForEnrollment, keyForRenewal, loadState, saveState, saveTrust } from '../../src/client/state.ts'
import { deviceCredentials, smallAuthority } from '../agent/small-server.ts'

const authority = await smallAuthority()

async function folder(t: ExecutionContext): Promise<string> {
  const parent = await mkdtemp(join(tmpdir(), 'edgemesh-state-'))
  t.teardown(() => rm(parent, { recursive: true }))
  return join(parent, 'state')
}

test('a device finds its identity again after a restart', async t => {
  const directory = await folder(t)
  const credentials = deviceCredentials(authority, 'alpha')
  await saveState(directory, credentials)
  t.deepEqual(await loadState(directory), credentials)
})

test('the key is for its owner alone, and nothing is left lying about', async t => {
  const directory = await folder(t)
  await saveState(directory, deviceCredentials(authority, 'alpha'))
  t.deepEqual((await readdir(directory)).sort(), ['ca.crt', 'device.crt', 'device.key', 'identity.json'])
  t.is((await stat(join(directory, 'device.key'))).mode & 0o777, 0o600)
  t.is((await stat(directory)).mode & 0o777, 0o700)
})

test('a folder without an identity is no error', async t => {
  t.is(await loadState(await folder(t)), undefined)
})

test('a device that crashed while it enrolled asks again with the same key', async t => {
  const directory = await folder(t)
  const keyPem = await keyForEnrollment(directory)
  t.is(await keyForEnrollment(directory), keyPem)
  t.is(await loadState(directory), undefined)
})

test('a crash between the two halves of a renewal costs nothing', async t => {
  const directory = await folder(t)
  const [old, renewed] = [deviceCredentials(authority, 'alpha'), deviceCredentials(authority, 'alpha')]
  await saveState(directory, old)

  // Before the certificate's rename: the new key is there, the old pair still fits.
  await writeFile(join(directory, 'device.key.new'), renewed.keyPem)
  t.is((await loadState(directory))?.keyPem, old.keyPem)

  // After it: the old key fits no more, the new one takes its place.
  await writeFile(join(directory, 'device.crt'), renewed.certificateChainPem)
  t.is((await loadState(directory))?.keyPem, renewed.keyPem)
  t.is(await readFile(join(directory, 'device.key'), 'utf8'), renewed.keyPem)
})

test('a renewal that crashed is repeated with the same key, and one that is done leaves none behind', async t => {
  const directory = await folder(t)
  const credentials = deviceCredentials(authority, 'alpha')
  await saveState(directory, credentials)
  const keyPem = await keyForRenewal(directory)
  t.is(await keyForRenewal(directory), keyPem)
  t.deepEqual(await loadState(directory), credentials)
  t.is((await stat(join(directory, 'device.key.new'))).mode & 0o777, 0o600)

  // Whom one trusts may change meanwhile.
  await saveTrust(directory, { ...credentials, trustBundleId: 'second' })
  t.is(await keyForRenewal(directory), keyPem)
  t.is((await loadState(directory))?.trustBundleId, 'second')

  await saveState(directory, deviceCredentials(authority, 'alpha', keyPem))
  t.is((await loadState(directory))?.keyPem, keyPem)
  t.not(await keyForRenewal(directory), keyPem)
})

test('a key of a renewal that can not be read is replaced, since nothing rests on it', async t => {
  const directory = await folder(t)
  await saveState(directory, deviceCredentials(authority, 'alpha'))
  await writeFile(join(directory, 'device.key.new'), 'half a ke')
  t.regex(await keyForRenewal(directory), /^-----BEGIN PRIVATE KEY-----/)
})

test('a key of another certificate is told as what it is', async t => {
  const directory = await folder(t)
  await saveState(directory, deviceCredentials(authority, 'alpha'))
  await writeFile(join(directory, 'device.key'), deviceCredentials(authority, 'beta').keyPem)
  await t.throwsAsync(loadState(directory), { message: /device.key is not the key of device.crt/ })
})
