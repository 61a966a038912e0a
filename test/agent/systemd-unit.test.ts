import { execFile } from 'node:child_process'
import { join } from 'node:path'
import test from 'ava'
import { findProgram } from '../support/find-program.ts'

const analyze = findProgram('systemd-analyze')
const unit = join(import.meta.dirname, '../../deploy/systemd/edgemesh-agent.service')

const verified = analyze ? test : test.skip
verified(
  `systemd finds nothing wrong with the agent's unit${analyze ? '' : ' (systemd-analyze is missing)'}`,
  async t => {
    const { exitCode, said } = await new Promise<{ exitCode: number; said: string }>(resolve => {
      execFile(analyze ?? '', ['verify', '--man=no', unit], (error, stdout, stderr) => {
        resolve({ exitCode: error ? Number(error.code) : 0, said: stdout + stderr })
      })
    })
    t.deepEqual({ exitCode, said }, { exitCode: 0, said: '' })
  },
)
