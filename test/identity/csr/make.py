#!/usr/bin/env python3
"""Makes the certificate requests of this folder: `python3 make.py`, which needs the `openssl` command.

Each file is named for the one thing that is wrong with it, and is right in every other respect: in particular its
signature is good unless the name says otherwise. Those named `valid-…` have nothing wrong. Keys are made, used once and
thrown away, so every run changes every file.
"""
import base64
import hashlib
import math
import os
import secrets
import subprocess
import tempfile

here = os.path.dirname(os.path.abspath(__file__))
work = tempfile.TemporaryDirectory()
key_file = os.path.join(work.name, 'key.pem')

P256 = ['EC', '-pkeyopt', 'ec_paramgen_curve:P-256', '-pkeyopt', 'ec_param_enc:named_curve']
ECDSA_SHA256 = bytes.fromhex('300a06082a8648ce3d040302')


def openssl(*args, stdin=None):
    return subprocess.run(['openssl', *args], input=stdin, check=True, capture_output=True).stdout


def new_key(*algorithm):
    openssl('genpkey', '-algorithm', *algorithm, '-out', key_file)


def request(*options, digest='-sha256', subject='/O=ignored/CN=ignored'):
    return openssl('req', '-new', '-key', key_file, '-subj', subject, digest, '-outform', 'DER', *options)


def write(name, der, label='CERTIFICATE REQUEST'):
    body = base64.encodebytes(der).decode().replace('\n', '')
    lines = '\n'.join(body[i:i + 64] for i in range(0, len(body), 64))
    write_text(name, f'-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n')


def write_text(name, text):
    with open(os.path.join(here, name), 'w') as file:
        file.write(text)


def read_text(name):
    with open(os.path.join(here, name)) as file:
        return file.read()


def tlv(tag, *parts):
    contents = b''.join(parts)
    size = len(contents)
    octets = size.to_bytes((size.bit_length() + 7) // 8, 'big')
    return bytes([tag]) + (bytes([size]) if size < 128 else bytes([0x80 | len(octets)]) + octets) + contents


def signed(info, algorithm=ECDSA_SHA256):
    return tlv(0x30, info, algorithm, tlv(0x03, b'\0', openssl('dgst', '-sha256', '-sign', key_file, stdin=info)))


def by_hand(spki=None, version=b'\0', attributes=b'', subject=tlv(0x30), algorithm=ECDSA_SHA256):
    spki = spki or openssl('pkey', '-in', key_file, '-pubout', '-outform', 'DER')
    return signed(tlv(0x30, tlv(0x02, version), subject, spki, tlv(0xa0, attributes)), algorithm)


def is_prime(number):
    """Miller and Rabin's test, for odd numbers above 60."""
    if any(number % small == 0 for small in primes_below(60)):
        return False
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        powers = [pow(secrets.randbelow(number - 3) + 2, odd, number)]
        while len(powers) < twos:
            powers.append(powers[-1] ** 2 % number)
        if powers[0] != 1 and number - 1 not in powers:
            return False
    return True


def primes_below(bound):
    return [number for number in range(2, bound) if all(number % smaller for smaller in range(2, number))]


def new_prime(bits):
    """With its two upper bits set, so that the product of two has all the bits."""
    while True:
        candidate = secrets.randbits(bits) | 3 << (bits - 2) | 1
        if candidate % 65537 != 1 and is_prime(candidate):
            return candidate


def next_prime(number):
    number += 2
    while number % 65537 == 1 or not is_prime(number):
        number += 2
    return number


def roca_prime(bits):
    """As the library of CVE-2017-15361 made them: k * M + (65537 ** a mod M), M the product of the first 126 primes."""
    product = math.prod(primes_below(702))
    while True:
        start = secrets.randbits(bits) | 3 << (bits - 2)
        candidate = start - start % product + pow(65537, secrets.randbits(128), product)
        if candidate.bit_length() == bits and candidate % 65537 != 1 and is_prime(candidate):
            return candidate


def integer(number):
    return tlv(0x02, number.to_bytes(number.bit_length() // 8 + 1, 'big'))


def rsa_request(p, q):
    """For the key whose modulus is p * q, and signed by it (RFC 8017 section 8.2): openssl would make no such key."""
    modulus, size = p * q, ((p * q).bit_length() + 7) // 8
    sha256_with_rsa, rsa = (bytes.fromhex(f'300d06092a864886f70d0101{last}0500') for last in ('0b', '01'))
    public_key = tlv(0x30, integer(modulus), integer(65537))
    info = tlv(0x30, tlv(0x02, b'\0'), tlv(0x30), tlv(0x30, rsa, tlv(0x03, b'\0', public_key)), tlv(0xa0))
    digest_info = bytes.fromhex('3031300d060960864801650304020105000420') + hashlib.sha256(info).digest()
    padded = b'\0\1' + b'\xff' * (size - 3 - len(digest_info)) + b'\0' + digest_info
    private_exponent = pow(65537, -1, (p - 1) * (q if p == q else q - 1))
    signature = pow(int.from_bytes(padded, 'big'), private_exponent, modulus).to_bytes(size, 'big')
    return tlv(0x30, info, sha256_with_rsa, tlv(0x03, b'\0', signature))


# Nothing wrong.
for name, algorithm in {
    'p256': P256,
    'p384': ['EC', '-pkeyopt', 'ec_paramgen_curve:P-384'],
    'ed25519': ['ED25519'],
    'rsa-2048': ['RSA', '-pkeyopt', 'rsa_keygen_bits:2048'],
    'rsa-4096': ['RSA', '-pkeyopt', 'rsa_keygen_bits:4096'],
}.items():
    new_key(*algorithm)
    write(f'valid-{name}.pem', request())
new_key('EC', '-pkeyopt', 'ec_paramgen_curve:P-384')
write('valid-p384-signed-with-sha384.pem', request(digest='-sha384'))
new_key(*P256)
write('valid-with-subject-and-extensions.pem', request(
    '-addext', 'subjectAltName=URI:spiffe://elsewhere/operator/root,DNS:bank.example',
    '-addext', 'basicConstraints=critical,CA:TRUE', subject='/CN=root/OU=admin'))
write('valid-with-old-label.pem', request(), label='NEW CERTIFICATE REQUEST')
write('valid-with-empty-subject.pem', by_hand())

# The key.
new_key('RSA', '-pkeyopt', 'rsa_keygen_bits:1024')
write('rsa-1024.pem', request())
new_key('RSA', '-pkeyopt', 'rsa_keygen_bits:6144')
write('rsa-6144.pem', request())
new_key('RSA', '-pkeyopt', 'rsa_keygen_bits:2048', '-pkeyopt', 'rsa_keygen_pubexp:3')
write('rsa-exponent-3.pem', request())
new_key('RSA', '-pkeyopt', 'rsa_keygen_bits:2048', '-pkeyopt', 'rsa_keygen_pubexp:1099511627791')
write('rsa-exponent-of-41-bits.pem', request())
p = new_prime(1024)
write('rsa-close-primes.pem', rsa_request(p, next_prime(p + (1 << 500))))
write('rsa-same-prime-twice.pem', rsa_request(p, p))
write('rsa-small-factor.pem', rsa_request(751, new_prime(2038)))
write('rsa-even-modulus.pem', rsa_request(2, new_prime(2047)))
write('rsa-roca.pem', rsa_request(roca_prime(1024), roca_prime(1024)))
new_key('RSA-PSS', '-pkeyopt', 'rsa_keygen_bits:2048')
write('rsa-pss-key.pem', request())
for name, curve in {'p521': 'P-521', 'secp256k1': 'secp256k1', 'brainpool-p256': 'brainpoolP256r1'}.items():
    new_key('EC', '-pkeyopt', f'ec_paramgen_curve:{curve}')
    write(f'{name}.pem', request())
new_key('ED448')
write('ed448.pem', request())
new_key('EC', '-pkeyopt', 'ec_paramgen_curve:P-256', '-pkeyopt', 'ec_param_enc:explicit')
write('curve-spelled-out.pem', request())
dsa_parameters = os.path.join(work.name, 'dsa.pem')
openssl('genpkey', '-genparam', '-algorithm', 'DSA', '-pkeyopt', 'dsa_paramgen_bits:2048', '-out', dsa_parameters)
openssl('genpkey', '-paramfile', dsa_parameters, '-out', key_file)
write('dsa.pem', request())
new_key(*P256)
write('compressed-point.pem', by_hand(openssl(
    'ec', '-in', key_file, '-pubout', '-conv_form', 'compressed', '-outform', 'DER')))
spki = openssl('pkey', '-in', key_file, '-pubout', '-outform', 'DER')
write('point-off-the-curve.pem', by_hand(spki[:-1] + bytes([spki[-1] ^ 1])))

# The signature.
new_key(*P256)
good = request()
write('bad-signature.pem', good[:-1] + bytes([good[-1] ^ 1]))
new_key(*P256)
write('signed-by-another-key.pem', by_hand(spki))
write('ecdsa-sha1-signature.pem', request(digest='-sha1'))
write('signature-algorithm-of-another-key-type.pem', by_hand(algorithm=bytes.fromhex('300d06092a864886f70d01010b0500')))
write('signature-algorithm-with-parameters.pem', by_hand(algorithm=bytes.fromhex('300c06082a8648ce3d0403020500')))
new_key('RSA', '-pkeyopt', 'rsa_keygen_bits:2048')
write('rsa-sha1-signature.pem', request(digest='-sha1'))
write('rsa-md5-signature.pem', request(digest='-md5'))

# The form.
new_key(*P256)
good = request()
assert good[1] == 0x81, 'the length of a P-256 request is one octet after the 81'
write('trailing-bytes.pem', good + b'\0')
write('truncated.pem', good[:-10])
write('version-1.pem', by_hand(version=b'\1'))
write('padded-version.pem', by_hand(version=b'\0\0'))
write('no-attributes.pem', signed(tlv(0x30, tlv(0x02, b'\0'), tlv(0x30), spki)))
write('padded-length.pem', b'\x30\x82\x00' + good[2:])
write('indefinite-length.pem', b'\x30\x80' + good[3:] + b'\0\0')
nested = tlv(0x30)
for _ in range(30):
    nested = tlv(0x30, nested)
write('nested-too-deeply.pem', by_hand(attributes=tlv(0x30, tlv(0x06, b'\x2a\x03'), tlv(0x31, nested))))
COMMON_NAME = bytes.fromhex('0603550403')
for name, subject in {
    'that-is-no-name': tlv(0x30, tlv(0x02, b'\1')),
    'with-an-empty-set': tlv(0x30, tlv(0x31)),
    'with-a-number-for-a-name': tlv(0x30, tlv(0x31, tlv(0x30, COMMON_NAME, tlv(0x02, b'\1')))),
    'that-is-not-utf8': tlv(0x30, tlv(0x31, tlv(0x30, COMMON_NAME, tlv(0x0c, b'\xff')))),
    'with-half-a-character': tlv(0x30, tlv(0x31, tlv(0x30, COMMON_NAME, tlv(0x1e, b'\xd8\x00')))),
}.items():
    write(f'subject-{name}.pem', by_hand(subject=subject))
write('attribute-without-a-value.pem', by_hand(attributes=tlv(0x30, tlv(0x06, b'\x2a\x03'), tlv(0x31))))
write('attribute-that-is-none.pem', by_hand(attributes=tlv(0x02, b'\0')))
write('a-certificate.pem', openssl(
    'req', '-x509', '-key', key_file, '-subj', '/CN=x', '-outform', 'DER'), label='CERTIFICATE')
write('a-certificate-labelled-as-request.pem', openssl(
    'req', '-x509', '-key', key_file, '-subj', '/CN=x', '-outform', 'DER'))
write('oversized.pem', by_hand(attributes=tlv(0x30, tlv(0x06, b'\x2a\x03'), tlv(0x31, tlv(0x04, b'x' * 9000)))))
write_text('empty.pem', '')
write_text('not-pem.pem', 'a request, please\n')
valid = read_text('valid-p256.pem')
write_text('two-requests.pem', valid + valid)
write_text('no-end-line.pem', valid.replace('-----END CERTIFICATE REQUEST-----\n', ''))
write_text('base64-with-empty-lines.pem', valid.replace('\n', '\n\n'))
write_text('begins-within-a-line.pem', 'here: ' + valid)
write_text('one-damaged-one-good.pem', valid.replace('\nM', '\nM ', 1) + valid)
write_text('base64-with-blanks.pem', valid.replace('\nM', '\nM ', 1))
