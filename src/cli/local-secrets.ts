/**
 * The secrets of a server that nobody has configured: made on first start and kept in DATA_DIR/secrets.json, which only
 * its owner can read. What the environment gives wins.
 */
import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import { z } from 'zod'
import { ownerOnly, readIfThere, writeOnce } from '../whole-file.ts'
import { CommandFailure } from './failure.ts'

export type Environment = Readonly<Record<string, string | undefined>>

const names = ['ENROLLMENT_TOKEN_SECRET', 'CA_KEY_PASSPHRASE'] as const
const secretBytes = 32

const shape = z.record(z.enum(names), z.string().min(1))

/** Whether the environment says something about a variable, either way. */
export function isGiven(env: Environment, name: string): boolean {
  return Boolean(env[name] || env[`${name}_FILE`])
}

/** The environment with the kept secrets added; makes them if there are none. */
export async function withKeptSecrets(env: Environment, dataDir: string): Promise<Environment> {
  if (names.every(name => isGiven(env, name))) return env
  const path = fileIn(dataDir)
  const fresh = Object.fromEntries(names.map(name => [name, randomBytes(secretBytes).toString('hex')]))
  const content = (await readIfThere(path)) ?? (await writeOnce(path, `${JSON.stringify(fresh, null, 2)}\n`, ownerOnly))
  return added(env, content, path)
}

/** The same, but makes none: for commands that run beside a database which has an authority already. */
export async function withSecretsIfKept(env: Environment, dataDir: string): Promise<Environment> {
  const path = fileIn(dataDir)
  const content = await readIfThere(path)
  return content === undefined ? env : added(env, content, path)
}

/** For commands that need no secret, but settings that are whole. Nothing is ever kept under these. */
export function withThrowawaySecrets(env: Environment): Environment {
  const missing = names.filter(name => !isGiven(env, name))
  return { ...env, ...Object.fromEntries(missing.map(name => [name, randomBytes(secretBytes).toString('hex')])) }
}

function fileIn(dataDir: string): string {
  return join(dataDir, 'secrets.json')
}

function added(env: Environment, content: string, path: string): Environment {
  const kept = parse(content)
  if (!kept) {
    throw new CommandFailure(
      `${path} does not hold the secrets that this data folder was made with`,
      'restore the file, or start anew with another folder: --data FOLDER',
    )
  }
  return { ...env, ...Object.fromEntries(names.filter(name => !isGiven(env, name)).map(name => [name, kept[name]])) }
}

function parse(content: string) {
  try {
    return shape.safeParse(JSON.parse(content)).data
  } catch {
    return undefined
  }
}
