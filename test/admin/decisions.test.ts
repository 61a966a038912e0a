import { randomUUID } from 'node:crypto'
import test from 'ava'
import { type DecidedQuestion, Decision } from '../../src/access/entities.ts'
import { ListDecisionsRequest } from '../../src/gen/edgemesh/v1/admin.ts'
import { allPages, explanation, invalid, operator, refused, start } from './operator.ts'

const list = ListDecisionsRequest.fromPartial
const get = (id: string, explain = false) => ({ id, explain })
const denied = {
  code: 'DISK_NOT_ENCRYPTED',
  field: 'device.health.disk_encrypted',
  actual: 'false',
  required: 'true',
  message: 'No.',
}

function question(service: string, allow = true): DecidedQuestion {
  const input = { action: 'connect' } as DecidedQuestion['input']
  return { user: 'alice', service, action: 'connect', allow, reasons: allow ? [] : [denied], input }
}

function decisionRow(questions: DecidedQuestion[], at = start, deviceId = 'alpha') {
  return {
    id: randomUUID(),
    at: new Date(at),
    deviceId,
    caller: `spiffe://test/device/${deviceId}`,
    method: '/edgemesh.v1.AuthorizeService/Check',
    sourceAddress: '192.0.2.9',
    instanceId: 'instance-1',
    policyRevision: 'revision-1',
    latencyUs: 100,
    questions,
  }
}

test('each question of a message is a decision of its own', async t => {
  const { admin, call, db } = await operator(t)
  const row = decisionRow([question('git'), question('mail', false)])
  await db.em().insert(Decision, row)
  const { decisions } = await admin.listDecisions(list({}), call())
  t.deepEqual(
    decisions.map(({ id, service, allowed }) => [id, service, allowed]),
    [
      [`${row.id}.0`, 'git', true],
      [`${row.id}.1`, 'mail', false],
    ],
  )
  const { decision } = await admin.getDecision(get(`${row.id}.1`), call())
  t.deepEqual(decision, {
    id: `${row.id}.1`,
    decidedAt: new Date(start),
    deviceId: 'alpha',
    user: 'alice',
    service: 'mail',
    action: 'connect',
    allowed: false,
    reasons: [denied],
    policyRevision: 'revision-1',
    caller: 'spiffe://test/device/alpha',
    instanceId: 'instance-1',
    input: { action: 'connect' },
    inputOf: '',
    // Rows of older versions have neither.
    evaluatedAt: undefined,
    expiresAt: undefined,
  })
})

test('decisions are listed by device, the newest first', async t => {
  const { admin, call, db } = await operator(t)
  await db
    .em()
    .insertMany(Decision, [
      decisionRow([question('old')], start),
      decisionRow([question('young')], start + 1),
      decisionRow([question('other')], start + 2, 'beta'),
    ])
  const services = async (deviceId: string) => {
    const { decisions } = await admin.listDecisions(list({ deviceId }), call())
    return decisions.map(decision => decision.service)
  }
  t.deepEqual(await services(''), ['other', 'young', 'old'])
  t.deepEqual(await services('alpha'), ['young', 'old'])
})

test('decisions are listed from a moment on, and up to another', async t => {
  const { admin, call, db } = await operator(t)
  const rows = [0, 1, 2, 3].map(at => decisionRow([question(`s-${at}`), question(`t-${at}`)], start + at))
  await db.em().insertMany(Decision, rows)
  const services = async (filter: { after?: Date; before?: Date; pageSize?: number }) =>
    allPages(async pageToken => {
      const { decisions, nextPageToken } = await admin.listDecisions(list({ ...filter, pageToken }), call())
      return { items: decisions.map(({ service }) => service), next: nextPageToken }
    })
  const [second, last] = [new Date(start + 1), new Date(start + 3)]
  t.deepEqual(await services({ after: last }), ['s-3', 't-3'])
  t.deepEqual(await services({ before: second }), ['s-0', 't-0'])
  for (const pageSize of [1, 3]) {
    t.deepEqual(await services({ after: second, before: last, pageSize }), ['s-2', 't-2', 's-1', 't-1'])
  }
  await invalid(t, admin.listDecisions(list({ after: new Date(Number.NaN) }), call()), ['after'])
})

test('a decision says of when its facts are, until when it held, and what each rule makes of them', async t => {
  const { admin, call, db } = await operator(t)
  const [evaluatedAt, expiresAt] = [new Date(start - 5_000).toISOString(), new Date(start + 55_000).toISOString()]
  const row = decisionRow([{ ...question('git'), evaluatedAt, expiresAt }])
  await db.em().insert(Decision, row)
  const plain = await admin.getDecision(get(`${row.id}.0`), call())
  t.deepEqual(plain.decision?.evaluatedAt, new Date(evaluatedAt))
  t.deepEqual(plain.decision?.expiresAt, new Date(expiresAt))
  t.is(plain.explanation, undefined)
  const explained = await admin.getDecision(get(`${row.id}.0`, true), call())
  t.deepEqual(explained, { ...plain, explanation: { policyRevision: 'revision-1', rules: explanation } })
})

test('the id of a decision is read strictly', async t => {
  const { admin, call } = await operator(t)
  const id = randomUUID()
  for (const wrong of [
    '',
    id,
    `${id}.`,
    `${id}.00`,
    `${id}.-1`,
    `${id}.0.0`,
    `${id}.1e3`,
    `x.0`,
    `${id} .0`,
    `${id}.1234567`,
  ]) {
    await invalid(t, admin.getDecision(get(wrong), call()), ['id'])
  }
  await refused(t, admin.getDecision(get(`${id}.0`), call()), 'NOT_FOUND', 'DECISION_NOT_FOUND')
  await invalid(t, admin.listDecisions(list({ deviceId: '?', pageToken: 'W10' }), call()), ['device_id', 'page_token'])
})

test('a position beyond the questions of the message is not found', async t => {
  const { admin, call, db } = await operator(t)
  const row = decisionRow([question('git')])
  await db.em().insert(Decision, row)
  await refused(t, admin.getDecision(get(`${row.id}.1`), call()), 'NOT_FOUND', 'DECISION_NOT_FOUND')
})

test('pages show each of 250 questions once, also where a page ends within a message', async t => {
  const { admin, call, db } = await operator(t)
  const rows = Array.from({ length: 50 }, (_, row) =>
    decisionRow(
      Array.from({ length: 5 }, (_, position) => question(`s-${row}-${position}`)),
      start + Math.floor(row / 10),
    ),
  )
  await db.em().insertMany(Decision, rows)
  for (const pageSize of [1, 7, 100]) {
    const decisions = await allPages(async pageToken => {
      const { decisions, nextPageToken } = await admin.listDecisions(list({ pageSize, pageToken }), call())
      return { items: decisions, next: nextPageToken }
    })
    t.is(decisions.length, 250)
    t.is(new Set(decisions.map(decision => decision.id)).size, 250)
  }
})
