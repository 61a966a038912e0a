/** The scripts of `deploy/backup`, and what they leave. */
import { execFileSync } from 'node:child_process'
import { cp, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { PlainUser } from './plain-user.ts'

/** The scripts that are shipped, where that user finds them. @returns their folder */
export async function installScripts(who: PlainUser): Promise<string> {
  const folder = await who.subfolder('opt')
  await cp(join(import.meta.dirname, '../../deploy/backup'), folder, { recursive: true })
  if (who.account.owner) execFileSync('chown', ['-R', `${who.account.owner.uid}:${who.account.owner.gid}`, folder])
  return folder
}

/** The lines of a manifest, by their first word. */
export async function manifestOf(path: string): Promise<Map<string, string[][]>> {
  const lines = new Map<string, string[][]>()
  for (const line of (await readFile(path, 'utf8')).trimEnd().split('\n')) {
    const [word = '', ...values] = line.split('\t')
    lines.set(word, [...(lines.get(word) ?? []), values])
  }
  return lines
}
