/**
 * Pages of a list. A page is found by the key of the last row before it (keyset paging), never by counting rows, so
 * that it costs the same however far on it is, and rows that come and go meanwhile neither repeat nor hide others.
 *
 *     const listUsersRequest = z.object({ ...page(z.tuple([id])) })
 *
 *     const { pageSize, pageToken: after } = check(listUsersRequest, request)
 *     const rows = …the first `pageSize + 1` rows after `after`…
 *     const { rows: users, nextPageToken } = cutPage(rows, pageSize, user => [user.id])
 *
 * The token is opaque to callers: the key, as base64url of JSON. It is no secret and grants nothing, but it is input,
 * so it is checked like any other.
 */
import { z } from 'zod'

const pageSizeDefault = 100
const pageSizeMax = 1_000
/** Keys are a few ids of at most 64 characters. */
const tokenCharactersMax = 512

/** A key as the token carries it: texts only, so that there is one spelling of each. */
type Key = string[]

/** The two fields of a list's request. `pageToken` is read into the key, `undefined` for the first page. */
export function page<K extends Key>(keyShape: z.ZodType<K>) {
  return {
    pageSize: z
      .int('has to be a whole number')
      .min(0, `has to be 1 to ${pageSizeMax}, or 0 for ${pageSizeDefault}`)
      .max(pageSizeMax, `has to be 1 to ${pageSizeMax}, or 0 for ${pageSizeDefault}`)
      .transform(size => size || pageSizeDefault),
    pageToken: z.string().transform((token, context): K | undefined => {
      if (token === '') return undefined
      const key = keyShape.safeParse(decode(token))
      if (key.success) return key.data
      context.addIssue({ code: 'custom', message: 'has to be empty or what the page before gave as next_page_token' })
      return z.NEVER
    }),
  }
}

/** @param rows one more than `pageSize` if there are as many: the last one tells that there is a next page */
export function cutPage<R>(rows: R[], pageSize: number, keyOf: (row: R) => Key): { rows: R[]; nextPageToken: string } {
  const last = rows[pageSize - 1]
  if (rows.length <= pageSize || last === undefined) return { rows, nextPageToken: '' }
  return { rows: rows.slice(0, pageSize), nextPageToken: encode(keyOf(last)) }
}

function encode(key: Key): string {
  return Buffer.from(JSON.stringify(key)).toString('base64url')
}

/** `undefined` for what `encode` does not make. */
function decode(token: string): unknown {
  if (token.length > tokenCharactersMax) return undefined
  const bytes = Buffer.from(token, 'base64url')
  // Buffer skips what is not base64url; a token of ours has one spelling.
  if (bytes.toString('base64url') !== token) return undefined
  try {
    return JSON.parse(bytes.toString())
  } catch {
    return undefined
  }
}
