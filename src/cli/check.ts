/** `edgemesh check`: asks for a decision and explains it. */
import { readFile } from 'node:fs/promises'
import { Command } from 'commander'
import { type Answer, check } from '../client/authorize-stream.ts'
import { comparingClocks } from '../client/server-clock.ts'
import { loadState } from '../client/state.ts'
import type { GetDecisionResponse } from '../gen/edgemesh/v1/admin.ts'
import { Answer as AnswerMessage } from '../gen/edgemesh/v1/authorize.ts'
import { type ConnectionOptions, connecting, findServer, serverDefault, withAdmin } from './admin-client.ts'
import { explanationJson, explanationNote, renderInput, renderRules } from './explanation.ts'
import { CommandFailure } from './failure.ts'
import { renderFacts, renderTable } from './table.ts'

type CheckOptions = ConnectionOptions & {
  user?: string
  userAssertionFile?: string
  service: string
  action: string
  device?: string
  state?: string
  explain?: true
  json?: true
}

export function checkCommand(): Command {
  return connecting(new Command('check'))
    .description('ask whether a user on a device may reach a service now, and why')
    .option('--user <user>', 'id or e-mail address; needed unless an assertion names the user')
    .option('--user-assertion-file <path>', "a file with a JWT of the users' issuer; its text shows nowhere")
    .requiredOption('--service <id>')
    .option('--device <id>', 'the device that is asked about; needed unless --state is given')
    .option('--action <action>', 'what is to be done', 'connect')
    .option('--state <folder>', 'ask as the device itself, whose agent keeps its state there, not as an operator')
    .option('--explain', 'every rule with what it found and what it requires, and every fact, also where it is allowed')
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
Exit codes: 0 allowed, 1 denied or failed, 2 not understood.

Examples:
  edgemesh check --user ada@example.com --service orders --device laptop-7
  edgemesh check --user ada --service orders --device laptop-7 --explain
  edgemesh check --user ada --service orders --state ./laptop-7 --server localhost:8000
  edgemesh check --user-assertion-file ./ada.jwt --service orders --state ./laptop-7
  edgemesh check --user ada --service orders --device laptop-7 --json | jq .reasons
`,
    )
    .action(ask)
}

async function ask(options: CheckOptions, command: Command): Promise<void> {
  const { user = '', service, action } = options
  if (user === '' && options.userAssertionFile === undefined) {
    command.error('error: give --user, or --user-assertion-file where an assertion says who it is')
  }
  if (options.state === undefined && options.device === undefined) {
    command.error('error: give --device, or --state to ask as the device itself')
  }
  if (options.explain && options.state !== undefined) {
    command.error('error: --explain reads the record of the decision as an operator: give --device instead of --state')
  }
  const userAssertion =
    options.userAssertionFile === undefined ? undefined : await readAssertion(options.userAssertionFile)
  const { server, credentials } = await (options.state === undefined ? findServer(options) : findDevice(options))
  const asking = check({
    server,
    credentials,
    question: { user, service, action },
    userAssertion,
    ...(options.device !== undefined && { deviceId: options.device }),
  })
  const answer = await comparingClocks(server, asking)
  // What was denied before policy was asked has no decision to explain.
  const record = options.explain && answer.decisionId ? await recordOf(answer, { ...options, server }) : undefined
  // A denial has an explicit `allowed` too, which the JSON of the proto leaves out.
  if (options.json) {
    const { evaluatedAt, input } = record?.decision ?? {}
    const explained = record && { evaluatedAt, input, ...explanationJson(record.explanation) }
    console.log(JSON.stringify({ allowed: answer.allowed, ...(AnswerMessage.toJSON(answer) as object), ...explained }))
  } else {
    console.log(describe(answer, { ...options, user: user || 'the user of the assertion' }))
    if (record) console.log(describeRecord(record))
  }
  const note = record && explanationNote(record.explanation, answer.policyRevision)
  if (note) console.error(note)
  if (!answer.allowed) process.exitCode = 1
}

async function readAssertion(path: string): Promise<string> {
  const text = await readFile(path, 'utf8').catch(error => {
    throw new CommandFailure(
      `${path} can not be read (${error.code})`,
      'give a file that holds the assertion and nothing else',
    )
  })
  return text.trim()
}

async function findDevice(options: CheckOptions) {
  const folder = options.state as string
  const state = await loadState(folder)
  if (!state) {
    throw new CommandFailure(`no device keeps its state in ${folder}`, 'enroll one with: edgemesh agent --state FOLDER')
  }
  return { server: options.server || process.env.EDGEMESH_SERVER || serverDefault, credentials: state }
}

/** What was decided is on record before it is answered, with all that policy was given. */
function recordOf({ decisionId }: Answer, options: ConnectionOptions): Promise<GetDecisionResponse> {
  return withAdmin(options, admin => admin.call('getDecision', { id: decisionId, explain: true }))
}

function describeRecord({ decision, explanation }: GetDecisionResponse): string {
  return [
    ...(explanation ? ['', renderRules(explanation)] : []),
    '',
    renderFacts({ 'facts of': decision?.evaluatedAt }),
    renderInput(decision?.input),
  ].join('\n')
}

function describe(answer: Answer, { user, service, action, device }: CheckOptions & { user: string }): string {
  const where = device === undefined ? '' : ` on ${device}`
  const verdict = `${answer.allowed ? 'allowed' : 'denied'}: ${user} may ${answer.allowed ? '' : 'not '}${action} to ${service}${where}`
  const reasons = renderTable(
    {
      reason: reason => reason.code,
      field: reason => reason.field,
      actual: reason => reason.actual,
      required: reason => reason.required,
      'in words': reason => reason.message,
    },
    answer.reasons,
  )
  const facts = renderFacts({
    'policy revision': answer.policyRevision,
    'decision id': answer.decisionId,
    'good until': answer.expiresAt,
  })
  return [verdict, ...(answer.reasons.length > 0 ? [reasons] : []), facts].join('\n\n')
}
