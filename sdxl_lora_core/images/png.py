"""PNG files: their text chunks, and a fast writer."""

from __future__ import annotations

from collections.abc import Mapping

from PIL.PngImagePlugin import PngInfo

XMP = "XML:com.adobe.xmp"  # the keyword under which readers of PNG look for it
# IPTC's mark: https://cv.iptc.org/newscodes/digitalsourcetype/
AI_GENERATED = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"><Iptc4xmpExt:DigitalSourceType>'
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    '</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
LONGEST_TEXT = 1 << 20  # characters; longer texts are left out, so that every reader opens the image


def png_info(texts: Mapping[str, str]) -> PngInfo:
    """The texts as chunks of a PNG."""
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_itxt(keyword, text) if keyword == XMP else info.add_text(keyword, text)
    return info
