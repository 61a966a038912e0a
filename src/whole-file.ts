/**
 * Files that are whole or absent, whatever is killed at whatever moment: written beside their place, synced, and only
 * then given their name. What was written before is on the disk before what is written next.
 */
import { randomBytes } from 'node:crypto'
import { link, mkdir, open, readFile, rename, rm } from 'node:fs/promises'
import { dirname } from 'node:path'

/** Permissions of what only its owner may read. */
export const ownerOnly = 0o600
export const everyoneReads = 0o644

/** Replaces what is there: readers see the old file or the new one; once this resolves, a power cut leaves the new one. */
export async function writeWhole(path: string, content: string | Uint8Array, mode: number): Promise<void> {
  const draft = await writeDraft(path, content, mode)
  try {
    await moveWhole(draft, path)
  } catch (error) {
    await rm(draft, { force: true })
    throw error
  }
}

/** Gives a file another name, in place of what has that name. */
export async function moveWhole(from: string, to: string): Promise<void> {
  await rename(from, to)
  // A rename is durable when the folder is.
  const folder = await open(dirname(to), 'r')
  try {
    await folder.sync()
  } finally {
    await folder.close()
  }
}

/**
 * Writes the file unless there is one already: of several that try at once, one wins.
 *
 * @returns what is in the file after that
 */
export async function writeOnce(path: string, content: string, mode: number): Promise<string> {
  const draft = await writeDraft(path, content, mode)
  try {
    await link(draft, path) // unlike rename, it refuses to replace
    return content
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
    return await readFile(path, 'utf8')
  } finally {
    await rm(draft, { force: true })
  }
}

/** `undefined` when there is no such file. */
export async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw error
  }
}

async function writeDraft(path: string, content: string | Uint8Array, mode: number): Promise<string> {
  await mkdir(dirname(path), { recursive: true })
  const draft = `${path}.${randomBytes(6).toString('hex')}.tmp`
  const file = await open(draft, 'wx', mode)
  try {
    // The umask has narrowed the mode.
    await file.chmod(mode)
    await file.writeFile(content)
    await file.sync()
  } catch (error) {
    await rm(draft, { force: true })
    throw error
  } finally {
    await file.close()
  }
  return draft
}
