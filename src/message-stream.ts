/** A bidirectional stream as handlers see it, free of the transport. */
export type MessageStream<In, Out> = {
  /**
   * Hands every message to `onMessage`, several at a time while their promises are pending, and resolves when the client
   * has sent its last and all are done. Rejects with the first error, or with the fault by which the server cuts the call.
   *
   * @param underWayMax how many at a time; the client is not read beyond that. Default: as many as one stream may have
   */
  receive(onMessage: (message: In) => void | Promise<void>, underWayMax?: number): Promise<void>
  send(message: Out): void
}
