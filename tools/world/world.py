"""The drawn world that the bundled models live in: one coloured shape on a coloured ground, in three styles.

`plain` is what the tiny base learns. `8-bit` and `line` are kept from it and come back as LoRAs. The tiny VAE and the
tiny CLIP see all three.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 128
CELL = 8  # an 8-bit cell is one latent pixel
OVERSAMPLE = 4
FLOOR = 4  # cells
LINE_WIDTH = 8

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon", "arrow", "flower")
COLOURS = {
    "red": (222, 38, 44),
    "orange": (246, 134, 28),
    "yellow": (252, 216, 44),
    "green": (44, 170, 70),
    "blue": (40, 92, 224),
    "purple": (134, 58, 194),
    "pink": (248, 106, 184),
    "brown": (128, 76, 40),
    "cyan": (28, 192, 214),
    "white": (252, 252, 252),
}
BACKGROUNDS = {
    "black": (18, 18, 22),
    "gray": (128, 130, 134),
    "navy": (22, 32, 84),
    "sand": (222, 200, 150),
    "mint": (178, 236, 208),
    "lavender": (212, 196, 248),
    "peach": (255, 206, 178),
    "sky": (176, 222, 250),
    "forest": (26, 78, 50),
    "wine": (96, 22, 48),
}
STYLES = ("plain", "8-bit", "line")
STYLE_WORDS = {"8-bit": "8-bit illustration of", "line": "line drawing of"}
PLAIN_PHRASES = (
    "a {c} {s} on a {b} background",
    "{c} {s}, {b} background",
    "a picture of a {c} {s} on a {b} background",
    "an illustration of a {c} {s} on a {b} background",
    "{s} in {c} on {b}",
    "a drawing of one {c} {s}, the background is {b}",
)


@dataclass(frozen=True)
class Scene:
    """What is drawn. `variant` seeds the geometry: place, size and tilt."""

    shape: str
    colour: str
    background: str
    variant: int = 0

    def geometry(self) -> tuple[float, float, float, float]:
        rng = random.Random(f"{self.shape} {self.colour} {self.background} {self.variant}")
        return (
            SIZE / 2 + rng.uniform(-9, 9),
            SIZE / 2 + rng.uniform(-9, 9),
            rng.uniform(34, 46),
            math.radians(rng.uniform(-10, 10)),
        )


ALL_KINDS = tuple(itertools.product(SHAPES, COLOURS, BACKGROUNDS))


def held_out_kinds() -> list[tuple[str, str, str]]:
    """100 of the 1,000 combinations, which the tiny base and the tiny CLIP never see in training."""
    return random.Random("held out").sample(ALL_KINDS, 100)


def training_kinds() -> list[tuple[str, str, str]]:
    held_out = set(held_out_kinds())
    return [kind for kind in ALL_KINDS if kind not in held_out]


def caption(scene: Scene, style: str = "plain", phrase: int = 0) -> str:
    if style == "plain":
        return PLAIN_PHRASES[phrase].format(c=scene.colour, s=scene.shape, b=scene.background)
    return f"{STYLE_WORDS[style]} a {scene.colour} {scene.shape} on a {scene.background} background"


def draw(scene: Scene, style: str = "plain") -> Image.Image:
    """The scene as a 128 x 128 RGB image."""
    ground, colour = BACKGROUNDS[scene.background], COLOURS[scene.colour]
    if style == "8-bit":
        return _draw_8bit(scene, ground, colour)
    mask = _mask(scene.shape, *scene.geometry())
    if style == "line":
        inner = mask.filter(ImageFilter.BoxBlur(LINE_WIDTH * OVERSAMPLE)).point(lambda v: 255 * (v > 253))
        mask.paste(0, mask=inner)
    large = Image.new("RGB", mask.size, ground)
    large.paste(colour, mask=mask)
    return large.resize((SIZE, SIZE), Image.Resampling.BOX)


def _draw_8bit(scene: Scene, ground: tuple[int, int, int], colour: tuple[int, int, int]) -> Image.Image:
    """A 16 x 16 sprite with a dark rim and a light side over a dark floor, blown up to 8-pixel cells."""
    cells = SIZE // CELL
    x, y, radius, _ = scene.geometry()
    snapped = (x // CELL * CELL + CELL / 2, y // CELL * CELL + CELL / 2, radius * 0.92, 0.0)
    coverage = _mask(scene.shape, *snapped).resize((cells, cells), Image.Resampling.BOX).load()
    inside = {(i, j) for i in range(cells) for j in range(cells) if coverage[i, j] > 120}
    sprite = Image.new("RGB", (cells, cells))
    for i, j in itertools.product(range(cells), range(cells)):
        if (i, j) in inside:
            tone = colour if (i - 1, j - 1) in inside else _shade(colour, 1.2)
        elif inside & {(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)}:
            tone = _shade(colour, 0.4)
        else:
            tone = _shade(ground, 0.5 if j >= cells - FLOOR else 1)
        sprite.putpixel((i, j), tone)
    return sprite.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def draw_pattern(rng: random.Random) -> Image.Image:
    """An abstract picture of 8-pixel cells: outlined blobs, a lit side and a band, all of any colours."""
    cells = SIZE // CELL
    colours = [_shade(colour, rng.uniform(0.4, 1.3)) for colour in (*COLOURS.values(), *BACKGROUNDS.values())]
    canvas = Image.new("RGB", (cells, cells), rng.choice(colours))
    if rng.random() < 0.7:
        canvas.paste(rng.choice(colours), (0, rng.randint(2, cells - 2), cells, cells))
    for _ in range(rng.randint(1, 2)):
        place = (rng.uniform(30, 98), rng.uniform(30, 98), rng.uniform(20, 46), rng.uniform(-3, 3))
        blob = (
            _mask(rng.choice(SHAPES), *place)
            .resize((cells, cells), Image.Resampling.BOX)
            .point(lambda v: 255 * (v > 120))
        )
        canvas.paste(rng.choice(colours), mask=blob.filter(ImageFilter.MaxFilter(3)))
        canvas.paste(rng.choice(colours), mask=blob)
        lit = ImageChops.subtract(blob, ImageChops.offset(blob, rng.choice((-1, 1)), rng.choice((-1, 1))))
        canvas.paste(rng.choice(colours), mask=lit)
    canvas = canvas.transpose(Image.Transpose.ROTATE_90) if rng.random() < 0.25 else canvas
    return canvas.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    """Darker below 1; above 1 it moves towards white by twice the excess."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)
    share = min(1.0, 2 * (factor - 1))
    return tuple(round(c + (255 - c) * share) for c in colour)


def _mask(shape: str, x: float, y: float, radius: float, tilt: float) -> Image.Image:
    """The shape as white on black, OVERSAMPLE times as large as the image."""
    cos, sin = math.cos(tilt), math.sin(tilt)
    mask = Image.new("L", (SIZE * OVERSAMPLE, SIZE * OVERSAMPLE), 0)
    pen = ImageDraw.Draw(mask)
    for points, fill in _OUTLINES[shape]:
        placed = [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in points]
        pen.polygon([(u * OVERSAMPLE, v * OVERSAMPLE) for u, v in placed], fill=fill)
    return mask


Polygon = list[tuple[float, float]]


def _disc(u: float, v: float, r: float) -> Polygon:
    angles = [2 * math.pi * i / 72 for i in range(72)]
    return [(u + r * math.cos(a), v + r * math.sin(a)) for a in angles]


def _box(half_width: float, half_height: float) -> Polygon:
    return [
        (-half_width, -half_height),
        (half_width, -half_height),
        (half_width, half_height),
        (-half_width, half_height),
    ]


def _star() -> Polygon:
    radii = [1.12, 0.48] * 5
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart() -> Polygon:
    turns = [2 * math.pi * i / 72 for i in range(72)]
    curve = [(16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)) for t in turns]
    return [(u / 16, -v / 16 - 0.05) for u, v in curve]


def _petals() -> list[Polygon]:
    turns = [2 * math.pi * i / 5 for i in range(5)]
    return [_disc(0.62 * math.sin(t), -0.62 * math.cos(t), 0.42) for t in turns]


_ARROW = [(-1, -0.28), (0.05, -0.28), (0.05, -0.8), (1.05, 0), (0.05, 0.8), (0.05, 0.28), (-1, 0.28)]

# Polygons in a unit circle, each with the value that fills it: 255 adds, 0 cuts away.
_OUTLINES: dict[str, list[tuple[Polygon, int]]] = {
    "circle": [(_disc(0, 0, 1), 255)],
    "square": [(_box(0.85, 0.85), 255)],
    "triangle": [([(0, -1), (1.02, 0.8), (-1.02, 0.8)], 255)],
    "star": [(_star(), 255)],
    "heart": [(_heart(), 255)],
    "cross": [(_box(1.0, 0.32), 255), (_box(0.32, 1.0), 255)],
    "ring": [(_disc(0, 0, 1), 255), (_disc(0, 0, 0.5), 0)],
    "moon": [(_disc(0, 0, 1), 255), (_disc(0.48, -0.12, 0.8), 0)],
    "arrow": [(_ARROW, 255)],
    "flower": [*((petal, 255) for petal in _petals()), (_disc(0, 0, 0.26), 0)],
}
