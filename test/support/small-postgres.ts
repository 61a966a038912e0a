/** What every PostgreSQL that a test starts has in common. */
import pg from 'pg'

/** Arguments of `postgres`: on loopback alone, and small. @param settings besides those, or in their place */
export function smallServerArguments(port: number, settings: Record<string, string>): string[] {
  return Object.entries({
    listen_addresses: '127.0.0.1',
    port: String(port),
    unix_socket_directories: '',
    max_connections: '60',
    shared_buffers: '16MB',
    ...settings,
  }).flatMap(([name, value]) => ['-c', `${name}=${value}`])
}

/** One statement, on a connection of its own. @param options of the session, as `-c name=value` */
export async function queryOnce<Row extends pg.QueryResultRow>(
  url: string,
  statement: string,
  values: unknown[] = [],
  options?: string,
): Promise<Row[]> {
  const client = new pg.Client({ connectionString: url, connectionTimeoutMillis: 5_000, ...(options && { options }) })
  client.on('error', () => {})
  await client.connect()
  try {
    return (await client.query<Row>(statement, values)).rows
  } finally {
    await client.end()
  }
}
