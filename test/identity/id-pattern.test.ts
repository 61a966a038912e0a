import test from 'ava'
import fc from 'fast-check'
import { isIdPattern, matchesIdPattern } from '../../src/identity/id-pattern.ts'
import { isSafeId } from '../../src/identity/spiffe-id.ts'

test('a pattern is matched against the whole id', t => {
  const matches: [string, string[], string[]][] = [
    ['press-7', ['press-7'], ['press-70', 'xpress-7', 'press-', 'press_7']],
    ['press-*', ['press-7', 'press-hall-2'], ['press', 'press_7', 'my-press-7']],
    ['*-7', ['press-7', 'a-7-7'], ['press-8', '7']],
    ['press-?', ['press-7', 'press-x'], ['press-', 'press-70']],
    ['a*b?c', ['abxc', 'a-b-bxc'], ['abc', 'abxcd']],
    ['*', ['a', 'anything.at-all'], []],
    ['a.b', ['a.b'], ['a-b', 'axb']],
  ]
  for (const [pattern, good, bad] of matches) {
    t.true(isIdPattern(pattern), pattern)
    for (const id of good) t.true(matchesIdPattern(pattern, id), `${pattern} ${id}`)
    for (const id of bad) t.false(matchesIdPattern(pattern, id), `${pattern} ${id}`)
  }
})

test('what no id could match is no pattern', t => {
  for (const text of ['', 'Press-*', 'press *', '-*', '*-', '.a', '[ab]', 'a/b', 'a\n', '**\n', '?'.repeat(65)]) {
    t.false(isIdPattern(text), JSON.stringify(text))
  }
})

/** What the stars and question marks mean, as a regular expression. Good for short ones. */
function oracle(pattern: string): RegExp {
  return new RegExp(`^${pattern.replace(/[.]/g, '\\.').replaceAll('*', '.*').replaceAll('?', '.')}$`, 's')
}

test('patterns mean what their regular expressions mean', t => {
  const characters = (some: string, maxLength: number) =>
    fc.array(fc.constantFrom(...some), { minLength: 1, maxLength }).map(parts => parts.join(''))
  fc.assert(
    fc.property(characters('ab.*?', 8), characters('ab.', 10), (pattern, id) => {
      t.is(matchesIdPattern(pattern, id), oracle(pattern).test(id))
    }),
    { numRuns: 2_000 },
  )
})

test('an id is a pattern of itself, and every pattern of stars alone matches it', t => {
  const id = fc.stringMatching(/^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$/)
  fc.assert(
    fc.property(id, fc.integer({ min: 1, max: 64 }), (id, stars) => {
      fc.pre(isSafeId(id))
      t.true(isIdPattern(id) && matchesIdPattern(id, id))
      t.true(matchesIdPattern('*'.repeat(stars), id))
    }),
  )
})

test('thirty stars that nearly match do not keep anyone waiting', t => {
  // A backtracking matcher would try every way to deal the letters out to the stars: it would not end.
  t.false(matchesIdPattern(`${'a*'.repeat(30)}b`, 'a'.repeat(64)))
  t.true(matchesIdPattern(`${'a*'.repeat(30)}b`, `${'a'.repeat(63)}b`))
})
