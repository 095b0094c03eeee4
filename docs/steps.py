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
from scalablevit import IWSA, SSA, attention  # noqa: E402

DOCS = pathlib.Path(__file__).parent
KINDS = "●■▲◆"


def highlighted(steps):
    """CSS that lights up the steps one after another, and over again.

    Only the frame behind a step changes, so any moment is a complete picture.
    """
    seconds = 2.5 * steps
    share = 100 / steps
    rules = [
        f"@keyframes light {{ 0% {{ fill-opacity: 0 }} {0.3 * share:g}% {{ fill-opacity: .28 }} "
        f"{0.8 * share:g}% {{ fill-opacity: .28 }} {1.1 * share:g}% {{ fill-opacity: 0 }} }}",
        f".drawing .frame {{ animation: light {seconds:g}s infinite both }}",
        "@media (prefers-reduced-motion: reduce) { .drawing .frame { animation: none } }",
    ]
    rules += [f".drawing .step{i} {{ animation-delay: {2.5 * i:g}s }}" for i in range(steps)]
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
    seen = {}
    layer.lim.register_forward_hook(lambda conv, args, y: seen.update(Y=y))
    out = layer(x)
    numbers = {
        "V": v[0, :, :, 0],
        "Z": layer.attend(qkv)[0, :, :, 0],
        "Y": seen["Y"][0, 0],
        "Z'": out[0, :, :, 0],
    }
    for name, matrix in numbers.items():
        whole = matrix.round()
        torch.testing.assert_close(matrix, whole, rtol=0, atol=1e-5)
        numbers[name] = whole.int()
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
    whole = [(left, top), (right, top), (right, bottom), (left, bottom)]
    if attended:
        d.triangle(upper if convolved else whole, COLORS["wsa"], 0.75)
    if convolved:
        d.triangle(lower if attended else whole, COLORS["lim"], 0.75)


def tokens(d, x, y, numbers, attended=None, convolved=None, gap=0):
    """A map of 6 x 6 tokens, cut into windows if there is a gap; 0s are left out.

    attended, convolved: maps that are not 0 where a color from attention or LIM belongs.
    """
    for row in (0, M):
        for column in (0, M):
            left, top = place(x, y, row, column, gap)
            d.grid(left, top, M, M, SIDE)
    nothing = torch.zeros_like(numbers)
    by_attention = nothing if attended is None else attended
    by_lim = nothing if convolved is None else convolved
    for row, column in numbers.nonzero().tolist():
        left, top = place(x, y, row, column, gap)
        number = numbers[row, column].item()
        if number == 9:
            d.rect(left, top, SIDE, SIDE, "var(--line)", "none", tint=0.5)
        paint(d, left, top, by_attention[row, column] > 0, by_lim[row, column] > 0)
        d.text(left + SIDE / 2, top + SIDE / 2, str(number))
    if gap == 0:
        whole = 2 * M * SIDE
        middle = M * SIDE
        path = f"M{x + middle} {y}v{whole}M{x} {y + middle}h{whole}"
        d.lines.append(f'<path d="{path}" stroke="var(--ink)" stroke-width="1.5"/>')


def iwsa():
    """V -> windows -> attention -> Z, and V -> LIM -> Y; then Z' = Z + Y.  SVG text."""
    numbers = iwsa_numbers()
    v, z, y, out = numbers.values()
    own = (z > 0).sum().item()
    beyond = ((y > 0) & (z == 0)).sum().item()
    both = ((y > 0) & (z > 0)).sum().item()
    assert (own, beyond, both) == (9, 5, 4)
    assert set(out.flatten().tolist()) == {0, 1, 2}
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
    d.texts(20, 440, (f"Attention alone: {own} tokens, all in one window.",
                      f"LIM adds {beyond}, in the three windows next to it."), anchor="start")
    return d.svg()


# ---------------------------------------------------------------------------- SSA
MAP = torch.tensor([[0, 3, 1, 1],               # kinds of token; each cell of 2 x 2 has three of its
                    [0, 0, 2, 1],               # own kind and one of the opposite cell's
                    [2, 2, 3, 3],
                    [1, 2, 0, 3]])


@torch.no_grad()
def ssa_numbers(share=0.74):
    """Q', K', V', A and Z' of a real SSA with 2 x 2 cells, for a 4 x 4 map of four kinds of token.

    A cell's key is the mean of its tokens, then LayerNorm and GELU.  A query looks for the key
    that has most of its own kind; W_q is scaled so that it pays `share` of its attention there.
    """
    layer = SSA(4, heads=1, rc=1.0, rn=1 / 4)
    for parameter in layer.parameters():
        parameter.zero_()
    depthwise, pointwise = layer.reduce
    depthwise.weight.fill_(1 / 4)
    pointwise.weight[:, :, 0, 0] = torch.eye(4)
    layer.norm.weight.fill_(1)
    for linear in (layer.k, layer.v, layer.q, layer.proj):
        linear.weight[:] = torch.eye(4)
    x = torch.nn.functional.one_hot(MAP, 4).float()[None]           # (1, 4, 4, 4)
    seen = {}
    for name in "qkv":
        layer_of = getattr(layer, name)
        layer_of.register_forward_hook(lambda _, args, y, name=name: seen.update({name: y}))
    layer(x)
    scores = layer.scale * seen["k"].flatten(0, -2)[:, 0]            # of a query of the first kind

    low, high = 0.0, 20.0                                           # bisect for the scale of W_q
    for _ in range(60):
        middle = (low + high) / 2
        reached = (middle * scores).softmax(0).max().item()
        low, high = (middle, high) if reached < share else (low, middle)
    layer.q.weight[:] = low * torch.eye(4)
    out = layer(x)
    q, k, v = (seen[name].flatten(0, -2) for name in "qkv")       # (16, 4), (4, 4), (4, 4)
    A = attention(q, k, torch.eye(len(k)), layer.scale)             # V' = 1: the matrix itself
    torch.testing.assert_close(A @ v, out[0].flatten(0, 1))
    return {"Q'": q, "K'": k, "V'": v, "A": A, "Z'": out[0]}


def symbol(d, x, y, kind, size=22):
    d.text(x, y, KINDS[kind], size=size)


def ring(d, x, y, width, height):
    d.rect(x, y, width, height, "none", COLORS["ssa"], 3, more='stroke-width="4"')


def ssa(row=0, column=1):
    """X -> Q', cells -> K' and V', A = softmax(Q' K'^T), and what one token sees.  SVG text."""
    numbers = ssa_numbers()
    A, k = numbers["A"], numbers["K'"]
    shown = [[f"{share:.2f}" for share in line] for line in A.tolist()]
    for line in shown:
        assert math.isclose(sum(map(float, line)), 1)               # as printed, too
    n = row * 4 + column
    d = Drawing(1000, 560, "SSA step by step on a map of 4 x 4 tokens", highlighted(4))
    vermilion = COLORS["ssa"]

    frame(d, 0, 10, 20, 184, 232)
    frame(d, 1, 10, 300, 270, 246)
    frame(d, 2, 352, 20, 330, 526)
    frame(d, 3, 740, 84, 254, 420)

    d.text(102, 42, "1. 16 tokens, 4 cells", weight="bold")
    side = 41
    d.grid(20, 70, 4, 4, side)
    for r in range(4):
        for c in range(4):
            symbol(d, 20 + (c + 0.5) * side, 70 + (r + 0.5) * side, MAP[r, c].item())
    cut = f"M{20 + 2 * side} 70v{4 * side}M20 {70 + 2 * side}h{4 * side}"
    d.lines.append(f'<path d="{cut}" stroke="var(--ink)" stroke-width="2"/>')
    ring(d, 20 + column * side, 70 + row * side, side, side)

    d.arrow((102, 240), (102, 312))
    d.texts(114, 264, ("mean of each cell,", "LayerNorm, GELU"), anchor="start")
    d.text(20, 332, "2. one key for each cell: K′", anchor="start", weight="bold")
    owners = [MAP[0, 0], MAP[0, 2], MAP[2, 0], MAP[2, 2]]
    d.grid(52, 356, 4, 4, 54, 34)
    for r in range(4):
        symbol(d, 34, 356 + (r + 0.5) * 34, owners[r].item())
        for c in range(4):
            number = f"{k[r, c].item():.1f}".replace("-0.0", "0.0").replace("-", "−")
            d.text(52 + (c + 0.5) * 54, 356 + (r + 0.5) * 34, number)
    d.text(20, 520, "4 channels a row; V′ looks the same", anchor="start")

    d.text(362, 42, "3. A = softmax(Q′ K′ᵀ/√d′)", anchor="start", weight="bold")
    left, top, wide, tall = 398, 96, 58, 26
    d.arrow((188, 140), (352, 140))
    d.text(270, 122, "16 queries Q′")
    d.arrow((270, 424), (352, 424))
    d.text(312, 406, "K′ᵀ")
    for c in range(4):
        symbol(d, left + (c + 0.5) * wide, 80, owners[c].item())
    d.grid(left, top, 16, 4, wide, tall)
    for r in range(16):
        symbol(d, left - 18, top + (r + 0.5) * tall, MAP.flatten()[r].item(), 18)
        for c in range(4):
            share = A[r, c].item()
            d.rect(left + c * wide, top + r * tall, wide, tall, vermilion, "none", tint=0.75 * share)
            d.text(left + (c + 0.5) * wide, top + (r + 0.5) * tall, shown[r][c])
    ring(d, left, top + n * tall, 4 * wide, tall)
    d.text(left + 2 * wide, 530, "every row sums to 1")

    middle = top + (n + 0.5) * tall
    d.arrow((left + 4 * wide + 3, middle), (706, middle), (706, 230), (765, 230))
    d.text(867, 106, "4. what one token sees", weight="bold")
    big = 100
    for r in range(2):
        for c in range(2):
            share = A[n, 2 * r + c].item()
            x, y = 767 + c * big, 130 + r * big
            d.rect(x, y, big, big, vermilion, "var(--line)", tint=0.75 * share)
            d.text(x + big / 2, y + 0.72 * big, shown[n][2 * r + c], size=24)
    ring(d, 767 + column * big / 2, 130 + row * big / 2, big / 2, big / 2)
    strongest = A[n].argmax().item()
    assert owners[strongest] == MAP[row, column]
    assert strongest == 3                                           # the opposite corner
    d.texts(867, 356, ("The whole map, in cells:", f"it finds its kind, {KINDS[strongest]},",
                       "in the far corner."))
    parts = [f"{share} V′_{{{i + 1}}}" for i, share in enumerate(shown[n])]
    d.texts(867, 446, ("Z′ = " + " + ".join(parts[:2]), "+ " + " + ".join(parts[2:])))
    return d.svg()


if __name__ == "__main__":
    for name, draw in {"iwsa_steps": iwsa, "ssa_steps": ssa}.items():
        (DOCS / f"{name}.svg").write_text(draw(), encoding="utf-8")
