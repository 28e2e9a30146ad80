"""Draws the toy world's pins: 48 objects in 11 colours, as small pictures.

A shape is a chain of strokes of a `Pen` on a unit canvas (x to the right, y down, both 0..1). `render`
places it with random position, size, tilt and mirroring on a tinted, sometimes patterned background, and
adds a little noise.

    from toy_images import COLOURS, DRAW, render
    render("chair", "red", numpy.random.default_rng(0)).save("chair.png")
"""

import math

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (208, 32, 38),
    "orange": (246, 130, 28),
    "yellow": (250, 214, 40),
    "green": (52, 150, 66),
    "blue": (38, 92, 208),
    "purple": (124, 52, 168),
    "pink": (248, 142, 186),
    "brown": (122, 74, 40),
    "black": (32, 32, 36),
    "white": (250, 250, 247),
    "grey": (138, 140, 145),
}
# Parts that keep their own colour whatever the object's is: stems, trunks, glass, water, flames, paper,
# metal.
FIXED = {
    "leaf": (74, 134, 70),
    "wood": (134, 96, 62),
    "glass": (196, 222, 236),
    "flame": (255, 176, 40),
    "paper": (246, 243, 232),
    "metal": (92, 94, 100),
}
SUPERSAMPLE = 3  # drawn three times as large, then averaged down: smooth edges


class Pen:
    """Collects strokes on the unit canvas; every method returns the pen, so that a shape is one chain.

    A tone is "main" (the object's colour), "dark" or "light" (shades of it), "back" (the background) or a
    name in FIXED.
    """

    def __init__(self):
        self.strokes = []  # (points [n, 2], tone, line width or None for a filled polygon)

    def poly(self, *xy, tone="main"):
        """A filled polygon, its corners given as x, y, x, y, …"""
        self.strokes.append((np.array(xy, float).reshape(-1, 2), tone, None))
        return self

    def box(self, x0, y0, x1, y1, tone="main", r=0.0):
        """A filled rectangle with corner radius `r`."""
        if not r:
            return self.poly(x0, y0, x1, y0, x1, y1, x0, y1, tone=tone)
        corners = ((x1 - r, y0 + r, -90), (x1 - r, y1 - r, 0), (x0 + r, y1 - r, 90), (x0 + r, y0 + r, 180))
        return self.poly(
            *np.concatenate([_arc(x, y, r, r, a, a + 90, 5) for x, y, a in corners]).ravel(), tone=tone
        )

    def oval(self, x, y, rx, ry=None, tone="main", a=0, b=360):
        """A filled ellipse, or the part of it between the angles a and b (0 = right, 90 = down), closed by a
        chord."""
        return self.poly(*_arc(x, y, rx, ry or rx, a, b, 28).ravel(), tone=tone)

    def line(self, *xy, w=0.04, tone="main"):
        """A line of width `w` with round ends."""
        self.strokes.append((np.array(xy, float).reshape(-1, 2), tone, w))
        return self

    def arc(self, x, y, rx, ry=None, a=0, b=360, w=0.04, tone="main"):
        """A curved line along an ellipse from angle a to angle b."""
        return self.line(*_arc(x, y, rx, ry or rx, a, b, 20).ravel(), w=w, tone=tone)

    def each(self, values, stroke):
        """Calls `stroke(pen, value)` for every value: repeated parts."""
        for value in values:
            stroke(self, value)
        return self

    def paint(self, draw, place, unit, tones, edge):
        """Draws the strokes: first all of them thickened in the edge colour (the outline), then in their own
        tones."""
        e = edge[1]
        for points, tone, width in self.strokes:
            if tone != "back":
                xy = place(points)
                if width is None:
                    draw.polygon(xy, fill=edge[0])
                    draw.line(xy + xy[:2], fill=edge[0], width=2 * e, joint="curve")
                else:
                    _thick(draw, xy, max(1, round(width * unit)) + 2 * e, edge[0])
        for points, tone, width in self.strokes:
            if width is None:
                draw.polygon(place(points), fill=tones[tone])
            else:
                _thick(draw, place(points), max(1, round(width * unit)), tones[tone])


def _arc(x, y, rx, ry, a, b, n):
    """n + 1 points along an ellipse, from angle a to angle b in degrees."""
    t = np.radians(np.linspace(a, b, n + 1))
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=1)


def _thick(draw, xy, width, fill):
    """A line with round joints and ends."""
    draw.line(xy, fill=fill, width=width, joint="curve")
    for x, y in (xy[0], xy[-1]):
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=fill)


def _around(x, y, r, n):
    """n points evenly on a circle."""
    return _arc(x, y, r, r, 0, 360, n)[:-1]


def _frond(pen, degrees):
    """One leaf of the fern: a stem from the ground, leaning by `degrees`, with pairs of leaflets."""
    x, y = math.sin(math.radians(degrees)), -math.cos(math.radians(degrees))
    length = 0.96 - abs(degrees) / 180
    for s in np.linspace(0.25, 0.9, 6) * length:
        for side in (-0.13, 0.13):
            tip = 0.1 * x - side * y, 0.1 * y + side * x
            pen.line(
                0.5 + s * x,
                0.96 + s * y,
                0.5 + s * x + (1.2 - s) * tip[0],
                0.96 + s * y + (1.2 - s) * tip[1],
                w=0.055,
            )
    pen.line(0.5, 0.96, 0.5 + length * x, 0.96 + length * y, w=0.03, tone="dark")


# fmt: off
DRAW = {
    # furniture
    "chair": lambda p: p.line(.3, .5, .3, .95, w=.07).line(.68, .5, .68, .8, w=.06).box(.26, .03, .72, .52, r=.06)
        .box(.35, .12, .44, .5, "back").box(.53, .12, .62, .5, "back").poly(.26, .5, .72, .5, .86, .66, .34, .66, tone="dark")
        .line(.39, .68, .39, .97, w=.07).line(.82, .68, .82, .97, w=.07),
    "table": lambda p: p.poly(.16, .3, .84, .3, 1, .46, 0, .46).box(0, .46, 1, .53, "dark").box(.05, .53, .13, .92)
        .box(.87, .53, .95, .92).box(.24, .53, .3, .8, "dark").box(.7, .53, .76, .8, "dark"),
    "sofa": lambda p: p.box(.12, .24, .88, .7, r=.1).box(.0, .42, .2, .82, r=.08).box(.8, .42, 1, .82, r=.08)
        .box(.2, .58, .8, .82).line(.5, .28, .5, .8, w=.02, tone="dark").line(.2, .58, .8, .58, w=.03, tone="dark")
        .box(.08, .82, .15, .9, "wood").box(.85, .82, .92, .9, "wood"),
    "bed": lambda p: p.box(.0, .2, .09, .86, "dark", r=.03).box(.91, .44, 1, .86, "dark", r=.03).box(.09, .54, .91, .72)
        .box(.12, .42, .36, .55, "paper", r=.05).poly(.38, .44, .91, .5, .91, .72, .38, .72).box(.09, .7, .91, .77, "dark"),
    "lamp": lambda p: p.line(.5, .45, .5, .9, w=.05, tone="metal").oval(.5, .92, .22, .06, "dark")
        .poly(.36, .05, .64, .05, .84, .46, .16, .46).line(.18, .44, .82, .44, w=.03, tone="dark")
        .line(.66, .5, .66, .62, w=.02, tone="metal"),
    "shelf": lambda p: p.box(.14, .02, .86, .98).box(.21, .08, .79, .33, "back").box(.21, .39, .79, .63, "back")
        .box(.21, .69, .79, .92, "back").each((.25, .34, .43), lambda q, x: q.box(x, .14, x + .07, .33, "dark"))
        .each((.52, .61, .7), lambda q, x: q.box(x, .46, x + .07, .63, "light")).oval(.36, .84, .08, .08, "dark"),
    "mirror": lambda p: p.line(.5, .6, .2, .97, w=.06, tone="dark").line(.5, .6, .8, .97, w=.06, tone="dark")
        .oval(.5, .42, .34, .42).oval(.5, .42, .24, .32, "glass").line(.4, .5, .58, .22, w=.03, tone="paper")
        .line(.5, .56, .62, .38, w=.03, tone="paper"),
    "clock": lambda p: p.oval(.24, .16, .13, .12, "dark").oval(.76, .16, .13, .12, "dark").line(.28, .84, .18, .96, w=.07)
        .line(.72, .84, .82, .96, w=.07).oval(.5, .54, .4).oval(.5, .54, .28, .28, "paper")
        .line(.5, .34, .5, .54, .64, .62, w=.04, tone="metal"),
    # clothing
    "dress": lambda p: p.line(.38, .03, .38, .2, w=.05).line(.62, .03, .62, .2, w=.05)
        .poly(.3, .16, .5, .22, .7, .16, .63, .42, .92, .95, .08, .95, .37, .42).line(.38, .42, .62, .42, w=.05, tone="dark")
        .line(.42, .55, .3, .9, w=.02, tone="dark").line(.58, .55, .7, .9, w=.02, tone="dark"),
    "shirt": lambda p: p.poly(.36, .12, .64, .12, .98, .3, .86, .5, .74, .42, .74, .92, .26, .92, .26, .42, .14, .5, .02, .3)
        .oval(.5, .12, .13, .11, "back", 0, 180).arc(.5, .12, .15, .13, 5, 175, .03, "dark"),
    "boot": lambda p: p.poly(.28, .05, .62, .05, .6, .5, .82, .62, .95, .72, .95, .84, .3, .84)
        .box(.28, .84, .46, .95, "dark").box(.56, .84, .95, .9, "dark").box(.27, .05, .63, .15, "dark")
        .each((.28, .38, .48), lambda q, y: q.line(.44, y, .6, y + .03, w=.025, tone="light")),
    "hat": lambda p: p.oval(.5, .7, .5, .14).poly(.24, .7, .27, .28, .36, .2, .5, .26, .64, .2, .73, .28, .76, .7)
        .poly(.24, .56, .76, .56, .77, .7, .23, .7, tone="dark"),
    "bag": lambda p: p.arc(.5, .4, .22, .32, 180, 360, .06).poly(.12, .36, .88, .36, .98, .92, .02, .92)
        .poly(.1, .36, .9, .36, .74, .6, .26, .6, tone="dark").oval(.5, .59, .06, .06, "flame"),
    "scarf": lambda p: p.poly(.28, .3, .48, .36, .4, .84, .16, .8).poly(.52, .34, .72, .3, .8, .94, .56, .97)
        .arc(.5, .22, .3, .14, 0, 360, .15).each((.5, .62, .74), lambda q, y: q.line(.58, y + .06, .72, y + .05, w=.05, tone="light"))
        .each((.45, .58), lambda q, y: q.line(.26, y, .4, y + .04, w=.05, tone="light"))
        .each((.18, .26, .34), lambda q, x: q.line(x, .82, x - .02, .92, w=.03)),
    "jacket": lambda p: p.poly(.34, .08, .66, .08, .84, .16, 1, .8, .84, .84, .76, .42, .76, .94, .24, .94, .24, .42, .16, .84, 0, .8, .16, .16)
        .poly(.38, .08, .62, .08, .5, .46, tone="paper").poly(.34, .08, .4, .05, .5, .46, .3, .34, tone="dark")
        .poly(.66, .08, .6, .05, .5, .46, .7, .34, tone="dark").line(.5, .46, .5, .93, w=.025, tone="dark")
        .each((.3, .58), lambda q, x: q.line(x, .7, x + .12, .7, w=.03, tone="dark")),
    "skirt": lambda p: p.poly(.3, .2, .7, .2, .98, .82, .8, .88, .62, .82, .5, .88, .38, .82, .2, .88, .02, .82)
        .box(.29, .12, .71, .24, "dark").each((.38, .5, .62), lambda q, x: q.line(x, .28, 3 * x - 1, .78, w=.02, tone="dark")),
    # food
    "cake": lambda p: p.oval(.5, .86, .5, .08, "paper").box(.1, .54, .9, .86).box(.24, .26, .76, .54)
        .each((.18, .34, .5, .66, .82), lambda q, x: q.oval(x, .56, .08, .09, "light"))
        .each((.32, .5, .68), lambda q, x: q.oval(x, .28, .09, .09, "light")).oval(.5, .16, .07, .07, "dark")
        .line(.12, .76, .88, .76, w=.03, tone="dark"),
    "cup": lambda p: p.arc(.76, .52, .16, .15, -90, 110, .07).oval(.46, .88, .42, .07, "dark")
        .poly(.14, .36, .8, .36, .72, .76, .6, .86, .34, .86, .22, .76).oval(.47, .36, .33, .06, "dark")
        .each((.36, .56), lambda q, x: q.line(x, .26, x + .05, .19, x - .02, .12, x + .03, .05, w=.03, tone="paper")),
    "bowl": lambda p: p.box(.34, .78, .66, .88, "dark").oval(.5, .36, .48, .48, "main", 0, 180)
        .line(.1, .46, .2, .56, .3, .46, .4, .56, .5, .46, .6, .56, .7, .46, .8, .56, .9, .46, w=.04, tone="light")
        .box(.0, .3, 1, .38, "dark", r=.03),
    "teapot": lambda p: p.arc(.2, .56, .17, .2, 70, 290, .06).poly(.7, .58, .88, .3, 1, .3, .8, .76).oval(.5, .6, .32, .3)
        .oval(.5, .34, .2, .06, "dark").oval(.5, .22, .06, .06).box(.34, .88, .66, .94, "dark"),
    "pizza": lambda p: p.poly(.08, .22, .92, .22, .5, .98).line(.08, .2, .3, .12, .5, .1, .7, .12, .92, .2, w=.13, tone="wood")
        .oval(.36, .38, .08, .08, "dark").oval(.63, .42, .08, .08, "dark").oval(.5, .66, .07, .07, "dark")
        .oval(.5, .3, .04, .04, "light").oval(.46, .52, .04, .04, "light"),
    "salad": lambda p: p.oval(.26, .38, .17, .14, "leaf").oval(.74, .38, .17, .14, "leaf").oval(.5, .26, .16, .18, "leaf")
        .oval(.37, .3, .09, .09, "light").oval(.62, .4, .1, .1, "light").line(.72, .42, .96, .06, w=.05, tone="wood")
        .oval(.5, .46, .46, .44, "main", 0, 180).line(.07, .48, .93, .48, w=.05, tone="dark"),
    "bread": lambda p: p.oval(.5, .74, .5, .12, "wood").box(.06, .34, .94, .76, r=.2).line(.2, .69, .8, .69, w=.04, tone="dark")
        .each((.22, .42, .62), lambda q, x: q.poly(x, .58, x + .06, .58, x + .2, .4, x + .12, .38, tone="light")),
    "soup": lambda p: p.line(.76, .46, .98, .1, w=.06, tone="metal").oval(.5, .5, .48, .42, "main", 0, 180)
        .oval(.5, .5, .48, .16, "dark").oval(.5, .51, .39, .11, "light").oval(.4, .5, .06, .03, "leaf").oval(.58, .54, .05, .025, "leaf")
        .each((.3, .5), lambda q, x: q.line(x, .28, x + .05, .2, x - .02, .13, x + .03, .05, w=.03, tone="paper")),
    # garden
    "rose": lambda p: p.line(.5, .5, .5, .98, w=.045, tone="leaf").oval(.66, .74, .14, .06, "leaf").oval(.34, .84, .14, .06, "leaf")
        .each(_around(.5, .3, .15, 5), lambda q, c: q.oval(c[0], c[1], .15)).oval(.5, .3, .2)
        .arc(.5, .3, .16, .16, 20, 250, .03, "dark").arc(.5, .3, .09, .09, 200, 430, .03, "dark").oval(.5, .3, .03, .03, "dark"),
    "tree": lambda p: p.poly(.43, .6, .57, .6, .62, .97, .38, .97, tone="wood").oval(.28, .46, .24).oval(.72, .46, .24)
        .oval(.5, .28, .27).oval(.5, .52, .24).arc(.5, .3, .16, .14, 190, 290, .03, "light").arc(.28, .48, .14, .13, 60, 150, .03, "dark")
        .arc(.72, .48, .14, .13, 30, 120, .03, "dark"),
    "cactus": lambda p: p.line(.5, .14, .5, .9, w=.22).line(.5, .66, .18, .66, .18, .42, w=.13).line(.5, .54, .82, .54, .82, .28, w=.13)
        .line(.46, .14, .46, .84, w=.02, tone="dark").line(.55, .14, .55, .84, w=.02, tone="dark").oval(.5, .93, .42, .06, "wood"),
    "tulip": lambda p: p.line(.5, .5, .5, .98, w=.05, tone="leaf").poly(.5, .96, .2, .84, .12, .58, .34, .72, tone="leaf")
        .poly(.5, .96, .8, .84, .88, .58, .66, .72, tone="leaf").poly(.24, .08, .38, .24, .5, .04, .62, .24, .76, .08, .78, .36, .64, .54, .36, .54, .22, .36)
        .line(.38, .26, .42, .48, w=.025, tone="dark").line(.62, .26, .58, .48, w=.025, tone="dark"),
    "pot": lambda p: p.line(.5, .3, .5, .14, w=.03, tone="leaf").oval(.4, .13, .1, .05, "leaf").oval(.6, .1, .1, .05, "leaf")
        .poly(.16, .44, .84, .44, .7, .96, .3, .96).box(.08, .28, .92, .46, "main", r=.03).line(.18, .48, .82, .48, w=.04, tone="dark"),
    "fern": lambda p: p.each((-62, -31, 0, 31, 62), _frond),
    "bench": lambda p: p.each((.22, .36, .5), lambda q, y: q.box(.02, y, .98, y + .08)).box(.12, .18, .18, .66, "metal").box(.82, .18, .88, .66, "metal")
        .poly(.06, .64, .94, .64, 1, .74, 0, .74, tone="dark").box(.08, .74, .16, .94, "metal").box(.84, .74, .92, .94, "metal"),
    "fountain": lambda p: p.arc(.36, .2, .14, .16, 180, 360, .035, "glass").arc(.64, .2, .14, .16, 180, 360, .035, "glass")
        .line(.22, .2, .2, .36, w=.035, tone="glass").line(.78, .2, .8, .36, w=.035, tone="glass").line(.5, .12, .5, .74, w=.09)
        .oval(.5, .4, .34, .16, "main", 0, 180).line(.24, .48, .16, .7, w=.035, tone="glass").line(.76, .48, .84, .7, w=.035, tone="glass")
        .poly(0, .7, 1, .7, .86, .95, .14, .95).line(.02, .71, .98, .71, w=.06, tone="dark"),
    # celebration
    "candle": lambda p: p.arc(.84, .84, .1, .08, 0, 360, .045, "dark").oval(.5, .88, .36, .09, "dark").box(.38, .34, .62, .88, r=.02)
        .poly(.38, .34, .62, .34, .62, .44, .56, .54, .5, .44, .44, .48, .38, .42, tone="light").line(.5, .26, .5, .34, w=.03, tone="metal")
        .poly(.5, .02, .6, .18, .5, .28, .4, .18, tone="flame"),
    "wreath": lambda p: p.arc(.5, .46, .33, .33, w=.12).each(_around(.5, .46, .4, 13), lambda q, c: q.oval(c[0], c[1], .075))
        .each(_around(.5, .46, .27, 9), lambda q, c: q.oval(c[0], c[1], .06)).each(_around(.5, .46, .34, 7), lambda q, c: q.oval(c[0], c[1], .035, .035, "light"))
        .poly(.5, .84, .28, .72, .28, .98, tone="dark").poly(.5, .84, .72, .72, .72, .98, tone="dark"),
    "balloon": lambda p: p.line(.5, .7, .46, .78, .54, .88, .5, .98, w=.025, tone="metal").poly(.5, .64, .58, .74, .42, .74).oval(.5, .36, .29, .34)
        .arc(.5, .36, .18, .22, 190, 260, .045, "light"),
    "card": lambda p: p.poly(.5, .08, .96, .2, .96, .92, .5, .82, tone="paper").poly(.5, .08, .04, .16, .04, .9, .5, .82)
        .oval(.22, .44, .075, .075, "paper").oval(.34, .43, .075, .075, "paper").poly(.15, .47, .41, .46, .28, .66, tone="paper")
        .each((.38, .5, .62), lambda q, y: q.line(.6, y - .02, .86, y + .03, w=.025)),
    "garland": lambda p: p.each(((.06, .24), (.28, .37), (.5, .42), (.72, .37), (.94, .24)), lambda q, c:
        q.poly(c[0] - .11, c[1], c[0] + .11, c[1], c[0], c[1] + .32)).each(((.28, .37), (.72, .37)), lambda q, c:
        q.poly(c[0] - .11, c[1], c[0] + .11, c[1], c[0], c[1] + .32, tone="dark")).line(-.05, .17, .06, .24, .28, .37, .5, .42, .72, .37, .94, .24, 1.05, .17, w=.035, tone="metal"),
    "kite": lambda p: p.line(.5, .66, .42, .76, .56, .84, .46, .96, w=.025, tone="metal").poly(.5, .02, .82, .28, .5, .7, .18, .28)
        .poly(.5, .02, .82, .28, .5, .28, tone="light").poly(.5, .28, .18, .28, .5, .7, tone="dark")
        .each(((.42, .76), (.56, .85)), lambda q, c: q.poly(c[0] - .1, c[1] - .05, c[0] + .1, c[1] + .05, c[0] + .1, c[1] - .05, c[0] - .1, c[1] + .05)),
    "quilt": lambda p: p.box(.04, .04, .96, .96, "dark", r=.04).each([(i, j) for i in range(3) for j in range(3)], lambda q, c:
        q.box(.1 + .27 * c[0], .1 + .27 * c[1], .36 + .27 * c[0], .36 + .27 * c[1], "light" if sum(c) % 2 else "main"))
        .each([(.23 + .27 * i, .23 + .27 * j) for i in range(3) for j in range(3) if (i + j) % 2 == 0], lambda q, c:
        q.poly(c[0], c[1] - .08, c[0] + .08, c[1], c[0], c[1] + .08, c[0] - .08, c[1], tone="dark")),
    "necklace": lambda p: p.arc(.5, .1, .4, .6, -10, 190, .025, "metal").each(_arc(.5, .1, .4, .6, 10, 170, 12), lambda q, c: q.oval(c[0], c[1], .055))
        .poly(.5, .7, .62, .84, .5, .99, .38, .84, tone="dark"),
    # leisure
    "ball": lambda p: p.oval(.5, .5, .44).oval(.5, .5, .18, .44, "light").oval(.5, .5, .06, .06, "dark").arc(.5, .5, .18, .44, 0, 360, .025, "dark")
        .line(.06, .5, .94, .5, w=.025, tone="dark"),
    "guitar": lambda p: p.line(.5, .06, .5, .5, w=.07, tone="wood").box(.42, .0, .58, .12, "dark").oval(.5, .52, .2, .16).oval(.5, .78, .28, .21)
        .oval(.5, .62, .15, .12).oval(.5, .62, .08, .08, "metal").line(.4, .86, .6, .86, w=.04, tone="dark"),
    "bicycle": lambda p: p.arc(.21, .68, .2, .2, w=.045, tone="metal").arc(.79, .68, .2, .2, w=.045, tone="metal")
        .line(.21, .68, .36, .38, .68, .36, .48, .68, .21, .68, w=.06).line(.48, .68, .32, .28, w=.06).line(.79, .68, .66, .22, .78, .2, w=.06)
        .line(.24, .27, .4, .27, w=.07, tone="dark"),
    "boat": lambda p: p.line(.48, .06, .48, .7, w=.04, tone="wood").poly(.54, .06, .9, .6, .54, .6, tone="paper").poly(.42, .14, .42, .6, .14, .6, tone="light")
        .poly(.02, .68, .98, .68, .82, .92, .2, .92).line(.08, .74, .92, .74, w=.03, tone="dark"),
    "drum": lambda p: p.box(.1, .4, .9, .82).oval(.5, .82, .4, .13).oval(.5, .4, .4, .14, "paper").arc(.5, .4, .4, .14, 0, 360, .04, "dark")
        .line(.12, .5, .26, .86, .4, .56, .5, .92, .6, .56, .74, .86, .88, .5, w=.03, tone="light")
        .line(.1, .06, .46, .36, w=.05, tone="wood").line(.9, .06, .56, .36, w=.05, tone="wood"),
    "skateboard": lambda p: p.oval(.26, .7, .1, .1, "metal").oval(.74, .7, .1, .1, "metal").line(.04, .38, .16, .52, .84, .52, .96, .38, w=.12)
        .line(.14, .56, .86, .56, w=.03, tone="dark").oval(.26, .7, .04, .04, "paper").oval(.74, .7, .04, .04, "paper"),
    "book": lambda p: p.poly(.1, .8, .76, .98, .98, .84, .94, .72, .76, .88, .12, .7, tone="paper").poly(.3, .04, .96, .18, .76, .88, .1, .72)
        .poly(.3, .04, .38, .057, .18, .74, .1, .72, tone="dark").line(.1, .72, .1, .82, .76, .98, w=.04, tone="dark")
        .line(.5, .24, .78, .3, w=.05, tone="paper").line(.46, .37, .66, .41, w=.04, tone="paper"),
    "umbrella": lambda p: p.line(.5, .5, .5, .88, w=.045, tone="metal").arc(.41, .88, .09, .09, 0, 180, .045, "metal").line(.5, .04, .5, .12, w=.04, tone="metal")
        .oval(.5, .54, .48, .46, "main", 180, 360).each((.1, .34, .58, .82), lambda q, x: q.oval(x + .04, .55, .12, .07, "back", 180, 360))
        .line(.5, .1, .28, .3, .26, .48, w=.02, tone="dark").line(.5, .1, .72, .3, .74, .48, w=.02, tone="dark"),
}
# fmt: on


def _background(rng, size, avoid):
    """A pale tint that is not close to the colour `avoid`, and a picture of it: plain, striped, dotted,
    shaded or with a floor."""
    for _ in range(8):
        tint = rng.uniform(170, 245) + rng.uniform(-22, 22, 3)
        if np.abs(tint - avoid).max() > 45:
            break
    tint, other = (tuple(int(v) for v in np.clip(t, 0, 255)) for t in (tint, tint * rng.uniform(0.86, 0.95)))
    image = Image.new("RGB", (size, size), tint)
    draw, kind, step = ImageDraw.Draw(image), rng.integers(5), int(rng.integers(size // 9, size // 5))
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
        image = Image.composite(
            image, Image.new("RGB", (size, size), other), Image.linear_gradient("L").resize((size, size))
        )
    return image, tint


def render(obj: str, colour: str, rng: np.random.Generator, size: int = 80) -> Image.Image:
    """An RGB picture of `size` × `size` pixels of the object `obj` in about the colour `colour`; the same
    state of `rng` gives the same picture."""
    main = np.clip(
        np.array(COLOURS[colour], float) * rng.uniform(0.92, 1.06) + rng.uniform(-10, 10, 3), 0, 255
    )
    big = size * SUPERSAMPLE
    image, back = _background(rng, big, main)
    light = main @ (0.3, 0.59, 0.11) / 255
    dark = (
        main * 0.62 if light > 0.25 else main + (255 - main) * 0.3
    )  # the "dark" detail of a black thing is lighter
    tones = {
        "main": main,
        "dark": dark,
        "light": main + (255 - main) * (0.55 if light < 0.85 else 0) - (26 if light >= 0.85 else 0),
        **FIXED,
    }
    tones = {name: tuple(int(v) for v in value) for name, value in tones.items()} | {"back": back}

    unit = big * rng.uniform(0.6, 0.84)  # the unit canvas' side in pixels
    angle, flip = math.radians(rng.uniform(-14, 14)), rng.choice((-1, 1))
    turn = (
        unit
        * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        * [[flip], [1]]
    )
    centre = big / 2 + rng.uniform(-0.5, 0.5, 2) * (big - unit) * 0.7
    edge = tuple(int(v) for v in (main * 0.35 if light > 0.25 else main * 0.3)), max(1, round(big / 110))
    pen = Pen()
    DRAW[obj](pen)
    pen.paint(
        ImageDraw.Draw(image),
        lambda xy: [tuple(v) for v in ((xy - 0.5) @ turn + centre).tolist()],
        unit,
        tones,
        edge,
    )

    pixels = np.asarray(image.reduce(SUPERSAMPLE), float) + rng.normal(0, 4, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
