/** An issuer of user assertions: keys, tokens, and a real HTTP server that hands out the keys. */
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { ExecutionContext } from 'ava'
import { exportJWK, generateKeyPair, type JWK, type JWTPayload, SignJWT } from 'jose'

export const issuer = 'https://login.example.com'
export const audience = 'edgemesh'

export type IssuerKey = { kid: string; alg: string; privateKey: CryptoKey; jwk: JWK }

export async function issuerKey(kid: string, alg = 'ES256'): Promise<IssuerKey> {
  const { publicKey, privateKey } = await generateKeyPair(alg, { extractable: true })
  return { kid, alg, privateKey, jwk: { ...(await exportJWK(publicKey)), kid, alg } }
}

export const keySetOf = (...keys: IssuerKey[]) => ({ keys: keys.map(({ jwk }) => jwk) })

type Claims = JWTPayload & Record<string, unknown>

/** A token as the issuer makes it, but for what is given; a claim that is undefined is left out. */
export function assertionBy(
  { kid, alg, privateKey }: IssuerKey,
  claims: Claims = {},
  { at = Date.now(), header = {} }: { at?: number; header?: Record<string, unknown> } = {},
): Promise<string> {
  const now = Math.floor(at / 1_000)
  const all: Claims = { iss: issuer, aud: audience, sub: 'ada', iat: now, exp: now + 300, ...claims }
  for (const [name, value] of Object.entries(all)) if (value === undefined) delete all[name]
  return new SignJWT(all).setProtectedHeader({ alg, kid, typ: 'JWT', ...header }).sign(privateKey)
}

/** Hands out what `keys` is at the moment; counts who asks. */
export async function keyServer(t: ExecutionContext, keys: IssuerKey[]) {
  const served = { keys, url: '', requests: 0, status: 200, body: undefined as string | undefined }
  const server = createServer((_request, response) => {
    served.requests++
    response.writeHead(served.status, { 'content-type': 'application/json' })
    response.end(served.body ?? JSON.stringify(keySetOf(...served.keys)))
  })
  await new Promise<void>(listening => server.listen(0, '127.0.0.1', listening))
  served.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/keys`
  t.teardown(() => {
    server.closeAllConnections()
    return new Promise<void>(closed => server.close(() => closed()))
  })
  return served
}
