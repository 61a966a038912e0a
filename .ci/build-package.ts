/** Compiles what the npm package carries in place of the sources, into `dist`. `npm pack` and `npm publish` run it. */
import { spawnSync } from 'node:child_process'
import { cpSync, readdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'

rmSync('dist', { recursive: true, force: true })
const { status } = spawnSync('tsc', ['-p', '.ci/tsconfig.package.json'], { stdio: 'inherit' })
// It has said why.
if (status !== 0) process.exit(1)
// What the server reads beside its code.
for (const name of readdirSync('src/gen')) {
  if (name.endsWith('.binpb')) cpSync(join('src/gen', name), join('dist/gen', name))
}
