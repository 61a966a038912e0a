/**
 * A fleet: what a handshake, a report and an idle stream cost, how soon a revocation reaches its device, and how soon all are
 * back when an instance has died.
 */
import { startBareEcho } from '../bare-echo-server.ts'
import { addDevices, demandOpenFiles, devicesCount, fewRows, startFleetClients } from '../fleet.ts'
import { measureHandshakes } from '../fleet-handshakes.ts'
import { measureMemory } from '../fleet-memory.ts'
import { measureReports } from '../fleet-reports.ts'
import { measureStorm } from '../fleet-storm.ts'
import type { Group } from '../row.ts'
import { startServed } from '../served.ts'

/** Beside the connections: the database, the log, what Node opens for itself. */
const filesBeside = 1_000

export const group: Group = {
  title: `fleet: ${devicesCount.toLocaleString('en')} devices`,
  async *measure(options) {
    demandOpenFiles(devicesCount + filesBeside)
    const ends: (() => unknown)[] = []
    const { progress } = options
    try {
      progress('starting PostgreSQL, a server, and a bare one beside it')
      const served = await startServed()
      ends.push(served.stop)
      const bare = await startBareEcho()
      ends.push(bare.stop)
      const clients = startFleetClients()
      ends.push(clients.stop)
      const sides = { served, bare, clients }
      await addDevices(sides, 0, Math.min(fewRows, devicesCount), options)
      yield await measureHandshakes(sides, options)
      yield* measureReports(sides, options)
      yield* measureMemory(sides, options)
      yield* measureStorm(sides, options)
    } finally {
      for (const end of ends.reverse()) await end()
    }
  },
}
