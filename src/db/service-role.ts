/**
 * The role that the service connects as, where it is not the one that owns the tables: it adds to what is on record and
 * reads it, and can neither change nor remove it, nor the triggers that would not let it.
 *
 * Whether partitions come and go is decided by functions of the owner: see migration 0005.
 */
import pg from 'pg'

/** Of these the service only adds and reads rows. Their partitions it reaches through them alone. */
const appendOnly = ['audit_events', 'decisions', 'audit_seals']
/** Of these it only reads rows. */
const readOnly = ['migrations', 'audit_retention']
const functions = [
  'make_day_partition(text, date)',
  'drop_day_partition(text, date)',
  'remove_default_rows(text, date, int)',
]

/** The role can't be given less than all: what to do instead is in `hint`. */
export class ServiceRoleError extends Error {
  readonly hint: string

  constructor(message: string, hint: string) {
    super(message)
    this.name = 'ServiceRoleError'
    this.hint = hint
  }
}

/**
 * Gives the role exactly what a server needs, on the tables that there are now; so it is to be done after each migration.
 *
 * @param pool connected as the owner
 * @param retentionDaysMin what is younger can't be dropped by the role
 * @throws {ServiceRoleError} when there is no such role, or when it owns the tables itself
 */
export async function grantServiceRole(pool: pg.Pool, role: string, retentionDaysMin: number): Promise<void> {
  const client = await pool.connect()
  try {
    await client.query('begin')
    await demandLesserRole(client, role)
    const to = pg.escapeIdentifier(role)
    const { rows } = await client.query<{ name: string; schema: string; partition: boolean }>(
      `select relname as name, current_schema() as schema, relispartition as partition from pg_class
       where relnamespace = current_schema()::regnamespace and relkind in ('r', 'p') order by relname`,
    )
    const schema = pg.escapeIdentifier(rows[0]?.schema ?? 'public')
    await client.query(`revoke all on all tables in schema ${schema} from ${to}`)
    await client.query(`revoke all on schema ${schema} from ${to}`)
    await client.query(`grant usage on schema ${schema} to ${to}`)
    await demandClosedSchema(client, role)
    for (const { name, partition } of rows) {
      if (!partition) await client.query(`grant ${rightsOn(name)} on ${pg.escapeIdentifier(name)} to ${to}`)
    }
    await client.query(`grant usage on all sequences in schema ${schema} to ${to}`)
    for (const name of functions) await client.query(`grant execute on function ${name} to ${to}`)
    await client.query('update audit_retention set days_min = $1', [retentionDaysMin])
    await client.query('commit')
  } catch (error) {
    await client.query('rollback').catch(() => {})
    throw error
  } finally {
    client.release()
  }
}

function rightsOn(table: string): string {
  if (readOnly.includes(table)) return 'select'
  return appendOnly.includes(table) ? 'select, insert' : 'select, insert, update, delete'
}

async function demandLesserRole(client: pg.ClientBase, role: string): Promise<void> {
  const { rows } = await client.query<{ owns: boolean }>(
    `select rolsuper or pg_has_role(oid, (select relowner from pg_class where oid = 'audit_events'::regclass), 'member')
       as owns
     from pg_roles where rolname = $1`,
    [role],
  )
  if (!rows[0]) {
    throw new ServiceRoleError(
      `there is no role ${role}`,
      `make it: create role ${pg.escapeIdentifier(role)} login password '…'`,
    )
  }
  if (rows[0].owns) {
    throw new ServiceRoleError(
      `the role ${role} owns the tables, is a member of a role that does, or is a superuser`,
      'let the service connect as another one: see docs/audit.md',
    )
  }
}

/** Who may make functions in the schema could put their own in the place of those that the owner's functions call. */
async function demandClosedSchema(client: pg.ClientBase, role: string): Promise<void> {
  const { rows } = await client.query<{ schema: string; open: boolean }>(
    `select current_schema() as schema, has_schema_privilege($1, current_schema(), 'create') as open`,
    [role],
  )
  if (!rows[0]?.open) return
  throw new ServiceRoleError(
    `the role ${role} may create things in the schema ${rows[0].schema}, as everybody may`,
    `have its owner run: revoke create on schema ${pg.escapeIdentifier(rows[0].schema)} from public`,
  )
}

/** Who the service is in the database, and whether it could change what is on record. */
export async function ownAudit(pool: Pick<pg.Pool, 'query'>): Promise<{ role: string; isHeld: boolean }> {
  const { rows } = await pool.query<{ role: string; free: boolean }>(
    `select current_user as role, bool_or(pg_has_role(relowner, 'member')
       or has_table_privilege(oid, 'update') or has_table_privilege(oid, 'delete') or has_table_privilege(oid, 'truncate')
     ) as free
     from pg_class where oid = any ($1::regclass[]::oid[])`,
    [appendOnly],
  )
  return { role: rows[0]?.role ?? '', isHeld: rows[0]?.free === false }
}

/**
 * What a server needs and the role that asks does not have, in words such as `insert on audit_events`. It says nothing about
 * what the role has beyond that.
 */
export async function missingRights(client: Pick<pg.Pool, 'query'>): Promise<string[]> {
  const { rows } = await client.query<{ name: string; has: Record<string, boolean> }>(
    `select relname as name, json_build_object('select', has_table_privilege(oid, 'select'),
       'insert', has_table_privilege(oid, 'insert'), 'update', has_table_privilege(oid, 'update'),
       'delete', has_table_privilege(oid, 'delete')) as has
     from pg_class where relnamespace = current_schema()::regnamespace and relkind in ('r', 'p') and not relispartition
     order by relname`,
  )
  const { rows: closed } = await client.query<{ name: string }>(
    `select name from unnest($1::text[]) as name where not has_function_privilege(name, 'execute')`,
    [functions],
  )
  return [
    ...rows.flatMap(({ name, has }) => {
      const missing = rightsOn(name)
        .split(', ')
        .filter(right => !has[right])
      return missing.length > 0 ? [`${missing.join(', ')} on ${name}`] : []
    }),
    ...closed.map(({ name }) => `execute on ${name}`),
  ]
}
