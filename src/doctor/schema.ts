/** What is in the database: the schema, whose it is, the days that are made ahead, and whether what happened is on record. */
import type pg from 'pg'
import { partitionDays } from '../db/partitions.ts'
import { missingRights, ownAudit } from '../db/service-role.ts'
import { aliveSeconds } from './database.ts'
import { CannotLook, type Check, type Finding, failed, ok, orOk, span, warning } from './finding.ts'
import type { Subject } from './subject.ts'

export const migrationsCheck: Check<Subject> = {
  name: 'migrations',
  async look(subject) {
    const { applied, pending, newer } = await subject.migrations()
    if (pending.length > 0) {
      const what = applied.length === 0 ? 'there is no schema yet' : `the schema is behind: ${pending.join(', ')}`
      const why = 'a server whose role owns the tables brings it when it starts; any other one ends, and says so'
      return [failed({ what, why, mend: 'edgemesh migrate up, as the owner of the tables: DATABASE_MIGRATION_URL' })]
    }
    if (newer.length > 0) {
      return [
        warning({
          what: `the schema is of a newer version: ${newer.join(', ')}`,
          why: 'this version serves on it, one release back; it is not meant to last',
          mend: 'finish the update, or the way back: docs/upgrade.md',
        }),
      ]
    }
    return [ok(`${applied.length} migrations, none pending`)]
  },
}

/** What is missing is told by `migrations`. */
async function demandSchema(subject: Subject): Promise<void> {
  const { pending } = await subject.migrations()
  if (pending.length > 0) throw new CannotLook('the schema is behind: see the check migrations')
}

export const databaseRoleCheck: Check<Subject> = {
  name: 'database-role',
  async look(subject) {
    await demandSchema(subject)
    return subject.read(async client => {
      const { rows } = await client.query<{ role: string; isSuper: boolean; more: string }>(
        `select current_user as role, rolsuper as "isSuper", concat_ws(', ', case when rolcreaterole then 'createrole' end,
           case when rolcreatedb then 'createdb' end, case when rolreplication then 'replication' end,
           case when rolbypassrls then 'bypassrls' end) as more
         from pg_roles where rolname = current_user`,
      )
      const { role, isSuper, more } = rows[0]!
      const lesser = 'let servers connect as a role that owns nothing: docs/audit.md'
      if (isSuper) {
        const why = 'whoever takes over a server has the whole database server, and its files'
        return [failed({ what: `the role ${role} is a superuser`, why, mend: lesser })]
      }
      const troubles: Finding[] = []
      if (!(await ownAudit(client)).isHeld) {
        const why = 'whoever takes over a server can change what it has put on record'
        const what = `the role ${role} could change or remove what is on record`
        troubles.push(warning({ what, why, mend: lesser }))
      }
      if (more !== '') {
        const why = 'a server needs none of it'
        const mend = `alter role ${role} ${more.replace(/(\w+)/g, 'no$1').replaceAll(',', '')}`
        troubles.push(warning({ what: `the role ${role} may do more than it needs: ${more}`, why, mend }))
      }
      const missing = await missingRights(client)
      if (missing.length > 0) {
        const why = 'a server answers UNAVAILABLE to whatever needs it'
        const mend = 'edgemesh migrate up with DATABASE_MIGRATION_URL and DATABASE_URL: it grants what servers need'
        troubles.push(failed({ what: `the role ${role} lacks rights: ${missing.join('; ')}`, why, mend }))
      }
      return orOk(troubles, `${role} adds to what is on record, and can neither change nor remove it`)
    })
  },
}

/** Servers make eight, today's among them. */
const daysAheadMin = 3

export const partitionsCheck: Check<Subject> = {
  name: 'partitions',
  async look(subject) {
    await demandSchema(subject)
    return subject.read(async client => {
      const { retentionDays } = subject.settings().audit
      const { ahead, overdue } = await partitionDays(client, retentionDays, subject.clock())
      if (Object.values(ahead).every(days => days === 0) && !(await hasServed(client))) {
        throw new CannotLook('no server has run on this database yet: the first one makes them')
      }
      const troubles: Finding[] = []
      const short = Object.entries(ahead).filter(([, days]) => days < daysAheadMin)
      if (short.length > 0) {
        const least = Math.min(...short.map(([, days]) => days))
        const trouble = {
          what: `partitions are missing: ${short.map(([table, days]) => `${table} has those of ${days} days from today on`).join(', ')}`,
          why: 'rows of a day without one gather in the default partition, from where they are removed one by one',
          mend: 'start a server: it makes them, every ten minutes; if one runs, its log says why it can not',
        }
        troubles.push(least < 1 ? failed(trouble) : warning(trouble))
      }
      if (overdue.length > 0) {
        troubles.push(
          warning({
            what: `${overdue.length} partitions are older than the retention, such as ${overdue[0]}`,
            why: 'the disk fills with what should have gone',
            mend: 'end what keeps them from being dropped (a long report, a dump); the log of a server says why',
          }),
        )
      }
      return orOk(
        troubles,
        `partitions of ${Math.min(...Object.values(ahead))} days from today on, none older than the retention`,
      )
    })
  },
}

/** A server that serves begins with a seal. */
async function hasServed(client: pg.PoolClient): Promise<boolean> {
  const { rows } = await client.query<{ served: boolean }>('select exists (select from audit_seals) as served')
  return rows[0]?.served === true
}

/** A seal follows its events at once: the journal's batch takes them along. */
const unsealedMsMax = 30_000
const eventsLookedAt = 5_000

export const auditWritersCheck: Check<Subject> = {
  name: 'audit-writers',
  async look(subject) {
    await demandSchema(subject)
    return subject.read(async client => {
      // A seal is never dated before what it seals, so only those behind the event are looked at.
      const { rows } = await client.query<{ id: string; agoMs: number; isAlive: boolean }>(
        `with newest as (
           select instance_id as id, max(at) as at
           from (select instance_id, at from audit_events where at > now() - interval '1 day'
             order by at desc, id desc limit ${eventsLookedAt}) as looked_at
           where at < now() - make_interval(secs => $1) group by instance_id
         )
         select id, (extract(epoch from now() - at) * 1000)::float8 as "agoMs", exists (
           select from instances i where i.id = newest.id and i.seen_at > now() - make_interval(secs => $2)) as "isAlive"
         from newest where not exists (
           select from audit_seals s where s.at >= newest.at and s.instance_id = newest.id
             and s.last_at_us >= floor(extract(epoch from newest.at) * 1000000))
         order by newest.at`,
        [unsealedMsMax / 1_000, aliveSeconds],
      )
      const troubles = rows.map(({ id, agoMs, isAlive }) =>
        isAlive
          ? failed({
              what: `${id} is behind: its event of ${span(agoMs)} ago is in no seal`,
              why: 'what is not sealed can be removed without a trace, and whoever follows the log does not hear of it',
              mend: 'see its log for the journal: docs/runbooks/audit.md',
            })
          : warning({
              what: `${id} was killed before it had sealed its last events, ${span(agoMs)} ago`,
              why: 'until they are sealed their removal would not show',
              mend: 'start a server: it seals what others have left; then edgemesh audit verify',
            }),
      )
      return orOk(troubles, 'what happened is on record, and sealed')
    })
  },
}

// ── Client addresses ───────────────────────────────────────────────────────────────────────────────────────────────

const devicesMin = 5

export const clientAddressesCheck: Check<Subject> = {
  name: 'client-addresses',
  async look(subject) {
    await demandSchema(subject)
    const { trustedProxies } = subject.settings().api
    const malformed = await malformedHeaders(subject)
    const { rows } = await subject.read(client =>
      client.query<{ address: string; devices: number }>(
        `select source_address as address, count(distinct actor)::int as devices
         from (select source_address, actor from audit_events where at > now() - interval '1 hour'
           order by at desc, id desc limit ${eventsLookedAt}) as looked_at
         where actor like '%/device/%' group by 1 order by 2 desc`,
      ),
    )
    const troubles: Finding[] = []
    if (malformed > 0) {
      troubles.push(
        failed({
          what: `${malformed} connections of TRUSTED_PROXIES came without a PROXY protocol header, and were refused`,
          why: 'devices behind that balancer can not connect',
          mend: 'have it send the header (send-proxy-v2 with HAProxy, proxy_protocol on with nginx): docs/load-balancing.md',
        }),
      )
    }
    const [only, ...others] = rows
    if (only && others.length === 0 && only.devices >= devicesMin && trustedProxies.length === 0) {
      troubles.push(
        warning({
          what: `${only.devices} devices all come from ${only.address}`,
          why: 'if that is a balancer, limits by address hold for all devices together, and the log does not say who came from where',
          mend: `have the balancer send the PROXY protocol, and set TRUSTED_PROXIES=${only.address}`,
        }),
      )
    }
    const devices = rows.reduce((sum, row) => sum + row.devices, 0)
    return orOk(troubles, devices === 0 ? 'no device came within the hour' : `devices from ${rows.length} addresses`)
  },
}

async function malformedHeaders(subject: Subject): Promise<number> {
  const instance = await subject.instance().catch(() => undefined)
  return (instance?.samples ?? [])
    .filter(({ name, labels }) => name === 'edgemesh_proxy_headers_total' && labels.outcome !== 'read')
    .reduce((sum, { value }) => sum + value, 0)
}
