/**
 * The proto's enums as people read and type them: `DeviceStatus.QUARANTINED` is "quarantined", `USED_UP` is "used-up".
 */
type Enum = Readonly<Record<string, number>>

/** What an option accepts: every value but UNSPECIFIED. */
export function wordsOf(values: Enum): string[] {
  return Object.keys(values)
    .filter(key => key !== 'UNSPECIFIED')
    .map(toWord)
}

/** UNSPECIFIED, and what a newer server may send, is "-". */
export function wordFor(values: Enum, value: number): string {
  const key = Object.keys(values).find(key => values[key] === value)
  return key === undefined || key === 'UNSPECIFIED' ? '-' : toWord(key)
}

/** UNSPECIFIED when there is no word. */
export function valueFor<E extends Enum>(values: E, word: string | undefined): E[keyof E] {
  const key = word === undefined ? 'UNSPECIFIED' : word.toUpperCase().replaceAll('-', '_')
  return values[key] as E[keyof E]
}

function toWord(key: string): string {
  return key.toLowerCase().replaceAll('_', '-')
}
