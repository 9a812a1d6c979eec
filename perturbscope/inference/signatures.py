"""Signatures of bundles: who vouches for a manifest, and so for every file that it lists.

``manifest.sigstore.json`` beside the manifest is a bundle of the Sigstore project (version 0.3, a signature of a blob
by a key), as this command writes it too::

    cosign sign-blob --key cosign.key --new-bundle-format --bundle manifest.sigstore.json manifest.json

It is checked without any network. Needs the extra ``signatures`` (cryptography).

Keys are of ECDSA (P-256 or P-384, with SHA-256 and SHA-384) or Ed25519. Signatures by certificates of an identity
provider are not checked here: their proof needs a transparency log and its keys, for which cosign is the tool.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perturbscope.cells.files import commit
from perturbscope.errors import InvalidParameterError, UntrustedBundleError
from perturbscope.inference.bundle import MANIFEST, SIGNATURE, Bundle

State = Literal["absent", "unchecked", "trusted", "untrusted"]
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class Signer:
    """A key that is trusted to sign bundles, from :func:`read_signers`; named by its file."""

    name: str
    key: Any


@dataclass(frozen=True)
class Signature:
    """What is known of a bundle's signature.

    Attributes
    ----------
    state
        ``absent``: there is none; ``unchecked``: there is one, and no signer was named to check it against;
        ``trusted``: a named signer made it for this very manifest; ``untrusted``: none of them did.
    signer
        Name of the signer, if it is trusted.
    reason
        Why it is untrusted.
    """

    state: State
    signer: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return {"trusted": f"trusted: by {self.signer}", "untrusted": f"untrusted: {self.reason}"}.get(
            self.state, self.state
        )

    def require(self, bundle: Bundle) -> None:
        """Raise UntrustedBundleError unless the signature is trusted."""
        if self.state != "trusted":
            raise UntrustedBundleError(
                f"{bundle.path}: its signature is {self}, and one of a trusted signer is required. Sign the bundle "
                "with a key of theirs (perturbscope bundle sign), or trust its signer.",
                field="signature",
            )


def read_signers(paths: Sequence[str | Path]) -> tuple[Signer, ...]:
    """Read public keys (PEM), each named by its file without the suffix.

    Raises
    ------
    InvalidParameterError
        A file cannot be read or holds no such key; two have one name; or cryptography is not installed.
    """
    if not paths:
        return ()
    serialization = _cryptography().hazmat.primitives.serialization
    signers = []
    for path in map(Path, paths):
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidParameterError(
                f"{path} holds no public key ({error}). Give one in PEM, as cosign generate-key-pair or openssl pkey "
                "-pubout writes it.",
                field="signers",
            ) from error
        if _scheme(key) is None:
            raise InvalidParameterError(
                f"{path} holds a key of another kind; ECDSA (P-256, P-384) and Ed25519 are understood.", field="signers"
            )
        signers.append(Signer(path.stem, key))
    if len({signer.name for signer in signers}) < len(signers):
        raise InvalidParameterError("Two files of signers have one name, which names the signer.", field="signers")
    return tuple(signers)


def signature_of(bundle: Bundle, signers: Sequence[Signer]) -> Signature:
    """Return what is known of the signature of an opened bundle. Never raises for a bad signature, but says why."""
    path = bundle.path / SIGNATURE
    try:
        if not path.is_file():
            return Signature("absent")
        if not signers:
            return Signature("unchecked")
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        signature = _read(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Signature("untrusted", reason=f"{SIGNATURE} cannot be read ({type(error).__name__}: {error})"[:300])
    for signer in signers:
        if _verifies(signer.key, signature, bundle.manifest_bytes):
            return Signature("trusted", signer.name)
    names = ", ".join(signer.name for signer in signers)
    return Signature("untrusted", reason=f"it is of no trusted signer ({names}), or {MANIFEST} was changed after it")


def sign(path: str | Path, private_key: str | Path) -> Bundle:
    """Check a bundle, sign its manifest and write the signature beside it; an earlier one is replaced.

    Raises
    ------
    BundleError
        The directory is no bundle in order.
    InvalidParameterError
        The file holds no private key without a password, or cryptography is not installed.
    """
    serialization = _cryptography().hazmat.primitives.serialization
    try:
        key = serialization.load_pem_private_key(Path(private_key).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidParameterError(
            f"{private_key} holds no usable private key ({error}). Give one in PEM without a password: openssl genpkey "
            "-algorithm ed25519. For a key with a password or in a vault, sign with cosign.",
            field="key",
        ) from error
    scheme = _scheme(key.public_key())
    if scheme is None:
        raise InvalidParameterError(
            f"{private_key} holds a key of another kind; ECDSA (P-256, P-384) and Ed25519 are understood.", field="key"
        )
    bundle = Bundle.open(path)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    content = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": _base64(hashlib.sha256(public).digest())},
            "tlogEntries": [],  # readers ask for the field
        },
        "messageSignature": {
            "messageDigest": {
                "algorithm": "SHA2_256",
                "digest": _base64(hashlib.sha256(bundle.manifest_bytes).digest()),
            },
            "signature": _base64(key.sign(bundle.manifest_bytes, *scheme)),
        },
    }
    # Not inside of the bundle, where a server that looks at this moment would find a file that nobody listed.
    handle, name = tempfile.mkstemp(prefix=f".{bundle.path.name}.", dir=bundle.path.resolve().parent)
    staging = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
        commit(staging, bundle.path / SIGNATURE)
    finally:
        staging.unlink(missing_ok=True)
    return bundle


def _read(text: bytes) -> bytes:
    """Return the signature in a Sigstore bundle. Raises ValueError, KeyError, TypeError or AttributeError."""
    if len(text) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    content = json.loads(text)
    if not str(content["mediaType"]).startswith("application/vnd.dev.sigstore.bundle"):
        raise ValueError("it is no bundle of Sigstore")
    if "messageSignature" not in content:
        raise ValueError("it signs no blob; sign the manifest itself: cosign sign-blob")
    return base64.b64decode(content["messageSignature"]["signature"], validate=True)


def _verifies(key: Any, signature: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data, *(_scheme(key) or ()))
    except InvalidSignature:
        return False
    return True


def _scheme(key: Any) -> tuple[Any, ...] | None:
    """Return the further arguments of ``verify`` and ``sign`` for a public key; None: its kind is not understood."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(key, ed25519.Ed25519PublicKey):
        return ()
    if isinstance(key, ec.EllipticCurvePublicKey):
        digest = {"secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384}.get(key.curve.name)
        return None if digest is None else (ec.ECDSA(digest()),)
    return None


def _cryptography() -> Any:
    try:
        import cryptography.hazmat.primitives.serialization
    except ImportError as error:
        raise InvalidParameterError(
            "Signatures of bundles need the package cryptography: pip install 'perturbscope[signatures]'.",
            field="signers",
        ) from error
    return cryptography


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def files_of(text: str) -> tuple[Path, ...]:
    """Return the files that a setting names, separated by ``:``; a directory stands for its ``*.pem`` and ``*.pub``."""
    found: list[Path] = []
    for part in filter(None, text.split(os.pathsep)):
        path = Path(part)
        found += sorted([*path.glob("*.pem"), *path.glob("*.pub")]) if path.is_dir() else [path]
    return tuple(found)
