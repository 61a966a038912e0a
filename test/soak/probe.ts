/** Loaded into an instance before all else (`--import`): says, when asked, what only the process itself knows. */
import { readdirSync } from 'node:fs'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'

export type Probed = {
  rssBytes: number
  /** After everything that nobody refers to was removed. */
  heapBytes: number
  files: number
  handles: number
  /** Since the last time: by how much a timer came late, at worst but for one in a hundred. */
  lagMs: number
}

const lag = monitorEventLoopDelay({ resolution: 10 })
lag.enable()
setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

process.on('message', (message: unknown) => {
  if (message !== 'probe') return
  const lagMs = Math.max(0, lag.percentile(99) / 1e6 - 10)
  collect()
  lag.reset()
  const probed: Probed = {
    rssBytes: process.memoryUsage.rss(),
    heapBytes: process.memoryUsage().heapUsed,
    files: readdirSync('/proc/self/fd').length,
    handles: process.getActiveResourcesInfo().length,
    lagMs,
  }
  process.send?.(probed)
})
// Who listens keeps the process alive, and an instance has to end by itself.
process.channel?.unref()
