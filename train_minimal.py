"""Train ScalableViT on a folder of images: one program for a laptop, a GPU, and several machines full of them.

    python train_minimal.py                                    tiny, on digits that are drawn here: minutes
    python train_minimal.py --data DIR                         tiny, on DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg
    torchrun --nproc_per_node=8 train_minimal.py --data DIR --model s         the paper's run: 8 x 128 images a step

A run lives in --output: last.pt (every --save-every steps), best.pt and log.jsonl (every epoch).  The same command goes
on with a run that was stopped; --resume goes on with it under other settings, such as more epochs.
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
import pathlib
import random
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.nn        # DDP imports it late, and its defaults then hold the group: gloo's threads never end
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import scalablevit

# The settings, each a flag.  lr is the peak for 1024 images in a step, else in proportion; min_scale the smallest crop,
# as a share of the image; RandAugment does each operation half the time; an epoch takes an image aug_repeats times.
PAPER = dict(size=224, epochs=300, warmup_epochs=5.0, batch_size=128, accum=1, lr=1e-3, weight_decay=0.05,
             clip_grad=5.0, label_smoothing=0.1, drop_path_rate=0.2, mixup=0.8, cutmix=1.0, reprob=0.25, randaugment=2,
             min_scale=0.08, aug_repeats=3, seed=0)                 # Appendix C, and DeiT's RandAugment
TINY = PAPER | dict(size=112, epochs=100, batch_size=64, lr=0.032, drop_path_rate=0.0, mixup=0.0, cutmix=0.0,
                    reprob=0.0, randaugment=0, min_scale=0.25, aug_repeats=1)      # DIGITS: without --data; LARGE: b, l
DIGITS, LARGE = TINY | dict(size=56, epochs=8, warmup_epochs=1.0, min_scale=0.5), PAPER | dict(drop_path_rate=0.5)
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))       # set by torchrun
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
normalize = v2.Compose([v2.ToDtype(torch.float32, True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flag = parser.add_argument
flag("--data", type=os.path.abspath, metavar="DIR", help="with train/CLASS/ and val/CLASS/ (default: drawn digits)")
flag("--model", choices=("tiny", "s", "b", "l"), help="the size of the network (default: tiny)")
flag("--output", type=pathlib.Path, metavar="DIR", help="of the run (default: runs/MODEL)")
flag("--init", type=os.path.abspath, metavar="FILE", help="weights to start from: of this program, or published ones")
flag("--resume", action="store_true", help="go on with the run in --output, under the settings given here")
flag("--eval", action="store_true", help="evaluate --init, or else best.pt in --output, and stop")
flag("--workers", type=int, default=8 if CUDA else 0, metavar="N", help="that read images for each training process")
flag("--save-every", type=int, default=1000, metavar="N", help="steps between two saves of last.pt (1000)")
flag("--bf16", action=argparse.BooleanOptionalAction, default=CUDA, help="autocast to bfloat16 (default: on a GPU)")
flag("--fuse", action="store_true", help="run the fused kernels of scalablevit_kernels")
for name, value in PAPER.items():
    flag(f"--{name.replace('_', '-')}", type=type(value), default=value, metavar="N",
         help=f"{value}; for tiny {TINY[name]}, without --data {DIGITS[name]}")


def check(condition, message):
    if not condition:                                               # a mistake that the user can mend: one line
        print("train_minimal.py:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


def draw_digits(root, train=400, val=100, side=64):
    """root/{train,val}/{0..9}/*.png: a digit in any place, size, turn and color on blocks of darker colors."""
    part, rng = root.with_suffix(".part"), random.Random(0)
    for folder, n in [(part / split / str(i), n) for split, n in (("train", train), ("val", val)) for i in range(10)]:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image = Image.frombytes("RGB", (12, 12), rng.randbytes(432)).resize((side, side), Image.NEAREST)
            mask, font = Image.new("L", (side, side)), ImageFont.load_default(side * rng.uniform(0.7, 1))
            center = side * rng.uniform(0.3, 0.7), side * rng.uniform(0.3, 0.7)
            ImageDraw.Draw(mask).text(center, folder.name, 255, font, anchor="mm")
            color, image = tuple(rng.randrange(128, 256) for _ in "rgb"), image.point(lambda value: value // 3)
            image.paste(color, mask=mask.rotate(rng.uniform(-15, 15)))
            image.save(folder / f"{i:03}.png")
    part.rename(root)                                               # only now that all of them are there


def read_image(path, size):
    """An upright RGB image.  A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves each side 3 x size or more."""
    if not os.path.isfile(path):                                    # opening a FIFO would wait for ever
        raise OSError("not a regular file")
    with Image.open(path) as image:
        image.draft("RGB", (3 * size, 3 * size))
        image.load()
        with contextlib.suppress(Exception):                        # EXIF may be damaged where the pixels are whole
            ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")


class ImageFolder(Dataset):
    """The images in root/CLASS/ and the folders in it; not in folders that are links, which may lead back.

    Item (index, seed): image (3, size, size) uint8, mask (1, size, size) uint8 with 0 where it is erased, label, and an
    error if another image takes the place of one that cannot be read, else "".
    """

    def __init__(self, root, args, train):
        # v2 lacks DeiT's invert, solarize-add and noise on the magnitude, and its posterize is milder.
        operation = v2.RandAugment(1, 9, num_magnitude_bins=11, interpolation=Image.BILINEAR, fill=(124, 116, 104))
        augment = [v2.RandomResizedCrop(args.size, (args.min_scale, 1), interpolation=Image.BICUBIC),
                   v2.RandomHorizontalFlip(), *args.randaugment * [v2.RandomApply([operation], p=0.5)]]
        center_crop = [v2.Resize(round(args.size * 256 / 224), Image.BICUBIC), v2.CenterCrop(args.size)]
        self.transform = v2.Compose([*(augment if train else center_crop), v2.PILToTensor()])
        self.size, self.erase = args.size, v2.RandomErasing(args.reprob if train else 0, value=0, inplace=True)
        self.classes = sorted(d.name for d in root.glob("[!.]*") if d.is_dir())
        self.samples = [(os.path.join(folder, file), label) for label, name in enumerate(self.classes)
                        for folder, _, files in sorted(os.walk(os.path.join(root, name))) for file in sorted(files)
                        if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")]
        check(len({i for _, i in self.samples}) == len(self.classes) > 0, f"{root} must hold images in folders")

    def __getitem__(self, key):
        index, seed = key
        torch.default_generator.manual_seed(seed)                   # the same image, whichever process reads it
        mask, error = self.erase(torch.ones(1, self.size, self.size, dtype=torch.uint8)), ""
        for _ in range(100):
            path, label = self.samples[index]
            try:
                return self.transform(read_image(path, self.size)), mask, label, error
            except Exception as reason:                             # Pillow's decoders raise almost anything
                error = error or f"{path} ({reason})"
            index = int(torch.randint(len(self.samples), ()))
        raise OSError(f"cannot read {error}, nor 99 others")


def training_batches(n, args, first, last):
    """The keys of this process's images, batch by batch: an epoch shuffles n images and puts each aug_repeats times in
    a row.  A step deals them out one by one: half a batch (see `mix`) is half a step, however many share the step.
    """
    for step in range(first, last):
        epoch, i = divmod(step, n // (WORLD_SIZE * args.accum * args.batch_size))
        if step == first or i == 0:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(hash((args.seed, epoch))))
        for a in range(args.accum):
            places = [((i * args.batch_size + j) * args.accum + a) * WORLD_SIZE + RANK for j in range(args.batch_size)]
            yield [(int(order[p // args.aug_repeats]), hash((args.seed, epoch, p))) for p in places]


def ignore_signals(worker):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})      # the process that trains ends it


def mix(images, targets, args):
    """MixUp or CutMix of images (B, 3, H, W) and targets (B, classes): each with the one half a batch on."""
    mixing = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha > 0]
    # v2 pairs an image with the one before, under repeated augmentation its copy.  So v2's "batch" is two halves here.
    halves = images.view(2, -1, *images.shape[2:]), targets.view(2, -1)           # (2, B/2·3, H, W), (2, B/2·classes)
    return [mixed.view_as(own) for mixed, own in zip(v2.RandomChoice(mixing)(*halves), (images, targets))]


def gather(value):
    values = [value] * WORLD_SIZE                                   # one of each process
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def evaluate(model, loader, bf16):
    """Top-1 and top-5 accuracy in percent; each process counts its share of the images."""
    model.eval()
    right1, right5 = 0, 0
    for images, _, labels, errors in loader:                        # (B, 3, size, size), ..., (B,)
        check(not any(errors), f"cannot read {max(errors)}, and the accuracy is that of all images")
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            logits = model(normalize(images.to(DEVICE, non_blocking=True)))
        right = logits.topk(min(5, logits.shape[1])).indices == labels.to(DEVICE)[:, None]    # (B, 5)
        right1, right5 = right1 + right[:, 0].sum(), right5 + right.sum()
    return [100 * sum(counts) / len(loader.dataset.samples) for counts in zip(*gather((int(right1), int(right5))))]


def learning_rate(step, last, warmup, peak):
    """Linearly up from 1e-6, then a cosine down to 1e-5."""
    low, end = min(1e-6, peak), min(1e-5, peak)
    if step < warmup:
        return low + (peak - low) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(last - warmup, 1))) / 2


def load_checkpoint(path):
    """A checkpoint of this program, a published one or a mere state dict -> "model", "config", "settings" and more."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):               # published ones hold their arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights, config = checkpoint.get("model", checkpoint), checkpoint.get("config", {})
        if "patch_embeds.0.proj.weight" in weights:
            config, weights = scalablevit.official_kwargs(weights), scalablevit.convert_official(weights)
        config = {"num_classes": len(weights["head.bias" if "head.bias" in weights else "head.3.bias"])} | config
        return checkpoint | {"model": weights, "config": config, "settings": {} | checkpoint.get("settings", {})}
    except Exception as error:
        check(False, f"cannot load {path}: {str(error)[:300]!r}")


def main():
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")                # the first process speaks
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)         # names that it cannot encode
    args = parser.parse_args()
    output = args.output or pathlib.Path("runs", args.model or "tiny")
    last_pt = output / "last.pt"
    check(not args.resume or last_pt.exists(), f"--resume goes on with {last_pt}, and there is none")
    check(not args.resume or not (args.init or args.eval), "--resume goes with neither --init nor --eval")
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        store = next(dist.rendezvous("env://"))[0]                  # torchrun's keeps the addresses of earlier starts
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"           # one machine: torchrun counts the starts
        start = os.environ["TORCHELASTIC_RESTART_COUNT"] if alone else store.add(f"starts of {RANK}", 1)
        dist.init_process_group("nccl" if CUDA else "gloo", store=dist.PrefixStore(str(start), store), rank=RANK,
                                world_size=WORLD_SIZE)
    if RANK == 0 and not args.eval:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)        # not inherited by the processes that read images
        except BlockingIOError:
            check(False, f"another process is writing to {output}")
        if not (args.data or last_pt.exists() or (output / "digits").exists()):
            draw_digits(output / "digits")
    gather(None)                                                    # the others wait for the lock and the digits

    # Settings: the flags; else, with --resume and --eval, those of the checkpoint; else the defaults
    going_on = last_pt.exists() and not args.eval
    start = last_pt if going_on else args.init or (output / "best.pt" if args.eval else None)
    checkpoint = load_checkpoint(start) if start else {}
    saved = checkpoint.get("settings", {})
    kept = saved if args.resume or args.eval else {}
    name = args.model or saved.get("model", "tiny")
    check(name == saved.get("model", name), f"{start} is not of --model {name}")
    preset = {"tiny": TINY if args.data or kept.get("data") else DIGITS, "s": PAPER}.get(name, LARGE)
    args = parser.parse_args(namespace=argparse.Namespace(**preset | {"model": name} | kept))
    check(min(args.size, args.epochs, args.batch_size, args.accum, args.save_every) > 0 <= args.workers,
          "--size, --epochs, --batch-size, --accum and --save-every must be at least 1, --workers at least 0")
    check(args.batch_size % 2 == 0 or not args.mixup + args.cutmix, "mixup and CutMix want an even --batch-size")
    data = pathlib.Path(args.data or output / "digits")
    val_set = ImageFolder(data / "val", args, train=False)
    train_set = val_set if args.eval else ImageFolder(data / "train", args, train=True)
    classes, n, batch = train_set.classes, len(train_set.samples), WORLD_SIZE * args.accum * args.batch_size
    steps = n // batch                                              # of an epoch, in each of which `batch` images
    check(classes == val_set.classes, f"{data} has different classes in train and val")
    check(steps or args.eval, f"a step takes {batch} images, and there are {n}: lower --batch-size or --accum")
    settings = {key: getattr(args, key) for key in ("data", "model", "init", "bf16", *PAPER)} | {"extent": [n, batch]}
    check(not going_on or settings == saved or args.resume and settings["extent"] == saved.get("extent"),
          f"{output} holds a run with other {'images or steps' if args.resume else 'settings; --resume goes on'}")
    loading = dict(num_workers=args.workers, pin_memory=CUDA, worker_init_fn=ignore_signals)
    val_keys = [(i, 0) for i in range(RANK, len(val_set.samples), WORLD_SIZE)]
    val_loader = DataLoader(val_set, args.batch_size, sampler=val_keys, **loading)

    torch.manual_seed(args.seed)
    step, loss_sum, log, unreadable = 0, 0.0, [], []                # loss_sum: of this epoch; log: an entry per epoch
    try:
        config = {"num_classes": len(classes)} | checkpoint.get("config", {}) | {"drop_path_rate": args.drop_path_rate}
        model = getattr(scalablevit, f"scalablevit_{args.model}")(**config)
        model.load_state_dict(checkpoint.get("model", model.state_dict()))
        if checkpoint.get("classes", classes) != classes or model.num_classes != len(classes):
            check(not (going_on or args.eval), f"{start} is of other classes than {data}")
            print(f"{start} is of other classes than {data}: training a fresh head")
            model.reset_classifier(len(classes))
        if args.fuse:
            from scalablevit_kernels import fuse
            model = fuse(model)
        model, exempt = model.to(DEVICE), model.no_weight_decay()
        groups = [{"params": [p for name, p in model.named_parameters() if (name in exempt) == light],
                   "weight_decay": 0.0 if light else args.weight_decay} for light in (False, True)]
        optimizer = torch.optim.AdamW(groups, fused=True)           # which keeps these groups
        if going_on:
            step, loss_sum, log, unreadable = (checkpoint[key] for key in ("step", "loss_sum", "log", "unreadable"))
            for i, p in enumerate(p for group in groups for p in group["params"]):
                optimizer.state[p] = {"step": torch.tensor(float(step), device=DEVICE)}
                for key in ("exp_avg", "exp_avg_sq"):               # checked and copied: fused AdamW trusts them
                    moment = checkpoint["optimizer"]["state"][i][key]
                    check(moment.shape == p.shape, f"{start} has the optimizer of another model")
                    optimizer.state[p][key] = torch.zeros_like(p).copy_(moment)
    except Exception as error:
        check(False, f"cannot build the model of {start}: {str(error)[:300]}")
    if args.eval:
        print("top-1 {:.2f} %  top-5 {:.2f} %".format(*evaluate(model, val_loader, args.bf16)))
        return
    net = torch.nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model

    last, warmup, peak = args.epochs * steps, args.warmup_epochs * steps, args.lr * batch / 1024
    began, first, stopped, signals = time.time(), step, False, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    batches = iter(DataLoader(train_set, batch_sampler=training_batches(n, args, step, last), **loading))
    print(f"scalablevit_{args.model}, {n} images of {len(classes)} classes, {batch} in a step, writing to {output}")
    while not stopped and (step < last or step // steps > len(log)):
        if step // steps > len(log):                                # an epoch is complete, and last.pt has it
            top1, top5 = evaluate(model, val_loader, args.bf16)
            log.append({"epoch": len(log) + 1, "loss": loss_sum / steps, "top1": top1, "top5": top5,
                        "lr": learning_rate(step - 1, last, warmup, peak), "unreadable": len(unreadable)})
            print("epoch {epoch}  loss {loss:.3f}  top-1 {top1:.2f} %  top-5 {top5:.2f} %".format(**log[-1]))
            loss_sum = 0.0
        else:
            net.train()
            loss, found = 0.0, set()
            for a in range(args.accum):
                images, masks, labels, errors = next(batches)       # (B, 3, size, size), (B, 1, size, size), (B,)
                found.update(errors)
                images, masks, labels = (t.to(DEVICE, non_blocking=True) for t in (images, masks, labels))
                torch.manual_seed(hash((args.seed, step, 0, 0)))    # only now: without workers, images were drawn here
                images = torch.where(masks > 0, normalize(images), torch.randn(images.shape[1:], device=DEVICE))
                targets = F.one_hot(labels, len(classes)).float()
                if args.mixup > 0 or args.cutmix > 0:
                    images, targets = mix(images, targets, args)
                torch.manual_seed(hash((args.seed, step, a + 1, RANK)))            # stochastic depth: each its own
                net.require_backward_grad_sync = a + 1 == args.accum               # what DDP's no_sync sets
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16):
                    part = F.cross_entropy(net(images), targets, label_smoothing=args.label_smoothing) / args.accum
                part.backward()
                loss += part.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad, error_if_nonfinite=True)
            groups[0]["lr"] = groups[1]["lr"] = learning_rate(step, last, warmup, peak)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses, stops, found = zip(*gather((loss.item(), len(signals), found)))
            loss, stopped = sum(losses) / WORLD_SIZE, any(stops)
            loss_sum += loss
            for error in sorted(set().union(*found) - {"", *unreadable}):
                print(f"cannot read {error}: another image takes its place")
                unreadable.append(error)
            if step % 50 == 0 or step % steps == 0:
                print(f"step {step}/{last}  loss {loss:.3f}  {(time.time() - began) / (step - first):.3f} s per step")
        if RANK == 0 and (stopped or step % steps == 0 or step % args.save_every == 0):
            state = dict(model=model.state_dict(), config=model.config, settings=settings, classes=classes, log=log,
                         optimizer=optimizer.state_dict(), step=step, loss_sum=loss_sum, unreadable=unreadable)
            files = {"log.jsonl": "".join(json.dumps(entry) + "\n" for entry in log).encode(), "last.pt": state}
            if step == len(log) * steps and max(log, key=lambda entry: entry["top1"]) is log[-1]:
                files = {"best.pt": state} | files
            for name, content in files.items():                     # last.pt at the end: it is what a run goes on with
                with open(output / f"{name}.part", "wb") as file:
                    torch.save(content, file) if name.endswith(".pt") else file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(output / f"{name}.part", output / name)  # a kill leaves the old file or the new one
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if stopped:
        print(f"stopped after step {step} of {last}, which is saved: the same command goes on from there")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])            # it may have come to another process


if __name__ == "__main__":
    main()
