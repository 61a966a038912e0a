/** What the kernel counts of a process, where there is /proc. */
import { readFile } from 'node:fs/promises'

export type ProcessStat = { name: string; parent: string; cpu: NodeJS.CpuUsage }

/** @returns times in microseconds, by the kernel's clock of 10 ms @throws where there is no such process, or no /proc */
export async function processStat(pid: number | string): Promise<ProcessStat> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8')
  // After the name, which may have spaces: state, parent, … and in the 12th and 13th place the two times.
  const [, parent = '', ...fields] = stat.slice(stat.lastIndexOf(') ') + 2).split(' ')
  return {
    name: stat.slice(stat.indexOf('(') + 1, stat.lastIndexOf(') ')),
    parent,
    cpu: { user: Number(fields[9]) * 10_000, system: Number(fields[10]) * 10_000 },
  }
}
