/** docs/integrate.md, as tests run it: what it says is done as it says it. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

export const repository = join(import.meta.dirname, '../..')

/** A block of code: its info string, such as `sh`, or `sh install` for what `.ci/tools` does; and its text. */
export type Block = { info: string; text: string }

/** The blocks under a heading of the second level, in order. */
export function blocksUnder(heading: string): Block[] {
  const guide = readFileSync(join(repository, 'docs/integrate.md'), 'utf8')
  const section = guide.split(/^## /m).find(text => text.startsWith(`${heading}\n`))
  if (section === undefined) throw new Error(`docs/integrate.md has no section ${heading}`)
  const blocks = section.matchAll(/^```(.*)\n([\s\S]*?)^```$/gm)
  return [...blocks].map(([, info = '', text = '']) => ({ info, text }))
}

/** The commands of a section that are for its reader to type, as one script. */
export function scriptUnder(heading: string, info = 'sh'): string {
  const commands = blocksUnder(heading).filter(block => block.info === info)
  if (commands.length === 0) throw new Error(`docs/integrate.md has no commands under ${heading}`)
  return commands.map(({ text }) => text).join('')
}

/** What a section has installed. */
export function installedBy(heading: string): string {
  return scriptUnder(heading, 'sh install')
}
