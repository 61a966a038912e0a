/** How old the last backup is that could really be restored: what the backup leaves for node-exporter. */
import { readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { CannotLook, type Check, failed, ok, span } from './finding.ts'
import { readSamples } from './instance-http.ts'
import type { Subject } from './subject.ts'

const metric = 'edgemesh_backup_last_success_timestamp_seconds'
/** As the alert EdgeMeshBackupOld has it: a night and two hours. */
const ageMsMax = 26 * 3_600_000
/** Where node-exporter looks, with Debian's package and without. */
const usualFolders = [
  '/var/lib/edgemesh/node-metrics',
  '/var/lib/prometheus/node-exporter',
  '/var/lib/node_exporter/textfile_collector',
]

export const backupCheck: Check<Subject> = {
  name: 'backup',
  async look({ backupMetrics, clock }) {
    const places = backupMetrics === undefined ? usualFolders : [backupMetrics]
    const found = (await Promise.all(places.map(samplesAt))).flat().filter(({ name }) => name === metric)
    if (found.length === 0) {
      const what = `nobody has left the age of a backup in ${places.join(' or ')}`
      if (backupMetrics === undefined) throw new CannotLook(`${what}; --backup-metrics says where else`)
      const why = 'without a backup a disk that dies takes all devices, grants and the audit log with it'
      return [failed({ what, why, mend: 'docs/runbooks/database.md#edgemeshbackupmissing' })]
    }
    const newestMs = Math.max(...found.map(({ value }) => value * 1_000))
    const ageMs = clock() - newestMs
    if (ageMs <= ageMsMax) return [ok(`the last one that could be restored is ${span(ageMs)} old`)]
    const what = `the last backup that could be restored is ${span(ageMs)} old`
    const why = 'what came after it is lost with the disk'
    return [failed({ what, why, mend: 'docs/runbooks/database.md#edgemeshbackupold' })]
  },
}

async function samplesAt(path: string) {
  const found = await stat(path).catch(() => undefined)
  if (!found) return []
  const files = found.isDirectory()
    ? (await readdir(path)).filter(name => name.endsWith('.prom')).map(name => join(path, name))
    : [path]
  const texts = await Promise.all(files.map(file => readFile(file, 'utf8')))
  return texts.flatMap(readSamples)
}
