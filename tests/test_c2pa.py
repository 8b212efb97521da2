"""Signed images, read by the reader of the c2pa library: whole ones are valid, changed ones are not."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.images import c2pa_signature
from sdxl_lora_core.images.c2pa_signature import (
    CERTIFICATE,
    KEY,
    Signature,
    SigningError,
    own_signature,
    require_own_signature,
)
from sdxl_lora_core.images.png import AI_GENERATED, XMP, png_info, stored_png
from tools.run_workflow import load_pack

TEXTS = {"parameters": "a cat\nSteps: 3", XMP: AI_GENERATED}


@pytest.fixture(scope="module")
def signature(tmp_path_factory: pytest.TempPathFactory) -> Signature:
    """A chain of two: an authority, and a certificate for signing."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> Any:
        parts = [(NameOID.COMMON_NAME, text), (NameOID.ORGANIZATION_NAME, "Test"), (NameOID.COUNTRY_NAME, "XX")]
        return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])

    folder = tmp_path_factory.mktemp("chain")
    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject: str, key: Any, is_authority: bool) -> Any:
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
        )
        found = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not is_authority,
                    key_cert_sign=is_authority,
                    crl_sign=is_authority,
                    decipher_only=False,
                    **usage,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )
        if not is_authority:
            found = found.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        return found.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    chain = certificate("signer", own, False) + certificate("authority", authority, True)
    (folder / "chain.pem").write_bytes(chain)
    private = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return Signature(folder / "chain.pem", folder / "key.pem")


def png() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    return stored_png(pixels, [(kind, data) for kind, data, *_ in png_info(TEXTS).chunks])


def read(data: bytes) -> dict[str, Any]:
    import c2pa

    return json.loads(c2pa.Reader("image/png", io.BytesIO(data)).json())


def test_a_signed_image_is_valid_and_keeps_pixels_and_texts(signature: Signature) -> None:
    signed = signature.sign(png())
    found = read(signed)
    assert found["validation_state"] in ("Valid", "Trusted")
    manifest = found["manifests"][found["active_manifest"]]
    assert manifest["claim_generator_info"][0]["name"] == "sdxl-lora-nodes"
    (actions,) = [one["data"]["actions"] for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")]
    assert actions[0]["action"] == "c2pa.created"
    assert actions[0]["digitalSourceType"].endswith("trainedAlgorithmicMedia")
    before, after = (Image.open(io.BytesIO(data)) for data in (png(), signed))
    assert np.array_equal(np.asarray(before), np.asarray(after))
    assert after.info["parameters"] == TEXTS["parameters"] and "trainedAlgorithmicMedia" in after.info[XMP]


@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
def test_one_changed_byte_of_the_image_is_invalid(signature: Signature, place: float) -> None:
    signed = bytearray(signature.sign(png()))
    start = signed.index(b"IDAT") + 8
    signed[start + int((len(signed) - start - 32) * place)] ^= 1
    assert read(bytes(signed))["validation_state"] == "Invalid"


def test_it_is_off_unless_both_are_set() -> None:
    assert own_signature({}) is None
    assert own_signature({CERTIFICATE: "a", KEY: "b"}) == Signature(Path("a"), Path("b"))
    for name in (CERTIFICATE, KEY):
        with pytest.raises(ValueError, match=f"only {name} is set: set {CERTIFICATE} and {KEY}, or neither"):
            own_signature({name: "a"})


def test_what_cannot_sign_is_said(signature: Signature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"gone.pem, named by .* cannot be read"):
        Signature(tmp_path / "gone.pem", signature.key).sign(png())
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(ValueError, match=r"an image cannot be signed \(.*SDXL_LORA_C2PA_KEY the ECDSA P-256 key"):
        Signature(tmp_path / "bad.pem", signature.key).sign(png())
    monkeypatch.setattr(c2pa_signature.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="signing needs c2pa-python: python -m pip install c2pa-python"):
        signature.sign(png())


def test_a_wrong_setup_is_found_before_an_image_is_made(
    signature: Signature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_own_signature()
    monkeypatch.setenv(KEY, str(signature.key))
    node = load_pack().NODE_CLASS_MAPPINGS["SDXLGenerateCached"]()
    with pytest.raises(ValueError, match=f"only {KEY} is set"):
        node.generate(None, prompt="")
    monkeypatch.setenv(CERTIFICATE, str(tmp_path / "gone.pem"))
    with pytest.raises(SigningError, match=r"gone.pem, named by .* cannot be read"):
        require_own_signature()
    monkeypatch.setenv(CERTIFICATE, str(signature.certificate))
    require_own_signature()


def test_what_a_node_shows_of_generated_images_is_signed(
    signature: Signature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    previews = load_pack().nodes.previews
    pixels = np.zeros((16, 16, 3), np.uint8)
    plain = previews.show((), "", [pixels], [TEXTS])["ui"]["images"][0]
    monkeypatch.setenv(CERTIFICATE, str(signature.certificate))
    monkeypatch.setenv(KEY, str(signature.key))
    signed = previews.show((), "", [pixels], [TEXTS])["ui"]["images"][0]
    chart = previews.show((), "", [pixels])["ui"]["images"][0]
    assert plain["filename"] != signed["filename"]
    folder = tmp_path / "temp/sdxl_lora"
    assert read((folder / signed["filename"]).read_bytes())["validation_state"] in ("Valid", "Trusted")
    assert b"caBX" not in (folder / plain["filename"]).read_bytes()
    assert b"caBX" not in (folder / chart["filename"]).read_bytes(), "a chart was not generated"
