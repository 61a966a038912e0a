/** What a Dockerfile says, by stages. */
import { readFile } from 'node:fs/promises'

export type Stage = { name: string; from: string; steps: { instruction: string; words: string }[] }

export async function stagesOf(file: string): Promise<Stage[]> {
  const lines = (await readFile(file, 'utf8')).replace(/^#.*\n/gm, '').replaceAll(/\\\n\s*/g, '')
  const stages: Stage[] = []
  for (const line of lines.split('\n').filter(line => line.trim() !== '')) {
    const [, instruction = '', words = ''] = /^(\w+)\s+(.*)$/.exec(line) ?? []
    if (instruction === 'FROM') {
      const [from = '', , name = ''] = words.split(/\s+/)
      stages.push({ name, from, steps: [] })
    } else {
      stages.at(-1)?.steps.push({ instruction, words })
    }
  }
  return stages
}

/** The words of the last such instruction, written as JSON. */
export function list(stage: Stage, instruction: string): string[] {
  const words = stage.steps.findLast(step => step.instruction === instruction)?.words ?? '[]'
  return JSON.parse(words.replace(/^[^[]*/, ''))
}
