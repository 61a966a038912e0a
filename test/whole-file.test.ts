import { mkdir, mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { writeOnce, writeWhole } from '../src/whole-file.ts'

async function emptyFolder(t: ExecutionContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-whole-file-'))
  t.teardown(() => rm(folder, { recursive: true }))
  return folder
}

test('a file has the mode that was asked for, whatever the umask, and nothing lies beside it', async t => {
  const folder = await emptyFolder(t)
  const mode = 0o666 // which every common umask narrows
  await writeWhole(join(folder, 'replaced'), 'one', mode)
  await writeWhole(join(folder, 'replaced'), 'two', mode)
  await writeOnce(join(folder, 'once'), 'one', mode)
  t.is(await writeOnce(join(folder, 'once'), 'two', mode), 'one')
  t.is(await readFile(join(folder, 'replaced'), 'utf8'), 'two')
  for (const name of ['once', 'replaced']) t.is((await stat(join(folder, name))).mode & 0o777, mode)
  t.deepEqual((await readdir(folder)).sort(), ['once', 'replaced'])
})

test('a file that can not take its place leaves nothing behind', async t => {
  const folder = await emptyFolder(t)
  await mkdir(join(folder, 'taken', 'by'), { recursive: true })
  await t.throwsAsync(writeWhole(join(folder, 'taken'), 'a secret', 0o600), { message: /rename/ })
  await t.throwsAsync(writeWhole(join(folder, 'unwritable'), Symbol('no text') as unknown as string, 0o600))
  t.deepEqual(await readdir(folder), ['taken'])
})
