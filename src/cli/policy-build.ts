/** `edgemesh policy build`: Rego to a bundle that instances take from POLICY_BUNDLE_DIR. */
import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { Command } from 'commander'
import { archiveName } from '../access/policy-bundle.ts'
import { everyoneReads, writeWhole } from '../whole-file.ts'
import { buildCandidate } from './candidate-policy.ts'
import { CommandFailure } from './failure.ts'
import { renderFacts } from './table.ts'

export function buildCommand(): Command {
  return new Command('build')
    .description('compile a policy for instances that evaluate it in the process; needs opa on the path')
    .argument('<rego>', 'a folder with authz.rego and admin.rego; tests beside them are left out')
    .requiredOption('--out <folder>', `where ${archiveName} is put, in place of the one that is there`)
    .option('--json', 'one JSON document')
    .addHelpText(
      'after',
      `
What is written has been asked a few questions: it answers, and does not allow just anything. An instance whose
POLICY_BUNDLE_DIR is that folder decides by it within a second. The file is replaced at once, never half.

Examples:
  edgemesh policy diff ./policies --since 24h
  edgemesh policy build ./policies --out /etc/edgemesh/policy
  edgemesh policy show
`,
    )
    .action(async (rego: string, { out, json }: { out: string; json?: true }) => {
      const { archive, revision } = await buildCandidate(rego)
      if (await stat(join(out, 'policy.wasm')).catch(() => undefined)) {
        const hint = 'remove it, with the manifest beside it'
        throw new CommandFailure(`there is a policy.wasm in ${out}, and only one policy can decide`, hint)
      }
      const file = join(out, archiveName)
      await writeWhole(file, archive, everyoneReads)
      const built = { revision, file, bytes: archive.length }
      console.log(json ? JSON.stringify(built) : renderFacts(built))
    })
}
