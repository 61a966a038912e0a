/** All commands, and how what is typed wrong is answered. */
import { createRequire } from 'node:module'
import { Command, CommanderError, Option } from 'commander'
import { revision, version } from '../version.ts'
import { agentCommand } from './agent.ts'
import { auditCommand } from './audit.ts'
import { caCommand } from './ca.ts'
import { checkCommand } from './check.ts'
import { connectionCommand } from './connection.ts'
import { decisionCommand } from './decision.ts'
import { devCommand } from './dev.ts'
import { deviceCommand } from './device.ts'
import { doctorCommand } from './doctor.ts'
import { grantCommand } from './grant.ts'
import { lifecycleCommand } from './lifecycle.ts'
import { migrateCommand } from './migrate.ts'
import { operatorCommand } from './operator.ts'
import { policyCommand } from './policy.ts'
import { serveCommand } from './serve.ts'
import { serviceCommand } from './service.ts'
import { serviceIdentityCommand } from './service-identity.ts'
import { simulateCommand } from './simulate.ts'
import { tokenCommand } from './token.ts'
import { userCommand } from './user.ts'

export function createProgram(): Command {
  const { description } = createRequire(import.meta.url)('../../package.json') as { description: string }
  const program = new Command('edgemesh')
    .description(description)
    .addOption(new Option('--version', 'print the version, and the revision where it is known'))
    .on('option:version', printVersion)
    .helpOption('-h, --help', 'print help')
    .helpCommand(false)
    .addHelpText(
      'after',
      `
Exit codes: 0 done, 1 failed, 2 not understood.

Examples:
  edgemesh dev                      try it: everything embedded, proven end to end
  edgemesh token create --uses 3    let three devices enroll
  edgemesh check --user ada@example.com --service orders --device laptop-7
  edgemesh COMMAND --help           what a command does, with examples
`,
    )

  program.commandsGroup('Run a server:')
  for (const command of [devCommand(), serveCommand(), migrateCommand(), operatorCommand(), doctorCommand()])
    program.addCommand(command)
  program.addCommand(serviceIdentityCommand())
  program.commandsGroup('Administrate:')
  for (const command of [tokenCommand(), deviceCommand(), userCommand(), serviceCommand()]) program.addCommand(command)
  program.addCommand(grantCommand())
  program.addCommand(lifecycleCommand())
  for (const command of [connectionCommand(), auditCommand(), checkCommand(), caCommand()]) program.addCommand(command)
  for (const command of [decisionCommand(), policyCommand()]) program.addCommand(command)
  program.commandsGroup('Run on a device:')
  for (const command of [agentCommand(), simulateCommand()]) program.addCommand(command)

  answerMistakes(program, 'edgemesh')
  return program
}

/** The revision is read only when it is asked for: it takes a few files. */
function printVersion(): never {
  const commit = revision()
  const text = commit === undefined ? version : `${version} (${commit})`
  process.stdout.write(`${text}\n`)
  throw new CommanderError(0, 'commander.version', text)
}

/** Every command of the tree throws instead of exiting, and prints what was wrong as `error:` and `hint:`. */
function answerMistakes(command: Command, path: string): void {
  command
    .exitOverride()
    .showHelpAfterError(`hint: see ${path} --help`)
    .configureOutput({
      outputError: (text, write) =>
        write(text.replace(/\n\((Did you mean .*)\)/, (_, hint) => `\nhint: ${lower(hint)}`)),
    })
  for (const child of command.commands) answerMistakes(child, `${path} ${child.name()}`)
}

function lower(sentence: string): string {
  return sentence.charAt(0).toLowerCase() + sentence.slice(1)
}
