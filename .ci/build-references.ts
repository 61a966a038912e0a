/**
 * Writes the references that are made from the code into the folder that is named: settings.md, metrics.md and cli.md. With
 * `--check` it writes nothing, and fails when one is not what it would write.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { commandsReference } from './commands-reference.ts'
import { metricsReference } from './metrics-reference.ts'
import { settingsReference } from './settings-reference.ts'

const [folder = 'docs', mode] = process.argv.slice(2)
const references = {
  'settings.md': settingsReference(),
  'metrics.md': await metricsReference(),
  'cli.md': commandsReference(),
}

if (mode === '--check') {
  const stale = Object.entries(references).filter(([name, text]) => read(join(folder, name)) !== text)
  if (stale.length > 0) {
    const names = stale.map(([name]) => join(folder, name)).join(', ')
    console.error(`error: not current: ${names}\nhint: run npm run generate and commit what it changes`)
    process.exit(1)
  }
} else {
  for (const [name, text] of Object.entries(references)) writeFileSync(join(folder, name), text)
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return undefined
  }
}
