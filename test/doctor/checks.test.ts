/** The list of checks as documentation has it, and a check that fails by itself. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import test from 'ava'
import { checks } from '../../src/doctor/checks.ts'
import { examine } from '../../src/doctor/examine.ts'
import { openSubject } from '../../src/doctor/subject.ts'
import { goodSettings } from '../support/doctor.ts'

const page = () => readFile(join(import.meta.dirname, '../../docs/doctor.md'), 'utf8')

test('docs/doctor.md has every check, in the order of the program, and none that there is not', async t => {
  const documented = [...(await page()).matchAll(/^\| `([a-z-]+)` \| (.*) \| (.*) \|$/gm)]
  t.deepEqual(
    documented.map(([, name]) => name),
    checks.map(({ name }) => name),
  )
  for (const [, name, meaning = '', mend = ''] of documented) t.true(meaning.length > 20 && mend.length > 10, name)
})

test('docs that name a check, or an option of doctor, name one that there is', async t => {
  const runbook = await readFile(join(import.meta.dirname, '../../docs/runbooks/database.md'), 'utf8')
  const named = [...`${runbook}\n${await page()}`.matchAll(/edgemesh doctor --only ([a-z,-]+)/g)]
  t.true(named.length > 0)
  const names = new Set(checks.map(({ name }) => name))
  for (const [, list = ''] of named) for (const name of list.split(',')) t.true(names.has(name), name)
})

test('a check that throws, and one that never ends, are findings, in the order of the list', async t => {
  const subject = openSubject({ env: goodSettings })
  const { findings, counts } = await examine(
    [
      { name: 'silent', deadlineMs: () => 50, look: () => new Promise(() => {}) },
      {
        name: 'broken',
        look() {
          throw new Error(`no luck with ${goodSettings.CA_KEY_PASSPHRASE}`)
        },
      },
      { name: 'fine', look: () => [{ severity: 'ok', what: 'fine' }] },
    ],
    subject,
  )
  await subject.close()
  t.deepEqual(
    findings.map(({ check, severity, what }) => `${check} ${severity}: ${what}`),
    [
      'silent failed: there was no answer within 0.05 s',
      'broken failed: it could not be looked at: no luck with ***',
      'fine ok: fine',
    ],
  )
  t.deepEqual(counts, { ok: 1, warning: 0, failed: 2, skipped: 0 })
})
