/** The same choices for the same seed. What processes and networks do between them is their own. */

export type Random = {
  /** 0 to 1, exclusive. */
  next(): number
  between(least: number, most: number): number
  one<T>(of: readonly T[]): T
  shuffled<T>(of: readonly T[]): T[]
}

export function createRandom(seed: number): Random {
  let state = seed >>> 0
  // The sequence of Weyl, stirred: every 32-bit state comes up once.
  function next(): number {
    state = (state + 0x9e3779b9) >>> 0
    let mixed = state
    mixed = Math.imul(mixed ^ (mixed >>> 16), 0x21f0aaad)
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97)
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32
  }
  return {
    next,
    between: (least, most) => least + next() * (most - least),
    one: of => of[Math.floor(next() * of.length)]!,
    shuffled: of => {
      const drawn = [...of]
      for (let at = drawn.length - 1; at > 0; at--) {
        const other = Math.floor(next() * (at + 1))
        ;[drawn[at], drawn[other]] = [drawn[other]!, drawn[at]!]
      }
      return drawn
    },
  }
}
