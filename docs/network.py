"""Draws the network in three pictures, with the shapes of the model itself.

    python docs/network.py

pyramid.svg     the stages (Figure 2 of the paper)
block.svg       the inside of a block
attention.svg   SSA (Figure 3) and IWSA with LIM (Figures 4 and 6)

In a notebook: IPython.display.SVG(network.pyramid())
"""
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # this repository's file
import scalablevit  # noqa: E402
from drawing import COLORS, Drawing  # noqa: E402

DOCS = pathlib.Path(__file__).parent
BOX = "var(--box)"
SIZE = 224


def built(name):
    """The model and its maps for one image, without memory (on the meta device)."""
    with torch.device("meta"):
        model = getattr(scalablevit, name)()
        maps = model.forward_features(torch.empty(1, 3, SIZE, SIZE))
    return model, maps


def filled(d, x, y, width, height, fill, radius=0):
    """A rectangle: gray, or a lighter shade of the color."""
    if fill == BOX:
        d.rect(x, y, width, height, BOX, radius=radius)
    else:
        d.rect(x, y, width, height, fill, fill, radius, 0.4)


# ---------------------------------------------------------------------------- the stages
IWSA = ("IWSA", COLORS["iwsa"])
SSA = ("SSA", COLORS["ssa"])
PAIR = [("embed", BOX), IWSA, ("PEG", COLORS["peg"]), SSA]
WIDTHS = (26, 29, 33, 38)                                           # of a bar, by stage
HEIGHTS = (230, 176, 128, 84)
GAP = 13
Y = 180                                                             # of the arrows


def bars(d, stage, x, width, height):
    """A stage from x on, with a frame for all pairs of blocks but the first; returns its end."""
    further = len(stage.blocks) // 2 - 1
    top = Y - height / 2
    shown = PAIR + [IWSA, SSA] if further else PAIR
    for i, (text, fill) in enumerate(shown):
        if i == 4:
            frame = x + GAP / 2
        d.arrow((x, Y), (x + GAP, Y))
        x += GAP
        filled(d, x, top, width, height, fill, 4)
        d.text(x + width / 2, Y, text, size=20, turned=True)
        x += width
    if further:
        wide = x + 6 - frame
        d.rect(frame, top - 8, wide, height + 16, radius=6, more='stroke-dasharray="5 4"')
        d.text(frame + wide / 2, top - 22, f"× {further}", size=20)
    return x


def pyramid(name="scalablevit_s"):
    """Figure 2, left to right; bars shrink as the map does and widen with the channels."""
    model, maps = built(name)
    wide = 298
    for stage, width in zip(model.stages, WIDTHS):
        wide += (GAP + width) * (6 if len(stage.blocks) > 2 else 4)
    d = Drawing(wide, 546, f"{name}: four stages of IWSA and SSA blocks")
    d.text(14, 24, f"{name}, image of {SIZE} × {SIZE}", "start", "bold", 22)
    d.box(14, Y - 46, 76, 92, BOX, "image", f"{SIZE}²", "× 3", size=20)
    end = 76
    for i, (stage, features) in enumerate(zip(model.stages, maps)):
        first = end + 14
        end = bars(d, stage, first, WIDTHS[i], HEIGHTS[i])
        middle = (first + GAP + end) / 2
        C, H = features.shape[1:3]
        ssa = stage.blocks[1].attn
        kernel = stage.embed.conv.kernel_size[0]
        d.text(middle, 336, f"stage {i + 1}", weight="bold", size=20)
        lines = [
            f"{len(stage.blocks)} blocks",
            f"{H} × {H} tokens",
            f"C = {C}, {ssa.heads} heads",
            f"r_{{n}} = 1/{ssa.s ** 2}" if ssa.s > 1 else "r_{n} = 1",
            f"r_{{c}} = {ssa.q.out_features / C:g}",
            f"embed {kernel} × {kernel},",
            f"stride {stage.embed.conv.stride[0]}",
        ]
        d.texts(middle, 362, lines, size=20)
    d.arrow((end, Y), (end + 14, Y))
    d.box(end + 14, Y - 62, 94, 124, BOX, "norm", "mean", "head", size=20)
    d.arrow((end + 108, Y), (end + 122, Y))
    d.text(end + 136, Y, f"{model.num_classes} classes", size=20, turned=True)
    return d.svg()


# ---------------------------------------------------------------------------- a block
def block(name="scalablevit_s"):
    """The inside of a block: two residual branches, and PEG, which follows a stage's first block."""
    model, maps = built(name)
    C, H, W = maps[0].shape[1:]
    hidden = model.stages[0].blocks[0].mlp.fc1.out_features
    y = 122
    d = Drawing(1000, 220, "A block: attention, then an MLP, each with a residual connection")

    def arrow(start, end):
        d.arrow((start, y), (end, y))

    def box(x, width, fill, *lines):
        d.box(x, y - 32, width, 64, fill, *lines)

    def skip(start, end):
        d.arrow((start, y), (start, y - 56), (end, y - 56), (end, y - 14))
        d.sign(end, y, "+")

    d.rect(96, 20, 608, 172, BOX, radius=8, tint=0.5)
    d.rect(716, 20, 194, 172, BOX, radius=8, tint=0.5)
    d.text(108, 38, "a block", "start", "bold")
    d.text(728, 38, "after the first block", "start", "bold")
    for x in (46, 960):
        d.texts(x, y - 12, (f"{H} × {W}", f"× {C}"))
    arrow(88, 130)
    box(130, 100, BOX, "LayerNorm")
    arrow(230, 248)
    d.box(248, y - 32, 104, 32, COLORS["iwsa"], "IWSA")
    d.box(248, y, 104, 32, COLORS["ssa"], "or SSA")
    d.text(300, y - 44, "attention")
    arrow(352, 367)
    skip(112, 381)
    arrow(395, 426)
    box(426, 100, BOX, "LayerNorm")
    arrow(526, 544)
    box(544, 118, BOX, "MLP", f"{C}→{hidden}→{C}")
    arrow(662, 673)
    skip(410, 686)
    arrow(700, 748)
    box(748, 116, COLORS["peg"], "PEG: 3 × 3", "depthwise")
    arrow(864, 877)
    skip(732, 890)
    arrow(904, 924)
    return d.svg()


# ---------------------------------------------------------------------------- SSA and IWSA
def matrix(d, x, y, width, height, label, fill):
    filled(d, x, y, width, height, fill)
    d.text(x + width / 2, y + height / 2, label, weight="bold")


def ssa_panel(d, attn, features, y):
    """Figure 3, with the shapes of the first stage."""
    C, H, W = features.shape[1:]
    N = H * W
    s = attn.s
    keys = math.ceil(H / s) * math.ceil(W / s)
    scaled = attn.q.out_features
    color = COLORS["ssa"]
    d.rect(10, y, 980, 416, "none", radius=8)
    title = "SSA: every token attends to the whole map, in few keys"
    d.text(24, y + 24, title, "start", "bold", 20)
    d.text(24, y + 52, f"stage 1: r_{{n}} = 1/{s ** 2}, r_{{c}} = {scaled / C:g}", "start")
    top = y + 84
    middle = y + 139

    def arrow(start, end):
        d.arrow((start, middle), (end, middle))

    def linear(x):
        d.box(x, middle - 20, 72, 40, BOX, "linear")

    def column(x, width, label, fill, *shape):
        matrix(d, x, top, width, 110, label, fill)
        d.texts(x + width / 2, top + 126, shape, leading=22)

    column(40, 44, "X", BOX, "N × C", f"{N} × {C}")
    arrow(84, 196)
    linear(196)
    arrow(268, 340)
    column(340, 56, "Q′", color, "N × C′", f"{N} × {scaled}")
    arrow(396, 492)
    d.sign(506, middle, "×")
    arrow(519, 610)
    d.text(560, middle - 20, "softmax")
    d.text(560, middle + 24, "· 1/√d′")
    column(610, 40, "A′", BOX, "N × N·r_{n}", f"{N} × {keys}")
    arrow(650, 722)
    d.sign(736, middle, "×")
    arrow(749, 784)
    column(784, 44, "Z′", BOX, "N × C", f"{N} × {C}")
    arrow(828, 862)
    linear(862)
    arrow(934, 970)

    low = y + 320                                                   # the cells' row
    d.arrow((140, middle), (140, low - 60), (66, low - 60), (66, low - 30))
    d.box(24, low - 30, 104, 60, BOX, "depthwise", f"{s} × {s}, / {s}")
    d.box(142, low - 30, 104, 60, BOX, "1 × 1", f"{C} → {scaled}")
    d.arrow((128, low), (142, low))
    d.box(260, low - 30, 104, 60, BOX, "LayerNorm", "GELU")
    d.arrow((246, low), (260, low))
    d.text(24, low + 52, f"a row for each {s} × {s} cell: {keys} × {scaled}", "start")

    def row(x, height, width, label, shape):
        """From the cells to K' or V', and up to the product at x."""
        left = x - width / 2
        d.arrow((364, low), (384, low), (384, height), (x - 114, height))
        d.box(x - 114, height - 17, 64, 34, BOX, "linear")
        d.arrow((x - 50, height), (left, height))
        matrix(d, left, height - 17, width, 34, label, color)
        d.text(left + width + 8, height, shape, "start")
        d.arrow((x, height - 17), (x, middle + 14))

    row(506, low - 40, 56, "K′", f"{keys} × {scaled}")
    row(736, low + 40, 44, "V′", f"{keys} × {C}")


def iwsa_panel(d, attn, features, y):
    """Figures 4 and 6: attention in windows above, LIM on the whole map below."""
    C, H, W = features.shape[1:]
    M = attn.window
    windows = math.ceil(H / M) * math.ceil(W / M)
    side = 8.5
    whole = 2 * M * side
    d.rect(10, y, 980, 372, "none", radius=8)
    title = "IWSA: attention in windows, and LIM across their borders"
    d.text(24, y + 24, title, "start", "bold", 20)
    d.text(24, y + 52, f"stage 1: {windows} windows of {M} × {M} tokens; four are drawn", "start")
    top = y + 96
    low = y + 232
    up = top + whole / 2 + 4
    down = low + whole / 2
    split = y + 198

    def arrow(start, end, height):
        d.arrow((start, height), (end, height))

    def tokens(x, top, gap, tint, fill):
        step = M * side + gap
        for i in range(4):
            d.grid(x + i % 2 * step, top + i // 2 * step, M, M, side, fill=fill, tint=tint)

    d.texts(52, split - 46, ("X", f"{H} × {W}", f"× {C}"))
    arrow(92, 110, split)
    d.box(110, split - 32, 92, 64, BOX, "linear", f"{C} → {attn.qkv.out_features}")
    d.arrow((202, split), (226, split), (226, up), (300, up))
    d.text(262, up - 18, "Q, K, V")
    tokens(300, top, 8, 0.4, COLORS["wsa"])
    arrow(432, 536, up)
    d.text(484, up - 18, "attend")
    tokens(536, top, 8, 0.75, COLORS["wsa"])
    d.text(598, top - 16, "Z")
    d.arrow((202, split), (226, split), (226, down), (300, down))
    d.text(262, down - 18, "V")
    lim = COLORS["lim"]
    tokens(300, low, 0, 0.2, lim)
    reach = (M - 2) * side
    d.rect(300 + reach, low + reach, 3 * side, 3 * side, lim, "var(--ink)", tint=0.9)
    arrow(420, 536, down)
    d.text(478, down - 18, "LIM")
    d.text(478, down + 20, "3 × 3")
    tokens(536, low, 0, 0.75, lim)
    center = reach + side
    d.rect(536 + center, low + center, side, side, lim, "var(--ink)")
    d.text(670, down + 40, "Y")
    d.arrow((664, up), (714, up), (714, split - 14))
    d.arrow((656, down), (714, down), (714, split + 14))
    d.sign(714, split, "+")
    arrow(728, 780, split)
    d.text(754, split - 18, "Z′")
    d.box(780, split - 32, 92, 64, BOX, "linear", f"{C} → {attn.proj.out_features}")
    arrow(872, 896, split)
    d.texts(936, split - 12, (f"{H} × {W}", f"× {C}"))


def attention(name="scalablevit_s"):
    """SSA above, IWSA below, with the shapes of the first stage."""
    model, maps = built(name)
    iwsa, ssa = model.stages[0].blocks
    d = Drawing(1000, 824, "SSA and IWSA, with the shapes of the first stage")
    ssa_panel(d, ssa.attn, maps[0], 10)
    iwsa_panel(d, iwsa.attn, maps[0], 438)
    return d.svg()


if __name__ == "__main__":
    for name, draw in {"pyramid": pyramid, "block": block, "attention": attention}.items():
        (DOCS / f"{name}.svg").write_text(draw(), encoding="utf-8")
