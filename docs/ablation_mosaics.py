"""Tables 4, 5 and 7 on real pixels: the rows of ablation.py as backbones of Semantic FPN.

    python docs/ablation_mosaics.py --data DIR      train on mosaics of DIR/{train,val}/CLASS/*
    python docs/ablation_mosaics.py --table         the mean IoU so far beside the paper's

Each row is scalablevit_tiny with that row's arguments, trained from nothing by segmentation.py with
its settings for mosaics, seeds 0, 1 and 2; a stopped run goes on.  WSA & SWSA stands for Swin of
Table 4, and WSA & SSA with r_c = 1 for Twins: their kinds of attention in this network.

Expected, before any run.  At 80 pixels the four stages have 20 x 20, 10 x 10, 5 x 5 and 3 x 3
tokens, so windows of 7 x 7 cover the last two whole: only the first two can lack long range, and
the pyramid above them adds context to every row.  A cell is some 40 pixels wide, and its texture
says its class.  So

- WSA is lowest but for the rows without PEG, by 1 to 3 points; in the paper it is by 4.6.
- IWSA is above WSA by 1 to 2 points: LIM joins its nine windows of the first stage.
- SSA and SSA with r_c = 1 do not differ by more than the interval: the paper has 0.7 points.
- LIM is above LEM by less than 1 point, in the paper by 3.8: with one window LEM is LIM.
- Swin's and Twins' kinds are within an interval of the network; in the paper 3.4 and 1.7 below.
- PEG adds less than 1 point: the pyramid's convolutions see the borders of the image, too.
- The network, IWSA & SSA, is among the best three, but not separable from IWSA.
- Intervals of 3 seeds are 2 to 4 points wide: most pairs will not be told apart.
"""
import argparse
import json
import pathlib
import statistics

import ablation
import segmentation
import torch
from scalablevit import scalablevit_tiny
from train_minimal import save

ROWS = {row: (arguments, mean_iou) for row, (arguments, _, mean_iou) in ablation.ROWS.items()}
ROWS["WSA & SWSA (Swin)"] = (dict(pattern=("wsa", "swsa")), 41.5)
ROWS["WSA & SSA, r_c = 1 (Twins)"] = (dict(pattern=("wsa", "ssa"), rc=(1,)), 43.2)
SEEDS = 3
T = 4.303                                       # Student's t for 95 % and two degrees of freedom


def backbone(row):
    """A row's arguments, for the four stages of scalablevit_tiny."""
    arguments = dict(ROWS[row][0], num_classes=0)
    if "rc" in arguments:
        arguments["rc"] = (1,) * 4
    return scalablevit_tiny(**arguments)


def folder_of(args, row, seed):
    name = "".join(letter for letter in row if letter.isalnum())
    return args.output / f"{name}_{seed}"


def train(args, row, seed, *more):
    folder = folder_of(args, row, seed)
    torch.manual_seed(seed)
    model = backbone(row)
    init = folder / "init.pt"
    save(dict(model=model.state_dict(), config=model.config), init)
    segmentation.main([
        "--data", str(args.data), "--output", str(folder), "--init", str(init),
        "--seed", str(seed), "--no-fuse", *more])


def table(args):
    """Print the last mean IoU of each row, with the interval of its mean, beside the paper's."""
    print("| | mean IoU, % | the paper's |\n|---|---|---|")
    for row, (_, paper) in ROWS.items():
        scores = []
        for seed in range(SEEDS):
            log = folder_of(args, row, seed) / "log.jsonl"
            if log.exists():
                last = json.loads(log.read_text().splitlines()[-1])
                scores.append(last["score"])
        text = f"{len(scores)} of {SEEDS} runs"
        if len(scores) == SEEDS:
            around = T * statistics.stdev(scores) / SEEDS ** 0.5
            text = f"{statistics.mean(scores):.1f} ± {around:.1f}"
        print(f"| {row} | {text} | {paper or '–'} |")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="folder with train/CLASS/*, val/CLASS/*")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/mosaics"))
    parser.add_argument("--table", action="store_true")
    args, more = parser.parse_known_args(argv)                      # the rest is segmentation.py's
    if not args.table:
        for seed in range(SEEDS):
            for row in ROWS:
                train(args, row, seed, *more)
    table(args)


if __name__ == "__main__":
    main()
