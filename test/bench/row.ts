/** What a benchmark says: one figure beside what bounds it, measured in the same run on the same machine. */
export type Row = {
  name: string
  value: number
  unit: string
  /** What the figure is held against, in the same unit; `null` where there is nothing to hold it against. */
  floor: number | null
  /** 1 at the floor, more is better. */
  ratio: number | null
  note: string
  /** What has to hold, where something has to. */
  bar?: { demand: string; met: boolean }
}

/** A file in `groups/`, which exports it as `group`; its name is that of the file. */
export type Group = {
  title: string
  /** Rows as they are measured. What it has started it has also ended when it returns or throws. */
  measure(options: GroupOptions): AsyncIterable<Row>
}

export type GroupOptions = {
  /** Also say where the time goes. */
  profile: boolean
  /** Tells whoever waits what is being done. */
  progress: (text: string) => void
}
