/**
 * The URL of a database as people write it: for SQLAlchemy, for libpq, with a password that nobody has escaped. Made into one
 * that `pg` understands as it was meant.
 */

/** What is wrong with the URL, to be said behind the name of the setting. */
export class DatabaseUrlError extends Error {}

/**
 * `ssl=` is asyncpg's word and `sslmode=` libpq's; they share these meanings. `prefer` and `allow` are left out: both
 * fall back to plain text when someone on the path asks for it.
 */
const SSL_MODES: Readonly<Record<string, string>> = {
  disable: 'disable',
  false: 'disable',
  require: 'require',
  'verify-ca': 'verify-ca',
  'verify-full': 'verify-full',
  true: 'verify-full',
}

/**
 * @param isPlaceholder whether a password is still that of the documentation
 * @returns the URL as `pg` reads it, of several servers in `?host=one,two&port=5432,5433`
 * @throws DatabaseUrlError
 */
export function readDatabaseUrl(given: string, isPlaceholder: (password: string) => boolean): string {
  // The user and the password are cut out before the URL is parsed: passwords made by `openssl rand -base64` have
  // slashes, which SQLAlchemy accepts unescaped in this place and the URL standard doesn't.
  const match = /^(?:postgres|postgresql|postgresql\+asyncpg):\/\/(?:([^:@/]*)(?::([^@]*))?@)?(.*)$/.exec(given)
  if (!match) throw new DatabaseUrlError('must begin with postgresql://, postgres:// or postgresql+asyncpg://')
  const [, user = '', password = '', rest = ''] = match
  if (isPlaceholder(password)) throw new DatabaseUrlError('has still the placeholder of the documentation as password')

  const userInfo = user === '' ? '' : `${escapeOnce(user)}${password === '' ? '' : `:${escapeOnce(password)}`}@`
  const several = severalServers(rest)
  if (several === 'wrong') throw new DatabaseUrlError('names several servers, not as host:5432,host:5432/edgemesh')
  const normalised = `postgresql://${userInfo}${several?.rest ?? rest}`
  if (!URL.canParse(normalised))
    throw new DatabaseUrlError('must be a URL: postgresql://user:password@host:5432/edgemesh')
  const url = new URL(normalised)
  if (url.hostname === '' && !url.searchParams.has('host')) throw new DatabaseUrlError('names no host')
  if (url.pathname.length < 2) throw new DatabaseUrlError('names no database: end it with /edgemesh')

  if (several) {
    url.searchParams.set('host', several.hosts.join())
    url.searchParams.set('port', several.ports.join())
  }
  const [hosts, ports] = ['host', 'port'].map(name => url.searchParams.get(name)?.split(',').length ?? 1) as [
    number,
    number,
  ]
  if (ports !== 1 && ports !== hosts) throw new DatabaseUrlError(`names ${hosts} servers and ${ports} ports`)

  const word = url.searchParams.get('ssl') ?? url.searchParams.get('sslmode')
  if (word === null) return url.href
  const mode = SSL_MODES[word.toLowerCase()]
  if (!mode) throw new DatabaseUrlError('ssl must be disable, require, verify-ca or verify-full')
  if (mode === 'verify-ca' && !url.searchParams.has('sslrootcert')) {
    throw new DatabaseUrlError('ssl=verify-ca needs sslrootcert, the path of the authority that signed the server')
  }
  url.searchParams.delete('ssl')
  url.searchParams.set('sslmode', mode)
  // Without this, `pg` takes every mode for verify-full and says so on stderr.
  url.searchParams.set('uselibpqcompat', 'true')
  return url.href
}

/**
 * What libpq takes in the place of a host, and no URL has: `one:5432,two:5432/edgemesh`. `db/servers.ts` finds them all in
 * the parameters `host` and `port`, which libpq takes too.
 */
function severalServers(rest: string): { rest: string; hosts: string[]; ports: string[] } | 'wrong' | undefined {
  const [, list = '', path = ''] = /^([^/?]*)(.*)$/s.exec(rest) ?? []
  if (!list.includes(',')) return undefined
  const servers = list.split(',').map(server => /^(\[[\da-f:.]+\]|[^\s:[\]%]+)(?::(\d{1,5}))?$/i.exec(server))
  if (!servers.every(server => server !== null)) return 'wrong'
  const hosts = servers.map(([, host = '']) => host)
  const ports = servers.map(([, , port = '5432']) => port)
  return { rest: `${hosts[0]}:${ports[0]}${path}`, hosts, ports }
}

/** Percent-encodes what was given plainly, and leaves what was percent-encoded already as it is. */
function escapeOnce(userInfo: string): string {
  try {
    return encodeURIComponent(decodeURIComponent(userInfo))
  } catch {
    return encodeURIComponent(userInfo) // a bare % that begins no escape
  }
}
