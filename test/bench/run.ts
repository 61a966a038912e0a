/**
 * Measures: `npm run bench -- [GROUP…] [--profile] [--json]`.
 *
 * A table for people, or with --json one row a line on stdout; what is being done, on stderr. Exit code 1 when a bar is
 * missed or a group failed, 2 when the command was not understood. Another group is another file in `groups/`.
 */
import { readdirSync } from 'node:fs'
import { cpus, loadavg } from 'node:os'
import { parseArgs } from 'node:util'
import type { Group, Row } from './row.ts'

const groupNames = readdirSync(new URL('groups/', import.meta.url)).map(file => file.replace(/\.ts$/, ''))

const usage = `usage: npm run bench -- [GROUP…] [--profile] [--json]
groups: ${groupNames.join(', ')}; without one, all`

const { names, profile, json } = readArguments()
const progress = (text: string) => console.error(`… ${text}`)
const [cpu] = cpus()
console.error(
  `${cpu?.model.trim()}, ${cpus().length} cores, load ${loadavg()[0]?.toFixed(2)}, Node ${process.versions.node} with ` +
    `OpenSSL ${process.versions.openssl}, ${new Date().toISOString().slice(0, 10)}`,
)

let failures = 0
for (const name of names) {
  const { group } = (await import(`./groups/${name}.ts`)) as { group: Group }
  if (!json) console.log(`\n${group.title}`)
  try {
    for await (const row of group.measure({ profile, progress })) {
      console.log(json ? JSON.stringify(row) : forPeople(row))
      if (!row.bar || row.bar.met) continue
      console.error(`missed: ${row.name} was to be ${row.bar.demand}`)
      failures++
    }
  } catch (error) {
    console.error(`error: ${name} could not be measured:`, error)
    failures++
  }
}
process.exitCode = failures > 0 ? 1 : 0

function readArguments(): { names: string[]; profile: boolean; json: boolean } {
  try {
    const { values, positionals } = parseArgs({
      allowPositionals: true,
      options: { json: { type: 'boolean' }, profile: { type: 'boolean' }, help: { type: 'boolean', short: 'h' } },
    })
    const unknown = positionals.filter(name => !groupNames.includes(name))
    if (unknown.length > 0) throw new Error(`there is no group ${unknown.join(', ')}`)
    if (values.help) {
      console.log(usage)
      process.exit(0)
    }
    return {
      names: positionals.length > 0 ? positionals : groupNames,
      profile: values.profile ?? false,
      json: values.json ?? false,
    }
  } catch (error) {
    console.error(`error: ${(error as Error).message}\n${usage}`)
    process.exit(2)
  }
}

function forPeople({ name, value, unit, floor, ratio, note, bar }: Row): string {
  const measured = `  ${name.padEnd(34)} ${figure(value).padStart(7)} ${unit}`
  if (floor === null || ratio === null) return `${measured}   ${note}`
  const verdict = bar ? `   ${bar.met ? '✓' : '✗ MISSED:'} ${bar.demand}` : ''
  return `${measured}   floor ${figure(floor)}   ratio ${ratio.toPrecision(3)}${verdict}\n${' '.repeat(37)}${note}`
}

function figure(value: number): string {
  return value.toLocaleString('en', { maximumFractionDigits: value < 100 ? 1 : 0 })
}
