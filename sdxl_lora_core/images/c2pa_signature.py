"""Signs generated images by C2PA (Content Credentials) with a certificate of the user's own. Off by default.

Source: C2PA Technical Specification 2.1; the signature is made by the library of its authors, c2pa-python.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..files import file_sha256
from ..messages import brief
from .png import stored_png

CERTIFICATE, KEY = "SDXL_LORA_C2PA_CERTIFICATE", "SDXL_LORA_C2PA_KEY"
_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_ALGORITHM = b"es256"
_CLAIM = {
    "claim_generator_info": [{"name": "sdxl-lora-nodes"}],
    "title": "image",
    "assertions": [
        {
            "label": "c2pa.actions.v2",
            "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": _SOURCE}]},
        }
    ],
}


class SigningError(ValueError):
    """Images cannot be signed as the environment variables ask for."""


@dataclass(frozen=True)
class Signature:
    """Signs PNGs with the certificate chain (PEM, the signer's first) and its private key (PEM, ECDSA P-256)."""

    certificate: Path
    key: Path

    @cached_property
    def fingerprint(self) -> str:
        """Of the certificate: images signed by another one are other files."""
        return file_sha256(self.certificate)

    def sign(self, png: bytes) -> bytes:
        """The PNG with a signed manifest. Raises SigningError naming what is wrong with library, certificate or key."""
        c2pa = _library()
        try:
            chain, key = self.certificate.read_bytes(), self.key.read_bytes()
            signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(_ALGORITHM, chain, key, None))
            signed = io.BytesIO()
            c2pa.Builder(json.dumps(_CLAIM)).sign(signer, "image/png", io.BytesIO(png), signed)
        except OSError as error:
            raise SigningError(f"{error.filename}, named by {CERTIFICATE} or {KEY}, cannot be read") from error
        except Exception as error:  # of any type: the library has its own
            raise SigningError(
                f"an image cannot be signed ({brief(error)}): {CERTIFICATE} is a chain of PEM certificates for "
                f"signing, {KEY} the ECDSA P-256 key of the first one"
            ) from error
        return signed.getvalue()


def own_signature(environment: Mapping[str, str] = os.environ) -> Signature | None:
    """The signature that the environment variables ask for; None if they are not set.

    Raises SigningError if only one of them is set.
    """
    certificate, key = environment.get(CERTIFICATE, ""), environment.get(KEY, "")
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise SigningError(
            f"only {CERTIFICATE if certificate else KEY} is set: set {CERTIFICATE} and {KEY}, or neither"
        )
    return Signature(Path(certificate), Path(key))


def require_own_signature() -> None:
    """Raises SigningError if `own_signature` cannot sign an image."""
    if signature := own_signature():
        signature.sign(stored_png(np.zeros((1, 1, 3), np.uint8), []))


def _library() -> Any:
    if importlib.util.find_spec("c2pa") is None:
        raise ValueError(f"{CERTIFICATE} is set, and signing needs c2pa-python: python -m pip install c2pa-python")
    import c2pa

    return c2pa
