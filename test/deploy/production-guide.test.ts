/** The guide for production names files, settings and commands: they are there, and they are called so. */
import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import test from 'ava'
import { createProgram } from '../../src/cli/program.ts'
import { readSettings } from '../../src/settings.ts'
import { unknownSettings } from '../support/known-settings.ts'
import { root } from '../support/programs.ts'

const file = join(root, 'docs', 'production.md')
const guide = await readFile(file, 'utf8')

/** What operators make themselves. */
const made = /^deploy\/(compose\/(\.env|grafana\.env)|kubernetes\/secrets\/files|edgemesh)$/
test('every file that the guide for production names is there', t => {
  const named = new Set(guide.match(/\bdeploy\/[\w./-]*\w/g))
  t.true(named.size > 20)
  for (const path of [...named].filter(path => !made.test(path))) {
    t.true(existsSync(join(root, path)), path)
  }
})

test('the settings of the guide for production are taken', t => {
  const [, block = ''] = /```sh\n(SERVER_NAMES=[^`]+)```/.exec(guide) ?? []
  const pairs = block.split('\n').filter(line => line !== '' && !line.startsWith('#'))
  const environment = Object.fromEntries(pairs.map(pair => pair.split(/=(.*)/s)))
  t.deepEqual(unknownSettings(Object.keys(environment)), [])
  const secrets = { ENROLLMENT_TOKEN_SECRET: 'x'.repeat(32), CA_KEY_PASSPHRASE: 'y'.repeat(32) }
  t.is(readSettings({ ...secrets, ...environment }).database.poolMax, 30)
})

test('every command of the guide for production is one of the program', t => {
  const program = createProgram()
  const commands = [...guide.matchAll(/\bedgemesh\s+([a-z]+)(?:\s+([a-z]+))?/g)].map(([, name, below]) => [name, below])
  const known = commands.filter(([name = '']) => program.commands.some(command => command.name() === name))
  t.true(known.length > 8)
  for (const [name = '', below] of known) {
    const command = program.commands.find(command => command.name() === name)
    if (!command?.commands.length) continue
    t.true(
      command.commands.some(sub => sub.name() === below),
      `edgemesh ${name} ${below}`,
    )
  }
})
