/**
 * At what pace new connections are let in to their TLS handshake.
 *
 * When an instance dies, its devices come to the others within a second, thousands at once. A handshake is half a
 * millisecond of the event loop and more, twice; all of them at once would be a second in which nobody else is served, the
 * change feed is missed, and devices that were well here are told UNAVAILABLE. So a connection waits until its client has
 * spoken, and of those only so many are taken in a turn of the event loop, in the order in which they came. In between
 * everybody else has a turn. Where nothing waits, nobody is held up.
 *
 * A number of handshakes under way would not do as a bound: each lasts as long as its client likes, so a few who say nothing
 * more would keep everybody out, and a fleet far away would come in slowly. What a turn may cost depends on neither.
 *
 * Whoever finds the queue full, or would wait for longer than clients do, is hung up on: before TLS that costs next to
 * nothing, and clients come back by their backoff.
 */
import type { Socket } from 'node:net'

/** `queue_full`: too many wait already. `waited_too_long`: its turn has come too late. `no_hello`: that is not TLS. */
export type RefusedArrival = 'queue_full' | 'waited_too_long' | 'no_hello'

export type Admission = {
  /** A connection of which nothing has been read but what came before TLS. */
  arrive(socket: Socket): void
  /** Those whose client has spoken and whose turn has not come. */
  waiting(): number
}

/**
 * Handshakes begun in one turn of the event loop: at a millisecond each, with what the clients of those before have
 * answered, about 10 ms. More make others wait longer and are not done sooner: docs/performance.md has the figures.
 */
export const handshakesPerTurnMax = 8
/** Those that wait: about 3 kB each, and 80 kB at most. At 500 handshakes a second it is four seconds' work. */
export const waitingMax = 2_048
/** gRPC's clients give up after 20 s. */
export const waitMsMax = 10_000
/** Whoever says nothing waits in nobody's way, but not for ever. */
const silenceMsMax = 10_000
/** What a client says first is one TLS record. */
const helloBytesMax = 16_384 + 5

/** @param admit begins the handshake */
export function admitAtPace(options: {
  admit: (socket: Socket) => void
  /** Called with how long it has waited. */
  onAdmitted: (waitedMs: number) => void
  onRefused: (why: RefusedArrival, socket: Socket) => void
}): Admission {
  const { admit, onAdmitted, onRefused } = options
  /** Since when each waits, the first to come first. */
  const queue = new Map<Socket, number>()
  let begunInTurn = 0
  let turnIsCounted = false

  function refuse(socket: Socket, why: RefusedArrival): void {
    onRefused(why, socket)
    socket.resetAndDestroy()
  }

  function hasSpoken(socket: Socket): void {
    if (socket.readableLength > helloBytesMax) refuse(socket, 'no_hello')
    else if (queue.size >= waitingMax) refuse(socket, 'queue_full')
    else {
      queue.set(socket, performance.now())
      socket.once('close', leave)
      takeTurn()
    }
  }

  function leave(this: Socket): void {
    queue.delete(this)
  }

  function takeTurn(): void {
    for (const [socket, since] of queue) {
      if (begunInTurn >= handshakesPerTurnMax) break
      queue.delete(socket)
      socket.off('close', leave)
      const waitedMs = performance.now() - since
      if (waitedMs > waitMsMax) {
        refuse(socket, 'waited_too_long')
        continue
      }
      begunInTurn += 1
      onAdmitted(waitedMs)
      admit(socket)
    }
    if (begunInTurn === 0 || turnIsCounted) return
    turnIsCounted = true
    setImmediate(() => {
      turnIsCounted = false
      begunInTurn = 0
      takeTurn()
    })
  }

  return {
    arrive(socket) {
      // It may break while it waits; whoever has taken it by then hears of it, too.
      socket.on('error', ignore)
      const silence = setTimeout(() => socket.destroy(), silenceMsMax).unref()
      const stop = () => {
        clearTimeout(silence)
        socket.off('readable', listen).off('close', stop)
      }
      const listen = () => {
        if (socket.readableLength > 0) {
          stop()
          hasSpoken(socket)
        } else socket.read() // so that its end is noticed
      }
      socket.on('readable', listen).on('close', stop)
      if (socket.readableLength > 0) listen()
    },
    waiting: () => queue.size,
  }
}

const ignore = () => {}
