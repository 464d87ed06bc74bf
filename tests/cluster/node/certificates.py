"""Who is who on the node: an authority, certificates of every program, and the files by which they sign in."""

import json
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.cluster.node.addresses import API, HOST, NODE, SERVICE

CLIENTS = {
    # file's name: (user, group)
    "admin": ("admin", "system:masters"),
    "apiserver-to-kubelet": ("apiserver", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
    "proxy": ("system:kube-proxy", ""),
    "coredns": ("system:coredns", ""),
}
SERVER_NAMES = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", NODE)


def write(folder: Path) -> None:
    """Writes ``ca.crt``, ``NAME.crt`` and ``NAME.key`` of all, ``NAME.kubeconfig`` of clients, the accounts' key."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = _Authority(folder)
    authority.issue("server", "kube-apiserver", "", server=True)
    for name, (user, group) in CLIENTS.items():
        authority.issue(name, user, group, server=name == "kubelet")
        (folder / f"{name}.kubeconfig").write_text(_kubeconfig(folder, name))
    accounts = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    _write_key(folder / "accounts.key", accounts)
    public = accounts.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / "accounts.pub").write_bytes(public)


class _Authority:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        built = self._builder(self.name, self.key.public_key())
        built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        (folder / "ca.crt").write_bytes(built.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, file: str, user: str, group: str, *, server: bool) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
        if group:
            names.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
        built = self._builder(x509.Name(names), key.public_key())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
        built = built.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if server:
            others: list[x509.GeneralName] = [x509.IPAddress(ip_address(a)) for a in (HOST, SERVICE, "127.0.0.1")]
            others += [x509.DNSName(name) for name in SERVER_NAMES]
            built = built.add_extension(x509.SubjectAlternativeName(others), critical=False)
        signed = built.sign(self.key, hashes.SHA256())
        (self.folder / f"{file}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        _write_key(self.folder / f"{file}.key", key)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=2))
        )


def _write_key(file: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    form = serialization.PrivateFormat.TraditionalOpenSSL
    file.touch(mode=0o600)
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def _kubeconfig(folder: Path, name: str) -> str:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "node", "cluster": {"server": API, "certificate-authority": str(folder / "ca.crt")}}],
            "users": [
                {
                    "name": name,
                    "user": {
                        "client-certificate": str(folder / f"{name}.crt"),
                        "client-key": str(folder / f"{name}.key"),
                    },
                }
            ],
            "contexts": [{"name": "node", "context": {"cluster": "node", "user": name}}],
            "current-context": "node",
        },
        indent=1,
    )
