/** What a device says of itself when it enrolls: checked for form, believed where its token says nothing else. */
import { Fault, type FieldViolation } from '../fault.ts'
import { type DeviceDescription, DeviceType } from '../gen/edgemesh/v1/types.ts'
import { isSafeId } from './spiffe-id.ts'

export type Description = {
  /** Empty: the server may choose. */
  id: string
  /** As the database spells it. */
  type: string
  os: string
  osVersion: string
  labels: Record<string, string>
}

const textCharactersMax = 64
const labelsMax = 32
const labelKeyCharactersMax = 63
const labelValueCharactersMax = 255

const typeNames: Record<number, string> = {
  [DeviceType.UNSPECIFIED]: 'unspecified',
  [DeviceType.LAPTOP]: 'laptop',
  [DeviceType.SERVER]: 'server',
  [DeviceType.IOT]: 'iot',
  [DeviceType.GATEWAY]: 'gateway',
}

/** @throws Fault INVALID_ARGUMENT that names every field out of bounds */
export function checkDescription(device: DeviceDescription | undefined): Description {
  const given = device ?? { id: '', type: DeviceType.UNSPECIFIED, os: '', osVersion: '', labels: {} }
  const violations: FieldViolation[] = []
  const wrong = (field: string, text: string) => violations.push({ field: `device.${field}`, description: text })
  if (given.id && !isSafeId(given.id)) {
    wrong('id', 'has to be 1 to 64 lower-case letters, digits, ".", "_" or "-", with a letter or digit at both ends')
  }
  const type = typeNames[given.type]
  if (type === undefined) wrong('type', 'is none of the known device types')
  for (const [field, text] of [['os', given.os] as const, ['os_version', given.osVersion] as const]) {
    if (text.length > textCharactersMax) wrong(field, `has to be of at most ${textCharactersMax} characters`)
    if (text.includes('\0')) wrong(field, 'must not contain NUL characters')
  }
  const labels = Object.entries(given.labels)
  if (labels.length > labelsMax) wrong('labels', `has to have at most ${labelsMax} entries`)
  for (const [key, value] of labels.slice(0, labelsMax)) {
    if (key.length === 0 || key.length > labelKeyCharactersMax) wrong('labels', 'keys have to be of 1 to 63 characters')
    if (value.length > labelValueCharactersMax) wrong('labels', 'values have to be of at most 255 characters')
    if (key.includes('\0') || value.includes('\0')) wrong('labels', 'must not contain NUL characters')
  }
  if (violations.length > 0 || type === undefined) {
    const what = violations.map(({ field, description }) => `${field} ${description}`).join('; ')
    throw new Fault('INVALID_ARGUMENT', 'INVALID_FIELD', what, { violations })
  }
  const { id, os, osVersion } = given
  return { id, type, os, osVersion, labels: given.labels }
}
