/** Which program this is: the version of the package, and the revision of the source where somebody has left word of it. */
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join, resolve } from 'node:path'

export const { version } = createRequire(import.meta.url)('../package.json') as { version: string }

const root = join(import.meta.dirname, '..')
const revisionDigits = 12

/**
 * The commit that this was made from: what stands in the file REVISION beside package.json, as who builds an image may write it;
 * else that of the checkout. Undefined where neither is there.
 */
export function revision(): string | undefined {
  const commit = textOf(join(root, 'REVISION')) ?? commitOfCheckout(join(root, '.git'))
  return commit !== undefined && /^[0-9a-f]{7,64}$/.test(commit) ? commit.slice(0, revisionDigits) : undefined
}

/** What `git rev-parse HEAD` says, where there may be no git. */
function commitOfCheckout(dotGit: string): string | undefined {
  // In a worktree .git is a file that says where its folder is, and that one says where the branches are.
  const [, elsewhere] = /^gitdir: (.+)$/.exec(textOf(dotGit) ?? '') ?? []
  const own = elsewhere === undefined ? dotGit : resolve(root, elsewhere)
  const head = textOf(join(own, 'HEAD'))
  const [, branch] = /^ref: (.+)$/.exec(head ?? '') ?? []
  if (branch === undefined) return head
  const common = resolve(own, textOf(join(own, 'commondir')) ?? '.')
  const packed = textOf(join(common, 'packed-refs'))?.split('\n') ?? []
  return textOf(join(common, branch)) ?? packed.find(line => line.endsWith(` ${branch}`))?.split(' ')[0]
}

function textOf(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim()
  } catch {
    return undefined
  }
}
