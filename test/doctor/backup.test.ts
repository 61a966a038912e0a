import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { look } from '../support/doctor.ts'

const hourMs = 3_600_000

async function folderWith(t: ExecutionContext, ageMs?: number): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'edgemesh-doctor-backup-'))
  t.teardown(() => rm(folder, { recursive: true }))
  if (ageMs === undefined) return folder
  const seconds = (Date.now() - ageMs) / 1_000
  await writeFile(
    join(folder, 'edgemesh.prom'),
    `# HELP edgemesh_backup_last_success_timestamp_seconds When\n# TYPE edgemesh_backup_last_success_timestamp_seconds gauge
edgemesh_backup_last_success_timestamp_seconds ${seconds}\n`,
  )
  return folder
}

test('a backup of this night is found, in the folder or in its file', async t => {
  const folder = await folderWith(t, 5 * hourMs)
  for (const backupMetrics of [folder, join(folder, 'edgemesh.prom')]) {
    const [finding] = await look({}, 'backup', { backupMetrics })
    t.like(finding, { severity: 'ok', what: 'the last one that could be restored is 5 h old' })
  }
})

test('a backup that is older than a night and two hours fails, and so does none', async t => {
  const [old] = await look({}, 'backup', { backupMetrics: await folderWith(t, 27 * hourMs) })
  t.like(old, { severity: 'failed', what: 'the last backup that could be restored is 27 h old' })
  t.regex(old?.mend ?? '', /edgemeshbackupold$/)
  const [none] = await look({}, 'backup', { backupMetrics: await folderWith(t) })
  t.is(none?.severity, 'failed')
  t.regex(none?.what ?? '', /^nobody has left the age of a backup in /)
})
