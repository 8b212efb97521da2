"""Decodes image files to RGB as viewers show them, and rejects files that cannot be used, with the reason."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile, ImageOps

MAX_PIXELS = 64 * 2**20
MAX_SIDE = 16384

# All other formats of Pillow are rejected: an EPS file named .png would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# The exceptions that Pillow raises for damaged files (found by flipping bytes in every format).
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, RuntimeError, LookupError, struct.error, zlib.error)
# Pillow's switches are global: two threads that set and restore them at the same time would leave them wrong.
_SWITCHES = threading.Lock()


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Makes truncated files an error within the block, whatever other code in the process has set.

    Pillow's own size limit is off within the block: `decode` has a lower limit, which raises instead of warning.
    """
    with _SWITCHES:
        found = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = found


def open_image(path: Path) -> Image.Image:
    """The image as RGB in sRGB: rotated by its EXIF orientation, transparent parts on white, 16-bit grey scaled to 8.

    Of an animation the first frame. Raises ValueError naming the file and the reason if it is damaged, too large
    (over 64 megapixels or 16384 px on a side) or not an image; FileNotFoundError if it does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} does not exist: it was moved or deleted after the folder was read")
    try:
        with strict_pillow():
            return decode(path)
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from error


def decode(path: Path) -> Image.Image:
    """`open_image` within a `strict_pillow` of the caller, which covers many files and names the file in errors."""
    return decode_with_alpha(path)[0]


def decode_with_alpha(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """As `decode`, with the alpha channel (mode L) of an image that has transparency."""
    try:
        _verify(path)
        with Image.open(path, formats=_known_formats()) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright), _alpha(upright)
    except _DAMAGE as error:
        raise ValueError(f"cannot be used: {_reason(error)}") from error


def decode_mask(path: Path) -> tuple[Image.Image, bool]:
    """A mask (mode L) with its transparent parts black, and whether it has any. Raises ValueError as `decode` does."""
    image, alpha = decode_with_alpha(path)
    grey = image.convert("L")
    if alpha is None or alpha.getextrema()[0] == 255:
        return grey, False
    return ImageChops.multiply(grey, alpha), True


def open_mask(path: Path) -> Image.Image:
    """As `decode_mask`, outside a `strict_pillow`. Raises ValueError naming the file."""
    with strict_pillow():
        return decode_mask(path)[0]


def open_alpha(path: Path) -> Image.Image:
    """The alpha channel (mode L) of an image with transparency, rotated by its EXIF orientation."""
    with strict_pillow(), Image.open(path, formats=_known_formats()) as image:
        return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")


def _alpha(image: Image.Image) -> Image.Image | None:
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def _verify(path: Path) -> None:
    # verify() detects a truncated PNG, which load() accepts; load() detects half a JPEG, which verify() accepts.
    with Image.open(path, formats=_known_formats()) as image:
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ValueError(
                f"{width}x{height} is too large: scale it down to at most {MAX_PIXELS // 2**20} megapixels "
                f"and {MAX_SIDE} pixels on a side"
            )
        image.verify()


def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image in a supported format (PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        # The profile applies to the image, not to the white background.
        rgb = _to_srgb(rgba.convert("RGB"), profile)
        return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), rgba.getchannel("A"))
    return _to_srgb(image if image.mode == "CMYK" else image.convert("RGB"), profile)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey, which Pillow would clip at 255, to 8-bit RGB. Older versions of Pillow open it in mode I."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have 32 bits: save it with 8 or 16 bits per channel")
    eight_bits = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(eight_bits).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts RGB or CMYK to sRGB. An invalid profile, or one for another color mode, is ignored."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source) and image.mode == "RGB":
            return image
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")
    return converted if converted is not None else image.convert("RGB")
