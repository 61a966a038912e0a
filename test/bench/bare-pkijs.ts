/**
 * Issuing a certificate with pkijs as its examples do: parse the request, verify it, build the certificate, sign it by
 * WebCrypto, encode. It is given what can be known beforehand: the issuer's name, its key, and its key identifier.
 */
import { type KeyObject, webcrypto } from 'node:crypto'
import * as asn1 from 'asn1js'
import * as pkijs from 'pkijs'
import type { Issuer } from '../../src/identity/certificates.ts'

export type BareTemplate = { spiffeId: string; commonName: string; notBefore: Date; notAfter: Date }

/** @returns what issues a certificate with the extensions that ours have, in DER */
export function barePkijs(
  issuer: Issuer & { privateKey: KeyObject },
): (csr: Buffer, template: BareTemplate) => Promise<Buffer> {
  const issuerName = pkijs.Certificate.fromBER(issuer.certificateDer).subject
  const signingKey = issuer.privateKey.toCryptoKey({ name: 'ECDSA', namedCurve: 'P-256' }, false, ['sign'])
  const extension = (extnID: string, critical: boolean, value: { toBER(): ArrayBuffer }) =>
    new pkijs.Extension({ extnID, critical, extnValue: value.toBER() })

  return async (der, { spiffeId, commonName, notBefore, notAfter }) => {
    const request = pkijs.CertificationRequest.fromBER(der)
    if (!(await request.verify())) throw new Error('the request is not signed by its own key')
    const publicKey = request.subjectPublicKeyInfo
    const keyBits = new Uint8Array(publicKey.subjectPublicKey.valueBlock.valueHexView)
    const keyId = (await webcrypto.subtle.digest('SHA-256', keyBits)).slice(0, 20)

    const certificate = new pkijs.Certificate({
      version: 2,
      serialNumber: new asn1.Integer({ valueHex: webcrypto.getRandomValues(new Uint8Array(16)) }),
      issuer: issuerName,
      notBefore: new pkijs.Time({ type: 0, value: notBefore }),
      notAfter: new pkijs.Time({ type: 0, value: notAfter }),
      subjectPublicKeyInfo: publicKey,
    })
    certificate.subject.typesAndValues.push(
      new pkijs.AttributeTypeAndValue({ type: '2.5.4.3', value: new asn1.Utf8String({ value: commonName }) }),
    )
    certificate.extensions = [
      extension('2.5.29.19', true, new pkijs.BasicConstraints({ cA: false }).toSchema()),
      extension('2.5.29.15', true, new asn1.BitString({ valueHex: Uint8Array.of(0x80), unusedBits: 7 })),
      extension('2.5.29.37', false, new pkijs.ExtKeyUsage({ keyPurposes: ['1.3.6.1.5.5.7.3.2'] }).toSchema()),
      extension(
        '2.5.29.17',
        false,
        new pkijs.GeneralNames({ names: [new pkijs.GeneralName({ type: 6, value: spiffeId })] }).toSchema(),
      ),
      extension('2.5.29.14', false, new asn1.OctetString({ valueHex: keyId })),
      extension(
        '2.5.29.35',
        false,
        new pkijs.AuthorityKeyIdentifier({
          keyIdentifier: new asn1.OctetString({ valueHex: issuer.keyId }),
        }).toSchema(),
      ),
    ]
    await certificate.sign(signingKey, 'SHA-256')
    return Buffer.from(certificate.toSchema(true).toBER())
  }
}
