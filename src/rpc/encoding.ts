/** Messages as bytes, for the methods that are called most. */
import { BinaryWriter } from '@bufbuild/protobuf/wire'

/** A writer that has written something larger is not kept: its buffer would stay as large. */
const keptBytesMax = 65_536

let writer = new BinaryWriter()

/**
 * Does what generated code does with a new writer for every message, whose buffer then grows from nothing, and whose bytes are
 * copied once more. This one's has grown already.
 */
export function encoderOf<Message>(type: {
  encode(message: Message, writer: BinaryWriter): BinaryWriter
}): (message: Message) => Buffer {
  return message => {
    try {
      const bytes = type.encode(message, writer).finish()
      if (bytes.length > keptBytesMax) writer = new BinaryWriter()
      return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    } catch (error) {
      // There is half a message in it.
      writer = new BinaryWriter()
      throw error
    }
  }
}
