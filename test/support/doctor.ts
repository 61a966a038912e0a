/** `edgemesh doctor` within a test: what it finds under settings of the test's own, with secrets that nobody guesses. */
import { randomBytes } from 'node:crypto'
import { networkInterfaces } from 'node:os'
import { checks } from '../../src/doctor/checks.ts'
import { type CheckedFinding, examine } from '../../src/doctor/examine.ts'
import { openSubject, type SubjectOptions } from '../../src/doctor/subject.ts'

export const strongSecret = () => randomBytes(32).toString('hex')

/** What a server needs, and nothing that anybody could find wrong. */
export const goodSettings = {
  ENROLLMENT_TOKEN_SECRET: strongSecret(),
  CA_KEY_PASSPHRASE: strongSecret(),
  API_HOST: '127.0.0.1',
  API_PORT: '0',
  METRICS_HOST: '127.0.0.1',
  METRICS_PORT: '0',
  DATA_DIR: '/nonexistent/edgemesh',
}

/**
 * @param env settings beside the good ones
 * @param only names of checks
 */
export async function look(
  env: Record<string, string>,
  only: string | readonly string[],
  options: Partial<SubjectOptions> = {},
): Promise<CheckedFinding[]> {
  const subject = openSubject({ env: { PATH: process.env.PATH, ...goodSettings, ...env }, ...options })
  try {
    const names = [only].flat()
    const wanted = checks.filter(({ name }) => names.includes(name))
    if (wanted.length !== names.length) throw new Error(`not all of these are checks: ${names.join(', ')}`)
    return (await examine(wanted, subject)).findings
  } finally {
    await subject.close()
  }
}

/** `severity: what` of each, which is what tests are about; each trouble says also why it matters, and what mends it. */
export async function told(...args: Parameters<typeof look>): Promise<string[]> {
  return (await look(...args)).map(({ check, severity, what, why, mend }) => {
    if ((severity === 'warning' || severity === 'failed') && !(why && mend))
      throw new Error(`${check}: no way to mend it`)
    return `${severity}: ${what}`
  })
}

/** An address of this host that others may reach; undefined: there is none. */
export function outsideAddress(): string | undefined {
  const all = Object.values(networkInterfaces()).flatMap(found => found ?? [])
  return all.find(({ internal, family }) => !internal && family === 'IPv4')?.address
}
