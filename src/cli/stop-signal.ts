/**
 * Ctrl-C and `kill`, for commands that run until they are told to stop.
 *
 *     const stopping = stopSignal()
 *     …
 *     await asked(stopping)
 *     await server.stop()
 */

/**
 * `npm start` passes Ctrl-C on to a process that the terminal has told already. So a second signal right after the
 * first is the same wish, and not impatience.
 */
const echoMsMax = 500

/** The code that shells give to what Ctrl-C has ended: 128 + SIGINT. */
const interrupted = 130

/** Aborted by the first signal. A later one ends the process at once. */
export function stopSignal(): AbortSignal {
  const stopping = new AbortController()
  let firstAt = 0
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(name, () => {
      if (stopping.signal.aborted && performance.now() - firstAt > echoMsMax) process.exit(interrupted)
      if (stopping.signal.aborted) return
      firstAt = performance.now()
      stopping.abort()
    })
  }
  return stopping.signal
}

export function asked(stopping: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>()
  if (stopping.aborted) resolve()
  stopping.addEventListener('abort', () => resolve(), { once: true })
  return promise
}
