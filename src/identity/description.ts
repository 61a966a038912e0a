/** What a device says of itself when it enrolls: checked for form, believed where its token says nothing else. */
import { type FieldViolation, invalidFields } from '../fault.ts'
import { type DeviceDescription, DeviceType } from '../gen/edgemesh/v1/types.ts'
import { controlCharacter, labelViolations } from './labels.ts'
import { isSafeId, safeIdRule } from './spiffe-id.ts'

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
  if (given.id && !isSafeId(given.id)) wrong('id', safeIdRule)
  const type = typeNames[given.type]
  if (type === undefined) wrong('type', 'is none of the known device types')
  for (const [field, text] of [['os', given.os] as const, ['os_version', given.osVersion] as const]) {
    if (text.length > textCharactersMax) wrong(field, `has to be of at most ${textCharactersMax} characters`)
    if (controlCharacter.test(text)) wrong(field, 'must not contain control characters')
  }
  violations.push(...labelViolations(given.labels, 'device.labels'))
  if (violations.length > 0 || type === undefined) throw invalidFields(violations)
  const { id, os, osVersion } = given
  return { id, type, os, osVersion, labels: given.labels }
}
