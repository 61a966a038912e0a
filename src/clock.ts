/** Where the time comes from: milliseconds since the Unix epoch. A parameter, so that tests need no sleeping. */
export type Clock = () => number

export const systemClock: Clock = () => Date.now()
