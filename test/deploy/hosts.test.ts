/** What is put on hosts beside the program: firewalls, the rotation of logs, and every shell script, by the programs that run them. */
import { execFileSync } from 'node:child_process'
import { mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { promisify } from 'node:util'
import { gunzip } from 'node:zlib'
import test from 'ava'
import { findProgram } from '../support/find-program.ts'
import { deploy, judged, root, say } from '../support/programs.ts'
import { openFolder } from '../support/shipped-postgres.ts'

const shellcheck = findProgram('shellcheck')
const nft = findProgram('nft')
const ufw = findProgram('ufw')
const logrotate = findProgram('logrotate')

/** A network and mounts of its own, so that the firewall of the machine stays as it is. */
const apart = canBeApart()
function canBeApart(): string | undefined {
  try {
    execFileSync('unshare', ['--net', '--mount', 'true'], { stdio: 'ignore' })
    return 'unshare'
  } catch {
    return undefined
  }
}

async function scripts(folder: string): Promise<string[]> {
  const found: string[] = []
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name)
    if (/^(node_modules|\.git|\.tools|\.edgemesh|dist)$/.test(entry.name)) continue
    if (entry.isDirectory()) found.push(...(await scripts(path)))
    else if (entry.isFile() && (await stat(path)).size < 1e6) {
      if (/^#!.*\b(ba|da)?sh\b/.test((await readFile(path, 'latin1')).slice(0, 80))) found.push(path)
    }
  }
  return found
}

judged('shellcheck finds nothing in any script', { shellcheck }, async (t, { shellcheck }) => {
  const found = await scripts(root)
  const names = found.map(path => relative(root, path))
  for (const name of ['.ci/run', 'deploy/opa/start', 'deploy/compose/make-secrets', 'deploy/firewall/ufw.sh']) {
    t.true(names.includes(name), name)
  }
  const { exitCode, said } = await say(shellcheck, [
    '--severity=style',
    '--external-sources',
    '--source-path=SCRIPTDIR',
    ...found,
  ])
  t.is(exitCode, 0, said)
})

judged(
  'nftables takes the rules, again and again, and refuses what none of them names',
  { nft, 'unshare with privileges': apart },
  async (t, { nft }) => {
    const file = join(deploy, 'firewall', 'nftables.conf')
    const twice = `"$0" -c -f "$1" && "$0" -f "$1" && "$0" -f "$1" && "$0" list ruleset`
    const { exitCode, said } = await say('unshare', ['--net', 'sh', '-c', twice, nft, file])
    t.is(exitCode, 0, said)
    t.is(said.match(/type filter hook input/g)?.length, 1)
    t.regex(said, /policy drop/)
    // The database's port is for the servers, and nobody else.
    t.deepEqual(
      said.match(/.*5432.*/g)?.map(line => line.trim()),
      ['ip saddr 10.0.1.0/24 tcp dport 5432 accept comment "PostgreSQL"'],
    )
    const anywhere = said.match(/^\s*tcp dport .* accept.*$/gm) ?? []
    t.deepEqual(
      anywhere.map(line => line.trim()),
      ['tcp dport 8000 accept comment "EdgeMesh, from anywhere"'],
    )
  },
)

judged(
  'ufw lets in who belongs to a role of the host, and nobody else, however often it is told',
  { ufw, 'unshare with privileges': apart },
  async (t, { ufw }) => {
    const script = join(deploy, 'firewall', 'ufw.sh')
    // Where ufw keeps its rules it writes into copies, which are gone with the mounts.
    const copies =
      'for d in /etc/ufw /var/lib/ufw /etc/default /run; do c="$1/$(echo $d | tr / _)"; cp -a "$d/." "$c" 2>/dev/null || true; ' +
      'mkdir -p "$c"; mount --bind "$c" "$d"; done; ip link set lo up'
    const folder = await openFolder(t, 'ufw')
    const told = async (roles: string) => {
      const words = `${copies}; "$0" ${roles} >/dev/null && "$0" ${roles} >/dev/null && ufw status verbose`
      const env = { PATH: `${join(ufw, '..')}:/usr/sbin:/sbin:${process.env.PATH}`, LC_ALL: 'C' }
      const { exitCode, said } = await say('unshare', ['--net', '--mount', 'sh', '-c', words, script, folder], { env })
      t.is(exitCode, 0, said)
      t.regex(said, /Default: deny \(incoming\), allow \(outgoing\)/)
      return (said.match(/^.*ALLOW IN.*$/gm) ?? []).map(line => line.replace(/\s*#.*/, '').replaceAll(/\s+/g, ' '))
    }
    t.deepEqual(await told('api database'), [
      '22/tcp ALLOW IN 10.0.0.0/24',
      '9100/tcp ALLOW IN 10.0.2.0/24',
      '8000/tcp ALLOW IN 10.0.3.0/24',
      '9090/tcp ALLOW IN 10.0.3.0/24',
      '9090/tcp ALLOW IN 10.0.2.0/24',
      '8282/tcp ALLOW IN 10.0.2.0/24',
      '5432/tcp ALLOW IN 10.0.1.0/24',
      '9187/tcp ALLOW IN 10.0.2.0/24',
    ])
  },
)

test('the script of the firewall shows what it would do, and says what is wrong with a role or a network', async t => {
  const script = join(deploy, 'firewall', 'ufw.sh')
  const run = (args: string[], env = {}) => say(script, args, { env: { PATH: process.env.PATH, ...env } })
  const shown = await run(['--dry-run', 'balancer'])
  t.is(shown.exitCode, 0, shown.said)
  t.regex(shown.said, /^ufw allow 8000\/tcp comment EdgeMesh$/m)
  const role = await run(['databse'])
  t.is(role.exitCode, 2)
  t.regex(role.said, /error: 'databse' is no role: balancer, api, database, monitoring/)
  const network = await run(['--dry-run', 'api'], { API_NETWORK: 'anywhere' })
  t.is(network.exitCode, 2)
  t.regex(network.said, /error: 'anywhere' is no network such as/)
  t.is((await run([])).exitCode, 2)
})

judged(
  'logrotate takes the file, and rotates logs under whoever writes them',
  { logrotate },
  async (t, { logrotate }) => {
    const file = join(deploy, 'logrotate', 'edgemesh')
    const checked = await say(logrotate, ['--debug', '--state', '/dev/null', file])
    t.is(checked.exitCode, 0, checked.said)
    t.notRegex(checked.said, /^error/m)
    const folder = await openFolder(t, 'logrotate')
    const logs = join(folder, 'log')
    await mkdir(logs)
    const shipped = await readFile(file, 'utf8')
    const copy = join(folder, 'edgemesh')
    // Who is not root can't become somebody else; and with numbers for dates two rounds need no second between them.
    const own = shipped.slice(0, shipped.indexOf('# As the guide')).replaceAll('/var/log/edgemesh', logs)
    await writeFile(copy, own.replace(/ {2}su .*\n/, '').replace(/ {2}date.*\n/g, ''))
    const log = join(logs, 'haproxy.log')
    for (const round of ['first', 'second']) {
      await writeFile(log, `${round}\n`, { flag: 'a' })
      const { exitCode, said } = await say(logrotate, ['--force', '--state', join(folder, round), copy])
      t.is(exitCode, 0, said)
      t.is(await readFile(log, 'utf8').catch(String), '', 'whoever has it open goes on writing at its beginning')
    }
    t.deepEqual((await readdir(logs)).sort(), ['haproxy.log', 'haproxy.log.1', 'haproxy.log.2.gz'])
    t.is((await promisify(gunzip)(await readFile(`${log}.2.gz`))).toString(), 'first\n')
    t.is(await readFile(`${log}.1`, 'utf8'), 'second\n')
  },
)
