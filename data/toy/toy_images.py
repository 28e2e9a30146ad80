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
SIZE = 80  # pixels of a picture's side
LARGE = 3 * SIZE  # drawn three times as large, then averaged down: smooth edges


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
    (left, top), (right, bottom) = points + [[radius], [-radius]]
    outline = []
    for x, y, angle in ((left, top, 180), (right, top, 270), (right, bottom, 0), (left, bottom, 90)):
        outline.extend(ellipse([(x, y), (radius, radius), (angle, angle + 90)], 5 if radius else 0))
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


def paint(draw, strokes, colours, grow):
    """Draws strokes, in pixels, whose tone has a colour in `colours`, all of them `grow` pixels thicker."""
    for xy, tone, width in strokes:
        colour = colours.get(tone)
        if colour and width:  # a line with round joints and ends
            draw.line(xy, fill=colour, width=width + grow, joint="curve")
            for end in (xy[0], xy[-1]):
                draw.circle(end, (width + grow) / 2, fill=colour)
        elif colour:
            draw.polygon(xy, fill=colour)
            if grow:
                draw.line(xy + xy[:2], fill=colour, width=grow, joint="curve")


def rounded(colour):
    return tuple(int(value) for value in colour)


def background(rng, avoid):
    """A large picture of a pale tint that is not close to the colour `avoid`, plain, striped, dotted, shaded
    or with a floor; and the tint."""
    for _ in range(8):
        tint = rng.uniform(170, 245) + rng.uniform(-22, 22, 3)
        if np.abs(tint - avoid).max() > 45:
            break
    other = np.clip(tint * rng.uniform(0.86, 0.95), 0, 255)
    tint, other = rounded(np.clip(tint, 0, 255)), rounded(other)
    image = Image.new("RGB", (LARGE, LARGE), tint)
    draw = ImageDraw.Draw(image)
    kind, step = rng.integers(5), int(rng.integers(26, 48))
    width = step // 3
    if kind == 1:
        for x in range(0, 2 * LARGE, step):
            draw.line((x, 0, x - LARGE, LARGE), fill=other, width=width)
    elif kind == 2:
        for x in range(step // 2, LARGE, step):
            for y in range(step // 2, LARGE, step):
                draw.ellipse((x, y, x + width, y + width), fill=other)
    elif kind == 3:
        top = int(LARGE * rng.uniform(0.6, 0.85))
        draw.rectangle((0, top, LARGE, LARGE), fill=other)
    elif kind == 4:
        shade = Image.linear_gradient("L").resize((LARGE, LARGE))
        image = Image.composite(image, Image.new("RGB", image.size, other), shade)
    return image, tint


def tones_of(main):
    """A colour, RGB of 0 to 255 -> {tone: colour}, and the colour of the outline."""
    brightness = main @ (0.3, 0.59, 0.11) / 255
    dark, light, edge = main * 0.62, main + (255 - main) * 0.55, main * 0.35
    if brightness <= 0.25:  # the dark parts of a black thing are lighter
        dark, edge = main + (255 - main) * 0.3, main * 0.3
    if brightness >= 0.85:
        light = main - 26
    tones = {"main": rounded(main), "dark": rounded(dark), "light": rounded(light)}
    return FIXED | tones, rounded(edge)


def render(obj: str, colour: str, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of SIZE × SIZE pixels of the object `obj` in about the colour `colour`; the same state
    of `rng` gives the same picture."""
    main = np.array(ImageColor.getrgb(COLOURS[colour])) * rng.uniform(0.92, 1.06)
    main = np.clip(main + rng.uniform(-10, 10, 3), 0, 255)
    image, tint = background(rng, main)
    tones, edge = tones_of(main)

    unit = LARGE * rng.uniform(0.6, 0.84)  # the canvas' side in pixels
    angle = math.radians(rng.uniform(-14, 14))
    cos, sin = math.cos(angle), math.sin(angle)
    turn = unit * np.array([[cos, sin], [-sin, cos]])
    turn[0] *= rng.choice((-1, 1))  # mirrored or not
    centre = LARGE / 2 + rng.uniform(-0.5, 0.5, 2) * (LARGE - unit) * 0.7
    strokes = []
    for points, tone, width in SHAPES[obj]:
        placed = (points - 0.5) @ turn + centre
        width = max(1, round(width * unit)) if width else 0
        strokes.append(([*map(tuple, placed.tolist())], tone, width))
    draw = ImageDraw.Draw(image)
    paint(draw, strokes, dict.fromkeys(tones, edge), 4)  # the outline
    paint(draw, strokes, tones | {"back": tint}, 0)

    pixels = image.reduce(LARGE // SIZE) + rng.normal(0, 4, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
