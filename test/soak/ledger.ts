/** What the service has acknowledged, and whether the database has it. It is asked directly, not by way of the service. */
import type pg from 'pg'
import type { Findings } from './findings.ts'

export type Ledger = {
  enrolled(deviceId: string, serial: string): void
  allowed(allow: { decisionId: string; connectionId: string; deviceId: string }): void
  /** The report is known by how full the disk was said to be. */
  reported(deviceId: string, diskPercent: number): void
  /** A user may have this name from now on; once acknowledged, no earlier one. */
  named(userId: string, name: string): () => void
  /** A token that was acknowledged, and how often it was redeemed as far as was heard. */
  token(id: string, usesMax: number): { redeemed(): void }
  counts: { enrollments: number; allows: number; reports: number; changes: number; tokens: number }
  /** Compares all that was not compared yet. */
  compare(): Promise<void>
}

/** Kept in memory until they are compared, at some 200 bytes each. */
const keptMax = 50_000

export function createLedger(pool: pg.Pool, findings: Findings): Ledger {
  const counts = { enrollments: 0, allows: 0, reports: 0, changes: 0, tokens: 0 }
  const serials = new Map<string, string>()
  let enrollments: { deviceId: string; serial: string }[] = []
  let allows: { decisionId: string; connectionId: string; deviceId: string }[] = []
  let reports: { deviceId: string; diskPercent: number }[] = []
  const names = new Map<string, Set<string>>()
  const tokens = new Map<string, { usesMax: number; heard: number }>()
  let comparing: Promise<void> = Promise.resolve()

  function compareIfMany(kept: readonly unknown[]): void {
    if (kept.length >= keptMax) comparing = comparing.then(compareWork)
  }

  async function missing(what: string, sql: string, columns: unknown[][]): Promise<void> {
    const { rows } = await pool.query<{ missing: string }>(sql, columns)
    for (const row of rows) findings.broken('acknowledged work is in the database', `${what}: ${row.missing}`)
  }

  async function compareWork(): Promise<void> {
    const [enrolled, allowed, reported] = [enrollments, allows, reports]
    ;[enrollments, allows, reports] = [[], [], []]
    await missing(
      'an enrollment',
      `select t.device_id || ' with ' || t.serial as missing from unnest($1::text[], $2::text[]) as t(device_id, serial)
       where not exists (select from certificates c where c.serial = t.serial and c.subject_id = t.device_id
         and c.fingerprint_sha256 is not null)
         or not exists (select from devices d where d.id = t.device_id)`,
      [enrolled.map(({ deviceId }) => deviceId), enrolled.map(({ serial }) => serial)],
    )
    await missing(
      'an allowed connection',
      `select t.decision_id || ' for ' || t.connection_id as missing
       from unnest($1::text[], $2::text[], $3::text[]) as t(decision_id, connection_id, device_id)
       where not exists (select from decisions d where d.id = split_part(t.decision_id, '.', 1)::uuid
           and d.device_id = t.device_id
           and (d.questions -> split_part(t.decision_id, '.', 2)::int ->> 'allow')::boolean)
         or t.connection_id <> '' and not exists (
           select from decisions d where d.id = (left(t.connection_id, -2) || '00')::uuid and d.device_id = t.device_id)`,
      [
        allowed.map(({ decisionId }) => decisionId),
        allowed.map(({ connectionId }) => connectionId),
        allowed.map(({ deviceId }) => deviceId),
      ],
    )
    await missing(
      'a report',
      `select t.device_id || ' with ' || t.disk as missing from unnest($1::text[], $2::text[]) as t(device_id, disk)
       where not exists (select from health_reports h where h.device_id = t.device_id
         and (h.posture ->> 'diskPercent')::float8 = t.disk::float8)`,
      [reported.map(({ deviceId }) => deviceId), reported.map(({ diskPercent }) => String(diskPercent))],
    )
  }

  async function compareState(): Promise<void> {
    const { rows: users } = await pool.query<{ id: string; name: string }>('select id, name from users')
    const nameOf = new Map(users.map(({ id, name }) => [id, name]))
    for (const [id, possible] of names) {
      const name = nameOf.get(id)
      if (possible.has('') && name === undefined) continue
      if (name !== undefined && possible.has(name)) continue
      const detail = `the user ${id} is named ${name}, not ${[...possible].join(' or ')}`
      findings.broken('acknowledged work is in the database', detail)
    }
    const { rows: kept } = await pool.query<{ id: string; uses: number; redeemed: number; devices: number }>(
      `select t.id, t.uses, count(r.token_id)::int as redeemed, count(distinct r.device_id)::int as devices
       from enrollment_tokens t left join token_redemptions r on r.token_id = t.id
       where t.id = any($1) group by t.id, t.uses`,
      [[...tokens.keys()]],
    )
    for (const [id, { usesMax, heard }] of tokens) {
      const row = kept.find(token => token.id === id)
      if (!row) {
        findings.broken('acknowledged work is in the database', `the token ${id}`)
        continue
      }
      const { uses, redeemed, devices } = row
      if (uses > usesMax || uses !== redeemed || redeemed !== devices || heard > redeemed) {
        const detail = `${id}: ${uses} of ${usesMax} uses, ${redeemed} redemptions, ${devices} devices, ${heard} heard of`
        findings.broken('a token is redeemed as often as it allows', detail)
      }
    }
  }

  return {
    counts,
    enrolled(deviceId, serial) {
      counts.enrollments += 1
      const other = serials.get(serial)
      if (other !== undefined) findings.broken('a serial is issued once', `${serial} for ${deviceId} and ${other}`)
      serials.set(serial, deviceId)
      enrollments.push({ deviceId, serial })
      compareIfMany(enrollments)
    },
    allowed(allow) {
      counts.allows += 1
      allows.push(allow)
      compareIfMany(allows)
    },
    reported(deviceId, diskPercent) {
      counts.reports += 1
      reports.push({ deviceId, diskPercent })
      compareIfMany(reports)
    },
    named(userId, name) {
      // Not there at all, until its creation was acknowledged.
      const possible = names.get(userId) ?? new Set([''])
      names.set(userId, possible.add(name))
      return () => {
        counts.changes += 1
        names.set(userId, new Set([name]))
      }
    },
    token(id, usesMax) {
      counts.tokens += 1
      const token = { usesMax, heard: 0 }
      tokens.set(id, token)
      return {
        redeemed() {
          token.heard += 1
        },
      }
    },
    async compare() {
      comparing = comparing.then(compareWork).then(compareState)
      await comparing
    },
  }
}
