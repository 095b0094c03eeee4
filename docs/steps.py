"""Draws docs/iwsa_steps.svg and docs/ssa_steps.svg: IWSA and SSA step by step, with real numbers.

    python docs/steps.py

The layers are those of scalablevit.py, with weights simple enough to follow by eye.  Each drawing
takes its numbers from the layer and asserts what its text says about them.
In a notebook: IPython.display.SVG(steps.iwsa())
"""
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # this repository's file
from drawing import COLORS, Drawing  # noqa: E402
from scalablevit import IWSA, SSA, attention, convolve  # noqa: E402

DOCS = pathlib.Path(__file__).parent
KINDS = "●■▲◆"


def highlighted(steps):
    """CSS that lights up the steps one after another, and over again.

    Only the frame behind a step changes, so any moment is a complete picture.
    """
    share = 100 / steps
    rules = [
        f"@keyframes light {{ 0% {{ fill-opacity: 0 }} {0.3 * share:g}% {{ fill-opacity: .28 }} "
        f"{0.8 * share:g}% {{ fill-opacity: .28 }} {1.1 * share:g}% {{ fill-opacity: 0 }} }}",
        f".drawing .frame {{ animation: light {2.5 * steps:g}s infinite both }}",
        "@media (prefers-reduced-motion: reduce) { .drawing .frame { animation: none } }",
    ]
    for i in range(steps):
        rules.append(f".drawing .step{i} {{ animation-delay: {2.5 * i:g}s }}")
    return "\n".join(rules)


def frame(d, step, x, y, width, height):
    d.rect(x, y, width, height, "var(--line)", "none", 8, 0, f'class="frame step{step}"')


# ---------------------------------------------------------------------------- IWSA
@torch.no_grad()
def set_to_means(module):
    """Make attention the mean of V over a window, F the mean of 3 x 3 tokens, and V = X."""
    for name, parameter in module.named_parameters():
        is_convolution = name in ("lim.weight", "lem.weight")
        parameter.fill_(1 / 9 if is_convolution else 0)             # Q = K = 0: equal weights
    dim = module.proj.in_features
    module.qkv.weight[2 * dim:] = torch.eye(dim)
    module.proj.weight[:] = torch.eye(dim)


@torch.no_grad()
def iwsa_numbers(side=6, window=3, row=2, column=2, value=9):
    """V, Z, Y and Z' of a real IWSA, (side, side) each; one token of V is not 0."""
    layer = IWSA(1, heads=1, window=window)
    set_to_means(layer)
    x = torch.zeros(1, side, side, 1)
    x[0, row, column] = value
    qkv = layer.qkv(x)
    v = qkv[..., 2:]                                                # (1, side, side, 1)
    numbers = {
        "V": v,
        "Z": layer.attend(qkv),
        "Y": convolve(layer.lim, v),
        "Z'": layer(x),
    }
    for name, matrix in numbers.items():
        whole = matrix.round()
        torch.testing.assert_close(matrix, whole, rtol=0, atol=1e-5)
        numbers[name] = whole[0, :, :, 0].int()
    assert torch.equal(numbers["Z"] + numbers["Y"], numbers["Z'"])
    return numbers


M = 3                       # window of the drawing, in tokens
SIDE = 28                   # of a token, in pixels
GAP = 14                    # between windows that are cut apart


def place(x, y, row, column, gap):
    """Top left corner of a token on a map at (x, y)."""
    left = x + column * SIDE + column // M * gap
    top = y + row * SIDE + row // M * gap
    return left, top


def paint(d, left, top, attended, convolved):
    """A token's color: from attention, from LIM, or half of each."""
    right = left + SIDE
    bottom = top + SIDE
    upper = [(left, top), (right, top), (left, bottom)]
    lower = [(right, top), (right, bottom), (left, bottom)]
    whole = [(left, top), *lower]
    if attended:
        d.triangle(upper if convolved else whole, COLORS["wsa"], 0.75)
    if convolved:
        d.triangle(lower if attended else whole, COLORS["lim"], 0.75)


NOTHING = torch.zeros(2 * M, 2 * M)


def tokens(d, x, y, numbers, attended=NOTHING, convolved=NOTHING, gap=0):
    """A map of 6 x 6 tokens, cut into windows if there is a gap; 0s are left out.

    attended, convolved: maps that are not 0 where a color from attention or LIM belongs.
    """
    for row in (0, M):
        for column in (0, M):
            d.grid(*place(x, y, row, column, gap), M, M, SIDE)
    for row, column in numbers.nonzero().tolist():
        left, top = place(x, y, row, column, gap)
        number = numbers[row, column].item()
        if number == 9:
            d.rect(left, top, SIDE, SIDE, "var(--line)", "none", tint=0.5)
        paint(d, left, top, attended[row, column] > 0, convolved[row, column] > 0)
        d.text(left + SIDE / 2, top + SIDE / 2, str(number))
    if gap == 0:
        cross(d, x, y, M * SIDE, 1.5)


def cross(d, x, y, half, width):
    """The borders between the four quarters of a map at (x, y)."""
    path = f"M{x + half} {y}v{2 * half}M{x} {y + half}h{2 * half}"
    d.lines.append(f'<path d="{path}" stroke="var(--ink)" stroke-width="{width}"/>')


def iwsa():
    """V -> windows -> attention -> Z, and V -> LIM -> Y; then Z' = Z + Y.  SVG text."""
    v, z, y, out = iwsa_numbers().values()
    own = z.count_nonzero().item()
    beyond = out.count_nonzero().item() - own
    assert own == 9
    assert beyond == 5
    assert out.unique().tolist() == [0, 1, 2]
    d = Drawing(1000, 500, "IWSA step by step on a map of 6 x 6 tokens", highlighted(5))
    frame(d, 0, 10, 128, 196, 240)
    frame(d, 1, 276, 20, 206, 240)
    frame(d, 2, 540, 20, 206, 240)
    frame(d, 3, 547, 270, 192, 218)
    frame(d, 4, 806, 128, 188, 240)
    d.text(104, 150, "1. values V", weight="bold")
    tokens(d, 20, 172, v)
    d.arrow((190, 230), (232, 230), (232, 140), (284, 140))
    d.arrow((190, 290), (232, 290), (232, 390), (556, 390))
    d.text(379, 42, "2. cut into windows", weight="bold")
    tokens(d, 288, 64, v, gap=GAP)
    d.arrow((472, 155), (550, 155))
    d.text(510, 138, "attend")
    d.text(643, 42, "3. attention: Z", weight="bold")
    tokens(d, 552, 64, z, attended=z, gap=GAP)
    d.text(643, 292, "4. LIM: Y", weight="bold")
    tokens(d, 559, 312, y, convolved=y)
    d.text(392, 370, "3 × 3 convolution of all of V")
    d.arrow((736, 155), (772, 155), (772, 241))
    d.arrow((729, 390), (772, 390), (772, 267))
    d.sign(772, 254, "+")
    d.arrow((785, 254), (812, 254))
    d.text(900, 150, "5. Z′ = Z + Y", weight="bold")
    tokens(d, 816, 172, out, attended=z, convolved=y)
    d.text(20, 440, f"Attention alone: {own} tokens, all in one window.", "start")
    d.text(20, 464, f"LIM adds {beyond}, in the three windows next to it.", "start")
    return d.svg()


# ---------------------------------------------------------------------------- SSA
MAP = torch.tensor([                            # kinds of token
    [0, 3, 1, 1],                               # a cell of 2 x 2 has three of its own kind
    [0, 0, 2, 1],                               # and one of the opposite cell's
    [2, 2, 3, 3],
    [1, 2, 0, 3],
])
OWNERS = MAP[::2, ::2].flatten().tolist()       # the kind of each cell


@torch.no_grad()
def ssa_numbers():
    """K', A and Z' of a real SSA with 2 x 2 cells, for a 4 x 4 map of four kinds of token.

    A cell's key is the mean of its tokens, then LayerNorm and GELU.  A query looks for the key
    that has most of its own kind; with this W_q it pays 74 % of its attention there.
    """
    layer = SSA(4, heads=1, rc=1.0, rn=1 / 4)
    for parameter in layer.parameters():
        parameter.zero_()
    identity = torch.eye(4)
    depthwise, pointwise = layer.reduce
    depthwise.weight.fill_(1 / 4)
    pointwise.weight[:, :, 0, 0] = identity
    layer.norm.weight.fill_(1)
    layer.q.weight[:] = 2.5873227 * identity
    seen = []
    for linear in (layer.k, layer.v, layer.proj):
        linear.weight[:] = identity
    for linear in (layer.q, layer.k, layer.v):
        linear.register_forward_hook(lambda linear, args, out: seen.append(out[0]))
    x = torch.nn.functional.one_hot(MAP, 4).float()
    out = layer(x[None])[0]                                         # (4, 4, 4)
    q, k, v = seen                                                  # (16, 4), (4, 4), (4, 4)
    A = attention(q, k, identity, layer.scale)                      # V' = 1: the matrix itself
    torch.testing.assert_close(A @ v, out.flatten(0, 1))
    return {"K'": k, "A": A, "Z'": out}


def symbol(d, x, y, kind, size=22):
    d.text(x, y, KINDS[kind], size=size)


def ring(d, x, y, width, height):
    d.rect(x, y, width, height, "none", COLORS["ssa"], 3, more='stroke-width="4"')


def shaded(d, x, y, width, height, share, line):
    """A box as strong in color as the token's attention."""
    d.rect(x, y, width, height, COLORS["ssa"], line, tint=0.75 * share)


def draw_map(d, row, column):
    side = 41
    d.text(102, 42, "1. 16 tokens, 4 cells", weight="bold")
    d.grid(20, 70, 4, 4, side)
    for r in range(4):
        for c in range(4):
            symbol(d, 20 + (c + 0.5) * side, 70 + (r + 0.5) * side, MAP[r, c])
    cross(d, 20, 70, 2 * side, 2)
    ring(d, 20 + column * side, 70 + row * side, side, side)


def draw_keys(d, keys):
    d.arrow((102, 240), (102, 312))
    d.texts(114, 264, ("mean of each cell,", "LayerNorm, GELU"), anchor="start")
    d.text(20, 332, "2. one key for each cell: K′", "start", "bold")
    d.grid(52, 356, 4, 4, 54, 34)
    for r in range(4):
        y = 373 + 34 * r
        symbol(d, 34, y, OWNERS[r])
        for c in range(4):
            number = f"{keys[r, c]:.1f}".replace("-0.0", "0.0").replace("-", "−")
            d.text(79 + 54 * c, y, number)
    d.text(20, 520, "4 channels a row; V′ looks the same", "start")


def draw_attention(d, A, shown, n):
    left, top, wide, tall = 398, 96, 58, 26
    d.text(362, 42, "3. A = softmax(Q′ K′ᵀ/√d′)", "start", "bold")
    d.arrow((188, 140), (352, 140))
    d.text(270, 122, "16 queries Q′")
    d.arrow((270, 424), (352, 424))
    d.text(312, 406, "K′ᵀ")
    for c in range(4):
        symbol(d, left + (c + 0.5) * wide, 80, OWNERS[c])
    d.grid(left, top, 16, 4, wide, tall)
    for r, kind in enumerate(MAP.flatten()):
        y = top + r * tall
        symbol(d, left - 18, y + tall / 2, kind, 18)
        for c in range(4):
            x = left + c * wide
            shaded(d, x, y, wide, tall, A[r, c], "none")
            d.text(x + wide / 2, y + tall / 2, shown[r][c])
    ring(d, left, top + n * tall, 4 * wide, tall)
    d.text(left + 2 * wide, 530, "every row sums to 1")
    middle = top + (n + 0.5) * tall
    d.arrow((left + 4 * wide + 3, middle), (706, middle), (706, 230), (765, 230))


def draw_token(d, seen, shown, row, column):
    """What the token at (row, column) sees: its row of A, and of A as printed."""
    side = 100
    d.text(867, 106, "4. what one token sees", weight="bold")
    for i in range(4):
        x = 767 + i % 2 * side
        y = 130 + i // 2 * side
        shaded(d, x, y, side, side, seen[i], "var(--line)")
        d.text(x + side / 2, y + 0.72 * side, shown[i], size=24)
    ring(d, 767 + column * side / 2, 130 + row * side / 2, side / 2, side / 2)
    assert seen.argmax() == 3                                       # the opposite corner
    assert OWNERS[3] == MAP[row, column]
    finds = f"it finds its kind, {KINDS[OWNERS[3]]},"
    d.texts(867, 356, ("The whole map, in cells:", finds, "in the far corner."))
    parts = [f"{share} V′_{{{i}}}" for i, share in enumerate(shown, 1)]
    d.text(867, 446, f"Z′ = {parts[0]} + {parts[1]}")
    d.text(867, 470, f"+ {parts[2]} + {parts[3]}")


def ssa(row=0, column=1):
    """X -> Q', cells -> K' and V', A = softmax(Q' K'^T), and what one token sees.  SVG text."""
    numbers = ssa_numbers()
    A = numbers["A"]
    shown = []
    for line in A:
        printed = [f"{share:.2f}" for share in line]
        assert math.isclose(sum(map(float, printed)), 1)            # as printed, too
        shown.append(printed)
    n = row * 4 + column
    d = Drawing(1000, 560, "SSA step by step on a map of 4 x 4 tokens", highlighted(4))
    frame(d, 0, 10, 20, 184, 232)
    frame(d, 1, 10, 300, 270, 246)
    frame(d, 2, 352, 20, 330, 526)
    frame(d, 3, 740, 84, 254, 420)
    draw_map(d, row, column)
    draw_keys(d, numbers["K'"])
    draw_attention(d, A, shown, n)
    draw_token(d, A[n], shown[n], row, column)
    return d.svg()


if __name__ == "__main__":
    for name, draw in {"iwsa_steps": iwsa, "ssa_steps": ssa}.items():
        (DOCS / f"{name}.svg").write_text(draw(), encoding="utf-8")
