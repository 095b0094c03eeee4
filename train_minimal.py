"""Train ScalableViT on a folder of images: on a laptop, on one GPU, or on many.

    python train_minimal.py                                    tiny, on digits that it draws
    python train_minimal.py --data DIR                         tiny, on DIR/{train,val}/CLASS/*
    torchrun --nproc_per_node=8 train_minimal.py --data DIR --model s        the paper's run
    python train_minimal.py --predict photo.jpg                with the best weights of runs/tiny

Stop it whenever you like: the same command goes on from the last save.  Settings and their
meanings stand at the top of this file; docs/training.md says more.
"""
import argparse
import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

import scalablevit

env = os.environ.get
RANK = int(env("RANK", 0))                                          # torchrun sets it
WORLD_SIZE = int(env("WORLD_SIZE", 1))
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
if DEVICE.type != "cpu":
    torch.accelerator.set_device_index(int(env("LOCAL_RANK", 0)))
CUDA = DEVICE.type == "cuda"

# ---------------------------------------------------------------------------- settings
# Each is a flag, too: --batch-size 32, --no-bf16.
GENERAL = dict(
    data="",                 # folder with train/CLASS/* and val/CLASS/*; else digits are drawn
    output="",               # folder of the run; else runs/MODEL
    init="",                 # initial weights, from this program or published
    eval=False,              # only evaluate best.pt, or --init
    fuse=False,              # use the kernels (docs/kernels.md)
    compile=False,           # use torch.compile
    bf16=CUDA,               # autocast to bfloat16
    workers=8 if CUDA else 0,        # loading processes of each training process
    save_every=500,          # steps between saves of last.pt
)
PAPER = dict(                # Appendix C and the published recipe; RandAugment as in DeiT
    size=224,                # side of an image in pixels
    epochs=300,
    warmup_epochs=5.0,
    batch_size=128,          # images per process and backward pass
    accum=1,                 # backward passes per step
    lr=1e-3,                 # peak for 1024 images per step; scaled linearly with their number
    weight_decay=0.05,
    clip_grad=5.0,           # a longer gradient is scaled down to this norm; inf: never
    label_smoothing=0.1,
    drop_path_rate=0.2,      # stochastic depth
    mixup=0.8,               # alpha of MixUp; each batch gets it or CutMix
    cutmix=1.0,              # alpha of CutMix
    reprob=0.25,             # probability of random erasing
    randaugment=2,           # operations, each applied with probability 1/2
    min_scale=0.08,          # area of the smallest random crop
    aug_repeats=3,           # an epoch shows a third of the images, three times each
    seed=0,
)
LARGE = dict(PAPER, drop_path_rate=0.5)
TINY = dict(                 # for small sets: crops and flips only
    PAPER, size=112, epochs=100, batch_size=64, lr=0.032, min_scale=0.25, drop_path_rate=0.0,
    mixup=0.0, cutmix=0.0, reprob=0.0, randaugment=0, aug_repeats=1)
DIGITS = dict(TINY, size=56, epochs=8, warmup_epochs=1.0, min_scale=0.5)
RECIPES = {"tiny": TINY, "s": PAPER, "b": LARGE, "l": LARGE}


class UserError(Exception):
    """A user's mistake: ends the program with one line instead of a traceback."""


def say(text):
    if RANK == 0:
        print(text, flush=True)


def recipe(known):
    """The settings for a model and its data."""
    return RECIPES[known["model"]] if known["data"] or known["model"] != "tiny" else DIGITS


def parse_args(argv=None, doc=__doc__, general=GENERAL, recipe=recipe, name="model"):
    """The settings, each from the command line, else the run in --output, else the recipe.

    Returns them and the checkpoint that they go on from, {} for a new run.  The arguments are those
    of docs/dense.py, whose runs are named after their framework.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS)
    parser.add_argument("--model", choices=RECIPES)
    parser.add_argument("--predict", nargs="+")
    known = {**general, "model": "tiny", "predict": None}
    numbers = recipe(known)
    for key, value in (general | numbers).items():
        kind = dict(type=type(value))
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + key.replace("_", "-"), help=f"default: {value!r}", **kind)

    given = vars(parser.parse_args(argv))
    known |= given
    output = pathlib.Path(known["output"] or f"runs/{dict(numbers, **known)[name]}")
    use = known["eval"] or "predict" in given                       # rather than train
    weights = given.get("init", output / "best.pt") if use else output / "last.pt"
    if not use and not weights.exists():                            # stopped in the first save
        weights = output / "best.pt"
    run = load(weights)
    saved = run.get("settings", {})
    known.update(saved, **given)
    args = argparse.Namespace(**recipe(known) | known)
    args.output = output
    if run or use:
        args.init = weights
    args.step_size = WORLD_SIZE * args.accum * args.batch_size      # images in a step
    args.settings = {key: getattr(args, key) for key in [*numbers, "model", "data", "bf16"]}
    for key, value in args.settings.items():
        if saved.get(key, value) != value:
            say(f"{key}: {saved[key]!a} in {str(weights)!a}, now {value!a}")
    return args, run


# ---------------------------------------------------------------------------- data
def draw_digits(root):
    """root/{train,val}/{0..9}/*.png: a digit of random place, size and color on dark blocks."""
    part = root.with_suffix(".part")
    rng = np.random.default_rng(0)
    for split, n in (("train", 4000), ("val", 1000)):
        for i in range(n):
            digit = str(i % 10)
            blocks = rng.integers(0, 86, (12, 12, 3), np.uint8)
            image = Image.fromarray(blocks).resize((64, 64), Image.NEAREST)
            font = ImageFont.load_default(rng.uniform(45, 64))
            color = tuple(rng.integers(128, 256, 3).tolist())
            ImageDraw.Draw(image).text(rng.uniform(19, 45, 2), digit, color, font, anchor="mm")
            folder = part / split / digit
            os.makedirs(folder, exist_ok=True)
            image.save(folder / f"{i:04}.png")
    part.rename(root)                                               # appears when it is complete


def load_image(path):
    """An RGB image, rotated as its EXIF data says."""
    try:
        image = Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"))
        if image.mode[0] in "IF":                                   # would be clipped to white
            raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:                                      # decoders raise almost anything
        raise UserError(f"cannot read {str(path)!a}: {str(error)!a}")


class Images(datasets.ImageFolder):
    """root/CLASS/**, without hidden files and folders.

    An item is asked for by (index, seed), so every process augments it alike.
    """

    def __init__(self, root, transform):
        def shown(path):
            return datasets.folder.is_image_file(path) and os.sep + "." not in path[len(str(root)):]

        super().__init__(root, transform, loader=load_image, is_valid_file=shown)

    def find_classes(self, root):
        names, _ = super().find_classes(root)
        classes = [name for name in names if name[0] != "."]
        if len(classes) < 2:
            raise UserError(f"{str(root)!a} must have a folder for each of two or more classes")
        return classes, {name: i for i, name in enumerate(classes)}

    def __getitem__(self, key):
        index, seed = key
        torch.default_generator.manual_seed(seed)                   # wherever it is loaded
        return super().__getitem__(index)


def transform(args, train):
    """PIL image -> (3, size, size) uint8."""
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [v2.Resize(round(args.size * 256 / 224), bicubic), v2.CenterCrop(args.size)]
    if train:
        crop = v2.RandomResizedCrop(args.size, (args.min_scale, 1), interpolation=bicubic)
        operation = v2.RandAugment(1, 9, num_magnitude_bins=11, fill=(124, 116, 104))
        operations = [v2.RandomApply([operation])] * args.randaugment           # with p = 1/2
        steps = [crop, v2.RandomHorizontalFlip(), *operations]
    return v2.Compose([*steps, v2.PILToTensor()])


def load_data(args, split):
    data = pathlib.Path(args.data or args.output / "digits")
    if not args.data and RANK == 0 and not data.exists():
        draw_digits(data)
    if WORLD_SIZE > 1:
        dist.barrier()                                              # the digits are drawn
    return Images(data / split, transform(args, split == "train"))


def training_batches(n, steps, start, args):
    """Yield this process's batches of (index, seed), from step `start` on; an epoch has `steps`.

    With repeated augmentation a step shows a third of its images three times, in the order a b c …
    a b c …, so that MixUp seldom meets copies.
    """
    different = math.ceil(args.step_size / args.aug_repeats)        # images in a step
    for step in range(start, steps * args.epochs):
        epoch, i = divmod(step, steps)
        if step == start or i == 0:
            torch.manual_seed(hash((args.seed, epoch)))
            chunks = torch.randperm(n).split(different)
        images = chunks[i].repeat(args.aug_repeats).tolist()
        for k in range(args.accum):
            places = range(RANK + k * WORLD_SIZE, args.step_size, args.accum * WORLD_SIZE)
            yield [(images[p], hash((args.seed, step, p))) for p in places]


def normalize(images):
    """(B, 3, size, size) uint8 -> float32 on the device, with ImageNet's mean and deviation."""
    images = images.to(DEVICE).float() / 255
    return v2.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# ---------------------------------------------------------------------------- model and optimizer
def build_model(args, **changes):
    """scalablevit_MODEL: new, or with the weights of --init, of the run, or of its best epoch."""
    model = getattr(scalablevit, f"scalablevit_{args.model}")(**changes)
    if args.init:
        try:
            loaded = scalablevit.load_model(args.init, **changes)
        except ValueError as error:
            raise UserError(error)
        if loaded.channels != model.channels:
            raise UserError(f"{str(args.init)!a} is no scalablevit_{args.model}: change --model")
        model = loaded
    model.to(DEVICE, memory_format=torch.channels_last)             # the layout that DDP expects
    if args.fuse:
        from scalablevit_kernels import fuse                        # docs/kernels.md
        fuse(model)
    if args.compile:
        model.compile()
    return model


def build_optimizer(model, args):
    """AdamW, without weight decay for biases, norms and the PEG."""
    exempt = model.no_weight_decay()
    groups = [{"params": [], "weight_decay": args.weight_decay},
              {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        groups[name in exempt]["params"].append(p)
    return torch.optim.AdamW(groups, fused=True)


def learning_rate(epoch, args):
    """Linear warm-up from 1e-6, then cosine decay to 1e-5; `epoch` counts fractions."""
    peak = args.lr * args.step_size / 1024
    if epoch < args.warmup_epochs:
        return 1e-6 + (peak - 1e-6) * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * progress)) / 2


# ---------------------------------------------------------------------------- one step, evaluation
def augment(images, labels, args):
    """Random erasing, then MixUp or CutMix: images (B, 3, size, size), labels (B,) or (B, n)."""
    erase = v2.RandomErasing(args.reprob, value="random")
    images = torch.stack([erase(image) for image in images])
    mixes = []
    for mix, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)):
        if alpha:
            mixes.append(mix(alpha=alpha, num_classes=args.num_classes))
    return v2.RandomChoice(mixes)(images, labels) if mixes else (images, labels)


def autocast(args):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16)


def train_step(model, optimizer, batches, step, epoch, args):
    """One optimizer step on accum batches; `epoch` counts fractions.  Returns this process's loss."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(epoch, args)
    total = 0.0
    for i in range(args.accum):
        images, labels = next(batches)                              # (B, 3, size, size), (B,)
        torch.manual_seed(hash((args.seed, step, i, RANK)))         # a resumed run draws the same
        images, labels = augment(normalize(images), labels.to(DEVICE), args)
        model.require_backward_grad_sync = i + 1 == args.accum      # DDP averages once per step
        with autocast(args):
            loss = F.cross_entropy(model(images), labels, label_smoothing=args.label_smoothing)
        loss /= args.accum
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


@torch.no_grad()
def evaluate(model, dataset, args):
    """Top-1 accuracy in percent; each process evaluates its share of the images."""
    model.eval()
    hits = torch.zeros(1, device=DEVICE)
    loader = DataLoader(
        dataset, args.batch_size, sampler=[(i, 0) for i in range(RANK, len(dataset), WORLD_SIZE)],
        num_workers=args.workers)
    for images, labels in loader:
        with autocast(args):
            found = model(normalize(images)).argmax(1)              # (B,)
        hits += (found == labels.to(DEVICE)).sum()
    if WORLD_SIZE > 1:
        dist.all_reduce(hits)
    return 100 * hits.item() / len(dataset)


@torch.no_grad()
def predict(args, run):
    """Print the three likeliest classes of each image."""
    model = build_model(args).eval()
    names = run.get("classes", range(model.num_classes))
    for path in args.predict:
        image = transform(args, train=False)(load_image(path))      # (3, size, size)
        chances = model(normalize(image[None]))[0].softmax(0)       # (classes,)
        best = chances.argsort(descending=True)[:3].tolist()
        say(f"{path!a}: {', '.join(f'{names[i]!a} {100 * chances[i]:.1f} %' for i in best)}")


# ---------------------------------------------------------------------------- checkpoints
def load(file):
    """What a checkpoint holds; {} if there is no such file."""
    if not os.path.exists(file):
        return {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):    # in some published files
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{str(file)!a} is not a checkpoint: {type(error).__name__}")


def save(state, file):
    """Atomically: the file is the old one or the new one."""
    os.makedirs(file.parent, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)


def check_run(run, steps, classes, args):
    """Refuse what would train wrongly: processes that differ, too few images, other data."""
    mine = [run.get("step"), steps, classes, args.settings]
    everyone = [mine] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(everyone, mine)
    if everyone != [mine] * WORLD_SIZE:
        raise UserError(f"processes differ in step, steps, classes or settings: {everyone!a:.500}")
    if not steps:
        raise UserError("a step takes more images than there are: lower --batch-size or --accum")
    if run and run.get("steps") != steps:
        raise UserError(f"{str(args.output)!a} has {run.get('steps')} steps per epoch, not {steps}: another --output?")


def train(model, optimizer, train_set, val_set, steps, run, args):
    """Go on from where the run stands; an epoch has `steps` steps."""
    start = run.get("step", 0)
    total = steps * args.epochs
    loss_sum = run.get("loss_sum", 0.0)                             # of this epoch
    log = run.get("log", [])
    say(f"{str(args.output)!a}: {len(train_set)} images in {len(train_set.classes)} classes, step {start} of {total}")
    if start >= total:
        say("finished: more --epochs, or another --output")
    net = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    keys = training_batches(len(train_set), steps, start, args)
    batches = iter(DataLoader(train_set, batch_sampler=keys, num_workers=args.workers))
    began = time.time()
    for step in range(start, total):
        loss = train_step(net, optimizer, batches, step, step / steps, args)
        loss_sum += loss
        done = step + 1
        ended = done % steps == 0                                   # the epoch
        if ended or done % 50 == 0:
            seconds = (time.time() - began) / (done - start)
            say(f"step {done}/{total}  loss {loss:.3f}  {seconds:.3f} s per step  "
                f"{seconds * (total - done) / 60:.0f} min left")
        if ended:
            top1 = evaluate(model, val_set, args)
            log.append(dict(epoch=done // steps, loss=loss_sum / steps, top1=top1))
            say(f"epoch {done // steps}  loss {loss_sum / steps:.3f}  top-1 {top1:.2f} %")
            loss_sum = 0.0
        if RANK == 0 and (ended or done % args.save_every == 0):
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), config=model.config,
                settings=args.settings, classes=train_set.classes, steps=steps, step=done,
                loss_sum=loss_sum, log=log)
            if ended:
                if top1 == max(entry["top1"] for entry in log):
                    save(state, args.output / "best.pt")
                (args.output / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
            save(state, args.output / "last.pt")


def main(argv=None):
    args, run = parse_args(argv)
    if args.predict:
        return predict(args, run)
    if WORLD_SIZE > 1:
        dist.init_process_group()
    val_set = load_data(args, "val")
    classes = val_set.classes
    if run.get("classes", classes) != classes:
        raise UserError(f"{str(args.init)!a} has other classes than the data: another --output?")
    if args.eval:
        network = build_model(args)
        if "classes" not in run:
            say(f"{str(args.init)!a} names no classes; assumed for its {network.num_classes}: {classes!a:.100}")
        return say(f"top-1 {evaluate(network, val_set, args):.2f} %")

    train_set = load_data(args, "train")
    if train_set.classes != classes:
        raise UserError(f"classes in only one of train and val: {sorted(set(classes) ^ set(train_set.classes))[:9]!a}")
    steps = len(train_set) // args.step_size                        # per epoch
    check_run(run, steps, classes, args)
    torch.manual_seed(args.seed)
    args.num_classes = len(classes)
    model = build_model(args, num_classes=args.num_classes, drop_path_rate=args.drop_path_rate)
    optimizer = build_optimizer(model, args)
    if run:
        state = optimizer.state_dict()                              # its settings are this file's
        state["state"] = run["optimizer"]["state"]
        optimizer.load_state_dict(state)
    train(model, optimizer, train_set, val_set, steps, run, args)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, ImportError) as error:  # the last line: workers add more
        print(f"train_minimal.py: {str(error).splitlines()[-1].encode('unicode_escape').decode()}",
              file=sys.stderr)
        sys.exit(2)
