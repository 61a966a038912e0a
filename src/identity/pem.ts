/** The textual encoding of certificates, requests and revocation lists (RFC 7468, the strict grammar of section 3). */
export function encodePem(label: string, der: Uint8Array): string {
  const base64 = Buffer.from(der.buffer, der.byteOffset, der.byteLength).toString('base64')
  return `-----BEGIN ${label}-----\n${base64.replace(/.{1,64}/g, '$&\n')}-----END ${label}-----\n`
}

/** BEGIN and END each have a line of their own. */
const blockPattern = /^-----BEGIN ([A-Z0-9 ]{1,64})-----\r?\n([A-Za-z0-9+/=\r\n]*)^-----END \1-----$/gm
/** An empty line, at the beginning or later, or half of a line's end. */
const looseLine = /^\r?\n|\n\r?\n|\r(?!\n)/

/**
 * The DER of every block in `text` whose label is `label`, in order. Text around and between blocks is ignored, as
 * RFC 7468 section 2 has it; a block whose base64 has a second spelling of the same bytes is left out, and so is one
 * with an empty line in it: what stands above such a line is a header to other readers (RFC 1421 section 4.4).
 */
export function decodePem(label: string, text: string): Buffer[] {
  const ders: Buffer[] = []
  for (const [, blockLabel, body = ''] of text.matchAll(blockPattern)) {
    const base64 = body.replace(/[\r\n]/g, '')
    const der = Buffer.from(base64, 'base64')
    if (blockLabel === label && !looseLine.test(body) && der.toString('base64') === base64) ders.push(der)
  }
  return ders
}
