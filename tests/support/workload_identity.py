"""JSON Web Tokens of a key pair that a test makes, as Nomad signs them for its tasks, and Consul's side of it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

ISSUER, AUDIENCE = "https://nomad.example", "consul.io"
COORDINATE_BYTES = 32


class Signer:
    """Signs what a workload is (RFC 7519, ES256)."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    @property
    def public_pem(self) -> str:
        """The public key."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()

    def jwt(self, task: str, life_s: float = 600.0) -> str:
        """Return the token of a task of Nomad's; with a `life_s` below zero it has expired."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "sub": f"global:default:mesh:web:{task}",
            "nomad_task": task,
            "iat": now - 700,
            "exp": now + int(life_s),
        }
        signed = f"{_encoded({'alg': 'ES256', 'typ': 'JWT'})}.{_encoded(claims)}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        raw = r.to_bytes(COORDINATE_BYTES) + s.to_bytes(COORDINATE_BYTES)
        return f"{signed}.{_base64(raw)}"


def trust(
    write_acl: Callable[[str, object], object], method: str, signer: Signer, **rules_of_task: str
) -> None:
    """Have a Consul take the signer's tokens: one auth method, and for each task a role with exactly its rules."""
    config = {
        "JWTValidationPubKeys": [signer.public_pem],
        "BoundIssuer": ISSUER,
        "BoundAudiences": [AUDIENCE],
        "ClaimMappings": {"nomad_task": "nomad_task"},
    }
    write_acl("auth-method", {"Name": method, "Type": "jwt", "MaxTokenTTL": "1h", "Config": config})
    for task, rules in rules_of_task.items():
        name = f"{method}-{task}"
        write_acl("policy", {"Name": name, "Rules": rules})
        write_acl("role", {"Name": name, "Policies": [{"Name": name}]})
        selector = f'value.nomad_task=="{task}"'
        bound = {"AuthMethod": method, "BindType": "role", "BindName": name, "Selector": selector}
        write_acl("binding-rule", bound)


def _encoded(value: Any) -> str:
    return _base64(json.dumps(value).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
