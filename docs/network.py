"""Draws docs/network.svg: the network (Figure 2), SSA (Figure 3) and LIM (Figures 4, 6), with shapes from the model.

    python docs/network.py

In a notebook: IPython.display.SVG(network.draw())
"""
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # this repository's file, not an installed copy
import scalablevit  # noqa: E402

IWSA, SSA, PEG, EMBED, PLAIN = "#b8d4f0", "#f6c5b0", "#f6e3a1", "#dddddd", "#f1f1f1"
RED = "#d62728"
WINDOWS = ("#b8d4f0", "#cfe8c6", "#e3d2ef", "#f6dfb8")


class Drawing:
    """Boxes, arrows and text of an SVG; coordinates are pixels from the top left."""

    def __init__(self, width, height):
        self.size, self.lines = (width, height), []
        self.lines.append(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222" stroke-linejoin="round">\n'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="#222"/></marker></defs>')
        self.rect(0, 0, width, height, "white", line="none")

    def rect(self, x, y, width, height, fill="none", line="#222", radius=0, more=""):
        """more: additional SVG attributes."""
        self.lines.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
                          f'fill="{fill}" stroke="{line}" {more}/>')

    def text(self, x, y, string, anchor="middle", weight="normal", size=13, turned=False):
        """`string`, vertically centered at y."""
        turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        self.lines.append(f'<text x="{x:g}" y="{y + 0.35 * size:g}" text-anchor="{anchor}" font-weight="{weight}" '
                          f'font-size="{size}"{turn}>{string}</text>')

    def texts(self, x, y, strings, leading=17, **kwargs):
        for i, string in enumerate(strings):
            self.text(x, y + leading * i, string, **kwargs)

    def box(self, x, y, width, height, fill, *strings, radius=4):
        """A box with centered lines of text."""
        self.rect(x, y, width, height, fill, radius=radius)
        self.texts(x + width / 2, y + height / 2 - 8.5 * (len(strings) - 1), strings)

    def bar(self, x, y, width, height, fill, *strings):
        """A tall box with rotated text, vertically centered at y."""
        self.rect(x, y - height / 2, width, height, fill, radius=4)
        for i, string in enumerate(strings):
            self.text(x + width / 2 + 16 * (i - (len(strings) - 1) / 2), y, string, turned=True)

    def arrow(self, *points, tip=True):
        """An arrow through points (x, y)."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.lines.append(f'<path d="M{path}" fill="none" stroke="#222"' + ' marker-end="url(#tip)"' * tip + "/>")

    def sign(self, x, y, symbol):
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="white" stroke="#222"/>')
        self.text(x, y, symbol, size=16)

    def grid(self, x, y, cell, n, fill):
        """n x n tokens."""
        self.rect(x, y, n * cell, n * cell, fill)
        path = "".join(f"M{x + i * cell:g} {y:g}v{n * cell:g}M{x:g} {y + i * cell:g}h{n * cell:g}" for i in range(1, n))
        self.lines.append(f'<path d="{path}" stroke="#222" stroke-opacity="0.25" stroke-width="0.6"/>')

    def svg(self):
        return "\n".join([*self.lines, "</svg>"]) + "\n"


def pyramid(d, name, model, maps, y):
    """Figure 2, left to right: patch embedding, IWSA block, PEG, SSA block, and so on; numbers below each stage."""
    size = 224
    d.text(14, 20, f"{name} on an image of {size} × {size}", "start", "bold", size=14)
    d.box(14, y - 36, 74, 72, "white", "image", f"{size} × {size}", f"× {model.config['in_chans']}", radius=0)
    x = 88
    for i, (stage, features) in enumerate(zip(model.stages, maps)):
        (C, H), depth, tall = features.shape[1:3], len(stage.blocks), 176 - 16 * i
        step, conv, ssa = size // H, stage.embed.conv, stage.blocks[1].attn
        first = x + 14

        def bar(width, fill, *strings):
            nonlocal x
            d.arrow((x, y), (x + 14, y))
            d.bar(x + 14, y, width, tall, fill, *strings)
            x += 14 + width

        bar(40, EMBED, "patch embedding", f"{conv.kernel_size[0]}×{conv.kernel_size[0]}, stride {conv.stride[0]}")
        bar(28, IWSA, "IWSA block")
        bar(24, PEG, "PEG")
        bar(28, SSA, "SSA block")
        if depth > 2:
            frame = x + 7
            bar(28, IWSA, "IWSA block")
            bar(28, SSA, "SSA block")
            d.rect(frame, y - tall / 2 - 7, x + 7 - frame, tall + 14, radius=6, more='stroke-dasharray="4 3"')
            d.text((frame + x + 7) / 2, y - tall / 2 - 17, f"× {depth // 2 - 1}")
        middle = (first + x) / 2
        d.text(middle, y + 108, f"stage {i + 1}: {depth} blocks", weight="bold")
        scales = f"r_n = 1/{ssa.s ** 2}, r_c = {ssa.q.out_features / C:g}" if ssa.s > 1 else "r_n = 1"
        d.texts(middle, y + 127, (f"H/{step} × W/{step} = {H} × {H}", f"C = {C}, {ssa.heads} heads", scales))
    d.arrow((x, y), (x + 14, y))
    d.bar(x + 14, y, 40, 128, PLAIN, "norm, mean over", "tokens, head")
    d.arrow((x + 54, y), (x + 68, y))
    d.text(x + 78, y, f"{model.num_classes} classes", turned=True)


def block(d, model, maps, y):
    """The inside of a block: two residual branches; PEG, after a stage's first block, is a third."""
    C, H, W = maps[0].shape[1:]
    fc1 = model.stages[0].blocks[0].mlp.fc1
    d.text(14, y - 78, "Inside a block, and the PEG after the first block of each stage", "start", "bold", size=14)
    d.rect(100, y - 58, 588, 96, "#fafafa", "#999", 6)
    d.rect(702, y - 58, 204, 96, "#fafafa", "#999", 6)
    d.texts(50, y - 9, (f"{H} × {W}", f"× {C}"))
    d.texts(950, y - 9, (f"{H} × {W}", f"× {C}"))

    def residual(start, end, *boxes):
        """x + boxes(x): the branch, the skip connection and the sum at `end`."""
        d.arrow((start, y), (start, y - 42), (end, y - 42), (end, y - 10))
        for x, width, fill, *strings in boxes:
            d.arrow((start, y), (x, y))
            d.box(x, y - 24, width, 48, fill, *strings)
            start = x + width
        d.arrow((start, y), (end - 10, y))
        d.sign(end, y, "+")

    d.arrow((80, y), (118, y), tip=False)
    residual(118, 374, (138, 86, PLAIN, "LayerNorm"), (244, 104, IWSA, "attention:", "IWSA or SSA"))
    d.arrow((383, y), (404, y), tip=False)
    residual(404, 668, (424, 86, PLAIN, "LayerNorm"),
             (530, 112, PLAIN, "MLP:", f"{fc1.in_features} → {fc1.out_features} → {fc1.in_features}"))
    d.arrow((677, y), (722, y), tip=False)
    residual(722, 886, (744, 116, PEG, "PEG: depthwise", "3×3 convolution"))
    d.arrow((895, y), (922, y))


def ssa_panel(d, attn, features, x, y):
    """Figure 3, with the shapes of the first stage."""
    C, H, W = features.shape[1:]
    N, keys, scaled = H * W, math.ceil(H / attn.s) * math.ceil(W / attn.s), attn.q.out_features
    d.rect(x, y, 480, 372, "none", "#999", 6)
    d.text(x + 14, y + 20, "SSA: N queries, but only N·r_n keys", "start", "bold", size=14)
    scales = f"r_n = 1/{attn.s ** 2}, r_c = {scaled / C:g}"
    d.text(x + 14, y + 40, f"stage 1: {scales}; channels are split among heads", "start")
    top, tall, k, v = y + 82, 104, y + 268, y + 338
    middle = top + tall / 2

    def matrix(x, y, width, height, name, fill, *shape, beside=False):
        d.rect(x, y, width, height, fill)
        d.text(x + width / 2, y + height / 2, name, weight="bold")
        if beside:
            d.texts(x + width + 8, y + height / 2 - 8, shape, anchor="start")
        else:
            d.texts(x + width / 2, y + height + 13, shape)

    matrix(x + 22, top, 36, tall, "X", PLAIN, "N × C", f"{N} × {C}")
    d.arrow((x + 58, middle), (x + 96, middle))
    d.box(x + 96, middle - 15, 48, 30, PLAIN, "linear")
    d.arrow((x + 144, middle), (x + 165, middle))
    matrix(x + 165, top, 45, tall, "Q′", SSA, "N × C·r_c", f"{N} × {scaled}")
    d.arrow((x + 210, middle), (x + 240, middle))
    d.sign(x + 250, middle, "×")
    d.arrow((x + 259, middle), (x + 298, middle))
    d.text(x + 312, top - 12, "softmax")
    matrix(x + 298, top, 28, tall, "A′", "white", "N × N·r_n", f"{N} × {keys}")
    d.arrow((x + 326, middle), (x + 363, middle))
    d.sign(x + 373, middle, "×")
    d.arrow((x + 382, middle), (x + 412, middle))
    matrix(x + 412, top, 36, tall, "Z′", PLAIN, "N × C", f"{N} × {C}", "then linear")

    d.arrow((x + 82, middle), (x + 82, v - 35), (x + 96, v - 35))                       # X's path to K and V
    d.box(x + 96, k - 18, 72, v - k + 36, PLAIN, "one token", "for each", f"{attn.s}×{attn.s} cell:",
          f"{keys} × {scaled}")
    for goal, height, width, up, name, *shape in (
            (250, k, 45, middle + 10, "K′", "N·r_n × C·r_c", f"{keys} × {scaled}"),
            (373, v, 36, middle + 10, "V′", "N·r_n × C", f"{keys} × {C}")):
        d.arrow((x + 168, height), (x + goal - width / 2, height))
        d.text(x + 196, height - 12, "linear")
        matrix(x + goal - width / 2, height - 12, width, 24, name, SSA, *shape, beside=name == "V′")
        d.arrow((x + goal, height - 12), (x + goal, up))
    d.text(x + 268, middle + 40, "K′ᵀ")


def lim_panel(d, attn, features, x, y):
    """Figures 4 and 6: four neighboring windows, step by step."""
    M, windows = attn.window, math.ceil(features.shape[2] / attn.window) * math.ceil(features.shape[3] / attn.window)
    side, cell = 98, 98 / (2 * M)
    d.rect(x, y, 480, 372, "none", "#999", 6)
    d.text(x + 14, y + 20, "IWSA: attention in windows, LIM across borders", "start", "bold", size=14)
    d.text(x + 14, y + 40, f"stage 1: four of its {windows} windows of {M} × {M} tokens", "start")

    def tokens(x, y, gap=0, joined=False):
        """2 x 2 windows; joined: darken tokens whose 3x3 neighborhood crosses a border."""
        for i, fill in enumerate(WINDOWS):
            d.grid(x + i % 2 * (side / 2 + gap), y + i // 2 * (side / 2 + gap), cell, M, fill)
        for box in ((x + side / 2 - cell, y, 2 * cell, side), (x, y + side / 2 - cell, side, 2 * cell)) * joined:
            d.rect(*box, "#222", "none", more='fill-opacity="0.35"')

    top, low, middle = y + 84, y + 240, y + 84 + 53
    tokens(x + 20, top, 8)
    d.text(x + 73, top - 14, "Q, K, V in windows")
    d.arrow((x + 126, middle), (x + 186, middle))
    d.text(x + 156, middle - 12, "attend")
    tokens(x + 186, top, 8)
    d.text(x + 239, top - 14, "Z, window by window")
    d.arrow((x + 292, middle), (x + 317, middle))
    d.sign(x + 327, middle, "+")
    d.arrow((x + 336, middle), (x + 360, middle))
    tokens(x + 360, top + 4, joined=True)
    d.text(x + 409, top - 14, "Z′ = Z + Y")
    d.arrow((x + 73, top + 106), (x + 73, low))
    d.text(x + 92, low - 24, "V")
    tokens(x + 24, low)
    d.text(x + 73, low + side + 14, "V, merged again")
    d.rect(x + 24 + (M - 1) * cell, low + 2 * cell, 3 * cell, 3 * cell, RED, RED, more='fill-opacity="0.35"')
    d.arrow((x + 122, low + 3.5 * cell), (x + 190, low + 3.5 * cell))
    d.text(x + 156, low + 3.5 * cell - 12, "LIM")
    tokens(x + 190, low, joined=True)
    d.rect(x + 190 + M * cell, low + 3 * cell, cell, cell, RED, RED)
    d.text(x + 239, low + side + 14, "Y: depthwise 3×3 of V")
    d.arrow((x + 288, low + 3.5 * cell), (x + 327, low + 3.5 * cell), (x + 327, middle + 10))
    d.texts(x + 343, low + 24, ("red: one 3×3 kernel", "and its output;", "dark: tokens that", "also see another",
                                "window"), anchor="start")


def draw(name="scalablevit_s"):
    """The picture of that network, as SVG text."""
    with torch.device("meta"):                                      # shapes without memory
        model = getattr(scalablevit, name)()
        maps = model.forward_features(torch.empty(1, 3, 224, 224))
    d = Drawing(1000, 866)
    pyramid(d, name, model, maps, 136)
    block(d, model, maps, 412)
    ssa_panel(d, model.stages[0].blocks[1].attn, maps[0], 14, 480)
    lim_panel(d, model.stages[0].blocks[0].attn, maps[0], 506, 480)
    return d.svg()


if __name__ == "__main__":
    pathlib.Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
