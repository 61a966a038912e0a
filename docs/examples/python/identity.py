"""What an edge daemon shows, and whom it trusts: enrolled by a token, renewed by itself. See docs/integrate.md."""

import base64
import hashlib
import os
import re
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AttributeOID

from edgemesh.v1 import enroll_pb2 as wire
from edgemesh.v1 import enroll_pb2_grpc as stubs
from edgemesh.v1 import types_pb2 as types

KEY_FILE = "device.key"
# Key and certificate in one file, so that they change together.
IDENTITY_FILE = "device.pem"
ROOTS_FILE = "ca.crt"
TIMEOUT_SECONDS = 30


class Identity:
    """PEM: `pair` holds the certificates and the key. The roots begin with a line that names their bundle, so that both
    change together."""

    def __init__(self, pair: bytes, roots: bytes):
        self.pair = pair
        self.roots = roots

    @property
    def bundle_id(self) -> str:
        return self.roots.split(b"\n", 1)[0].removeprefix(b"# ").decode()

    def channel(self, server: str) -> grpc.Channel:
        key = re.search(rb"-----BEGIN PRIVATE KEY-----.*?-----END PRIVATE KEY-----\n", self.pair, re.S).group()
        return grpc.secure_channel(
            server, grpc.ssl_channel_credentials(self.roots, key, self.pair.replace(key, b""))
        )


def load(folder: Path) -> Identity | None:
    if not (folder / IDENTITY_FILE).exists():
        return None
    return Identity((folder / IDENTITY_FILE).read_bytes(), (folder / ROOTS_FILE).read_bytes())


def enroll(server: str, token: str, roots_file: Path, folder: Path, device_id: str) -> Identity:
    """Redeems a token. The key is kept before: a call whose answer was lost is repeated with it, and gives the same device."""
    # Step 1: The server. gRPC for Python connects to nobody whom it can't verify, so the root comes as a file beside the
    # token, and is believed because the token names it.
    root = pinned_root(roots_file.read_bytes(), token)
    key = key_in(folder)
    with grpc.secure_channel(server, grpc.ssl_channel_credentials(root)) as channel:
        client = stubs.EnrollServiceStub(channel)

        # Step 2: The request, signed over a challenge of the server, and the token. The stream stays open while an operator
        # has to approve the device.
        request = wire.EnrollRequest(
            token=token,
            csr=signing_request(client, key),
            device=types.DeviceDescription(id=device_id, type=types.DEVICE_TYPE_GATEWAY),
        )
        request.sent_at.FromDatetime(datetime.now(timezone.utc))
        for answer in client.Enroll(request):
            if answer.HasField("pending_approval"):
                print(f"an operator has to approve {answer.pending_approval.device_id}", flush=True)
            if answer.HasField("identity"):
                print(f"enrolled {answer.identity.spiffe_id}", flush=True)
                return keep(folder, key, answer.identity)
    raise ConnectionError("the server ended the enrollment without a certificate: try again")


def renew(server: str, folder: Path, shown: Identity) -> Identity:
    """A new certificate for a new key, of the same identity."""
    key = ec.generate_private_key(ec.SECP256R1())
    with shown.channel(server) as channel:
        client = stubs.EnrollServiceStub(channel)
        request = wire.RenewCertificateRequest(csr=signing_request(client, key))
        return keep(folder, key, client.RenewCertificate(request, timeout=TIMEOUT_SECONDS).identity)


def adopt(folder: Path, shown: Identity, bundle: types.TrustBundle) -> Identity:
    """Trusts the roots of a bundle from the next connection on. It came over a connection that roots trusted before have
    verified."""
    if not bundle.roots_pem:
        raise ValueError("the trust bundle has no root")
    trusting = Identity(shown.pair, roots_of(bundle))
    write(folder / ROOTS_FILE, trusting.roots)
    return trusting


def roots_of(bundle: types.TrustBundle) -> bytes:
    return f"# {bundle.id}\n{''.join(bundle.roots_pem)}".encode()


def pinned_root(roots: bytes, token: str) -> bytes:
    parts = token.split(".")
    if len(parts) != 4 or parts[0] != "em1":
        raise ValueError("not an enrollment token: want em1.<id>.<secret>.<key hash>, copied whole")
    for root in x509.load_pem_x509_certificates(roots):
        key = root.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        if base64.urlsafe_b64encode(hashlib.sha256(key).digest()).rstrip(b"=").decode() == parts[3]:
            return root.public_bytes(serialization.Encoding.PEM)
    raise ValueError("none of the roots is that of the server that the token is for")


def signing_request(client: stubs.EnrollServiceStub, key: ec.EllipticCurvePrivateKey) -> bytes:
    challenge = client.GetChallenge(wire.GetChallengeRequest(), timeout=TIMEOUT_SECONDS).challenge
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_attribute(AttributeOID.CHALLENGE_PASSWORD, challenge.encode())
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def keep(folder: Path, key: ec.EllipticCurvePrivateKey, issued: wire.Identity) -> Identity:
    chain = "".join(issued.certificate_chain_pem).encode()
    if not chain or x509.load_pem_x509_certificate(chain).public_key() != key.public_key():
        raise ValueError("the certificate in the answer is for another key")
    shown = Identity(chain + pem_of(key), roots_of(issued.trust_bundle))
    write(folder / ROOTS_FILE, shown.roots)
    write(folder / IDENTITY_FILE, shown.pair)
    return shown


def key_in(folder: Path) -> ec.EllipticCurvePrivateKey:
    if (folder / KEY_FILE).exists():
        return serialization.load_pem_private_key((folder / KEY_FILE).read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    write(folder / KEY_FILE, pem_of(key))
    return key


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write(path: Path, text: bytes) -> None:
    """Replaces a file as a whole, for its owner alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(dir=path.parent)  # with mode 0600
    with os.fdopen(handle, "wb") as file:
        file.write(text)
    os.replace(fresh, path)
