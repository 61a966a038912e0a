/**
 * The change from one certificate authority to the next, in stages that a fleet can follow and an operator can take back:
 *
 * - `stable`: one authority.
 * - `published`: the next one is in every trust bundle, and issues nothing. Devices learn of its root.
 * - `issuing`: the next one issues; the last one's certificates still count. Devices and operators renew.
 * - `retiring`: the last one is trusted no more: its certificates are refused, its root leaves the bundles.
 * - `stable` again: the last one is forgotten with its key, and with it the way back.
 *
 * Each call goes one stage on or, until the last, one stage back. While there are two, each root is certified by the
 * other (`cross-certificate.ts`), so that a client that has slept through a stage still knows the server.
 */
import type { KeyObject } from 'node:crypto'
import { announce } from '../db/change-feed.ts'
import type { EntityManager } from '../db/orm.ts'
import { Fault } from '../fault.ts'
import {
  type AuthorityOptions,
  type AuthoritySet,
  authorityChanged,
  type Generation,
  insertAuthority,
  lockedAuthorities,
  type RotationStage,
} from './authorities.ts'
import { createAuthority, openKey } from './certificate-authority.ts'
import { crossCertify } from './cross-certificate.ts'
import type { StoredAuthority } from './entities.ts'
import { decodePem, encodePem } from './pem.ts'
import { type RotationProgress, rotationProgress } from './rotation-progress.ts'

/** Where each stage may lead: one on, and one back while there is a way. */
const ways: Record<RotationStage, { on: RotationStage; back?: RotationStage }> = {
  stable: { on: 'published' },
  published: { on: 'issuing', back: 'stable' },
  issuing: { on: 'retiring', back: 'published' },
  retiring: { on: 'stable', back: 'issuing' },
}

export type Rotation = {
  /**
   * Goes to the stage `to`, in the transaction of `em`.
   *
   * @throws Fault FAILED_PRECONDITION ROTATION_STAGE where no way leads there; ROTATION_NOT_READY where a device or an
   *   operator would be left behind and `force` is not set; ABORTED ROTATION_RACE when another call was faster
   */
  to(em: EntityManager, to: RotationStage, force: boolean): Promise<RotationProgress | undefined>
}

export function createRotation(
  options: Pick<AuthorityOptions, 'trustDomain' | 'validityDays' | 'passphrase' | 'clock'> & {
    current: () => AuthoritySet
    /** CERT_RECOVERY_DAYS, in ms. */
    recoveryMs: number
  },
): Rotation {
  const { passphrase, trustDomain, clock } = options

  return {
    async to(em, to, force) {
      // Step 1. Nobody else rotates until this transaction has ended, and what is in memory is what is in the database.
      const set = options.current()
      const rows = await lockedAuthorities(em)
      const stages = (all: { generation: number; stage: string }[]) =>
        all.map(({ generation, stage }) => `${generation}:${stage}`).sort()
      const stored = rows.map(({ id, stage }) => ({ generation: id, stage }))
      if (stages(stored).join() !== stages(set.all).join()) throw raced()

      // Step 2. There is a way, and nobody is left behind on it.
      const { on, back } = ways[set.rotation]
      if (to !== on && to !== back) throw noWay(set.rotation, to)
      const progress = set.other && (await rotationProgress(em, set, options.recoveryMs))
      if (!force && progress) demandReady(set.rotation, to, progress)
      if (to === 'issuing' || to === 'published') demandKey(set)

      // Step 3. Take it.
      const row = (generation: Generation | undefined) => rows.find(({ id }) => id === generation?.generation)!
      switch (`${set.rotation} → ${to}` as const) {
        case 'stable → published':
          await publish(em, set, rows)
          break
        case 'published → issuing':
        case 'issuing → published':
          await handOver(em, row(set.issuing), row(set.other))
          break
        case 'issuing → retiring':
          row(set.other).stage = 'retired'
          break
        case 'retiring → issuing':
          row(set.other).stage = 'trusted'
          break
        case 'published → stable':
        case 'retiring → stable':
          row(set.issuing).crossPem = ''
          forget(em, row(set.other), set.rotation)
          break
      }
      await em.flush()
      await announce(em, [authorityChanged, 'crl:authority'])
      return progress
    },
  }

  /** The next authority: the one that a file has brought, else a new one. Each root is certified by the other. */
  async function publish(em: EntityManager, set: AuthoritySet, rows: StoredAuthority[]): Promise<void> {
    const prepared = rows.findLast(({ stage, id }) => stage === 'prepared' && id > set.issuing.generation)
    const old = rows.find(({ id }) => id === set.issuing.generation)!
    if (prepared) {
      const next = set.all.find(({ generation }) => generation === prepared.id)!
      prepared.stage = 'trusted'
      prepared.crossPem = cross(next, rootKeyOf(old, set.issuing), old.rootPem)
      old.crossPem = cross(set.issuing, rootKeyOf(prepared, next), prepared.rootPem)
      return
    }
    const now = new Date(clock())
    const material = await createAuthority({ trustDomain, validityDays: options.validityDays, now, passphrase })
    const rootKey = openKey(material.rootKeyPem, passphrase)
    insertAuthority(em, {
      id: Math.max(...rows.map(({ id }) => id)) + 1,
      stage: 'trusted',
      trustDomain,
      createdAt: now,
      ...material,
      crossPem: cross({ rootPem: material.rootPem, below: 1 }, rootKeyOf(old, set.issuing), old.rootPem),
    })
    old.crossPem = cross(set.issuing, rootKey, material.rootPem)
  }

  /** @returns undefined where only its owner has the key: nobody can be certified by that root */
  function rootKeyOf({ rootKeyPem }: StoredAuthority, { intermediates, issuer }: Generation): KeyObject | undefined {
    if (rootKeyPem) return openKey(rootKeyPem, passphrase)
    return intermediates.length === 0 ? issuer.privateKey : undefined
  }
}

/** PEM, or nothing where the other root's key is not to be had or does not allow it. */
function cross(
  root: { rootPem: string } & ({ below: number } | { intermediates: string[] }),
  otherKey: KeyObject | undefined,
  otherRootPem: string,
): string {
  if (otherKey === undefined) return ''
  const below = 'below' in root ? root.below : root.intermediates.length
  const [rootDer, otherDer] = [derOf(root.rootPem), derOf(otherRootPem)]
  const der = crossCertify(rootDer, below, { certificateDer: otherDer, privateKey: otherKey })
  return der ? encodePem('CERTIFICATE', der) : ''
}

/** There is never more than one that issues, not even between two statements: the database sees to it. */
async function handOver(em: EntityManager, from: StoredAuthority, to: StoredAuthority): Promise<void> {
  from.stage = 'trusted'
  await em.flush()
  to.stage = 'issuing'
}

/** One from a file stays prepared after a step back; all else goes, and its key with it. */
function forget(em: EntityManager, row: StoredAuthority, from: RotationStage): void {
  if (from === 'published' && row.intermediateKeyPem == null) {
    row.stage = 'prepared'
    row.crossPem = ''
  } else em.remove(row)
}

function demandReady(from: RotationStage, to: RotationStage, progress: RotationProgress): void {
  const { devices, devicesTrusting, devicesCertified, operators, operatorsCertified } = progress
  if (from === 'published' && to === 'issuing' && devicesTrusting < devices) {
    throw notReady(
      `${devices - devicesTrusting} of ${devices} devices have not reported yet that they trust the new root`,
    )
  }
  if (from === 'issuing' && to === 'retiring' && devicesCertified < devices) {
    throw notReady(
      `${devices - devicesCertified} of ${devices} devices do not report with a certificate of the new authority yet`,
    )
  }
  if (from === 'issuing' && to === 'retiring' && operatorsCertified < operators) {
    const who = `${operators - operatorsCertified} of ${operators} operators`
    throw notReady(`${who} hold no certificate of the new authority yet`)
  }
  if (from === 'published' && to === 'stable' && progress.dependent > 0) {
    throw notReady(
      `${progress.dependent} devices and operators hold certificates of the authority that would be forgotten`,
    )
  }
}

/** Nobody would be let in or renewed by an instance that lacks the key; this one stands for all. */
function demandKey({ rotation, other }: AuthoritySet): void {
  if (rotation === 'stable' || rotation === 'retiring' || other?.issuer.privateKey !== undefined) return
  throw notReady(
    `the key of authority ${other?.generation} is not on this instance: give CA_KEY_FILE to every instance`,
  )
}

function notReady(why: string): Fault {
  return new Fault('FAILED_PRECONDITION', 'ROTATION_NOT_READY', why)
}

function noWay(from: RotationStage, to: RotationStage): Fault {
  const { on, back } = ways[from]
  const message = `the rotation is at ${from}: it can go on to ${on}${back ? ` or back to ${back}` : ''}, not to ${to}`
  return new Fault('FAILED_PRECONDITION', 'ROTATION_STAGE', message, { metadata: { stage: from } })
}

function raced(): Fault {
  const message = 'the authorities have just been changed by another call; look at them and try again'
  return new Fault('ABORTED', 'ROTATION_RACE', message, { retryAfterMs: raceRetryMs })
}

const raceRetryMs = 1_000

function derOf(pem: string): Buffer {
  return decodePem('CERTIFICATE', pem)[0]!
}
