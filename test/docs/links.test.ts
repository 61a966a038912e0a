/** What the docs name is there: links, files, commands, variables, metrics, tests, lines of the log. */
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, normalize, relative } from 'node:path'
import test from 'ava'
import { type Command, CommanderError } from 'commander'
import { parse } from 'yaml'
import { metricsReference } from '../../.ci/metrics-reference.ts'
import { createProgram } from '../../src/cli/program.ts'
import { SETTINGS_REFERENCE } from '../../src/settings.ts'

const root = join(import.meta.dirname, '..', '..')
const notOurs = new Set(['node_modules', '.git', '.tools', '.edgemesh', 'dist', 'gen'])

function filesBelow(folder: string, fits: RegExp): string[] {
  return readdirSync(join(root, folder), { withFileTypes: true }).flatMap(entry => {
    const path = join(folder, entry.name)
    if (entry.isDirectory()) return notOurs.has(entry.name) ? [] : filesBelow(path, fits)
    return fits.test(entry.name) ? [path] : []
  })
}

const read = (path: string) => readFileSync(join(root, path), 'utf8')

type Document = {
  path: string
  /** Without code. */
  prose: string
  /** What stands in single backticks. */
  spans: string[]
  fences: { language: string; text: string }[]
  anchors: Set<string>
}

const documents = filesBelow('.', /\.md$/).map(readDocument)

function readDocument(path: string): Document {
  const fences: Document['fences'] = []
  const spans: string[] = []
  const anchors = new Set<string>()
  const prose = read(path)
    .replaceAll(/^( *)```(\w*)\n([\s\S]*?)^\1```$/gm, (_, __, language, text) => {
      fences.push({ language, text })
      return ''
    })
    .replaceAll(/(`+)(.+?)\1/g, (_, __, code) => {
      spans.push(code)
      return `⟦${spans.length - 1}⟧`
    })
  const slugs = new Map<string, number>()
  for (const [, heading = ''] of prose.matchAll(/^#+ (.+)$/gm)) {
    const shown = heading.replaceAll(/⟦(\d+)⟧/g, (_, at) => spans[Number(at)] ?? '')
    const slug = slugOf(shown.replaceAll(/\[([^\]]*)\]\([^)]*\)/g, '$1'))
    const before = slugs.get(slug) ?? 0
    slugs.set(slug, before + 1)
    anchors.add(before === 0 ? slug : `${slug}-${before}`)
  }
  for (const [, id = ''] of prose.matchAll(/<a id="([^"]+)">/g)) anchors.add(id)
  return { path, prose, spans, fences, anchors }
}

/** As GitHub makes anchors of headings. */
function slugOf(heading: string): string {
  return heading
    .trim()
    .toLowerCase()
    .replaceAll(/[^\p{L}\p{N}\p{M}_ -]/gu, '')
    .replaceAll(' ', '-')
}

/** One line for each that is wrong, so that all of it is seen at once. */
function wrong(find: (document: Document) => Iterable<string>): string[] {
  return documents.flatMap(document => [...new Set(find(document))].map(problem => `${document.path}: ${problem}`))
}

test('the docs are found', t => {
  const paths = documents.map(({ path }) => path)
  for (const path of ['README.md', 'CONTRIBUTING.md', 'docs/architecture.md', 'docs/runbooks/fleet.md']) {
    t.true(paths.includes(path), path)
  }
})

test('every link leads to a file that is there, and to a heading of it', t => {
  const problems = wrong(function* ({ path, prose, anchors }) {
    for (const [, target = ''] of prose.matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^[a-z]+:/.test(target)) continue
      const [file = '', anchor] = target.split('#')
      const there = file === '' ? path : normalize(join(dirname(path), file))
      if (there.startsWith('..') || !existsSync(join(root, there))) yield `no file ${target}`
      else if (anchor !== undefined) {
        const known = file === '' ? anchors : documents.find(document => document.path === there)?.anchors
        if (!known?.has(anchor)) yield `no heading ${target}`
      }
    }
  })
  t.deepEqual(problems, [])
})

test('docs/README.md leads to every document', t => {
  const index = documents.find(({ path }) => path === 'docs/README.md')?.prose ?? ''
  const listed = [...index.matchAll(/\]\(([^)\s#]+)\)/g)].map(([, target = '']) => normalize(join('docs', target)))
  const ours = documents.map(({ path }) => path).filter(path => dirname(path) === 'docs' && path !== 'docs/README.md')
  t.deepEqual(
    ours.filter(path => !listed.includes(path)),
    [],
  )
})

const madeByOperators = /^deploy\/compose\/(grafana)?\.env$/

test('every file that is named is there', t => {
  const below = /^(?:\.\/)?((?:deploy|docs|src|test|policies|proto|\.ci)\/[^\s:#,;()|]*)/
  const ofSource = /^[a-z-]+(?:\/[a-z-]+)*\/[a-z0-9-]+\.ts$/
  const problems = wrong(function* ({ path, spans, prose }) {
    const own = prose.replaceAll(/https?:\S+/g, '')
    const named = [...spans, ...[...own.matchAll(/\b(?:deploy|docs)\/[\w./-]*\w/g)].map(([word]) => word)]
    for (const span of named) {
      const [, full] = below.exec(span) ?? []
      const name = full ?? (ofSource.test(span) ? span : undefined)
      if (name === undefined || madeByOperators.test(name)) continue
      // Of a pattern, what stands before the first variable part.
      const fixed = name.replace(/[^/]*[*{<…$].*$/, '')
      const places = full ? [fixed] : ['', 'src', 'test', dirname(path)].map(folder => join(folder, fixed))
      if (!places.some(place => existsSync(join(root, place)))) yield name
    }
  })
  t.deepEqual(problems, [])
})

// ── Commands ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** The words of each `edgemesh …` in a piece of shell, up to what belongs to the shell again. */
function commandsIn(text: string, where: 'anywhere' | 'at the start' = 'anywhere'): string[][] {
  const lines = text.replaceAll(/\\\n\s*/g, ' ').split('\n')
  return lines.flatMap(line => {
    const found: string[][] = []
    for (const { index, 0: prefix } of line.matchAll(
      /(?<![\w./@:=-])(?:npm run -s edgemesh --|edgemesh) (?=[a-z]|--?[a-z])/g,
    )) {
      // In what --help prints, commands within a line are those that a sentence names.
      if (where === 'at the start' && !/^ *([A-Z_]+=\S+ )*$/.test(line.slice(0, index))) continue
      if (/[#]/.test(line.slice(0, index)) || /Usage: $/.test(line.slice(0, index))) continue
      // A namespace of Kubernetes, a cluster of Patroni.
      if (/ -n $|patronictl [a-z]+ $/.test(line.slice(0, index))) continue
      found.push(wordsOf(line.slice(index + prefix.length)))
    }
    return found
  })
}

/** Until a pipe, a redirection, a comment, or the gap before an explanation. */
function wordsOf(line: string): string[] {
  const words: string[] = []
  const word = /^( ?)("(?:[^"\\]|\\.)*"|'[^']*'|[^\s"'|;&><()#`]+)+/
  let rest = line
  for (;;) {
    const match = word.exec(rest)
    if (!match || (words.length > 0 && match[1] !== ' ')) return words
    words.push(match[0].trim().replaceAll(/["']/g, ''))
    rest = rest.slice(match[0].length)
  }
}

/** The program that only understands: no command does anything. */
function understanding(): Command {
  const program = createProgram()
  const silence = (command: Command) => {
    command.exitOverride().configureOutput({ writeOut: () => {}, writeErr: () => {}, outputError: () => {} })
    if (command.commands.length === 0) command.action(() => {})
    command.commands.forEach(silence)
  }
  silence(program)
  return program
}

/** What commander says against it; undefined: nothing. */
async function objection(words: string[]): Promise<string | undefined> {
  try {
    await understanding().parseAsync(words, { from: 'user' })
    return undefined
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error
    return ['commander.helpDisplayed', 'commander.version'].includes(error.code) ? undefined : error.message
  }
}

/** Whether commands and options by these names exist, whatever is missing. */
function unknownName(words: string[]): string | undefined {
  let command = createProgram()
  for (const [at, word] of words.entries()) {
    const child = command.commands.find(candidate => candidate.name() === word)
    if (child) command = child
    else if (word.includes('/') && command.commands.length > 0) {
      const children = word.split('/').map(name => command.commands.find(candidate => candidate.name() === name))
      if (children.includes(undefined)) return `${word} of ${command.name()}`
      command = children[0] as Command
    } else if (word.startsWith('-')) {
      const [flag] = word.split('=')
      const isKnown =
        ['--help', '-h', '--version'].includes(word) ||
        command.options.some(({ long, short }) => long === flag || short === flag)
      if (!isKnown) return `${word} of ${command.name()}`
    } else if (command.commands.length > 0)
      return `${word} of ${command.name()}, in ${words.slice(0, at + 1).join(' ')}`
  }
  return undefined
}

test('every command of an example is understood as it stands there', async t => {
  const problems: string[] = []
  let understood = 0
  for (const { path, fences } of documents) {
    for (const { language, text } of fences) {
      if (!['sh', 'bash', 'text'].includes(language)) continue
      for (const words of commandsIn(text, language === 'text' ? 'at the start' : 'anywhere')) {
        const said = await objection(words)
        if (said) problems.push(`${path}: edgemesh ${words.join(' ')}: ${said}`)
        else understood++
      }
    }
  }
  t.deepEqual(problems, [])
  t.true(understood > 150, `${understood}`)
})

test('every command in a sentence exists, with the options that are named', t => {
  // Lines of the log begin like commands, too.
  const source = filesBelow('src', /\.ts$/).map(read).join('\n')
  const problems = wrong(function* ({ spans }) {
    for (const span of spans.filter(text => !source.includes(`'${text}'`))) {
      for (const words of commandsIn(span)) {
        const unknown = unknownName(words.filter(word => !/^[A-Z…]/.test(word)))
        if (unknown) yield unknown
      }
    }
  })
  t.deepEqual(problems, [])
})

// ── Words in capitals ──────────────────────────────────────────────────────────────────────────────────────────────

/** Variables and words of others: Grafana, OpenTelemetry, the tests and benches, shells, Envoy. */
const others =
  /^(GF|OTEL|BENCH|SOAK|PG)_[A-Z_]+$|^(NODE_OPTIONS|MALLOC_ARENA_MAX|APPEND_FORWARD|ALWAYS_FORWARD_ONLY|STATE_DIRECTORY|CREDENTIALS_DIRECTORY)$/
const inCapitals = /(?<![\w…/-])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+(?![\w…/*])/g

test('every variable that is set in an example is a setting, or one of a program that is named here', t => {
  const settings = new Set(SETTINGS_REFERENCE.flatMap(({ name }) => [name, `${name}_FILE`]))
  const own = new Set(['EDGEMESH_TOKEN', 'EDGEMESH_SERVER', 'EDGEMESH_CREDENTIALS', 'EDGEMESH_USER_ASSERTION'])
  for (const path of filesBelow('deploy', /./)) for (const [name] of read(path).matchAll(inCapitals)) own.add(name)
  const problems = wrong(function* ({ fences, spans }) {
    const shell = fences.filter(({ language }) => ['sh', 'bash'].includes(language)).map(({ text }) => text)
    for (const text of [...shell, ...spans]) {
      // What the example itself has set may be used in it.
      const set = new Set([...text.matchAll(/(?:^|[\s;(])([A-Z][A-Z_]+)=(?=[$])/gm)].map(([, name]) => name))
      for (const [, name = ''] of text.matchAll(/(?:^|[\s`(])([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)=/gm)) {
        if (!settings.has(name) && !own.has(name) && !others.test(name) && !set.has(name)) yield name
      }
    }
  })
  t.deepEqual(problems, [])
})

test('every word in capitals is one that the code has too: a setting, a reason, a code', t => {
  const code = [
    ...filesBelow('deploy', /./),
    ...filesBelow('src', /\.(ts|sql)$/),
    ...filesBelow('proto', /\.proto$/),
    ...filesBelow('policies', /\.rego$/),
  ]
  const known = new Set(code.flatMap(path => read(path).match(/[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+/g) ?? []))
  for (const { name } of SETTINGS_REFERENCE) known.add(`${name}_FILE`)
  const problems = wrong(function* ({ prose, spans }) {
    for (const [word] of [prose, ...spans].join('\n').matchAll(inCapitals)) {
      if (!known.has(word) && !others.test(word) && !placeholders.has(word)) yield word
    }
  })
  t.deepEqual(problems, [])
})

/** What a reader puts something in the place of. */
const placeholders = new Set(['TRUST_DOMAIN', 'USER_ASSERTION_JWKS_FILE'])

// ── What is measured, shown and logged ─────────────────────────────────────────────────────────────────────────────

/** Names of the database's: roles and channels. And what the backup leaves for node-exporter. */
const noMetrics = /^edgemesh_(owner|service|changes|monitor|bench|backup(_last_success_timestamp_seconds)?)$/

test('every metric that is named exists, and so does what is recorded of them', async t => {
  const names = new Set([...(await metricsReference()).matchAll(/<a id="([a-z_]+)">/g)].map(([, name = '']) => name))
  const { groups } = parse(read('deploy/prometheus/rules/recording.yml'))
  const recorded = new Set(
    groups.flatMap(({ rules }: { rules: { record: string }[] }) => rules.map(({ record }) => record)),
  )
  const problems = wrong(function* ({ prose, spans, fences }) {
    const text = [prose, ...spans, ...fences.map(fence => fence.text)].join('\n')
    for (const [word] of text.matchAll(/\bedgemesh_[a-z_]+[a-z]/g)) {
      if (!names.has(word.replace(/_(bucket|sum|count)$/, '')) && !noMetrics.test(word)) yield word
    }
    for (const [word] of text.matchAll(/\bedgemesh:[a-z0-9_]+:[a-z0-9_]+/g)) if (!recorded.has(word)) yield word
  })
  t.deepEqual(problems, [])
})

test('every test that docs/security.md names shows what it says: it is there, by its title', t => {
  const lines = read('docs/security.md').matchAll(/`(test\/[\w./-]+)`: \*(.+?)\* \|/g)
  let count = 0
  for (const [, file = '', title = ''] of lines) {
    count++
    t.true(read(file).includes(title), `${file}: ${title}`)
  }
  t.true(count > 30, `${count}`)
})

test('every line of the log that docs/logs.md names is one that the code writes', t => {
  const source = filesBelow('src', /\.ts$/).map(read).join('\n')
  const table = read('docs/logs.md').split('## Levels')[1]?.split('## Shipping')[0] ?? ''
  const rows = [...table.matchAll(/^\| (`.+?`) \| (info|warn|error|debug) \|/gm)]
  t.true(rows.length > 10)
  for (const [, cell = ''] of rows) {
    for (const [, message = ''] of cell.matchAll(/`([^`]+)`/g)) {
      const parts = message.split(': ')
      t.true(source.includes(message) || parts.every(part => source.includes(part)), message)
    }
  }
})

test('documents are written for those who read them anywhere', t => {
  const problems = wrong(function* ({ path, prose }) {
    if (relative('docs', path).startsWith('..')) return
    for (const [word] of prose.matchAll(/—|\bsimply\b|\/work\/|\/root\//g)) yield word
  })
  t.deepEqual(problems, [])
})
