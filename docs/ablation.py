"""Tables 5(a), 5(b) and 7 of the paper in miniature: the same rows, on two tasks that one core can train on.

    python docs/ablation.py                                   the tables at once: docs/ablation.jsonl has these runs
    python docs/ablation.py --results mine.jsonl              12 networks x 2 tasks x 5 seeds anew; 40 s each
    python docs/ablation.py --plot ablation.png               learning curves; needs matplotlib

Every finished run is in the results file at once: a stopped program goes on where it was.  The file does not know the
code: after a change to a row or to scalablevit.py, take another file.

A board has 8 x 8 cells.  A cell is one token: the patch embedding is 1x1 here, so that it joins no windows.

    local   cells are black or white; each names the colours of the 12 cells within two steps
    global  a quarter of the cells are items, with a code of 16 bits and one of four hues; each other cell asks with
            the code of one of them, wherever it is, and answers with its hue; every item has a twin, one bit away

The network has one pair of blocks and windows of 2 x 2 tokens.  What was expected of each row, and why: ablation.md.
"""
import argparse
import json
import pathlib
import random
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # the file beside, not an installed copy
from scalablevit import PatchEmbed, ScalableViT  # noqa: E402

RESULTS = pathlib.Path(__file__).with_name("ablation.jsonl")
NEAR = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if 1 <= abs(y) + abs(x) <= 2]    # rows down, columns right
ITEMS, BITS, HUES = 16, 16, 4
NET = dict(dim=32, depths=(2,), heads=(8,), rc=(2,), rn=(1 / 4,), window=2, mlp_ratio=2, num_classes=0)
SETTING = dict(batch=64, lr=3e-3, warmup=50, cooldown=100, weight_decay=0.05,   # for all rows; chosen on the last one
               every=50, patience=400, rise=0.5, ceiling=99.9, cap=1000)
ROWS = {  # name: (arguments, Top-1 and mIoU in the paper)
    "WSA": (dict(pattern=("wsa", "wsa")), 82.4, 38.9),                                  # Table 5(a)
    "IWSA": (dict(pattern=("iwsa", "iwsa")), 82.9, 43.5),
    "SSA": (dict(pattern=("ssa", "ssa")), 82.9, 44.4),
    "SSA, r_c = 1": (dict(pattern=("ssa", "ssa"), rc=(1,)), 82.6, 43.7),
    "SWSA & SSA": (dict(pattern=("swsa", "ssa")), 82.9, None),
    "SSA & IWSA": (dict(pattern=("ssa", "iwsa")), 83.0, None),
    "neither": (dict(pattern=("wsa", "ssa"), peg=False), 82.7, 41.7),                   # Table 5(b)
    "PEG": (dict(pattern=("wsa", "ssa")), 82.9, 43.2),
    "LEM": (dict(pattern=("lem", "ssa"), peg=False), 82.8, None),
    "LIM": (dict(pattern=("iwsa", "ssa"), peg=False), 83.0, 43.7),
    "PEG and LEM": (dict(pattern=("lem", "ssa")), 83.0, 41.1),                          # and Table 7
    "PEG and LIM": (dict(pattern=("iwsa", "ssa")), 83.1, 44.9),                         # IWSA & SSA, the network itself
}
CLAIMS = [  # the paper has the first above the second
    ("IWSA", "WSA"), ("SSA", "WSA"), ("SSA", "SSA, r_c = 1"), ("PEG and LIM", "IWSA"), ("PEG and LIM", "SSA"),
    ("PEG and LIM", "SWSA & SSA"), ("PEG and LIM", "SSA & IWSA"),                       # Table 5(a)
    ("PEG", "neither"), ("LEM", "neither"), ("LIM", "neither"), ("LIM", "PEG"), ("PEG and LIM", "PEG"),
    ("PEG and LIM", "LIM"), ("PEG and LIM", "PEG and LEM"),                             # Tables 5(b) and 7
]


def draw_local(n, generator):
    """n boards (n, 1, 8, 8) of -1 and 1, and the colours around each cell (n, 12, 8, 8): 0, 1, or -1 off the board."""
    colour = torch.randint(2, (n, 8, 8), generator=generator)
    around = F.pad(colour, (2, 2, 2, 2), value=-1)                                      # (n, 12, 12)
    labels = torch.stack([around[:, 2 + y:10 + y, 2 + x:10 + x] for y, x in NEAR], dim=1)
    return 2.0 * colour[:, None] - 1, labels


def draw_global(n, generator):
    """n boards (n, 36, 8, 8) and the hue that each cell asks for (n, 1, 8, 8); an item asks for none: -1.

    Channels: an item's code (16 of -1 and 1), its hue (4, one-hot), the code that another cell asks with (16).
    One item in each square of 2 x 2 cells, so that a key of SSA, which sums up a square, has one to tell of.
    """
    code = 2.0 * torch.randint(2, (n, ITEMS // 2, BITS), generator=generator) - 1
    bit = F.one_hot(torch.randint(BITS, (n, ITEMS // 2), generator=generator), BITS)
    code = torch.cat([code, code * (1 - 2 * bit)], dim=1)                               # (n, 16, 16): twins
    hue = torch.randint(HUES, (n, ITEMS), generator=generator)
    is_item = F.one_hot(torch.randint(4, (n, ITEMS), generator=generator), 4).bool()[..., None]      # (n, 16, 4, 1)
    wanted = torch.randint(ITEMS, (n, ITEMS * 4), generator=generator)                  # one for each cell
    question = code.gather(1, wanted[..., None].expand(-1, -1, BITS)).view(n, ITEMS, 4, BITS)
    cells = torch.cat([is_item * code[:, :, None], is_item * F.one_hot(hue, HUES)[:, :, None], ~is_item * question], 3)
    labels = hue.gather(1, wanted).view(n, ITEMS, 4, 1).masked_fill(is_item, -1)
    boards, labels = (t.view(n, 4, 4, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, 8, 8) for t in (cells, labels))
    return boards, labels


TASKS = {"local": (draw_local, 2, len(NEAR)), "global": (draw_global, HUES, 1)}         # answers, questions to a cell


def accuracy(logits, labels):
    """Right answers in percent: logits (n, answers, questions, 8, 8), labels (n, questions, 8, 8), -1 where none."""
    return 100 * (logits.argmax(1) == labels)[labels >= 0].float().mean().item()


def train(row, task, seed):
    """Train until the validation figure no longer rises, then let the learning rate fall to 0; -> dict of figures."""
    began = time.time()
    draw, answers, questions = TASKS[task]
    generator = torch.Generator().manual_seed(seed)                                     # the same boards for every row
    validation = draw(256, torch.Generator().manual_seed(10 ** 6))
    test = draw(1000, torch.Generator().manual_seed(10 ** 6 + 1))                       # used once
    torch.manual_seed(seed)
    channels = validation[0].shape[1]
    backbone = ScalableViT(**NET | ROWS[row][0], in_chans=channels)
    backbone.stages[0].embed = PatchEmbed(channels, NET["dim"], kernel_size=1, stride=1)
    head = nn.Conv2d(backbone.num_features, answers * questions, 1)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, SETTING["lr"], weight_decay=SETTING["weight_decay"], fused=True)

    def network(boards):
        return head(backbone.forward_features(boards)[-1]).unflatten(1, (answers, questions))

    def update(rate):
        boards, labels = draw(SETTING["batch"], generator)
        loss = F.cross_entropy(network(boards), labels, ignore_index=-1)
        optimizer.param_groups[0]["lr"] = rate * SETTING["lr"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    @torch.no_grad()
    def evaluate(boards, labels):
        return accuracy(network(boards), labels)

    curve = []                                                                          # [i]: after (i + 1) every
    while not stopped(curve):
        for i in range(SETTING["every"]):
            update(min(1, (len(curve) * SETTING["every"] + i + 1) / SETTING["warmup"]))
        curve.append(evaluate(*validation))
    for i in range(SETTING["cooldown"]):
        update(1 - (i + 1) / SETTING["cooldown"])
    curve = [round(figure, 2) for figure in curve]
    return {"final": evaluate(*test), "updates": len(curve) * SETTING["every"], "to_95": to_95(curve),
            "area": area(curve), "seconds": round(time.time() - began), "curve": curve}


def stopped(curve):
    """At the ceiling, at the cap, or without a rise over the last `patience` updates."""
    recent = SETTING["patience"] // SETTING["every"]
    flat = len(curve) > recent and max(curve[-recent:]) < max(curve[:-recent]) + SETTING["rise"]
    return flat or len(curve) * SETTING["every"] >= SETTING["cap"] or bool(curve) and curve[-1] >= SETTING["ceiling"]


def continued(curve):
    """The curve up to the cap: after a run has stopped, its last figure stays."""
    return curve + curve[-1:] * (SETTING["cap"] // SETTING["every"] - len(curve))


def to_95(curve):
    """Updates until the validation figure was 95 % for the first time; None if it never was."""
    return next(((i + 1) * SETTING["every"] for i, x in enumerate(curve) if x >= 95), None)


def area(curve):
    """Mean validation figure over all updates up to the cap: the area under the curve, 100 at most."""
    return statistics.mean(continued(curve))


def setting():
    """What all rows share, as it stands in the results file: runs under another setting are kept apart."""
    return json.loads(json.dumps({**SETTING, **NET}))


def finished():
    """{(row, task, seed): figures} of the runs under this setting."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(run["row"], run["task"], run["seed"]): run for run in lines if run["setting"] == setting()}


def run(row, task, seed):
    """Train and add a line to the results file, which is replaced as a whole."""
    result = {"row": row, "task": task, "seed": seed, **train(row, task, seed), "setting": setting()}
    part = RESULTS.with_suffix(".part")
    part.write_text((RESULTS.read_text() if RESULTS.exists() else "") + json.dumps(result) + "\n")
    part.replace(RESULTS)
    print(f"{task}, {row}, seed {seed}: {result['final']:.1f} %, {result['updates']} updates, {result['seconds']} s",
          flush=True)


def figures(row, task, key):
    """One figure of each finished run of a row, in the order of the seeds."""
    return [run[key] for name, run in sorted(finished().items()) if name[:2] == (row, task)]


def table():
    """Markdown: every row's figures over the seeds, beside the paper's."""


def differences():
    """Markdown."""


def main():
    global RESULTS
    parser = argparse.ArgumentParser(description="The paper's ablations in miniature.")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row and task (default: %(default)s)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, metavar="FILE",
                        help="default: docs/ablation.jsonl")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw learning curves; needs matplotlib")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    RESULTS = args.results
    for seed in range(args.seeds):                                                      # a whole table, then the next
        for task in TASKS:
            for row in ROWS:
                if (row, task, seed) not in finished():
                    run(row, task, seed)
    print(table())


if __name__ == "__main__":
    main()
