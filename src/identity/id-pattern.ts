/**
 * Patterns of ids, such as `press-*`: `*` stands for any number of characters, `?` for one, all others for themselves.
 * A pattern is matched against the whole id.
 */

/** An id as `isSafeId` has it, with `*` and `?` wherever a character may stand. */
const patternOfPatterns = /^[a-z0-9*?](?:[a-z0-9._*?-]{0,62}[a-z0-9*?])?$/

/** Whether `text` is a pattern that some id can match: 1 to 64 characters. */
export function isIdPattern(text: string): boolean {
  return patternOfPatterns.test(text)
}

/**
 * A regular expression would be shorter, and with a dozen stars would take years for some ids. Here each character of
 * the id is looked at once for each star at most: only the last star ever has to give way.
 */
export function matchesIdPattern(pattern: string, id: string): boolean {
  let at = 0
  let patternAt = 0
  /** Behind the last star, and how far the id had been read when what follows the star was last tried. */
  let retry: { patternAt: number; at: number } | undefined
  while (at < id.length) {
    const wanted = pattern[patternAt]
    if (wanted === '*') {
      patternAt++
      retry = { patternAt, at }
    } else if (wanted === '?' || wanted === id[at]) {
      patternAt++
      at++
    } else if (retry) {
      retry.at++
      at = retry.at
      patternAt = retry.patternAt
    } else {
      return false
    }
  }
  return /^\**$/.test(pattern.slice(patternAt))
}
