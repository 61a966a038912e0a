/**
 * A compiled policy as it lies in a folder, read whole or not at all:
 *
 *   bundle.tar.gz                    as `opa build --target wasm` makes it, and `edgemesh policy build`
 *   policy.wasm and manifest.json    the same, unpacked, as `policies/build.ts` makes it; or with OPA's own `.manifest`
 *
 * What is still being written is not mistaken for a policy. An archive ends with its checksum. Of unpacked files
 * `manifest.json` names the hash. Without one, nothing tells whether the files belong together; so such a revision is
 * the name that they give with a part of the hash of what really is there.
 */
import { createHash } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { gunzip } from 'node:zlib'
import { extract } from 'tar-stream'
import { z } from 'zod'

export type PolicyBundle = {
  compiled: Buffer
  /** What the policy finds under `data`, beside its own rules. */
  data: object
  /** Names the policy in decisions and logs. */
  revision: string
  /** SHA-256 over all that decides, hex. */
  digest: string
  /** Whether it is known that it was read as it was made. */
  isWhole: boolean
  /** What it is called where something is wrong with it. */
  name: string
}

/** A policy that can't be used: what is wrong, in lower case, and how to mend it. */
export class UnusablePolicy extends Error {
  readonly hint: string

  constructor(problem: string, hint: string, options?: ErrorOptions) {
    super(problem, options)
    this.name = 'UnusablePolicy'
    this.hint = hint
  }
}

export const archiveName = 'bundle.tar.gz'
/** What a folder may hold of a bundle. */
export const bundleFiles = [archiveName, 'policy.wasm', 'manifest.json', '.manifest', 'data.json'] as const

/** Of each file, and of all that an archive holds. Ours takes 200 kB; V8 needs some 10 ms to compile a megabyte. */
const bundleBytesMax = 16 * 1024 * 1024
/** Digits of a hash that stands for a name. */
const hashDigits = 12
const hashDigitsBesideName = 8

export const buildHint = 'build one with: edgemesh policy build FOLDER-OF-REGO --out FOLDER'

const revision = z.string().regex(/^[\x21-\x7e]{0,64}$/, 'has to be of at most 64 characters, without spaces')
const opaManifest = z.object({ revision: revision.default('') })
const ownManifest = z.object({ revision, wasm: z.string().optional() })

const unpackLimits = { maxOutputLength: bundleBytesMax }

type Files = Map<string, Buffer>

/**
 * @param path a folder, an archive, or a compiled policy, whose manifest may stand beside it
 * @throws {UnusablePolicy}
 */
export async function readBundle(path: string): Promise<PolicyBundle> {
  const found = await stat(path).catch(() => undefined)
  if (!found) throw new UnusablePolicy(`there is nothing at ${path}`, buildHint)
  if (found.isFile()) return path.endsWith('.gz') ? readArchive(path) : readUnpacked(dirname(path), basename(path))
  const archive = await stat(join(path, archiveName)).catch(() => undefined)
  const compiled = await stat(join(path, 'policy.wasm')).catch(() => undefined)
  if (archive && compiled) {
    throw new UnusablePolicy(`there are both ${archiveName} and policy.wasm in ${path}`, 'remove one of them')
  }
  if (archive) return readArchive(join(path, archiveName))
  if (compiled) return readUnpacked(path, 'policy.wasm')
  throw new UnusablePolicy(`there is neither ${archiveName} nor policy.wasm in ${path}`, buildHint)
}

async function readArchive(path: string): Promise<PolicyBundle> {
  const packed = await readBounded(path)
  if (!packed) throw new UnusablePolicy(`there is nothing at ${path}`, buildHint)
  return unpackBundle(packed, path)
}

/**
 * @param packed a bundle.tar.gz
 * @param name what it is called where something is wrong with it
 * @throws {UnusablePolicy}
 */
export async function unpackBundle(packed: Buffer, name: string): Promise<PolicyBundle> {
  const files = await unpack(packed, name)
  const compiled = files.get('policy.wasm')
  if (!compiled) {
    throw new UnusablePolicy(`${name} holds no policy.wasm: it was not built for WebAssembly`, buildHint)
  }
  const manifest = readJson(files.get('.manifest'), opaManifest, `${name}: .manifest`)
  return bundleOf({ compiled, data: files.get('data.json'), name, named: manifest?.revision, isWhole: true })
}

async function unpack(packed: Buffer, path: string): Promise<Files> {
  const files: Files = new Map()
  try {
    const archive = extract()
    archive.end(await promisify(gunzip)(packed, unpackLimits))
    for await (const entry of archive) {
      const name = entry.header.name.replace(/^(\.?\/)+/, '')
      if (files.has(name)) throw new Error(`it holds ${name} twice`)
      const content: Buffer[] = []
      for await (const chunk of entry as AsyncIterable<Buffer>) content.push(chunk)
      files.set(name, Buffer.concat(content))
    }
    return files
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException
    if (code === 'ERR_BUFFER_TOO_LARGE') throw tooLarge(path)
    throw new UnusablePolicy(`${path} is no whole archive: ${message}`, 'copy it again, or build it anew', { cause })
  }
}

async function readUnpacked(directory: string, compiledName: string): Promise<PolicyBundle> {
  const name = join(directory, compiledName)
  const read = (file: string) => readBounded(join(directory, file))
  const [compiled, own, opas, data] = [
    await read(compiledName),
    await read('manifest.json'),
    await read('.manifest'),
    await read('data.json'),
  ]
  if (!compiled) throw new UnusablePolicy(`there is nothing at ${name}`, buildHint)
  const manifest = readJson(own, ownManifest, join(directory, 'manifest.json'))
  if (manifest?.wasm) {
    if (manifest.wasm !== `sha256:${sha256(compiled)}`) {
      const problem = `${name} is not the file that manifest.json beside it names`
      throw new UnusablePolicy(problem, 'copy both again, or build the policy anew')
    }
    return bundleOf({ compiled, data, name, named: manifest.revision, isWhole: data === undefined })
  }
  const named = manifest?.revision ?? readJson(opas, opaManifest, join(directory, '.manifest'))?.revision
  return bundleOf({ compiled, data, name, named, isWhole: false })
}

function bundleOf(read: {
  compiled: Buffer
  data: Buffer | undefined
  name: string
  named: string | undefined
  isWhole: boolean
}): PolicyBundle {
  const { compiled, name, named, isWhole } = read
  const data = readJson(read.data, z.record(z.string(), z.unknown()), `data.json of ${name}`) ?? {}
  const digest = sha256(`${sha256(compiled)}\n${read.data ? sha256(read.data) : ''}`)
  const marked = named && !isWhole ? `${named}+${digest.slice(0, hashDigitsBesideName)}` : named
  return { compiled, data, revision: marked || digest.slice(0, hashDigits), digest, isWhole, name }
}

/** undefined when there is no such file. */
async function readBounded(path: string): Promise<Buffer | undefined> {
  const hint = 'see that it is a file which this user may read'
  try {
    const found = await stat(path)
    // To open a pipe would wait for who writes to it.
    if (!found.isFile()) throw new UnusablePolicy(`${path} is no file`, hint)
    if (found.size > bundleBytesMax) throw tooLarge(path)
    return await readFile(path)
  } catch (cause) {
    if (cause instanceof UnusablePolicy) throw cause
    const { code } = cause as NodeJS.ErrnoException
    if (code === 'ENOENT') return undefined
    throw new UnusablePolicy(`${path} can not be read: ${code}`, hint, { cause })
  }
}

function readJson<T>(text: Buffer | undefined, shape: z.ZodType<T>, name: string): T | undefined {
  if (text === undefined) return undefined
  try {
    return shape.parse(JSON.parse(text.toString('utf8')))
  } catch (cause) {
    const why = cause instanceof z.ZodError ? zodSentence(cause) : (cause as Error).message
    throw new UnusablePolicy(`${name} is not as it should be: ${why}`, buildHint, { cause })
  }
}

/** What does not fit, on one line. */
export function zodSentence(error: z.ZodError): string {
  return z.prettifyError(error).replaceAll(/\s*\n\s*/g, ' ')
}

function tooLarge(path: string): UnusablePolicy {
  return new UnusablePolicy(
    `${path} holds more than ${bundleBytesMax} bytes`,
    'a policy is rules: keep facts out of it',
  )
}

function sha256(content: Buffer | string): string {
  return createHash('sha256').update(content).digest('hex')
}
