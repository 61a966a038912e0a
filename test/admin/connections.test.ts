import { randomUUID } from 'node:crypto'
import test from 'ava'
import { Connection } from '../../src/access/entities.ts'
import { ConnectionStatus, ListConnectionsRequest } from '../../src/gen/edgemesh/v1/admin.ts'
import { allPages, invalid, operator, refused, start } from './operator.ts'

const list = ListConnectionsRequest.fromPartial

function connectionRow(changes: Partial<Connection> = {}) {
  return {
    id: randomUUID(),
    deviceId: 'alpha',
    userId: 'alice',
    serviceId: 'git',
    action: 'connect',
    instanceId: 'instance-2',
    status: 'active' as Connection['status'],
    grantedAt: new Date(start),
    endedAt: null,
    endReasons: null,
    decisionId: 'd.0',
    ...changes,
  }
}

test('connections are listed, the newest first, by device and status', async t => {
  const { admin, call, db } = await operator(t)
  const old = connectionRow()
  const young = connectionRow({ grantedAt: new Date(start + 1), status: 'closed', endedAt: new Date(start + 2) })
  const other = connectionRow({ deviceId: 'beta', grantedAt: new Date(start + 3) })
  await db.em().insertMany(Connection, [old, young, other])
  const ids = async (filter: Partial<ListConnectionsRequest>) => {
    const { connections } = await admin.listConnections(list(filter), call())
    return connections.map(connection => connection.id)
  }
  t.deepEqual(await ids({}), [other.id, young.id, old.id])
  t.deepEqual(await ids({ deviceId: 'alpha' }), [young.id, old.id])
  t.deepEqual(await ids({ deviceId: 'alpha', status: ConnectionStatus.ACTIVE }), [old.id])
  t.deepEqual(await ids({ status: ConnectionStatus.CLOSED }), [young.id])
})

test('a connection that an operator closes is revoked with the reason, and announced', async t => {
  const { admin, call, db, announcedDuring } = await operator(t)
  const row = connectionRow()
  await db.em().insert(Connection, row)
  const keys = await announcedDuring(async () => {
    const { connection } = await admin.closeConnection({ id: row.id, reason: 'maintenance' }, call())
    t.like(connection, { status: ConnectionStatus.REVOKED, endedAt: new Date(start), instanceId: 'instance-2' })
    t.deepEqual(connection?.reasons, [
      {
        code: 'CLOSED_BY_OPERATOR',
        field: 'connection.id',
        actual: 'maintenance',
        required: '',
        message: 'An operator closed the connection: maintenance.',
      },
    ])
  })
  t.deepEqual(keys, [`connection:${row.id}`])
})

test('a connection that has ended stays as it ended', async t => {
  const { admin, call, db, announcedDuring } = await operator(t)
  const row = connectionRow({ status: 'closed', endedAt: new Date(start - 1) })
  await db.em().insert(Connection, row)
  const keys = await announcedDuring(async () => {
    const { connection } = await admin.closeConnection({ id: row.id, reason: '' }, call())
    t.like(connection, { status: ConnectionStatus.CLOSED, endedAt: new Date(start - 1) })
  })
  t.deepEqual(keys, [])
})

test('wrong fields are named, and what is not there is not found', async t => {
  const { admin, call } = await operator(t)
  await invalid(t, admin.closeConnection({ id: 'x', reason: 'y'.repeat(256) }, call()), ['id', 'reason'])
  await invalid(t, admin.listConnections(list({ deviceId: 'A', status: 9 as ConnectionStatus }), call()), [
    'device_id',
    'status',
  ])
  await refused(t, admin.closeConnection({ id: randomUUID(), reason: '' }, call()), 'NOT_FOUND', 'CONNECTION_NOT_FOUND')
})

test('pages show each of 250 connections once, even those granted within a millisecond', async t => {
  const { admin, call, db } = await operator(t)
  const rows = Array.from({ length: 250 }, () => connectionRow())
  await db.em().insertMany(Connection, rows)
  await db.pool.query(
    `update connections set granted_at = granted_at + floor(random() * 3000) * interval '1 microsecond'`,
  )
  const connections = await allPages(async pageToken => {
    const { connections, nextPageToken } = await admin.listConnections(list({ pageSize: 7, pageToken }), call())
    return { items: connections, next: nextPageToken }
  })
  t.deepEqual(connections.map(connection => connection.id).sort(), rows.map(row => row.id).sort())
})
