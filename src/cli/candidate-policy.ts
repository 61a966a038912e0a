/**
 * A policy that nobody has activated yet, brought to answer in this process: a folder of Rego, compiled by `opa`; a bundle that
 * was built of it; or the bare WebAssembly.
 */
import { createHash } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { compileDecisions, findOpa, listSources } from '../../policies/build.ts'
import type { PolicyEngine } from '../access/policy-engine.ts'
import { wasmPolicy } from '../access/policy-wasm.ts'
import { CommandFailure } from './failure.ts'

/** Ours takes 200 kB. */
const compiledBytesMax = 64 * 1024 * 1024

const buildHint = 'build one with: opa build --target wasm --entrypoint edgemesh/authz/decision FOLDER, and unpack it'

/** @throws CommandFailure that says what is wrong with it */
export async function loadCandidate(path: string): Promise<PolicyEngine> {
  const found = await stat(path).catch(() => undefined)
  if (!found) throw new CommandFailure(`there is nothing at ${path}`, 'name a folder of .rego, or one with policy.wasm')
  if (found.isFile()) return fromWasm(path)
  const sources = listSources(path)
  if (sources.length > 0) return fromRego(path)
  const compiled = join(path, 'policy.wasm')
  if (await stat(compiled).catch(() => undefined)) return fromWasm(compiled)
  throw new CommandFailure(`there is neither .rego nor policy.wasm in ${path}`, buildHint)
}

function fromRego(folder: string): PolicyEngine {
  const opa = findOpa()
  if (opa === undefined) {
    throw new CommandFailure(
      `${folder} is Rego, and its compiler opa was not found in $OPA or PATH`,
      'install it from https://github.com/open-policy-agent/opa/releases, or name a bundle that was built with it',
    )
  }
  try {
    const { compiled, revision } = compileDecisions(opa, folder)
    return open(compiled, folder, revision)
  } catch (error) {
    const { stdout, stderr } = error as { stdout?: Buffer; stderr?: Buffer }
    if (stdout === undefined || stderr === undefined) throw error
    throw new CommandFailure(`opa can not compile ${folder}: ${`${stdout}${stderr}`.trim()}`)
  }
}

async function fromWasm(path: string): Promise<PolicyEngine> {
  const { size } = await stat(path)
  if (size > compiledBytesMax) {
    throw new CommandFailure(
      `${path} is of ${size} bytes; a compiled policy has ${compiledBytesMax} at most`,
      buildHint,
    )
  }
  const compiled = await readFile(path)
  return open(
    compiled,
    path,
    (await revisionBeside(path)) ?? createHash('sha256').update(compiled).digest('hex').slice(0, 12),
  )
}

/** A bundle that we have built names its revision, which is the one that a server which runs it goes by. */
async function revisionBeside(path: string): Promise<string | undefined> {
  const text = await readFile(join(dirname(path), 'manifest.json'), 'utf8').catch(() => undefined)
  if (text === undefined) return undefined
  try {
    const { revision } = JSON.parse(text)
    return typeof revision === 'string' && revision !== '' ? revision : undefined
  } catch {
    return undefined
  }
}

function open(compiled: Buffer, name: string, revision: string): PolicyEngine {
  try {
    return wasmPolicy({ compiled, revision, name, answers: ['authz'] })
  } catch (cause) {
    const { message } = cause as Error
    throw new CommandFailure(
      message.startsWith(name) ? message : `${name} is no compiled policy: ${message}`,
      buildHint,
    )
  }
}
