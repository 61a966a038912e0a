/** docs/cli.md, from what `edgemesh … --help` prints. */
import type { Command } from 'commander'
import { createProgram } from '../src/cli/program.ts'

const width = 100

export function commandsReference(): string {
  const program = createProgram()
  return `# Commands

<!-- Made from src/cli by npm run generate. -->

What \`--help\` prints. In a clone, \`edgemesh\` stands for \`npm run -s edgemesh --\`.

${sections(program, 'edgemesh').join('\n\n')}
`
}

function sections(command: Command, path: string): string[] {
  const own = `## ${path}\n\n\`\`\`text\n${helpOf(command)}\n\`\`\``
  return [own, ...command.commands.flatMap(child => sections(child, `${path} ${child.name()}`))]
}

function helpOf(command: Command): string {
  let help = ''
  command.configureOutput({
    writeOut: text => {
      help += text
    },
    getOutHelpWidth: () => width,
    getOutHasColors: () => false,
  })
  command.outputHelp()
  return help.trim()
}
