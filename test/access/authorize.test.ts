import { setImmediate } from 'node:timers/promises'
import test from 'ava'
import type pg from 'pg'
import { type ContinuousDeps, createAuthorize } from '../../src/access/authorize.ts'
import type { Decision } from '../../src/access/decide.ts'
import { revocationEntry } from '../../src/access/decision-records.ts'
import { createLeases, type Lease, newLease } from '../../src/access/leases.ts'
import { watchRevocations } from '../../src/access/revocations.ts'
import type { JournalEntry } from '../../src/audit/journal.ts'
import type { Call } from '../../src/caller.ts'
import type { AuthorizeRequest, AuthorizeResponse } from '../../src/gen/edgemesh/v1/authorize.ts'
import type { MessageStream } from '../../src/message-stream.ts'
import { createLog } from '../../src/telemetry/log.ts'

const clock = Date.now
const question = { deviceId: 'alpha', user: 'ada', service: 'payroll', action: 'connect' }
const gone = { code: 'GROUND_GONE', field: '', actual: '', required: '', message: '' }

function decisionOf({ allow = true, policyRevision = '1', role = 'engineer' } = {}): Decision {
  const expiresAtMs = clock() + 60_000
  return {
    verdict: {
      question,
      allow,
      reasons: allow ? [] : [gone],
      policyRevision,
      evaluatedAtMs: clock(),
      expiresAtMs,
      input: {},
      onRecord: { expiresAtMs, first: '{}' },
    },
    ground: { user: { value: { id: 'ada', role } }, service: { value: { id: 'payroll' } } },
  } as unknown as Decision
}

/** Leases, of which the test says how each is decided and what is announced. */
function scene(decide: () => Decision | Promise<Decision>) {
  const listeners: ((keys: string[]) => void)[] = []
  const later: JournalEntry[] = []
  const leases = createLeases({
    decider: { decide },
    engine: { revision: () => '2', onRevision() {} },
    feed: {
      onChange: listener => void listeners.push(listener),
      onReset() {},
      lagMs: () => 0,
      databaseTimeMs: ms => ms,
    },
    pool: {} as pg.Pool,
    record: entries => void later.push(...entries),
    decisionOf: revocationEntry('instance', clock),
    instanceId: 'instance',
    graceMs: 30_000,
    clock,
    log: createLog({ level: 'silent' }),
    onState() {},
  })
  return { leases, later, announce: (key: string) => listeners.forEach(listener => void listener([key])) }
}

test('a connection that is taken back before its answer is denied, and on record with the reasons', async t => {
  // The policy is replaced between the two, as the policy of a server can be.
  const decisions = [decisionOf(), decisionOf({ allow: false, policyRevision: '2' })]
  const decide = () => decisions.shift() ?? t.fail('nothing else is to be decided')
  const { leases, later } = scene(decide as () => Decision)
  t.teardown(leases.stop)
  const appended: JournalEntry[] = []
  const authorize = createAuthorize({
    decider: { decide },
    leases,
    facts: { isCurrent: () => true },
    journal: { append: async (entries: JournalEntry[]) => void appended.push(...entries) },
    instanceId: 'instance',
    clock,
    limit() {},
    assertions: undefined,
    onDecisions() {},
    onDenied() {},
    onConnection() {},
    onUndecided() {},
    revocations: watchRevocations({ clock, onPush() {}, onAcknowledge() {} }),
    graceMs: 30_000,
  } as unknown as ContinuousDeps)
  const answers: AuthorizeResponse[] = []
  const stream: MessageStream<AuthorizeRequest, AuthorizeResponse> = {
    send: message => void answers.push(message),
    async receive(onMessage) {
      const asked = { id: 'q', user: 'ada', service: 'payroll', action: '' }
      await onMessage({ kind: { $case: 'questions', value: { questions: [asked], userAssertion: undefined } } })
    },
  }
  const call = {
    caller: { kind: 'device', id: 'alpha', spiffeId: 'spiffe://test/device/alpha' },
    address: '192.0.2.1',
    method: '/test',
    instanceId: 'instance',
    startedAt: clock(),
    signal: new AbortController().signal,
    audit: { target: '', detail: {}, written: false },
  } as unknown as Call
  await authorize(stream, call)
  const [response] = answers
  const answer = response?.kind?.$case === 'answers' ? response.kind.value.answers[0] : undefined
  t.is(answer?.allowed, false)
  t.deepEqual(answer?.reasons, [gone])
  const records = [...later, ...appended].filter(({ table }) => table.name === 'connections')
  t.deepEqual(
    records.map(({ row }) => [row[6], JSON.parse(String(row[9]))]),
    [['revoked', [gone]]],
  )
})

test('a grant of a new role that goes while the connection is decided under that role ends it', async t => {
  const waiting: ((decision: Decision) => void)[] = []
  const { leases, announce } = scene(() => new Promise(resolve => waiting.push(resolve)))
  t.teardown(leases.stop)
  const revoked: Lease[] = []
  const lease = leases.grant(
    newLease({
      id: '00000000-0000-7000-8000-000000000000',
      questionId: 'q',
      question,
      userId: 'ada',
      role: 'engineer',
      serviceId: 'payroll',
      grantedAtMs: clock(),
      recorded: false,
      expiresAtMs: clock() + 60_000,
      assertedUntilMs: Number.POSITIVE_INFINITY,
      decisionId: '',
      push: ({ lease }) => void revoked.push(lease),
      moved() {},
    }),
    '2',
  )
  // Ada becomes an admin. While that is decided admins lose the service.
  announce('user:ada')
  announce('grants:admin')
  t.is(waiting.length, 1)
  waiting.shift()?.(decisionOf({ role: 'admin', policyRevision: '2' }))
  await setImmediate()
  t.is(waiting.length, 1, 'it is decided once more')
  waiting.shift()?.(decisionOf({ allow: false, role: 'admin', policyRevision: '2' }))
  await setImmediate()
  t.deepEqual(revoked, [lease])
})
