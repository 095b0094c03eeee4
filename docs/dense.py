"""What detection.py and segmentation.py share: settings, the training loop and pictures.

Settings, stopping and going on follow train_minimal.py.  Each program is a module with CHOICES,
SETTINGS, recipe, FOLDER, load_data, build, schedule, learning_rate, collate, loss, evaluate, find,
draw and describe.  Left out of torchvision's references: aspect-ratio grouping, SyncBN, EMA.
"""
import argparse
import colorsys
import json
import math
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))          # this repository's files
import scalablevit  # noqa: E402
import train_minimal  # noqa: E402
from dense_data import Mosaics  # noqa: E402  (needs the path, too)
from train_minimal import (  # noqa: E402
    CUDA, DEVICE, RANK, WORLD_SIZE, UserError, check_run, load, load_image, save, say)

# ---------------------------------------------------------------------------- settings
GENERAL = dict(
    data="",                 # folder; else mosaics of the digits that train_minimal.py draws
    output="",               # folder of the run; else runs/FRAMEWORK
    init="",                 # initial weights of the backbone; with --eval or --predict: the file
    eval=False,              # only evaluate best.pt, or --init
    fuse=True,               # use the kernels, if they are installed (docs/kernels.md)
    bf16=CUDA,               # autocast to bfloat16
    checkpointing=False,     # recompute the backbone's blocks instead of keeping activations
    workers=8 if CUDA else 0,        # loading processes of each training process
    save_every=500,          # steps between saves of last.pt
)


def is_mosaic(data):
    """Whether to cut mosaics: from digits, or from a folder with train/CLASS/*."""
    return not data or (pathlib.Path(data) / "train").is_dir()


def make_parser(program):
    parser = argparse.ArgumentParser(
        description=program.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS)
    parser.add_argument("--predict", nargs="+", metavar="IMAGE")
    for name, choices in program.CHOICES.items():
        parser.add_argument("--" + name, choices=choices, help=f"default: {choices[0]}")
    for name, value in dict(GENERAL, **program.SETTINGS).items():
        kind = dict(type=type(value))
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + name.replace("_", "-"), help=f"default: {value!r}", **kind)
    return parser


def parse_args(program, argv=None):
    """train_minimal.py's rule: the command line, else the run in --output, else the recipe.

    Returns the settings and the checkpoint that they go on from, {} for a new run.
    """
    given = vars(make_parser(program).parse_args(argv))
    known = {name: choices[0] for name, choices in program.CHOICES.items()}
    output = pathlib.Path(given.get("output", f"runs/{given.get('framework', known['framework'])}"))
    use = given.get("eval") or "predict" in given                   # rather than train
    weights = given.get("init", output / "best.pt") if use else output / "last.pt"
    if not use and not weights.exists():                            # stopped in the first save
        weights = output / "best.pt"
    run = load(weights)
    saved = run.get("settings", {})
    if (use or run) and saved.get("framework") not in program.CHOICES["framework"]:
        raise UserError(f"{str(weights)!a} must be a file that this program has saved")
    known.update(GENERAL, predict=None)
    known.update(saved)
    known.update(given)
    args = argparse.Namespace(**{**program.recipe(known), **known, "output": output})
    for name in set(program.SETTINGS) - {"seed", "warmup_steps", "weight_decay"}:
        if getattr(args, name) <= 0:
            raise UserError(f"{name} must be more than 0, not {getattr(args, name)}")
    args.aug_repeats = 1
    args.step_size = WORLD_SIZE * args.accum * args.batch_size      # images in a step
    remembered = [*program.CHOICES, *program.SETTINGS, "data", "bf16", "checkpointing"]
    args.settings = {name: getattr(args, name) for name in remembered}
    for name, value in saved.items():
        if args.settings[name] != value:
            say(f"{name}: {value!a} in {str(weights)!a}, now {args.settings[name]!a}")
    return args, run


# ---------------------------------------------------------------------------- data and model
def mosaics(args, split, view):
    """Fresh mosaics in training; for validation an eighth as many, always the same."""
    folder = pathlib.Path(args.data or args.output / "digits")
    if not args.data and RANK == 0 and not folder.exists():
        train_minimal.draw_digits(folder)
    if WORLD_SIZE > 1:
        dist.barrier()                                              # the digits are drawn
    n = args.mosaics if split == "train" else math.ceil(args.mosaics / 8)
    return Mosaics(folder / split, n, args.size, view)


def pretrained(name, file=None):
    """scalablevit_NAME without a head, with the weights in `file`, if given."""
    backbone = getattr(scalablevit, f"scalablevit_{name}")(num_classes=0)
    if not file:
        return backbone
    try:
        loaded = scalablevit.load_model(file, num_classes=0)
    except ValueError as error:
        raise UserError(error)
    if loaded.channels != backbone.channels:
        raise UserError(f"{str(file)!a} is no scalablevit_{name}: change --model")
    return loaded.train()


def build_model(program, args, run, classes):
    """The framework on a new backbone, on that of --init, or as in the run."""
    if run:
        backbone = scalablevit.ScalableViT(**run["config"])
    else:
        backbone = pretrained(args.model, args.init)
    backbone.norm.requires_grad_(False)                             # only a classifier uses it
    model = program.build(backbone, len(classes), args)
    model.config = backbone.config
    if run:
        try:
            model.load_state_dict(run["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"the run has another model than these settings: {reason!a:.200}")
    backbone.set_grad_checkpointing(args.checkpointing)
    if args.fuse:
        try:
            from scalablevit_kernels import fuse
            fuse(backbone)
        except ImportError:
            say("scalablevit_kernels is not installed: going on without (docs/kernels.md)")
    return model.to(DEVICE, memory_format=torch.channels_last)


def load_model(program, file):
    """The model and the class names in a file that the program has saved."""
    args, run = parse_args(program, ["--eval", "--init", str(file)])
    return build_model(program, args, run, run["classes"]).eval(), run["classes"]


# ---------------------------------------------------------------------------- training
def autocast(args):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16)


def train_step(program, net, optimizer, batches, step, args):
    """One optimizer step on accum batches; returns the mean loss of all processes."""
    net.train()
    total = torch.zeros((), device=DEVICE)
    for i in range(args.accum):
        batch = next(batches)
        torch.manual_seed(hash((args.seed, step, i, RANK)))         # a resumed run draws the same
        net.require_backward_grad_sync = i + 1 == args.accum        # DDP averages once per step
        with autocast(args):
            loss = program.loss(net, *batch) / args.accum
        loss.backward()
        total += loss.detach()
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    total = total.item() / WORLD_SIZE
    if not math.isfinite(total):
        raise UserError(f"step {step + 1}: the loss is {total}; lower --lr, or look at the data")
    optimizer.step()
    optimizer.zero_grad()
    return total


def share(dataset, args):
    """This process's share of a dataset, item by item; an item's seed is its index."""
    keys = [(i, i) for i in range(RANK, len(dataset), WORLD_SIZE)]
    return DataLoader(dataset, batch_size=None, sampler=keys, num_workers=args.workers)


@torch.no_grad()
def evaluate(program, model, dataset, args):
    """The program's score and its text, from all processes' shares."""
    if WORLD_SIZE > 1:
        for buffer in model.buffers():                              # BatchNorm's statistics
            dist.broadcast(buffer, 0)
    model.eval()
    with autocast(args):
        return program.evaluate(model, dataset, args)


def train(program, model, optimizer, train_set, val_set, run, args):
    """Go on from where the run stands; an evaluation follows every args.every steps."""
    start, total = run.get("step", 0), args.total
    losses, log = run.get("losses", []), run.get("log", [])         # since the last evaluation
    say(f"{str(args.output)!a}: {len(train_set)} images of {len(train_set.classes)} classes, "
        f"step {start} of {total}")
    if start >= total:
        say("finished: train longer, or give another --output")
    net = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    keys = train_minimal.training_batches(len(train_set), args.steps_per_epoch, start, args)
    batches = iter(DataLoader(
        train_set, batch_sampler=keys, num_workers=args.workers, collate_fn=program.collate))
    began = time.time()
    for step in range(start, total):
        rate = program.learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(train_step(program, net, optimizer, batches, step, args))
        done = step + 1
        scored = done % args.every == 0 or done == total
        if scored or done % 50 == 0:
            seconds = (time.time() - began) / (done - start)
            say(f"step {done}/{total}  loss {losses[-1]:.3f}  lr {rate:.1e}  "
                f"{seconds:.3f} s per step  {seconds * (total - done) / 60:.0f} min left")
        if scored:
            score, text = evaluate(program, model, val_set, args)
            log.append(dict(step=done, loss=sum(losses) / len(losses), score=score))
            say(f"step {done}  loss {log[-1]['loss']:.3f}  {text}")
            losses = []
        if RANK == 0 and (scored or done % args.save_every == 0):
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), config=model.config,
                settings=args.settings, classes=train_set.classes, steps=args.steps_per_epoch,
                step=done, losses=losses, log=log)
            if scored:
                if score == max(entry["score"] for entry in log):
                    save(state, args.output / "best.pt")
                (args.output / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
            save(state, args.output / "last.pt")


def begin(program, val_set, run, args):
    """Check everything, then train."""
    train_set = program.load_data(args, "train")
    if train_set.classes != val_set.classes:
        raise UserError("train and val must have the same classes")
    args.steps_per_epoch = len(train_set) // args.step_size
    check_run(run, args.steps_per_epoch, train_set.classes, args)
    args.total, args.every = program.schedule(args)
    args.epochs = math.ceil(args.total / args.steps_per_epoch)
    torch.manual_seed(args.seed)
    model = build_model(program, args, run, train_set.classes)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=args.weight_decay, fused=True)
    if run:
        optimizer.load_state_dict(run["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay
    train(program, model, optimizer, train_set, val_set, run, args)
    return model


def main(program, argv=None):
    torch.set_float32_matmul_precision("high")                      # TF32
    args, run = parse_args(program, argv)
    if args.predict:
        return predict(program, build_model(program, args, run, run["classes"]), run, args)
    if not is_mosaic(args.data) and not (pathlib.Path(args.data) / program.FOLDER).is_dir():
        raise UserError(f"{args.data!a} must have train/CLASS/* and val/CLASS/*, or a folder "
                        f"{program.FOLDER}: see --help")
    if WORLD_SIZE > 1:
        dist.init_process_group()
    val_set = program.load_data(args, "val")
    if run.get("classes", val_set.classes) != val_set.classes:
        raise UserError("the run has other classes than the data")
    if args.eval:
        model = build_model(program, args, run, val_set.classes)
        say(evaluate(program, model, val_set, args)[1])
    else:
        model = begin(program, val_set, run, args)
    if RANK == 0:
        show(program, model, val_set, args.output / f"{args.framework}.png")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def run_program(program):
    """main(), where a user's mistake ends the program with one line and status 2."""
    try:
        main(program)
    except (UserError, OSError, ImportError) as error:  # the last line: workers add more
        reason = str(error).splitlines()[-1]
        print(f"{pathlib.Path(program.__file__).name}: {reason!a}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------- pictures
def open_image(path):
    """(3, H, W) uint8."""
    return v2.functional.pil_to_tensor(load_image(path))


def enlarge(image):
    """(3, H, W) uint8 -> a picture in which text can be read, and how many times as large it is."""
    zoom = max(1, 320 // min(image.shape[1:]))
    picture = v2.functional.to_pil_image(image)
    return picture.resize((zoom * picture.width, zoom * picture.height)), zoom


def color(label):
    """Red, green and blue of a class: neighbors differ."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.8, 1.0))


def write(picture, place, text):
    """White on a black outline: legible on any background."""
    font = ImageFont.load_default(14)
    pen = ImageDraw.Draw(picture)
    pen.text(place, text, "white", font, stroke_width=2, stroke_fill="black")


def predict(program, model, run, args):
    """A picture beside each image, and its objects or classes line by line."""
    for path in args.predict:
        image = open_image(path)
        found = program.find(model, image)
        for line in program.describe(found, run["classes"]):
            say(f"{path!a}: {line}")
        file = pathlib.Path(path).with_suffix(f".{pathlib.Path(program.__file__).stem}.png")
        program.draw(image, found, run["classes"]).save(file)
        say(f"{path!a}: {str(file)!a}")


def show(program, model, dataset, file, width=360):
    """A picture of the first images: truth above prediction."""
    rows = [[], []]
    for i in range(min(6, len(dataset))):
        image, truth = dataset[i, i]
        for row, found in zip(rows, (truth, program.find(model, image))):
            picture = program.draw(image, found, dataset.classes)
            height = max(1, round(picture.height * width / picture.width))
            row.append(picture.resize((width, height)))
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (width * len(rows[0]), sum(heights) + 8), "white")
    for row, y in zip(rows, (0, heights[0] + 8)):
        for i, picture in enumerate(row):
            sheet.paste(picture, (width * i, y))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    say(f"truth above prediction: {str(file)!a}")
