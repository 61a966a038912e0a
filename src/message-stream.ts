/** A bidirectional stream as handlers see it, free of the transport. */
export type MessageStream<In, Out> = {
  /**
   * Hands every message to `onMessage`, several at a time while their promises are pending, and resolves when the client
   * has sent its last and all are done. Rejects with the first error, or with the fault by which the server cuts the call.
   */
  receive(onMessage: (message: In) => void | Promise<void>): Promise<void>
  send(message: Out): void
}
