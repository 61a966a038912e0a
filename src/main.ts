#!/usr/bin/env node
/** The bin `edgemesh`: argv to a command. Exit codes: 0 done, 1 failed, 2 not understood. */
import { exitCodeOf, printFailure } from './cli/failure.ts'
import { createProgram } from './cli/program.ts'

/** What a command leaves open must not keep the shell waiting: everything that matters was awaited. */
const lingerMsMax = 1_000

// `edgemesh device list | head` closes the pipe when it has seen enough, which is no failure.
process.stdout.on('error', error => process.exit((error as NodeJS.ErrnoException).code === 'EPIPE' ? 0 : 1))

process.on('uncaughtException', error => {
  printFailure(error)
  process.exit(1)
})

try {
  await createProgram().parseAsync()
} catch (error) {
  printFailure(error)
  process.exitCode = exitCodeOf(error)
}
setTimeout(() => process.exit(), lingerMsMax).unref()
