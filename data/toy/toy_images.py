"""Draws the toy world's pins: 48 objects in 11 colours, as small pictures.

shapes.txt says of which strokes an object is made. `render` places it with random position, size, tilt and
mirroring on a tinted, sometimes patterned background, and adds a little noise.

    from toy_images import COLOURS, SHAPES, render
    render("chair", "red", numpy.random.default_rng(0)).save("chair.png")
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

COLOURS = {
    "red": "#d02026",
    "orange": "#f6821c",
    "yellow": "#fad628",
    "green": "#349642",
    "blue": "#265cd0",
    "purple": "#7c34a8",
    "pink": "#f88eba",
    "brown": "#7a4a28",
    "black": "#202024",
    "white": "#fafaf7",
    "grey": "#8a8c91",
}
# Parts that keep their own colour whatever the object's is.
FIXED = {
    "leaf": "#4a8646",
    "wood": "#86603e",
    "glass": "#c4deec",
    "flame": "#ffb028",
    "paper": "#f6f3e8",
    "metal": "#5c5e64",
}
SUPERSAMPLE = 3  # drawn three times as large, then averaged down: smooth edges


# ------------------------------------------------------------------------------------------------------------
# Shapes


def ellipse(points, steps):
    """steps + 1 points [n, 2] along an ellipse. points: its centre, its radii, and the angles in degrees
    between which it lies."""
    centre, radii, (first, last) = points
    angle = np.radians(np.linspace(first, last, steps + 1))
    return centre + radii * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def rectangle(points, radius):
    """The outline [n, 2] of a rectangle with round corners. points: top left, bottom right."""
    (left, top), (right, bottom) = points
    if not radius:
        return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    left, right = left + radius, right - radius
    top, bottom = top + radius, bottom - radius
    outline = []
    for x, y, angle in ((right, top, -90), (right, bottom, 0), (left, bottom, 90), (left, top, 180)):
        outline.extend(ellipse([(x, y), (radius, radius), (angle, angle + 90)], 5))
    return np.array(outline)


def outlines_of(kind, size, pairs):
    """A stroke as shapes.txt writes it -> (list of points [n, 2], width of the line, or 0)."""
    points = np.array([pair.split(",") for pair in pairs if "," in pair], float)
    if kind == "arc":
        return [ellipse(points, 20)], size
    if kind == "oval":
        return [ellipse(points, 28)], 0
    if kind == "box":
        return [rectangle(points, size)], 0
    if kind == "dots":
        centres = ellipse(points, int(pairs[-1]))
        return [ellipse([centre, (size, size), (0, 360)], 28) for centre in centres], 0
    return [points], size  # of a polygon 0


def read_shapes(path):
    """{object: its strokes, (points [n, 2], tone, width of the line, or 0 of a filled outline)}."""
    shapes, strokes = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            kind, tone, size, *pairs = line.split()
            outlines, width = outlines_of(kind, float(size), pairs)
            strokes += [(points, tone, width) for points in outlines]
        elif line and line[0] != "#":
            strokes = shapes[line] = []
    return shapes


SHAPES = read_shapes(Path(__file__).resolve().parent / "shapes.txt")


# ------------------------------------------------------------------------------------------------------------
# Pictures


def draw_line(draw, xy, width, colour):
    """A line with round joints and ends."""
    draw.line(xy, fill=colour, width=width, joint="curve")
    for x, y in (xy[0], xy[-1]):
        draw.circle((x, y), width / 2, fill=colour)


def paint(draw, strokes, tones, edge):
    """Draws strokes, in pixels: first all of them thickened in the colour `edge` (the outline), then in their
    own tones."""
    thick = 2 * max(1, round(draw.im.size[0] / 110))
    for xy, tone, width in strokes:
        if tone == "back":
            continue
        if width:
            draw_line(draw, xy, width + thick, edge)
        else:
            draw.polygon(xy, fill=edge)
            draw.line(xy + xy[:2], fill=edge, width=thick, joint="curve")
    for xy, tone, width in strokes:
        if width:
            draw_line(draw, xy, width, tones[tone])
        else:
            draw.polygon(xy, fill=tones[tone])


def rounded(colour):
    return tuple(int(value) for value in colour)


def background(rng, size, avoid):
    """A picture of a pale tint that is not close to the colour `avoid`, plain, striped, dotted, shaded or
    with a floor; and the tint."""
    for _ in range(8):
        tint = rng.uniform(170, 245) + rng.uniform(-22, 22, 3)
        if np.abs(tint - avoid).max() > 45:
            break
    other = rounded(np.clip(tint * rng.uniform(0.86, 0.95), 0, 255))
    tint = rounded(np.clip(tint, 0, 255))
    image = Image.new("RGB", (size, size), tint)
    draw = ImageDraw.Draw(image)
    kind = rng.integers(5)
    step = int(rng.integers(size // 9, size // 5))
    if kind == 1:
        for x in range(0, 2 * size, step):
            draw.line((x, 0, x - size, size), fill=other, width=step // 3)
    elif kind == 2:
        for x in range(step // 2, size, step):
            for y in range(step // 2, size, step):
                draw.ellipse((x, y, x + step // 3, y + step // 3), fill=other)
    elif kind == 3:
        draw.rectangle((0, int(size * rng.uniform(0.6, 0.85)), size, size), fill=other)
    elif kind == 4:
        shade = Image.linear_gradient("L").resize((size, size))
        image = Image.composite(image, Image.new("RGB", (size, size), other), shade)
    return image, tint


def tones_of(main):
    """A colour, RGB of 0 to 255 -> {tone: colour}, and the colour of the outline."""
    brightness = main @ (0.3, 0.59, 0.11) / 255
    is_dark, is_white = brightness <= 0.25, brightness >= 0.85
    dark = main + (255 - main) * 0.3 if is_dark else main * 0.62  # of a black thing it is lighter
    light = main - 26 if is_white else main + (255 - main) * 0.55
    tones = FIXED | {"main": rounded(main), "dark": rounded(dark), "light": rounded(light)}
    return tones, rounded(main * (0.3 if is_dark else 0.35))


def render(obj: str, colour: str, rng: np.random.Generator, size: int = 80) -> Image.Image:
    """An RGB picture of `size` × `size` pixels of the object `obj` in about the colour `colour`; the same
    state of `rng` gives the same picture."""
    main = np.array(ImageColor.getrgb(COLOURS[colour]))
    main = np.clip(main * rng.uniform(0.92, 1.06) + rng.uniform(-10, 10, 3), 0, 255)
    big = size * SUPERSAMPLE
    image, tint = background(rng, big, main)
    tones, edge = tones_of(main)

    unit = big * rng.uniform(0.6, 0.84)  # the canvas' side in pixels
    angle = math.radians(rng.uniform(-14, 14))
    cos, sin, mirrored = math.cos(angle), math.sin(angle), rng.choice((-1, 1))
    turn = unit * np.array([[mirrored * cos, mirrored * sin], [-sin, cos]])
    centre = big / 2 + rng.uniform(-0.5, 0.5, 2) * (big - unit) * 0.7
    strokes = []
    for points, tone, width in SHAPES[obj]:
        placed = (points - 0.5) @ turn + centre
        width = max(1, round(width * unit)) if width else 0
        strokes.append(([*map(tuple, placed.tolist())], tone, width))
    paint(ImageDraw.Draw(image), strokes, tones | {"back": tint}, edge)

    pixels = np.asarray(image.reduce(SUPERSAMPLE), float) + rng.normal(0, 4, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
