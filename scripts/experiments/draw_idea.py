#!/usr/bin/env python3
"""Draw the README's picture of the idea, scripts/experiments/pictures/idea.svg.

    python scripts/experiments/draw_idea.py

The curve on the right is computed: one anchor among 5,000 random unit vectors, visited 60 times with different batches.
"""

import math
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "pictures" / "idea.svg"
SIMCLR, SOGCLR, GRAY, PULL = "#c85028", "#285ab4", "#999", "#2a9d4a"
HEADING = 28        # its distance from the top
IMAGES, DIM, TAU, BATCH, GAMMA, VISITS = 5000, 16, 0.1, 16, 0.2, 60


def simulate():
    """log g of all images, and of each visit's batch [VISITS], and log u after each visit [VISITS], by the paper's
    formulas for a fixed anchor.
    """
    rng = np.random.default_rng(3)
    z = rng.normal(size=(IMAGES, DIM))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    scores = np.exp(z[1:] @ z[0] / TAU)
    g = np.array([rng.choice(scores, 2 * (BATCH - 1), replace=False).mean() for _ in range(VISITS)])
    u = [g[0]]
    for value in g[1:]:
        u.append((1 - GAMMA) * u[-1] + GAMMA * value)
    return math.log(scores.mean()), np.log(g), np.log(u)


def text(x, y, content, size=14, fill="#222", anchor="middle", style=""):
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" {style}>{content}</text>'


def line(x1, y1, x2, y2, stroke, width=1.5, more=""):
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{width}" {more}/>'


def dot(x, y, radius, fill):
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"/>'


def sub(letter, index, power=""):
    """A letter with its subscript and, if any, its superscript above that."""
    above = f'<tspan dy="-8" font-size="70%">{power}</tspan><tspan dx="-7" dy="8" font-size="1">&#8203;</tspan>'
    below = f'<tspan dy="5" font-size="70%">{index}</tspan><tspan dy="-5" font-size="1">&#8203;</tspan>'
    return f'<tspan font-style="italic">{letter}</tspan>' + above * bool(power) + below


def sphere(x, y, radius):
    """The projections of a batch on the unit sphere: the two views of image i attract each other, the others repel."""
    def place(degrees):
        return x + radius * math.cos(math.radians(degrees)), y - radius * math.sin(math.radians(degrees))

    a, b, others = place(72), place(18), [place(angle) for angle in (118, 140, 172, 205, 230, 262, 300, 322)]
    parts = [f'<circle cx="{x}" cy="{y}" r="{radius}" fill="none" stroke="#ccc"/>']
    parts += [line(*a, *other, SIMCLR, width, 'opacity="0.75"')
              for other, width in zip(others, (4.5, 3.2, 2.2, 1.5, 1.1, 0.8, 0.8, 1), strict=True)]
    parts += [line(*a, *b, PULL, 4), *(dot(*other, 6, GRAY) for other in others),
              dot(*a, 7, SOGCLR), dot(*b, 7, SOGCLR),
              text(a[0] + 8, a[1] - 12, sub("z", "i", "a")), text(b[0] + 20, b[1] - 4, sub("z", "i", "b")),
              text(x, HEADING, "a batch: two views of each image", 15),
              text(x, y + radius + 30, "image i's views attract; each view of another image"),
              text(x, y + radius + 48, f"repels with weight exp({sub('s', 'ij')}/τ) / {sub('U', 'i')}")]
    return parts


def memory(x, y, cell=24, count=11, chosen=4):
    """The moving averages: one number per image of the data set."""
    left = x - count * cell / 2
    parts = [text(x, HEADING, "the whole data set: a number for each image", 15)]
    for k in range(count):
        fill = SOGCLR if k == chosen else "#e3eaf6"
        parts.append(f'<rect x="{left + k * cell}" y="{y - 14}" width="{cell - 3}" height="28" fill="{fill}" rx="3"/>')
    middle = left + (chosen + 0.5) * cell - 1.5
    parts += [text(middle, y - 24, sub("u", "i"), 16), text(left + count * cell + 10, y + 5, "…"),
              text(left, y + 34, "1", 12, GRAY), text(left + count * cell, y + 34, "N", 12, GRAY),
              text(x, y + 68, f"{sub('U', 'i')} = (1 &#8722; &#947;) {sub('u', 'i')} + &#947; {sub('g', 'i')}", 17),
              text(x, y + 96, f"{sub('g', 'i')}: mean score of the batch's negatives"),
              text(x, y + 116, f"{sub('u', 'i')} ← {sub('U', 'i')}, kept until image i's next visit")]
    return parts


def curve(left, top, width, height):
    """The denominators of SimCLR and SogCLR over the visits of one image."""
    true, batches, averages = simulate()
    low, high = min(batches.min(), true) - 0.1, max(batches.max(), true) + 0.1

    def place(visit, value):
        return left + width * visit / (VISITS - 1), top + height * (high - value) / (high - low)

    path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in enumerate(averages))
    parts = [line(left, top + height, left + width, top + height, "#222"), line(left, top, left, top + height, "#222"),
             line(*place(0, true), *place(VISITS - 1, true), "#222", 1.2, 'stroke-dasharray="6 4"')]
    parts += [dot(*place(*point), 2.6, SIMCLR) for point in enumerate(batches)]
    parts += [f'<polyline points="{path}" fill="none" stroke="{SOGCLR}" stroke-width="2.5"/>',
              text(left + width / 2, HEADING, "what image i's negatives are divided by", 15),
              text(left + width / 2, top + height + 20, f"visits of image i (batch {BATCH}, &#947; = {GAMMA})", 13),
              text(left + width / 2, top + height + 48,
                   f'<tspan fill="{SIMCLR}">SimCLR: {sub("g", "i")} of one batch</tspan>'
                   f'<tspan dx="16" fill="{SOGCLR}">SogCLR: {sub("U", "i")}</tspan>'
                   '<tspan dx="16">- - all images</tspan>', 13),
              text(left - 10, top + height / 2, "log score", 12, GRAY, "middle",
                   f'transform="rotate(-90 {left - 10} {top + height / 2})"')]
    return parts


def main():
    parts = [*sphere(170, 148, 84), *memory(495, 112), *curve(690, 52, 260, 180)]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 300" font-family="Helvetica, Arial, '
                    'sans-serif">\n<rect width="980" height="300" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    main()
