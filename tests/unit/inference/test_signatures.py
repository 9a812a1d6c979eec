"""Signatures of bundles: who signed the manifest, and what else makes a bundle one that nobody vouches for."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from perturbscope.cli import app
from perturbscope.errors import CorruptBundleError, InvalidParameterError, UntrustedBundleError
from perturbscope.inference import signatures
from perturbscope.inference.bundle import MANIFEST, SIGNATURE, Bundle
from perturbscope.inference.signatures import files_of, read_signers, sign, signature_of
from serving.commands import preflight
from serving.models.loading import ServedModel
from serving.settings import Settings

KEYS = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def key_files(folder: Path, name: str, key: Any) -> tuple[Path, Path]:
    """Files of a private key and of its public one."""
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def lab(tmp_path: Path) -> tuple[Path, Path]:
    return key_files(tmp_path, "lab", KEYS["ed25519"]())


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def state(bundle: Path, *public: Path) -> tuple[str, str]:
    found = signature_of(Bundle.open(bundle), read_signers(public))
    return found.state, found.signer


@pytest.mark.parametrize("kind", KEYS)
def test_a_signature_names_its_signer(bundle: Path, tmp_path: Path, lab: tuple[Path, Path], kind: str) -> None:
    private, public = key_files(tmp_path, "institute", KEYS[kind]())
    assert state(bundle, public) == ("absent", "")
    sign(bundle, private)
    assert state(bundle) == ("unchecked", "")
    assert state(bundle, lab[1], public) == ("trusted", "institute")
    assert state(bundle, lab[1]) == ("untrusted", "")
    sign(bundle, lab[0])  # a later signature takes its place
    assert state(bundle, lab[1], public) == ("trusted", "lab")


def test_what_was_changed_after_it_was_signed_is_untrusted(bundle: Path, lab: tuple[Path, Path]) -> None:
    """Also where the manifest's hashes were made to fit the new file."""
    sign(bundle, lab[0])
    (bundle / "MODEL_CARD.md").write_text("changed")
    with pytest.raises(CorruptBundleError, match=r"MODEL_CARD\.md has the SHA-256"):
        Bundle.open(bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"]["MODEL_CARD.md"] = hashlib.sha256(b"changed").hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert state(bundle, lab[1]) == ("untrusted", "")


def test_the_form_is_that_of_cosign(bundle: Path, tmp_path: Path) -> None:
    """As ``cosign sign-blob --new-bundle-format`` writes it: with more around it, and the signature over the bytes."""
    key = KEYS["p256"]()
    _, public = key_files(tmp_path, "cosign", key)
    content = (bundle / MANIFEST).read_bytes()
    written = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": [{"logIndex": "1"}]},
        "messageSignature": {
            "messageDigest": {
                "algorithm": "SHA2_256",
                "digest": base64.b64encode(hashlib.sha256(content).digest()).decode(),
            },
            "signature": base64.b64encode(key.sign(content, ec.ECDSA(hashes.SHA256()))).decode(),
        },
    }
    (bundle / SIGNATURE).write_text(json.dumps(written))
    assert state(bundle, public) == ("trusted", "cosign")
    sign(bundle, tmp_path / "cosign.key")
    ours = json.loads((bundle / SIGNATURE).read_text())
    assert {name: ours[name].keys() for name in ("messageSignature",)} == {
        "messageSignature": written["messageSignature"].keys()
    }
    assert ours["mediaType"] == written["mediaType"]
    assert ours["verificationMaterial"].keys() == written["verificationMaterial"].keys()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"mediaType": "text/plain", "messageSignature": {"signature": "AAAA"}}',
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": {}}',
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "messageSignature": {"signature": "?"}}',
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "messageSignature": {"signature": "AAAA"}}',
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "messageSignature": null}',
        b" " * (2**20 + 1),
    ],
)
def test_what_is_no_signature_is_untrusted(bundle: Path, lab: tuple[Path, Path], content: bytes) -> None:
    (bundle / SIGNATURE).write_bytes(content)
    assert state(bundle, lab[1]) == ("untrusted", "")


def test_a_server_shows_signatures_and_may_require_them(
    bundle: Path, tmp_path: Path, lab: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, stranger = key_files(tmp_path, "stranger", KEYS["p256"]())
    required = {"signers": str(lab[1]), "require_signatures": "yes"}
    with pytest.raises(UntrustedBundleError, match="its signature is absent"):
        ServedModel.load(bundle, Settings(**required))
    with pytest.raises(UntrustedBundleError, match="absent"):
        preflight.check(Settings(bundle=str(bundle), **required))
    assert app.run(["bundle", "sign", str(bundle), "--key", str(lab[0])]) == 0
    for settings, shown in (
        ({}, ("unchecked", "")),
        (required, ("trusted", "lab")),
        ({"signers": str(stranger)}, ("untrusted", "")),
        ({"signers": f"{stranger}:{lab[1]}"}, ("trusted", "lab")),
    ):
        info = ServedModel.load(bundle, Settings(**settings)).info
        assert (info.signature, info.signer) == shown
    with pytest.raises(UntrustedBundleError, match=r"of no trusted signer \(stranger\)"):
        ServedModel.load(bundle, Settings(signers=str(stranger), require_signatures="yes"))
    capsys.readouterr()
    assert app.run(["bundle", "verify", str(bundle), "--signer", str(lab[1])]) == 0
    assert "Signature: trusted: by lab" in capsys.readouterr().out
    assert app.run(["bundle", "verify", str(bundle), "--signer", str(stranger)]) != 0
    assert "untrusted_bundle" in capsys.readouterr().err


def test_keys_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    private, public = key_files(tmp_path, "old", rsa.generate_private_key(65537, 2048))
    with pytest.raises(InvalidParameterError, match="a key of another kind"):
        read_signers([public])
    with pytest.raises(InvalidParameterError, match="a key of another kind"):
        sign(bundle, private)
    with pytest.raises(InvalidParameterError, match="holds no public key"):
        read_signers([private])
    with pytest.raises(InvalidParameterError, match="No such file"):
        read_signers([tmp_path / "none.pem"])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        key_files(tmp_path / folder, "same", KEYS["ed25519"]())
    assert len(files_of(str(tmp_path / "a"))) == 1
    with pytest.raises(InvalidParameterError, match="one name"):
        read_signers(files_of(f"{tmp_path / 'a'}:{tmp_path / 'b'}"))
    with pytest.raises(InvalidParameterError, match="SIGNERS names no public key"):
        Settings(require_signatures="yes")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(InvalidParameterError, match=r"perturbscope\[signatures\]"):
        read_signers([public])
    assert signatures.signature_of(Bundle.open(bundle), ()).state == "absent"  # which needs no cryptography


@pytest.mark.parametrize(
    "kind", ["file", "hidden", "folder", "link", "link to a listed file", "pipe", "other signature"]
)
def test_nothing_lies_in_a_bundle_that_is_not_listed(bundle: Path, kind: str) -> None:
    extra = bundle / {"hidden": ".cache", "model.sig": "model.sig"}.get(kind, "extra")
    if kind == "folder":
        extra.mkdir()
        (extra / "weights.bin").touch()
    elif kind == "pipe":
        os.mkfifo(extra)
    elif kind.startswith("link"):
        extra.symlink_to(bundle / "model.onnx" if "listed" in kind else "/etc/hostname")
    else:
        extra.touch()
    with pytest.raises(CorruptBundleError, match=rf"{extra.name} is not listed in manifest\.json"):
        Bundle.open(bundle)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link"])
@pytest.mark.parametrize("name", ["MODEL_CARD.md", MANIFEST])
def test_what_is_listed_is_a_file(bundle: Path, kind: str, name: str) -> None:
    """Reading a pipe would wait for ever, and a device may have no end."""
    path = bundle / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else bundle / "nowhere")
    with pytest.raises(CorruptBundleError):
        Bundle.open(bundle)
