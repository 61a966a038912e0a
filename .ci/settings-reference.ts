/** docs/settings.md, from the table in src/settings.ts. */
import { SETTINGS_REFERENCE, type SettingReference } from '../src/settings.ts'

export function settingsReference(): string {
  const rows = SETTINGS_REFERENCE.map(setting => {
    const { name, meaning } = setting
    return `| <a id="${name.toLowerCase()}"></a>\`${name}\` | ${takes(setting)} | ${defaultOf(setting)} | ${cell(meaning)} |`
  })
  return `# Settings

<!-- Made from src/settings.ts by npm run generate. -->

Everything that is set is set by environment variables. Any \`X\` may be given as \`X_FILE\`, the path of a file that holds the value, as
Docker, Kubernetes and Vault hand out secrets. A variable that is empty counts as not set. Mistakes are told by name, all at once, and
the process exits with 2. A secret (🔑) is in no message and in no log.

| variable | takes | default | meaning |
|---|---|---|---|
${rows.join('\n')}

Beside them, those of OpenTelemetry (\`OTEL_…\`) say where traces go: [tracing.md](tracing.md).
`
}

function takes({ type, unit, secret }: SettingReference): string {
  return `${cell(type)}${unit === undefined ? '' : ` (${unit})`}${secret ? ' 🔑' : ''}`
}

/** A value as one would write it stands in backticks; words don't. */
function defaultOf({ default: value, isWords, required }: SettingReference): string {
  if (required) return '**required**'
  if (value === undefined || value === '') return 'empty'
  return isWords ? cell(value) : `\`${value}\``
}

function cell(text: string): string {
  return text.replaceAll('|', '\\|').replaceAll('<', '&lt;')
}
