import test from 'ava'
import { createLog } from '../../src/telemetry/log.ts'

function logged(fields: object): Record<string, unknown> {
  let line = ''
  createLog({ level: 'info', destination: { write: text => (line = text) } }).info(fields, 'hello')
  return JSON.parse(line)
}

test('a line is JSON with an ISO time, the level as a word and the message', t => {
  const line = logged({ device: 'alpha' })
  t.like(line, { level: 'info', msg: 'hello', device: 'alpha' })
  t.is(new Date(String(line.time)).toISOString(), String(line.time))
})

test('secrets do not reach the output, three levels down either', t => {
  const line = logged({ token: 's3cret', request: { password: 's3cret', headers: { authorization: 's3cret' } } })
  t.false(JSON.stringify(line).includes('s3cret'))
})

test('an error is logged with its cause', t => {
  const line = logged({ err: new Error('outer', { cause: new Error('inner') }) })
  t.like(line.err as object, { message: 'outer', cause: { message: 'inner' } })
})
