/** Fails when the committed code under src/gen is not what `npm run generate` makes of the protos. */
import { execFileSync } from 'node:child_process'
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const scratch = mkdtempSync(join(tmpdir(), 'edgemesh-generated-'))
const stale: string[] = []
try {
  cpSync('src/gen', join(scratch, 'committed'), { recursive: true })
  execFileSync('buf', ['generate', '--output', scratch], { stdio: 'inherit' })
  execFileSync(process.execPath, ['.ci/build-descriptors.ts', join(scratch, 'src/gen')], { stdio: 'inherit' })
  const [committed, made] = [join(scratch, 'committed'), join(scratch, 'src/gen')]
  for (const file of new Set([...filesOf(committed), ...filesOf(made)])) {
    if (read(join(committed, file)) !== read(join(made, file))) stale.push(file)
  }
} finally {
  rmSync(scratch, { recursive: true, force: true })
}
if (stale.length > 0) {
  console.error(
    `error: src/gen is not current: ${stale.join(', ')}\nhint: run npm run generate and commit what it changes`,
  )
  process.exit(1)
}

function filesOf(directory: string): string[] {
  return readdirSync(directory, { recursive: true, encoding: 'utf8' }).filter(name => /\.(ts|binpb)$/.test(name))
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'latin1')
  } catch {
    return undefined
  }
}
