"""Train ScalableViT on a folder of images, on a laptop, one GPU or several multi-GPU machines.

    python train_minimal.py [--data DIR]        tiny, on DIR/{train,val}/CLASS/*, or on digits drawn by the program
    torchrun --nproc_per_node=8 train_minimal.py --data DIR --model s         the paper's run: 8 x 128 images per step
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
import pathlib
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn        # here, because the program would not exit if DDP imported it later, after init
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import scalablevit

# The settings, each with a flag; what they mean: docs/training.md.  lr is for 1024 images per step, scaled linearly.
PAPER = dict(size=224, epochs=300, warmup_epochs=5.0, batch_size=128, accum=1, lr=1e-3, weight_decay=0.05,
             clip_grad=5.0, label_smoothing=0.1, drop_path_rate=0.2, mixup=0.8, cutmix=1.0, reprob=0.25, randaugment=2,
             min_scale=0.08, aug_repeats=3, seed=0)                 # Appendix C, plus RandAugment as in DeiT
TINY = PAPER | dict(size=112, epochs=100, batch_size=64, lr=0.032, drop_path_rate=0.0, mixup=0.0, cutmix=0.0,
                    reprob=0.0, randaugment=0, min_scale=0.25, aug_repeats=1)
DIGITS, LARGE = TINY | dict(size=56, epochs=8, warmup_epochs=1.0, min_scale=0.5), PAPER | dict(drop_path_rate=0.5)
SETTINGS = PAPER | dict(data="", model="", init="", bf16=False, extent=[])         # saved; extent: images, and per step
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))       # set by torchrun
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
normalize = v2.Compose([v2.ToDtype(torch.float32, True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--data", type=os.path.abspath, metavar="DIR", help="has train/CLASS/* and val/CLASS/* (default: digits)")
flag("--model", choices=("tiny", "s", "b", "l"), help="model size (default: tiny)")
flag("--output", type=pathlib.Path, metavar="DIR", help="run folder; an unfinished run there resumes (runs/MODEL)")
flag("--init", type=os.path.abspath, metavar="FILE", help="initial weights: from this program, or published ones")
flag("--resume", action="store_true", help="resume the run in --output with changed settings, e.g. more epochs")
flag("--eval", action="store_true", help="only evaluate --init (default: best.pt in --output)")
flag("--workers", type=int, default=8 if CUDA else 0, metavar="N", help="data loading workers per training process")
flag("--save-every", type=int, default=1000, metavar="N", help="save last.pt every N steps (1000)")
flag("--bf16", action=argparse.BooleanOptionalAction, default=CUDA, help="autocast to bfloat16 (default: on a GPU)")
for name, value in PAPER.items():
    flag("--" + name.replace("_", "-"), type=type(value), default=value, metavar="N",
         help=f"s: {value}; b, l: {LARGE[name]}; tiny: {TINY[name]}; digits: {DIGITS[name]}")


def check(condition, message):
    if not condition:                                               # a user error: one line, no traceback
        parser.exit(2, f"train_minimal.py: {' '.join(message.split())}\n")


def draw_digits(root, train=400, val=100, side=64):
    """root/{train,val}/{0..9}/*.png: a digit of random position, size, rotation and color on darker blocks."""
    part, rng = root.with_suffix(".part"), np.random.default_rng(0)
    for folder, n in [(part / split / str(i), n) for split, n in (("train", train), ("val", val)) for i in range(10)]:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image = Image.fromarray(rng.integers(0, 86, (12, 12, 3), np.uint8)).resize((side, side), Image.NEAREST)
            center, font = side * rng.uniform(0.3, 0.7, 2), ImageFont.load_default(side * rng.uniform(0.7, 1))
            ImageDraw.Draw(mask := Image.new("L", image.size)).text(center, folder.name, 255, font, anchor="mm")
            image.paste(tuple(rng.integers(128, 256, 3).tolist()), mask=mask.rotate(rng.uniform(-15, 15)))
            image.save(folder / f"{i:03}.png")
    part.rename(root)                                               # the folder appears only when it is complete


def read_image(path, size):
    """An RGB image, rotated as EXIF says.  A JPEG is decoded at 1/2, 1/4 or 1/8 if both sides stay >= 3 x size."""
    if not os.path.isfile(path):                                    # opening a FIFO would block forever
        raise OSError("not a regular file")
    with Image.open(path) as image:
        image.draft("RGB", (3 * size, 3 * size))
        image.load()
        if image.mode[0] in "IF":                                   # converting to RGB would clip them to white
            raise OSError(f"more than 8 bits per channel: mode {image.mode}")
        with contextlib.suppress(Exception):                        # EXIF may be corrupt although the pixels are fine
            ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")


class ImageFolder(Dataset):
    """Images under root/CLASS/, recursively; symlinked subfolders are skipped, as they may form cycles.  An item is the
    image (size, size, 3), its mask (1, size, size or 1, 1), 0 where erased, label, and error if replaced, or ""."""

    def __init__(self, root, args, train):
        operation = v2.RandAugment(1, 9, num_magnitude_bins=11, fill=(124, 116, 104))
        augment = [self.random_crop, *args.randaugment * [v2.RandomApply([operation], p=0.5)]]
        center_crop = [v2.Resize(round(args.size * 256 / 224), Image.BICUBIC), v2.CenterCrop(args.size)]
        self.transform = v2.Compose([*(augment if train else center_crop), np.array])
        self.mask = torch.ones(1, *2 * [args.size if args.reprob > 0 else 1], dtype=torch.uint8)
        self.erase = v2.RandomErasing(args.reprob, value=0) if train and args.reprob > 0 else torch.nn.Identity()
        self.args, self.classes = args, sorted(d.name for d in root.glob("[!.]*") if d.is_dir())
        self.samples = [(os.path.join(folder, file), label) for label, name in enumerate(self.classes)
                        for folder, _, files in sorted(os.walk(os.path.join(root, name))) for file in sorted(files)
                        if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")]
        empty = set(self.classes or "*") - {self.classes[label] for _, label in self.samples}
        check(not empty, f"no images ({', '.join(IMG_EXTENSIONS)}) in {root}/{', '.join(sorted(empty)[:9])}")

    def random_crop(self, image):
        """v2.RandomResizedCrop and RandomHorizontalFlip in plain Pillow, which is faster for small images."""
        top, left, h, w = v2.RandomResizedCrop.get_params(image, (self.args.min_scale, 1), (3 / 4, 4 / 3))
        image = image.resize(2 * [self.args.size], Image.BICUBIC, (left, top, left + w, top + h))
        return ImageOps.mirror(image) if torch.rand(()).item() < 0.5 else image

    def __getitem__(self, key):
        index, seed = key
        torch.default_generator.manual_seed(seed)                   # same augmentation, whichever process loads it
        mask, error = self.erase(self.mask), ""
        for _ in range(100):
            path, label = self.samples[index]
            try:
                image = read_image(path, self.args.size)
            except Exception as reason:                             # Pillow's decoders raise almost anything
                error, index = error or f"{path} ({reason})", int(torch.randint(len(self.samples), ()))
            else:
                return self.transform(image), mask, label, error
        raise OSError(f"cannot read {error}, nor 99 other images")


def training_batches(n, args, first, last):
    """Yield this process's batches of keys (index, seed).  An epoch takes n / aug_repeats of n shuffled images,
    aug_repeats times each.  Processes take keys in turn, so `mix` pairs the same images in any number of processes."""
    for step in range(first, last):
        epoch, i = divmod(step, n // (batch := WORLD_SIZE * args.accum * args.batch_size))
        if step == first or i == 0:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(hash((args.seed, epoch))))
        for a in range(args.accum):
            places = range(i * batch + a * WORLD_SIZE + RANK, (i + 1) * batch, args.accum * WORLD_SIZE)
            yield [(int(order[p // args.aug_repeats]), hash((args.seed, epoch, p))) for p in places]


def ignore_signals(worker):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})      # the main process handles them


def mix(images, targets, args):
    """MixUp or CutMix of images (B, 3, H, W) and targets (B, classes); image i is mixed with image i + B/2."""
    mixing = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha > 0]
    # v2 mixes adjacent images, which are copies under repeated augmentation; so it gets the two halves as a batch of 2.
    halves = images.view(2, -1, *images.shape[2:]), targets.view(2, -1)           # (2, B/2·3, H, W), (2, B/2·classes)
    return [mixed.view_as(own) for mixed, own in zip(v2.RandomChoice(mixing)(*halves), (images, targets))]


def setup_distributed():
    """Join the process group if started by torchrun.  Only rank 0 prints."""
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)         # for odd file names
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        store = next(dist.rendezvous("env://"))[0]                  # has addresses from before a restart: use prefixes
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"           # one machine: torchrun counts the restarts
        start = os.environ["TORCHELASTIC_RESTART_COUNT"] if alone else store.add(f"starts of {RANK}", 1)
        dist.init_process_group(store=dist.PrefixStore(str(start), store), rank=RANK, world_size=WORLD_SIZE)


def gather(value):
    values = [value] * WORLD_SIZE                                   # one per process
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def load_checkpoint(path):
    """Load a checkpoint of this program, a published one or a plain state dict, with "model", "config", "settings"."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):               # some published ones contain one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights, config = checkpoint.get("model", checkpoint), checkpoint.get("config", {})
        if "patch_embeds.0.proj.weight" in weights:
            config, weights = scalablevit.official_kwargs(weights), scalablevit.convert_official(weights)
        config = {"num_classes": len(weights["head.bias" if "head.bias" in weights else "head.3.bias"])} | config
        settings = {k: type(SETTINGS[k])(v) for k, v in checkpoint.get("settings", {}).items() if k in SETTINGS}
        return checkpoint | {"model": weights, "config": config, "settings": settings}
    except Exception as error:
        check(False, f"cannot load {path}: {type(error).__name__} {str(error).split('. ')[0][:300]!r}")


@torch.no_grad()
def evaluate(model, loader, bf16):
    """Top-1 and top-5 accuracy in percent; each process evaluates its share of the images."""
    model.eval()
    right = torch.zeros(2, device=DEVICE)
    for images, _, labels, errors in loader:                        # (B, size, size, 3), ..., (B,)
        check(not any(errors), f"cannot read {max(errors)}: validation needs every image")
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            logits = model(normalize(images.to(DEVICE).permute(0, 3, 1, 2)))
        check(logits.isfinite().all(), "the model's outputs are not finite")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.to(DEVICE)[:, None]     # (B, 5)
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
    return [100 * sum(counts) / len(loader.dataset.samples) for counts in zip(*gather(right.tolist()))]


def learning_rate(step, last, warmup, peak):
    """Linear warm-up from 1e-6, then cosine decay to 1e-5."""
    low, end = min(1e-6, peak), min(1e-5, peak)
    fall = (1 + math.cos(math.pi * (step - warmup) / max(last - warmup, 1))) / 2
    return low + (peak - low) * step / warmup if step < warmup else end + (peak - end) * fall


def main():
    args = parser.parse_args()
    setup_distributed()
    output = args.output or pathlib.Path("runs", args.model or "tiny")
    last_pt = output / "last.pt"
    check(not args.resume or last_pt.exists() and not (args.init or args.eval),
          f"--resume needs {last_pt}, and takes neither --init nor --eval")
    if RANK == 0 and not args.eval:
        try:
            output.mkdir(parents=True, exist_ok=True)
            fcntl.lockf(lock := open(output / ".lock", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)    # workers do not hold it
        except OSError as error:
            check(False, f"cannot write to {output}, or another process is writing to it: {error.strerror}")
        if not (args.data or last_pt.exists() or (output / "digits").exists()):
            draw_digits(output / "digits")
    gather(None)                                                    # the other ranks wait for the lock and the digits
    going_on = last_pt.exists() and not args.eval
    check(going_on or args.eval or not (output / "best.pt").exists(), f"a new run would replace {output}/best.pt")
    start = last_pt if going_on else args.init or (output / "best.pt" if args.eval else None)
    checkpoint = load_checkpoint(start) if start else {}
    saved = checkpoint.get("settings", {})
    kept = saved if args.resume or args.eval else {}                # settings: from flags, else kept, else defaults
    name = args.model or saved.get("model", "tiny")
    check(name == saved.get("model", name), f"{start} was trained with --model {saved.get('model')}, not {name}")
    preset = {"tiny": TINY if args.data or kept.get("data") else DIGITS, "s": PAPER}.get(name, LARGE)
    args = parser.parse_args(namespace=argparse.Namespace(**preset | {"model": name} | kept))      # flags override it
    for key in (*PAPER, "workers", "save_every"):
        low = key in ("size", "epochs", "batch_size", "accum", "aug_repeats", "save_every")         # lowest value
        high = 1 if key in ("label_smoothing", "reprob", "min_scale") else 1e18
        check(low <= (value := getattr(args, key)) <= high, f"{key} must be from {low:d} to {high}, got {value}")
    check(args.batch_size % 2 == 0 or not args.mixup + args.cutmix, "mixup and CutMix need an even --batch-size")

    data = pathlib.Path(args.data or output / "digits")
    val_set = ImageFolder(data / "val", args, train=False)
    train_set = val_set if args.eval else ImageFolder(data / "train", args, train=True)
    classes, n, batch = train_set.classes, len(train_set.samples), WORLD_SIZE * args.accum * args.batch_size
    steps = n // batch                                              # an epoch is `steps` steps of `batch` images
    check(classes == val_set.classes, f"{data}: only in train or val: {sorted({*classes} ^ {*val_set.classes})[:9]}")
    check(steps or args.eval, f"a step takes {batch} images, but there are {n}: lower --batch-size or --accum")
    settings = {k: "" if (v := getattr(args, k, None)) is None else v for k in SETTINGS} | {"extent": [n, batch]}
    changed = {key: saved.get(key) for key in settings if going_on and settings[key] != saved.get(key)}
    check("extent" not in changed, f"{output} is a run of [images, per step] {saved.get('extent')}, not {[n, batch]}")
    check(args.resume or not changed, f"{output} holds a run with {changed} (--resume changes that)")
    loading = dict(num_workers=args.workers, pin_memory=CUDA, worker_init_fn=ignore_signals)
    val_keys = [(i, 0) for i in range(RANK, len(val_set.samples), WORLD_SIZE)]
    val_loader = DataLoader(val_set, args.batch_size, sampler=val_keys, **loading)

    torch.manual_seed(args.seed)
    step, loss_sum, log, unreadable = 0, 0.0, [], []                # loss_sum: this epoch's; log: one entry per epoch
    try:
        config = {"num_classes": len(classes)} | checkpoint.get("config", {}) | {"drop_path_rate": args.drop_path_rate}
        model = getattr(scalablevit, f"scalablevit_{args.model}")(**config)
        model.load_state_dict(checkpoint.get("model", model.state_dict()))
        if checkpoint.get("classes", classes) != classes or model.num_classes != len(classes):
            check(not (going_on or args.eval), f"{start} has other classes than {data}")
            print(f"{start} has other classes than {data}: training a fresh head")
            model.reset_classifier(len(classes))
        model, exempt = model.to(DEVICE), model.no_weight_decay()
        groups = [{"params": [p for name, p in model.named_parameters() if (name in exempt) == light],
                   "weight_decay": 0.0 if light else args.weight_decay} for light in (False, True)]
        optimizer = torch.optim.AdamW(groups, fused=True)           # its param_groups are these dicts
        if going_on:
            step, loss_sum, log, unreadable = (checkpoint[key] for key in ("step", "loss_sum", "log", "unreadable"))
            check(type(step) is int and json.dumps(log) and step // steps - len(log) in (0, 1), f"{start} is corrupt")
            for i, p in enumerate(p for group in groups for p in group["params"]):
                moments = checkpoint["optimizer"]["state"][i]       # copied: fused AdamW does not check shapes
                optimizer.state[p] = {"step": torch.tensor(float(step), device=DEVICE)} | {
                    key: torch.zeros_like(p).copy_(moments[key].view_as(p)) for key in ("exp_avg", "exp_avg_sq")}
    except Exception as error:
        check(False, f"cannot build the model of {start or name}: {type(error).__name__}: {str(error)[:300]}")
    if args.eval:
        return print("top-1 {:.2f} %  top-5 {:.2f} %".format(*evaluate(model, val_loader, args.bf16)))
    net = torch.nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model

    last, warmup, peak = args.epochs * steps, args.warmup_epochs * steps, args.lr * batch / 1024
    began, first, stopped, signals = time.time(), step, False, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    batches = iter(DataLoader(train_set, batch_sampler=training_batches(n, args, step, last), **loading))
    print(f"{output}: {n} images, {len(classes)} classes, {batch} images per step, step {step} of {last} is done")
    while not stopped and (step < last or step // steps > len(log)):
        if step // steps > len(log):                                # an epoch is trained and saved, but not evaluated
            top1, top5 = evaluate(model, val_loader, args.bf16)
            log.append({"epoch": len(log) + 1, "loss": loss_sum / steps, "top1": top1, "top5": top5,
                        "lr": learning_rate(step - 1, last, warmup, peak), "unreadable": len(unreadable)})
            print("epoch {epoch}  loss {loss:.3f}  top-1 {top1:.2f} %  top-5 {top5:.2f} %".format(**log[-1]))
            loss_sum = 0.0
        else:
            net.train()
            loss, found = 0.0, set()
            for a in range(args.accum):
                images, masks, labels, errors = next(batches)       # (B, size, size, 3), (B, 1, size, size), (B,)
                found.update(errors)
                images, masks, labels = (t.to(DEVICE, non_blocking=True) for t in (images, masks, labels))
                images = normalize(images.permute(0, 3, 1, 2).contiguous())        # (B, 3, size, size) float32
                torch.manual_seed(hash((args.seed, step, 0, 0)))    # after loading, which may draw in this process
                images = torch.where(masks > 0, images, torch.randn(images.shape[1:], device=DEVICE))
                targets = F.one_hot(labels, len(classes)).float()
                if args.mixup > 0 or args.cutmix > 0:
                    images, targets = mix(images, targets, args)
                torch.manual_seed(hash((args.seed, step, a + 1, RANK)))            # stochastic depth: one per rank
                net.require_backward_grad_sync = a + 1 == args.accum               # as DDP.no_sync does
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16):
                    part = F.cross_entropy(net(images), targets, label_smoothing=args.label_smoothing) / args.accum
                part.backward()
                loss += part.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf, error_if_nonfinite=True)
            groups[0]["lr"] = groups[1]["lr"] = learning_rate(step, last, warmup, peak)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses, stops, found = zip(*gather((loss.item(), len(signals), found)))
            loss, stopped = sum(losses) / WORLD_SIZE, any(stops)
            loss_sum += loss
            for error in sorted(set().union(*found) - {"", *unreadable}):
                print(f"cannot read {error}: replaced by another image")
                unreadable.append(error)
            if step % 50 == 0 or step % steps == 0:
                print(f"step {step}/{last}  loss {loss:.3f}  {(time.time() - began) / (step - first):.3f} s per step")
        if RANK == 0 and (stopped or step % steps == 0 or step % args.save_every == 0):
            state = dict(model=model.state_dict(), config=model.config, settings=settings, classes=classes, log=log,
                         optimizer=optimizer.state_dict(), step=step, loss_sum=loss_sum, unreadable=unreadable)
            files = {"log.jsonl": "".join(json.dumps(entry) + "\n" for entry in log).encode(), "last.pt": state}
            if step == len(log) * steps and max(log, key=lambda entry: entry["top1"]) is log[-1]:
                files = {"best.pt": state} | files
            for name, content in files.items():                     # last.pt last: runs resume from it
                with open(output / f"{name}.part", "wb") as file:
                    torch.save(content, file) if name.endswith(".pt") else file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(output / f"{name}.part", output / name)  # atomic: either the old file or the new one
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if stopped:
        print(f"stopped after step {step} of {last} and saved: the same command resumes from there")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])            # another rank may have received the signal


if __name__ == "__main__":
    sys.excepthook = lambda *error: (sys.__excepthook__(*error), os._exit(1))      # joining the workers would block
    main()
