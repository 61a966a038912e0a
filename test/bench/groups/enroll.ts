/**
 * Enrollment: what a certificate costs, and what a whole Enroll call costs.
 *
 * A certificate is what happens in memory: the request checked, its challenge demanded, the leaf built, signed, linted.
 * A call is all of it: TLS and gRPC, the token redeemed and device, serial and audit event on disk, the certificate.
 */
import { execFileSync } from 'node:child_process'
import { generateKeyPairSync, type KeyObject, randomBytes, sign, X509Certificate } from 'node:crypto'
import { credentials, Metadata } from '@grpc/grpc-js'
import { createKey, signingRequestFor } from '../../../src/client/csr.ts'
import { AdminServiceClient, CreateEnrollmentTokenRequest } from '../../../src/gen/edgemesh/v1/admin.ts'
import { EnrollServiceClient } from '../../../src/gen/edgemesh/v1/enroll.ts'
import { DeviceDescription, DeviceType } from '../../../src/gen/edgemesh/v1/types.ts'
import { createAuthority, openAuthority } from '../../../src/identity/certificate-authority.ts'
import { newSerial } from '../../../src/identity/certificates.ts'
import { createChallenges } from '../../../src/identity/challenge.ts'
import { checkCsr } from '../../../src/identity/csr.ts'
import { barePkijs } from '../bare-pkijs.ts'
import { channelOf, channelOptions } from '../enrolled-device.ts'
import { profileRows } from '../profile.ts'
import { medianRate, type Rate, rate, ratesInTurns, showRate } from '../rates.ts'
import type { Group, GroupOptions, Row } from '../row.ts'
import { type Served, startServed } from '../served.ts'

export const group: Group = {
  title: 'enroll: certificates, and whole calls',
  async *measure(options) {
    yield await certificates(options)
    yield* calls(options)
  },
}

// ── enroll.certificates ────────────────────────────────────────────────────────────────────────────────────────────

/** Requests that are used over and over: each has a key of its own, and nothing here remembers any. */
const requestsCount = 500
const pkijsInFlight = 8
const timesPkijsMin = 4
const dayMs = 86_400_000

async function certificates({ progress }: GroupOptions): Promise<Row> {
  const passphrase = 'a passphrase of the benchmark'
  const now = new Date()
  const material = await createAuthority({ trustDomain: 'bench.test', validityDays: 365, now, passphrase })
  const authority = openAuthority({ ...material, passphrase })
  const challenges = createChallenges({ secret: passphrase, clock: Date.now })
  const { challenge } = challenges.give()
  const requests = Array.from({ length: requestsCount }, () => signingRequestFor(createKey(), challenge))
  const requestAt = (turn: number) => requests[turn % requestsCount] as Buffer
  const template = {
    spiffeId: 'spiffe://bench.test/device/sensor-7',
    commonName: 'sensor-7',
    notBefore: now,
    notAfter: new Date(now.getTime() + 90 * dayMs),
  }

  function ours(turn: number): Buffer {
    const key = checkCsr(requestAt(turn))
    challenges.demand(key)
    const serial = Buffer.from(newSerial(), 'hex')
    return authority.issueLeaf({ ...template, serial, spki: key.spki, purpose: 'client' }).der
  }
  const issuer = { ...authority.issuer, privateKey: authority.issuer.privateKey! }
  const pkijs = barePkijs(issuer)
  demandSameWork(ours(0), await pkijs(requestAt(0), template), issuer.publicKey)

  const pkijsOnce = (turn: number) => pkijs(requestAt(turn), template)
  const rates = await ratesInTurns(
    {
      ours: { once: ours },
      'pkijs one after another': { once: pkijsOnce },
      'pkijs side by side': { once: pkijsOnce, inFlight: pkijsInFlight },
      'raw P-256 signatures': { once: turn => sign('sha256', requestAt(turn), issuer.privateKey) },
    },
    progress,
  )
  const [alone, together] = [rates['pkijs one after another'], rates['pkijs side by side']]
  const value = rates.ours.perCpuSecond
  const floor = Math.max(alone.perCpuSecond, together.perCpuSecond)
  return {
    name: 'enroll.certificates',
    value,
    unit: 'certificates/s',
    floor,
    ratio: value / floor,
    note:
      `${showRate(rates.ours)}, ${Math.round(rates.ours.perWallSecond)}/s by the clock; floor: bare pkijs, the better of ` +
      `${showRate(alone)} one after another and ${showRate(together)} with ${pkijsInFlight} side by side; raw P-256 ` +
      `signatures by node:crypto ${showRate(rates['raw P-256 signatures'])}`,
    bar: { demand: `at least ${timesPkijsMin} × bare pkijs`, met: value >= timesPkijsMin * floor },
  }
}

/** @throws unless both certificates are signed by the issuer and say the same of their holder */
function demandSameWork(ours: Buffer, theirs: Buffer, issuerKey: KeyObject): void {
  const [one, other] = [new X509Certificate(ours), new X509Certificate(theirs)]
  const same =
    one.subject === other.subject &&
    one.issuer === other.issuer &&
    one.subjectAltName === other.subjectAltName &&
    one.validTo === other.validTo &&
    one.publicKey.equals(other.publicKey) &&
    String(one.keyUsage) === String(other.keyUsage)
  if (!same || !one.verify(issuerKey) || !other.verify(issuerKey)) {
    throw new Error(`pkijs was to make the same certificate:\n${one.toString()}\n${other.toString()}`)
  }
}

// ── enroll.calls ───────────────────────────────────────────────────────────────────────────────────────────────────

const connections = 4
const callsInFlight = 24
const warmUpCalls = 2_000
/** Odd, so that there is one in the middle. */
const callRounds = 5
const callsOfRound = 1_000
const callsProfiled = 2_000
/** Uses of a token wait for each other; a fleet that is set up with one token for each site has several. */
const tokensCount = 8
const usesOfToken = 10_000
const callsPerCpuSecondMin = 400
const callTimeoutMs = 30_000

async function* calls({ progress, profile }: GroupOptions): AsyncGenerator<Row> {
  progress('starting PostgreSQL and a server')
  const served = await startServed()
  const clients = enrollClients(served)
  try {
    const tokens = await createTokens(served)
    await enrollMany(clients, tokens, warmUpCalls)
    const rates: Rate[] = []
    for (let round = 1; round <= callRounds; round++) {
      progress(`calls: round ${round} of ${callRounds}`)
      const requests = await prepareRequests(clients, callsOfRound)
      const before = await served.cpuSince()
      const startedAt = performance.now()
      await enrollEach(clients, tokens, requests)
      rates.push(rate(callsOfRound, await served.cpuSince(before), performance.now() - startedAt))
    }
    const median = medianRate(rates)
    const value = median.perCpuSecond
    const signatures = await rawSignatures(progress)
    yield {
      name: 'enroll.calls',
      value,
      unit: 'calls/s',
      floor: signatures.perSecond,
      ratio: value / signatures.perSecond,
      note:
        `${showRate(median)} for a second of the server's processor time, ${Math.round(median.perWallSecond)}/s by the ` +
        `clock with clients and PostgreSQL on the same machine; ${callsInFlight} calls in flight over ${connections} ` +
        `connections, ${tokensCount} tokens; floor: raw P-256 signatures by ${signatures.by}`,
      bar: { demand: `at least ${callsPerCpuSecondMin} calls/s`, met: value >= callsPerCpuSecondMin },
    }
    if (profile) {
      progress('calls: where the time goes')
      const requests = await prepareRequests(clients, callsProfiled)
      const { recorded, cpu } = await served.profile(() => enrollEach(clients, tokens, requests))
      yield* profileRows('enroll.calls', recorded, callsProfiled, cpu.user + cpu.system)
    }
  } finally {
    for (const client of clients) client.close()
    await served.stop()
  }
}

function enrollClients({ address, rootsPem }: Served): EnrollServiceClient[] {
  const channel = credentials.createSsl(Buffer.from(rootsPem))
  return Array.from({ length: connections }, () => new EnrollServiceClient(address, channel, channelOptions))
}

async function createTokens(served: Served): Promise<string[]> {
  const keyPem = createKey()
  const certificatePem = await served.operatorCertificate(signingRequestFor(keyPem))
  const channel = channelOf({ rootsPem: served.rootsPem, keyPem, certificatePem })
  const admin = new AdminServiceClient(served.address, channel, channelOptions)
  const request = CreateEnrollmentTokenRequest.fromPartial({ usesMax: usesOfToken })
  const one = () =>
    new Promise<string>((resolve, reject) => {
      admin.createEnrollmentToken(request, (error, answer) => (error ? reject(error) : resolve(answer.tokenText)))
    })
  return Promise.all(Array.from({ length: tokensCount }, one)).finally(() => admin.close())
}

/** A challenge is good for many requests and ten minutes; a request is good once. */
async function prepareRequests([client]: EnrollServiceClient[], count: number): Promise<Buffer[]> {
  const challenge = await new Promise<string>((resolve, reject) => {
    client?.getChallenge({}, (error, answer) => (error ? reject(error) : resolve(answer.challenge)))
  })
  return Array.from({ length: count }, () => signingRequestFor(createKey(), challenge))
}

async function enrollMany(clients: EnrollServiceClient[], tokens: string[], count: number): Promise<void> {
  await enrollEach(clients, tokens, await prepareRequests(clients, count))
}

async function enrollEach(clients: EnrollServiceClient[], tokens: string[], requests: Buffer[]): Promise<void> {
  let next = 0
  async function repeat(): Promise<void> {
    for (;;) {
      const at = next++
      const csr = requests[at]
      if (csr === undefined) return
      await enroll(clients[at % connections] as EnrollServiceClient, tokens[at % tokensCount] as string, csr)
    }
  }
  await Promise.all(Array.from({ length: callsInFlight }, repeat))
}

const device = DeviceDescription.fromPartial({
  type: DeviceType.SERVER,
  os: 'linux',
  osVersion: '6.12',
  labels: { site: 'berlin', line: '4' },
})

function enroll(client: EnrollServiceClient, token: string, csr: Buffer): Promise<void> {
  return new Promise((resolve, reject) => {
    let enrolled = false
    const call = client.enroll({ token, csr, device, sentAt: new Date() }, new Metadata(), {
      deadline: Date.now() + callTimeoutMs,
    })
    call.on('data', ({ step }) => {
      enrolled ||= step?.$case === 'identity'
    })
    call.on('error', reject)
    call.on('end', () => (enrolled ? resolve() : reject(new Error('the call has ended without an identity'))))
  })
}

const opensslSeconds = 3
/** As long as what is signed of a certificate. */
const toBeSignedBytes = 450

/** P-256 signatures per second of processor time: by the `openssl` command, or where there is none by node:crypto. */
async function rawSignatures(progress: (text: string) => void): Promise<{ perSecond: number; by: string }> {
  progress('openssl speed')
  const openssl = (...args: string[]) =>
    execFileSync('openssl', args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
  try {
    const said = openssl('speed', '-mr', '-seconds', String(opensslSeconds), 'ecdsap256')
    // `+F4:<number of the curve>:<bits of the key>:<signatures per second>:<verifications per second>`
    const [, perSecond] = /^\+F4:\d+:256:([\d.]+):/m.exec(said) ?? []
    if (perSecond === undefined) throw new Error(`openssl speed has said: ${said}`)
    return { perSecond: Number(perSecond), by: `openssl speed (${openssl('version').split(' (')[0]?.trim()})` }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
    const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
    const toBeSigned = randomBytes(toBeSignedBytes)
    const { signing } = await ratesInTurns(
      { signing: { once: () => sign('sha256', toBeSigned, privateKey) } },
      progress,
    )
    return { perSecond: signing.perCpuSecond, by: 'node:crypto, since there is no openssl command here' }
  }
}
