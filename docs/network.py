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


# ---------------------------------------------------------------------------- the stages
def bars_of(stage):
    """(text, fill) of each bar in a stage; the last two stand for all further pairs of blocks."""
    iwsa = ("IWSA", COLORS["iwsa"])
    ssa = ("SSA", COLORS["ssa"])
    bars = [("embed", BOX), iwsa, ("PEG", COLORS["peg"]), ssa]
    if len(stage.blocks) > 2:
        bars += [iwsa, ssa]
    return bars


def pyramid(name="scalablevit_s"):
    """Figure 2, left to right; bars shrink as the map does and widen with the channels."""
    model, maps = built(name)
    widths = [26, 29, 33, 38]
    heights = [230, 176, 128, 84]
    gap, y = 13, 180
    total = sum((gap + width) * len(bars_of(stage)) for width, stage in zip(widths, model.stages))
    wide = 92 + total + 14 * 4 + 150
    d = Drawing(wide, 546, f"{name}: four stages of IWSA and SSA blocks")
    d.text(14, 24, f"{name}, image of {SIZE} × {SIZE}", "start", "bold", 22)
    d.box(14, y - 46, 76, 92, BOX, "image", f"{SIZE}²", "× 3", size=20)
    x = 90
    for i, (stage, features) in enumerate(zip(model.stages, maps)):
        C, H = features.shape[1:3]
        conv = stage.embed.conv
        depth = len(stage.blocks)
        first = x
        for j, (text, fill) in enumerate(bars_of(stage)):
            if j == 4:
                frame = x + gap / 2
            d.arrow((x, y), (x + gap, y))
            top = y - heights[i] / 2
            line = "var(--line)" if fill == BOX else fill
            tint = 1 if fill == BOX else 0.4
            d.rect(x + gap, top, widths[i], heights[i], fill, line, radius=4, tint=tint)
            d.text(x + gap + widths[i] / 2, y, text, size=20, turned=True)
            x += gap + widths[i]
        if depth > 2:
            top = y - heights[i] / 2
            d.rect(frame, top - 8, x + 6 - frame, heights[i] + 16, radius=6,
                   more='stroke-dasharray="5 4"')
            d.text((frame + x + 6) / 2, top - 22, f"× {depth // 2 - 1}", size=20)
        ssa = stage.blocks[1].attn
        reduced = f"r_{{n}} = 1/{ssa.s ** 2}" if ssa.s > 1 else "r_{n} = 1"
        scaled = f"r_{{c}} = {ssa.q.out_features / C:g}"
        stride = conv.stride[0]
        middle = (first + gap + x) / 2
        kernel = conv.kernel_size[0]
        d.text(middle, 336, f"stage {i + 1}", weight="bold", size=20)
        d.texts(middle, 362, (
            f"{depth} blocks", f"{H} × {H} tokens", f"C = {C}, {ssa.heads} heads",
            reduced, scaled, f"embed {kernel} × {kernel},", f"stride {stride}"), size=20)
        x += 14
    x -= 14
    d.arrow((x, y), (x + 14, y))
    d.box(x + 14, y - 62, 94, 124, BOX, "norm", "mean", "head", size=20)
    d.arrow((x + 108, y), (x + 122, y))
    d.text(x + 136, y, f"{model.num_classes} classes", size=20, turned=True)
    return d.svg()


# ---------------------------------------------------------------------------- a block
def block(name="scalablevit_s"):
    """The inside of a block: two residual branches; PEG, after a stage's first block, is a third."""
    model, maps = built(name)
    C, H, W = maps[0].shape[1:]
    hidden = model.stages[0].blocks[0].mlp.fc1.out_features
    d = Drawing(1000, 220, "A block: attention, then an MLP, each with a residual connection")
    y = 122
    d.rect(96, 20, 608, 172, BOX, radius=8, tint=0.5)
    d.rect(716, 20, 194, 172, BOX, radius=8, tint=0.5)
    d.text(108, 38, "a block", "start", "bold")
    d.text(728, 38, "after the first block", "start", "bold")
    d.texts(46, y - 12, (f"{H} × {W}", f"× {C}"))
    d.texts(960, y - 12, (f"{H} × {W}", f"× {C}"))

    def skip(start, end):
        d.arrow((start, y), (start, y - 56), (end, y - 56), (end, y - 14))
        d.sign(end, y, "+")

    d.arrow((88, y), (130, y))
    d.box(130, y - 32, 100, 64, BOX, "LayerNorm")
    d.arrow((230, y), (248, y))
    d.box(248, y - 32, 104, 32, COLORS["iwsa"], "IWSA")
    d.box(248, y, 104, 32, COLORS["ssa"], "or SSA")
    d.text(300, y - 44, "attention")
    d.arrow((352, y), (367, y))
    skip(112, 381)
    d.arrow((395, y), (426, y))
    d.box(426, y - 32, 100, 64, BOX, "LayerNorm")
    d.arrow((526, y), (544, y))
    d.box(544, y - 32, 118, 64, BOX, "MLP", f"{C}→{hidden}→{C}")
    d.arrow((662, y), (673, y))
    skip(410, 686)
    d.arrow((700, y), (748, y))
    d.box(748, y - 32, 116, 64, COLORS["peg"], "PEG: 3 × 3", "depthwise")
    d.arrow((864, y), (877, y))
    skip(732, 890)
    d.arrow((904, y), (924, y))
    return d.svg()


# ---------------------------------------------------------------------------- SSA and IWSA
def ssa_panel(d, attn, features, y):
    """Figure 3, with the shapes of the first stage."""
    C, H, W = features.shape[1:]
    N = H * W
    keys = math.ceil(H / attn.s) * math.ceil(W / attn.s)
    scaled = attn.q.out_features
    color = COLORS["ssa"]
    d.rect(10, y, 980, 416, "none", radius=8)
    d.text(24, y + 24, "SSA: every token attends to the whole map, in few keys", "start", "bold", 20)
    d.text(24, y + 52, f"stage 1: r_{{n}} = 1/{attn.s ** 2}, r_{{c}} = {scaled / C:g}", "start")

    def matrix(x, top, width, height, label, fill, *shape):
        tint = 1 if fill == BOX else 0.4
        line = "var(--line)" if fill == BOX else fill
        d.rect(x, top, width, height, fill, line, tint=tint)
        d.text(x + width / 2, top + height / 2, label, weight="bold")
        d.texts(x + width / 2, top + height + 16, shape, leading=22)

    top, tall = y + 84, 110
    middle = top + tall / 2
    matrix(40, top, 44, tall, "X", BOX, "N × C", f"{N} × {C}")
    d.arrow((84, middle), (196, middle))
    d.box(196, middle - 20, 72, 40, BOX, "linear")
    d.arrow((268, middle), (340, middle))
    matrix(340, top, 56, tall, "Q′", color, "N × C′", f"{N} × {scaled}")
    d.arrow((396, middle), (492, middle))
    d.sign(506, middle, "×")
    d.arrow((519, middle), (610, middle))
    d.text(560, middle - 20, "softmax")
    d.text(560, middle + 24, "· 1/√d′")
    matrix(610, top, 40, tall, "A′", BOX, "N × N·r_{n}", f"{N} × {keys}")
    d.arrow((650, middle), (722, middle))
    d.sign(736, middle, "×")
    d.arrow((749, middle), (784, middle))
    matrix(784, top, 44, tall, "Z′", BOX, "N × C", f"{N} × {C}")
    d.arrow((828, middle), (862, middle))
    d.box(862, middle - 20, 72, 40, BOX, "linear")
    d.arrow((934, middle), (970, middle))

    low = y + 320                                                   # the cells' row
    d.arrow((140, middle), (140, low - 60), (66, low - 60), (66, low - 30))
    s = attn.s
    layers = (("depthwise", f"{s} × {s}, / {s}"), ("1 × 1", f"{C} → {scaled}"), ("LayerNorm", "GELU"))
    x = 24
    for lines in layers:
        d.box(x, low - 30, 104, 60, BOX, *lines)
        if x > 24:
            d.arrow((x - 14, low), (x, low))
        x += 118
    d.text(24, low + 52, f"a row for each {s} × {s} cell: {keys} × {scaled}", "start")
    for goal, height, label, width, shape in (
            (506, low - 40, "K′", 56, f"{keys} × {scaled}"),
            (736, low + 40, "V′", 44, f"{keys} × {C}")):
        d.arrow((364, low), (384, low), (384, height), (goal - 114, height))
        d.box(goal - 114, height - 17, 64, 34, BOX, "linear")
        d.arrow((goal - 50, height), (goal - width / 2, height))
        matrix(goal - width / 2, height - 17, width, 34, label, color)
        d.text(goal + width / 2 + 8, height, shape, "start")
        d.arrow((goal, height - 17), (goal, middle + 14))


def iwsa_panel(d, attn, features, y):
    """Figures 4 and 6: attention in windows above, LIM on the whole map below."""
    C, H, W = features.shape[1:]
    M = attn.window
    windows = math.ceil(H / M) * math.ceil(W / M)
    d.rect(10, y, 980, 372, "none", radius=8)
    d.text(24, y + 24, "IWSA: attention in windows, and LIM across their borders", "start", "bold", 20)
    d.text(24, y + 52, f"stage 1: {windows} windows of {M} × {M} tokens; four are drawn", "start")
    side = 8.5
    whole = 2 * M * side

    def tokens(x, top, gap, tint, fill):
        for i in range(2):
            for j in range(2):
                d.grid(x + j * (M * side + gap), top + i * (M * side + gap), M, M, side,
                       fill=fill, tint=tint)

    top, low = y + 96, y + 232
    up, down = top + whole / 2 + 4, low + whole / 2
    split = y + 198
    d.texts(52, split - 46, ("X", f"{H} × {W}", f"× {C}"))
    d.arrow((92, split), (110, split))
    d.box(110, split - 32, 92, 64, BOX, "linear", f"{C} → {attn.qkv.out_features}")
    d.arrow((202, split), (226, split), (226, up), (300, up))
    d.text(262, up - 18, "Q, K, V")
    tokens(300, top, 8, 0.4, COLORS["wsa"])
    d.arrow((432, up), (536, up))
    d.text(484, up - 18, "attend")
    tokens(536, top, 8, 0.75, COLORS["wsa"])
    d.text(598, top - 16, "Z")
    d.arrow((202, split), (226, split), (226, down), (300, down))
    d.text(262, down - 18, "V")
    tokens(300, low, 0, 0.2, COLORS["lim"])
    reach = low + (M - 2) * side
    d.rect(300 + (M - 2) * side, reach, 3 * side, 3 * side, COLORS["lim"], "var(--ink)", tint=0.9)
    d.arrow((420, down), (536, down))
    d.texts(478, down - 18, ("LIM",))
    d.text(478, down + 20, "3 × 3")
    tokens(536, low, 0, 0.75, COLORS["lim"])
    d.rect(536 + (M - 1) * side, reach + side, side, side, COLORS["lim"], "var(--ink)")
    d.text(670, down + 40, "Y")
    d.arrow((664, up), (714, up), (714, split - 14))
    d.arrow((656, down), (714, down), (714, split + 14))
    d.sign(714, split, "+")
    d.arrow((728, split), (780, split))
    d.text(754, split - 18, "Z′")
    d.box(780, split - 32, 92, 64, BOX, "linear", f"{C} → {attn.proj.out_features}")
    d.arrow((872, split), (896, split))
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
