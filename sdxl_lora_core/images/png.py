"""Text chunks of PNG files, and a fast writer without compression."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL.PngImagePlugin import PngInfo

XMP = "XML:com.adobe.xmp"  # the keyword that the XMP specification defines for PNG
# IPTC's digital source type: https://cv.iptc.org/newscodes/digitalsourcetype/
AI_GENERATED = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"><Iptc4xmpExt:DigitalSourceType>'
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    '</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
LONGEST_TEXT = 1 << 20  # characters; longer texts are left out, so that every reader can open the image


def png_info(texts: Mapping[str, str]) -> PngInfo:
    """The texts as chunks of a PNG."""
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_itxt(keyword, text) if keyword == XMP else info.add_text(keyword, text)
    return info


def stored_png(pixels: np.ndarray, texts: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Encodes uint8 [H, W, 3] as an uncompressed PNG: 3 ms for 1024 x 1024 px, where Pillow takes at least 50 ms."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *texts, (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b"")]
    sealed = [struct.pack(">I", len(data)) + kind + data + _crc(kind + data) for kind, data in chunks]
    return b"".join([b"\x89PNG\r\n\x1a\n", *sealed])


def _crc(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))
