/** How hard the secrets are to guess, and who else can read the files that they are in. */
import { stat } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { SETTINGS_REFERENCE } from '../settings.ts'
import { type Check, type Finding, failed, orOk, warning } from './finding.ts'
import type { Subject } from './subject.ts'

const makeSecret = 'make another with: openssl rand -hex 32'
/** By the letters that are in it and how often: `openssl rand -hex 16` has 110 or so, 16 random letters have 60. */
const keyBitsMin = 96
const passwordBitsMin = 48
/** Those of examples, and what is tried first. */
const known = /change.?me|example|passw|secret|default|letmein|qwerty|edgemesh|postgres|admin|demo|test/i
const words = /^[a-z]{2,}([-_ .,][a-z]{2,}){2,}$/i

type Secret = { variable: string; text: string; bitsMin: number; mend: string }

export const secretsCheck: Check<Subject> = {
  name: 'secrets',
  look(subject) {
    const { identity, database, opa } = subject.settings()
    const rotate = 'alter role … password, then the URL; make one with: openssl rand -hex 24'
    const passwords: Secret[] = [
      ['DATABASE_URL', database.url] as const,
      ['DATABASE_MIGRATION_URL', database.migrationUrl] as const,
      ...database.replicaUrls.map(url => ['DATABASE_REPLICA_URLS', url] as const),
    ].flatMap(([variable, url]) => {
      const text = passwordOf(url)
      return text === undefined ? [] : [{ variable, text, bitsMin: passwordBitsMin, mend: rotate }]
    })
    const keys: Secret[] = [
      ['ENROLLMENT_TOKEN_SECRET', identity.enrollmentTokenSecret] as const,
      ['CA_KEY_PASSPHRASE', identity.caKeyPassphrase] as const,
      ...(opa.bearerToken === undefined ? [] : [['OPA_BEARER_TOKEN', opa.bearerToken] as const]),
    ].map(([variable, text]) => ({ variable, text, bitsMin: keyBitsMin, mend: makeSecret }))
    const all = [...keys, ...passwords]
    return orOk([...all.flatMap(weakness), ...shared(keys)], `${all.length} secrets, none of which can be guessed`)
  },
}

function passwordOf(url: string | undefined): string | undefined {
  if (url === undefined) return undefined
  const { password, searchParams } = new URL(url)
  return decodeURIComponent(password) || searchParams.get('password') || undefined
}

/** At most one finding each: whoever makes another secret has mended all. */
function weakness({ variable, text, bitsMin, mend }: Secret): Finding[] {
  const why = 'who guesses it is taken for a server, an operator or the database'
  const say = (what: string) => [failed({ what: `${variable} ${what}`, why, mend })]
  if (known.test(text) && !isRandom(text)) return say('has a word in it that examples have, and that is tried first')
  if (isPeriodic(text) || isSequence(text)) return say('is a pattern, not a random text')
  if (bitsOf(text) < bitsMin) return say(`is too simple: about ${Math.round(bitsOf(text))} bits, want ${bitsMin}`)
  if (words.test(text)) {
    return [
      warning({ what: `${variable} looks like words`, why: 'words are easier to guess than they are long', mend }),
    ]
  }
  return []
}

/** What is learnt of one place must not open another. */
function shared(secrets: Secret[]): Finding[] {
  return secrets.flatMap(({ variable, text, mend }, at) => {
    const other = secrets.slice(0, at).find(before => before.text === text)
    if (!other) return []
    const why = 'whoever learns the one has the other'
    return [failed({ what: `${variable} is the same as ${other.variable}`, why, mend })]
  })
}

/** Shannon's entropy of its letters, for all of them. */
function bitsOf(text: string): number {
  const counts = new Map<string, number>()
  for (const letter of text) counts.set(letter, (counts.get(letter) ?? 0) + 1)
  return [...counts.values()].reduce((bits, count) => bits + count * Math.log2(text.length / count), 0)
}

/** A long random text may hold such a word by chance. */
function isRandom(text: string): boolean {
  return bitsOf(text) >= 2 * keyBitsMin && (text.match(/\d/g)?.length ?? 0) > text.length / 16
}

function isPeriodic(text: string): boolean {
  return (text + text).indexOf(text, 1) < text.length
}

/** Most letters are the neighbours of those before them, as in abcdef or 654321. */
function isSequence(text: string): boolean {
  let steps = 0
  for (let at = 1; at < text.length; at++) {
    if (Math.abs(text.charCodeAt(at) - text.charCodeAt(at - 1)) === 1) steps++
  }
  return steps > text.length / 2
}

// ── Files ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Docker and Kubernetes put them there for one container, readable to all of its users. */
const handedOut = /^\/(var\/)?run\/secrets\//

export const secretFilesCheck: Check<Subject> = {
  name: 'secret-files',
  async look({ env, envFile }) {
    const named = SETTINGS_REFERENCE.filter(({ secret }) => secret).flatMap(({ name }) => {
      const path = env[`${name}_FILE`]
      return path ? [{ path, what: `${name}_FILE` }] : []
    })
    const hasSecrets = SETTINGS_REFERENCE.some(({ name, secret }) => secret && env[name])
    const places = [
      ...named,
      ...(envFile && hasSecrets ? [{ path: envFile, what: 'the environment file' }] : []),
      { path: join(env.DATA_DIR || '.edgemesh', 'secrets.json'), what: 'the secrets of edgemesh dev' },
    ]
    const found = await Promise.all(places.map(({ path, what }) => readers(resolve(path), what)))
    const there = found.filter(findings => findings !== undefined)
    const files = there.length === 1 ? 'one file is' : `${there.length} files are`
    const seen = there.length > 0 ? `${files} closed to everybody else` : 'no secret is in a file'
    return orOk(there.flat(), seen)
  },
}

/** @returns undefined where there is no such file, which is another check's business */
async function readers(path: string, what: string): Promise<Finding[] | undefined> {
  const found = await stat(path).catch(() => undefined)
  if (!found?.isFile()) return undefined
  const mode = (found.mode & 0o777).toString(8).padStart(4, '0')
  const mend = `chmod 600 ${path}`
  if (found.mode & 0o002) {
    const why = 'who writes there chooses the secret'
    return [failed({ what: `${what} (${path}) can be written by everybody: ${mode}`, why, mend })]
  }
  if (found.mode & 0o004 && !handedOut.test(path)) {
    const why = 'every program on this host has the secret'
    return [failed({ what: `${what} (${path}) can be read by everybody: ${mode}`, why, mend })]
  }
  if (found.mode & 0o020) {
    const why = 'who writes there chooses the secret'
    return [warning({ what: `${what} (${path}) can be written by its group: ${mode}`, why, mend })]
  }
  return []
}
