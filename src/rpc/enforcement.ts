/**
 * Enforcement on what is open already: neither a call nor a connection may outlive what let it in.
 *
 * A revocation cuts the caller's calls the moment that the change feed tells of it, an expired certificate within half a
 * second; the connection is ended when the refusal has had time to arrive. So is one that is made with a certificate that
 * does not stand: its calls are refused with the reason, each by itself, until then. After the feed was lost, everybody who
 * is connected is looked at again.
 */
import type { Socket } from 'node:net'
import type { Identified } from '../caller.ts'
import type { Clock } from '../clock.ts'
import type { ChangeFeed } from '../db/change-feed.ts'
import { Fault } from '../fault.ts'
import { certificateExpired, type Standing } from '../identity/standing.ts'
import type { Log } from '../telemetry/log.ts'
import type { Dispatch } from './dispatch.ts'
import type { Peer } from './peer.ts'

export type Enforcement = {
  /** A handshake is over. */
  connected(peer: Peer, socket: Socket): void
  stop(): void
}

/** How often connections are looked through for certificates that have expired: tens of microseconds each time. */
const sweepMs = 500
/** How long a connection goes on after its certificate was refused, for the refusals to arrive. */
const refusalMs = 1_000
/** The same where the certificate has expired: by it a device may come back, which takes a few calls. */
const comeBackMs = 30_000

/** The connection of a caller. `isEnding`: its end is near, and its calls have been cut. */
type Connection = { caller: Identified; socket: Socket; isEnding: boolean }

/** To be started after `createStanding`, whose memory has to hear of a change first. */
export function enforceStanding(options: {
  feed: ChangeFeed
  standing: Pick<Standing, 'demand'>
  dispatch: Dispatch
  /** Tells when other authorities are trusted than before. */
  onTrustChange: (listener: () => void) => void
  /** Called before the calls of a caller are cut, so that its streams can still be told. */
  beforeCut: (caller: Identified, fault: Fault) => void
  clock: Clock
  log: Log
}): Enforcement {
  const { feed, standing, dispatch, beforeCut, clock, log } = options
  /** By whose they are, as the feed's keys have it: `<kind>:<id>`. */
  const connections = new Map<string, Set<Connection>>()
  /** Of whom it could not be read whether they still stand; as long as they are connected, it is tried again. */
  const unsure = new Set<string>()

  /** @param holders absent: all */
  function recheck(holders: Iterable<string> = connections.keys()): void {
    for (const holder of [...holders]) {
      const serials = new Map([...(connections.get(holder) ?? [])].map(({ caller }) => [caller.serial, caller]))
      for (const caller of serials.values()) look(holder, caller)
    }
  }

  function look(holder: string, caller: Identified): void {
    if (caller.notAfter <= clock()) {
      throwOut(holder, caller, certificateExpired())
      return
    }
    Promise.try(standing.demand, caller).catch(error => {
      if (error instanceof Fault && error.code === 'UNAUTHENTICATED') throwOut(holder, caller, error)
      else if (connections.has(holder)) {
        log.debug({ err: error }, 'a certificate could not be looked at again yet')
        unsure.add(holder)
      }
    })
  }

  function throwOut(holder: string, caller: Identified, fault: Fault): void {
    beforeCut(caller, fault)
    dispatch.cut(other => other.serial === caller.serial, fault)
    for (const connection of connections.get(holder) ?? []) {
      if (connection.caller.serial !== caller.serial || connection.isEnding) continue
      connection.isEnding = true
      endLater(connection.socket, fault.reason)
    }
  }

  function endLater(socket: Socket, reason: string): void {
    const ms = reason === 'CERTIFICATE_EXPIRED' ? comeBackMs : refusalMs
    const timer = setTimeout(() => socket.destroy(), ms).unref()
    socket.once('close', () => clearTimeout(timer))
  }

  function sweep(): void {
    const now = clock()
    for (const [holder, siblings] of connections) {
      for (const { caller, isEnding } of siblings) {
        if (!isEnding && caller.notAfter <= now) throwOut(holder, caller, certificateExpired())
      }
    }
    const again = [...unsure]
    unsure.clear()
    recheck(again)
  }

  feed.onChange(keys => recheck(new Set(keys.filter(key => connections.has(key)))))
  feed.onReset(() => recheck())
  options.onTrustChange(() => recheck())
  const sweeping = setInterval(sweep, sweepMs)

  return {
    connected({ identity }, socket) {
      if ('refused' in identity) {
        // Whoever has shown nothing of ours is as good as one that has shown nothing.
        if (identity.expired) endLater(socket, identity.refused)
        return
      }
      const holder = `${identity.kind}:${identity.id}`
      const connection: Connection = { caller: identity, socket, isEnding: false }
      const siblings = connections.get(holder) ?? new Set()
      connections.set(holder, siblings.add(connection))
      socket.once('close', () => {
        siblings.delete(connection)
        if (siblings.size === 0 && connections.get(holder) === siblings) connections.delete(holder)
      })
      look(holder, identity)
    },
    stop: () => clearInterval(sweeping),
  }
}
