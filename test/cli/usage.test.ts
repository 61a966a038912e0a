import { execFile } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { type Command, InvalidArgumentError } from 'commander'
import fc from 'fast-check'
import { formatDuration, formatRoughly, parseDuration } from '../../src/cli/duration.ts'
import { valueFor, wordFor, wordsOf } from '../../src/cli/enum-words.ts'
import { hostAndPort, label, moment, wholeNumber } from '../../src/cli/option-values.ts'
import { createProgram } from '../../src/cli/program.ts'
import { renderFacts, renderTable } from '../../src/cli/table.ts'
import { EnrollmentTokenStatus } from '../../src/gen/edgemesh/v1/admin.ts'

type Outcome = { exitCode: number; stdout: string; stderr: string }

/** Runs the bin with nothing in its environment that could lead it to a server. */
function edgemesh(args: string[], env: Record<string, string> = {}): Promise<Outcome> {
  const main = join(import.meta.dirname, '../../src/main.ts')
  return new Promise(resolve => {
    const options = { env: { PATH: process.env.PATH, ...env } }
    execFile(process.execPath, [main, ...args], options, (error, stdout, stderr) => {
      resolve({ exitCode: error ? Number(error.code) : 0, stdout, stderr })
    })
  })
}

// ── What is typed wrong ────────────────────────────────────────────────────────────────────────────────────────────

const wrong: Record<string, { args: string[]; names: RegExp }> = {
  'an unknown command': { args: ['tokn'], names: /unknown command 'tokn'[\s\S]*hint: did you mean token\?/ },
  'an unknown flag': { args: ['token', 'create', '--use', '3'], names: /'--use'[\s\S]*hint: did you mean --uses\?/ },
  'a flag without its value': { args: ['token', 'create', '--uses'], names: /--uses/ },
  'a number that is none': {
    args: ['token', 'create', '--uses', 'three'],
    names: /--uses.*whole number from 1 to 10000/,
  },
  'a number out of range': { args: ['token', 'create', '--uses', '0'], names: /--uses/ },
  'a duration without a unit': { args: ['token', 'create', '--expires', '90'], names: /--expires.*90s, 15m, 1h or 7d/ },
  'a label without a value': { args: ['token', 'create', '--label', 'site'], names: /--label.*key=value/ },
  'a type that is not one': { args: ['token', 'create', '--type', 'toaster'], names: /--type.*laptop/ },
  'a server without a port': { args: ['device', 'list', '--server', 'localhost'], names: /--server.*localhost:8000/ },
  'a status that is not one': { args: ['device', 'list', '--status', 'lost'], names: /--status.*quarantined/ },
  'a missing reason': { args: ['device', 'revoke', 'alpha'], names: /--reason/ },
  'a missing argument': { args: ['device', 'show'], names: /'id'/ },
  'one argument too many': { args: ['device', 'show', 'a', 'b'], names: /too many arguments/ },
  'a moment that is none': { args: ['audit', 'search', '--after', 'yesterday'], names: /--after/ },
  'a question without a user': { args: ['check', '--service', 'orders', '--device', 'a'], names: /--user/ },
  'a question about no device': { args: ['check', '--user', 'ada', '--service', 'orders'], names: /--device/ },
  'a change of nothing': { args: ['user', 'update', 'ada'], names: /--role/ },
  'a role that is not one': {
    args: ['operator', 'create', 'a', '--role', 'king', '--out', '.'],
    names: /--role.*auditor/,
  },
  'a port that is none': { args: ['dev', '--port', '70000'], names: /--port/ },
}

for (const [title, { args, names }] of Object.entries(wrong)) {
  test(`${title} ends in exit code 2 and is named`, async t => {
    const { exitCode, stdout, stderr } = await edgemesh(args)
    t.is(exitCode, 2)
    t.is(stdout, '')
    t.regex(stderr, /^error: /)
    t.regex(stderr, names)
    t.regex(stderr, /^hint: see edgemesh .*--help$/m)
    t.notRegex(stderr, /^ {4}at /m)
  })
}

test('without a command the help is printed, and the exit code is 2', async t => {
  for (const args of [[], ['token']]) {
    const { exitCode, stdout, stderr } = await edgemesh(args)
    t.is(exitCode, 2)
    t.is(stdout, '')
    t.regex(stderr, /^Usage: edgemesh/)
  }
})

test('the version is that of the package, with the revision where it is known', async t => {
  const { exitCode, stdout } = await edgemesh(['--version'])
  t.is(exitCode, 0)
  t.regex(stdout, /^\d+\.\d+\.\d+( \([0-9a-f]{7,12}\))?\n$/)
})

test('wrong settings are all told, by name, with exit code 2', async t => {
  const { exitCode, stderr } = await edgemesh(['serve'], { API_PORT: 'http', METRICS_PORT: '-1' })
  t.is(exitCode, 2)
  for (const name of ['API_PORT', 'METRICS_PORT', 'ENROLLMENT_TOKEN_SECRET', 'CA_KEY_PASSPHRASE']) {
    t.regex(stderr, new RegExp(`^error: ${name}: `, 'm'))
  }
  t.regex(stderr, /^hint: /m)
})

test('missing credentials are told with a way to get some', async t => {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-'))
  t.teardown(() => rm(folder, { recursive: true }))
  const { exitCode, stderr } = await edgemesh(['token', 'list', '--credentials', folder])
  t.is(exitCode, 1)
  t.is(stderr.split('\n')[0], `error: there are no operator credentials in ${folder}`)
  t.regex(stderr, /^hint: .*npm start/m)
})

// ── Help ───────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Every command of the tree with the words that lead to it. */
function commandsIn(command: Command, path: string[]): { command: Command; path: string[] }[] {
  return [
    { command, path },
    ...command.commands.flatMap(child => commandsIn(child as Command, [...path, child.name()])),
  ]
}

for (const { command, path } of commandsIn(createProgram(), [])) {
  const name = ['edgemesh', ...path].join(' ')
  test(`the help of ${name} has examples of it, and every flag is explained`, t => {
    let help = ''
    command.configureOutput({ writeOut: text => (help += text) }).outputHelp()
    t.regex(help, new RegExp(`Examples:\\n[\\s\\S]*${name}`))
    for (const option of command.options) {
      const plain = ['--user', '--service'].includes(option.long ?? '')
      t.true(plain || option.description !== '', `${option.flags} says nothing`)
    }
    for (const line of help.split('\n')) t.true(line.length <= 120, line)
  })
}

test('help goes to stdout with exit code 0', async t => {
  const { exitCode, stdout, stderr } = await edgemesh(['token', 'create', '--help'])
  t.is(exitCode, 0)
  t.is(stderr, '')
  t.regex(stdout, /Examples:/)
})

// ── Values ─────────────────────────────────────────────────────────────────────────────────────────────────────────

test('a duration is read back as it is written', t => {
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 1_000_000_000 }), seconds => {
      t.is(parseDuration(formatDuration(seconds * 1_000)), seconds * 1_000)
    }),
  )
  t.is(parseDuration('90s'), 90_000)
  t.is(parseDuration('15m'), 900_000)
  t.is(parseDuration('1h'), 3_600_000)
  t.is(parseDuration('7d'), 604_800_000)
  t.is(formatDuration(5_400_000), '90m')
  t.is(formatRoughly(5_400_000), '90m')
  t.is(formatRoughly(10_801_000), '3h')
  t.is(formatRoughly(999_999_999), '12d')
  t.is(formatRoughly(400), '0s')
})

test('a text that is no duration is refused, whatever it is', t => {
  fc.assert(
    fc.property(fc.string(), text => {
      fc.pre(!/^[1-9]\d*[smhd]$/.test(text))
      t.throws(() => parseDuration(text), { instanceOf: InvalidArgumentError })
    }),
  )
  for (const text of ['', '0s', '-1h', '1.5h', '1 h', '1h30m', '1w', '99999999999d', '9999999999d']) {
    t.throws(() => parseDuration(text), { instanceOf: InvalidArgumentError }, text)
  }
})

test('labels are gathered, and a value may contain the sign', t => {
  t.deepEqual(label('a=1', label('b=x=y')), { b: 'x=y', a: '1' })
  t.deepEqual(label('a='), { a: '' })
  t.throws(() => label('=1'), { instanceOf: InvalidArgumentError })
})

test('addresses, numbers and moments', t => {
  for (const good of ['localhost:8000', '10.0.0.1:1', '[::1]:65535']) t.is(hostAndPort(good), good)
  for (const bad of ['localhost', ':8000', 'a:0', 'a:65536', '::1:80', 'http://a:80', 'a:80/']) {
    t.throws(() => hostAndPort(bad), { instanceOf: InvalidArgumentError }, bad)
  }
  t.is(wholeNumber(0, 10)('10'), 10)
  for (const bad of ['11', '-1', '1e1', '', ' 1', '1.0']) {
    t.throws(() => wholeNumber(0, 10)(bad), { instanceOf: InvalidArgumentError }, bad)
  }
  t.is(moment('2026-01-31').toISOString(), '2026-01-31T00:00:00.000Z')
  t.throws(() => moment('2026-13-01'), { instanceOf: InvalidArgumentError })
  t.throws(() => moment('5'), { instanceOf: InvalidArgumentError })
})

test('enums are words in both directions', t => {
  t.deepEqual(wordsOf(EnrollmentTokenStatus), ['active', 'used-up', 'expired', 'revoked'])
  for (const word of wordsOf(EnrollmentTokenStatus)) {
    t.is(wordFor(EnrollmentTokenStatus, valueFor(EnrollmentTokenStatus, word)), word)
  }
  t.is(wordFor(EnrollmentTokenStatus, 0), '-')
  t.is(wordFor(EnrollmentTokenStatus, 99), '-')
  t.is(valueFor(EnrollmentTokenStatus, undefined), EnrollmentTokenStatus.UNSPECIFIED)
})

test('columns line up, and nothing in a cell can break the table', t => {
  const rows = [
    { id: 'a', note: 'two\nlines \x1b[31m' },
    { id: 'longer', note: '' },
  ]
  const table = renderTable({ id: row => row.id, note: row => row.note }, rows)
  t.is(table, ['ID      NOTE', 'a       two lines  [31m', 'longer  -'].join('\n'))
  t.is(renderFacts({ id: 'a', longer: 1, absent: undefined, empty: '' }), 'id      a\nlonger  1')
})
