/** Decisions: what an answer costs beside the same messages sent back by a bare gRPC server, and how long one takes. */
import { AuthorizeServiceClient, type CheckResponse } from '../../../src/gen/edgemesh/v1/authorize.ts'
import { startBareEcho } from '../bare-echo-server.ts'
import { decisionRates, question, serviceOf, servicesCount } from '../decision-rates.ts'
import { answerTimes, decidingTimes } from '../decision-times.ts'
import { answered, channelOf, channelOptions, enrollDevice } from '../enrolled-device.ts'
import type { Group } from '../row.ts'
import { startServed } from '../served.ts'

export const group: Group = {
  title: 'authorize: decisions a second, and how long one takes',
  async *measure(options) {
    const ends: (() => unknown)[] = []
    try {
      yield* decidingTimes(options)
      options.progress('starting PostgreSQL, a server, and a bare one beside it')
      const served = await startServed()
      ends.push(served.stop)
      const echo = await startBareEcho()
      ends.push(echo.stop)
      const services = Array.from({ length: servicesCount }, (_, at) => serviceOf(at))
      const device = await enrollDevice(served, services)
      ends.push(device.stop)
      const client = new AuthorizeServiceClient(served.address, channelOf(device), channelOptions)
      ends.push(() => client.close())
      const asked = { question: question(0), deviceId: '' }
      const { answer } = await answered<CheckResponse>(done => client.check(asked, done))
      if (!answer?.allowed) throw new Error(`the device was to be allowed: ${JSON.stringify(answer)}`)
      // As long as the answers on a stream, which name a connection.
      const onStream = { ...answer, connectionId: crypto.randomUUID() }
      await echo.answer(onStream)
      const sides = { served, device, echo }
      // While the database is quiet: after the rates it is busy with what they have written.
      yield await answerTimes(sides, options)
      const committing = await startBareEcho(served.databaseUrl)
      ends.push(committing.stop)
      await committing.answer(onStream)
      yield* decisionRates(sides, committing, options)
    } finally {
      for (const end of ends.reverse()) await end()
    }
  },
}
