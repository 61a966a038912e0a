/** What the agent tells whoever runs it, as it happens. */
import type { Server } from '../client/channel.ts'
import type { ReportingEvent } from '../client/events.ts'

export type AgentEvent =
  | { event: 'enrolling'; server: Server }
  /** An operator has to let it in. Told once, however often the stream has to be opened anew. */
  | { event: 'pending-approval'; deviceId: string }
  | { event: 'enrolled'; deviceId: string; spiffeId: string; notAfter: Date }
  /** An identity was kept from an earlier run. */
  | { event: 'resumed'; deviceId: string; spiffeId: string; notAfter: Date }
  | ReportingEvent
  | { event: 'stopped' }
