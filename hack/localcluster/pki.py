"""Creates certificates with openssl, and kubeconfigs, for one cluster."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from localcluster.errors import LocalClusterError


@dataclass(frozen=True)
class Identity:
    """A certificate: its file name, subject and, for a server, its subject alternative names."""

    name: str
    common_name: str
    organization: str = ""
    sans: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """The subject, as openssl's -subj expects it."""
        return f"/O={self.organization}/CN={self.common_name}" if self.organization else f"/CN={self.common_name}"


def node_identities(name: str, address: str) -> tuple[Identity, ...]:
    """Returns the identities of one node: the kubelet's as a server, and as a client. Pure."""
    return (
        Identity("kubelet", name, sans=(f"DNS:{name}", f"IP:{address}")),
        Identity("node", f"system:node:{name}", "system:nodes"),
    )


def identities(server_address: str, kubernetes_service: str) -> tuple[Identity, ...]:
    """Returns the control plane's identities, with the names that Kubernetes' authorizers expect.

    Pure.
    """
    api_names = (
        *(f"DNS:kubernetes{suffix}" for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local")),
        "DNS:localhost",
        f"IP:{server_address}",
        f"IP:{kubernetes_service}",
        "IP:127.0.0.1",
    )
    return (
        Identity("apiserver", "kube-apiserver", sans=api_names),
        Identity("admin", "localcluster-admin", "system:masters"),
        Identity("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters"),
        Identity("controller-manager", "system:kube-controller-manager"),
        Identity("scheduler", "system:kube-scheduler"),
        Identity("proxy", "system:kube-proxy"),
        Identity("front-proxy", "front-proxy-client"),
    )


def make_pki(folder: Path, requested: tuple[Identity, ...]) -> None:
    """Writes ca.crt, NAME.crt, NAME.key and service-accounts.key/.pub.

    Raises LocalClusterError if openssl is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    _openssl(
        folder,
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "365"),
        *("-subj", "/CN=localcluster-ca", "-keyout", "ca.key", "-out", "ca.crt"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"),
    )
    sign(folder, requested)
    _openssl(folder, "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", "service-accounts.key")
    _openssl(folder, "pkey", "-in", "service-accounts.key", "-pubout", "-out", "service-accounts.pub")


def sign(folder: Path, requested: tuple[Identity, ...]) -> None:
    """Writes NAME.crt and NAME.key of each identity, signed by the folder's ca.crt."""
    for identity in requested:
        _signed(folder, identity)


def _signed(folder: Path, identity: Identity) -> None:
    name = identity.name
    extensions = ["basicConstraints=CA:FALSE", "extendedKeyUsage=clientAuth,serverAuth"]
    if identity.sans:
        extensions.append(f"subjectAltName={','.join(identity.sans)}")
    (folder / f"{name}.ext").write_text("\n".join(extensions))
    _openssl(
        folder,
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", identity.subject),
        *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
    )
    _openssl(
        folder,
        *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-days", "365", "-extfile", f"{name}.ext", "-out", f"{name}.crt"),
    )


def _openssl(folder: Path, *arguments: str) -> None:
    try:
        done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LocalClusterError("openssl is missing; install Debian's package openssl") from None
    if done.returncode:
        raise LocalClusterError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")


def kubeconfig(pki: Path, identity: str, server: str, cluster: str) -> str:
    """Returns a kubeconfig that contains its certificates, in JSON, which is valid YAML."""

    def inline(file: str) -> str:
        return base64.b64encode((pki / file).read_bytes()).decode()

    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": cluster, "cluster": {"server": server, "certificate-authority-data": inline("ca.crt")}}
            ],
            "users": [
                {
                    "name": identity,
                    "user": {
                        "client-certificate-data": inline(f"{identity}.crt"),
                        "client-key-data": inline(f"{identity}.key"),
                    },
                }
            ],
            "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": identity}}],
            "current-context": cluster,
        },
        indent=1,
    )
