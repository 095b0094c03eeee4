"""How fast images are read: the training program's loader against a bare loop of Pillow, per core, on the same files.

    python tests/bench_loader.py [--data DIR] [--workers 0] [--images 128] [--rounds 15]

The bare loop decodes, crops at random and resizes (bicubic) to 224 pixels, no more.  The loader does that, and flips,
makes batches of tensors, seeds every image, looks for EXIF; the last column adds RandAugment and random erasing.  One
round after the other takes each in turn, so that whatever else the machine does meets all; the fastest round of each counts.
Without --data it makes photographs of its own: noise of many scales, at ImageNet's usual size and at a camera's.
"""
import argparse
import pathlib
import random
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import train_minimal as train  # noqa: E402


def photographs(root, size, n):
    """n JPEG files of one class, each with noise of every scale from the whole picture down to a pixel."""
    (root / "train" / "x").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        picture = np.zeros((size[1], size[0], 3))
        for scale in (4, 16, 64, 256):
            noise = Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
            picture += np.asarray(noise.resize(size, Image.BICUBIC)) / scale ** 0.5
        picture = (picture - picture.min()) / (picture.max() - picture.min()) * 255
        Image.fromarray(picture.astype(np.uint8)).save(root / "train" / "x" / f"{i}.jpg", quality=90)
    return root


def bare(paths):
    rng = random.Random(0)
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB")
        x, y, w, h = train.random_crop(*image.size, 0.08, rng)
        image.resize((224, 224), Image.BICUBIC, box=(x, y, x + w, y + h))


def rates(root, n, workers, rounds):
    """Images per second and core of the bare loop, the loader, and the loader with the whole recipe."""
    def settings(**more):
        return SimpleNamespace(**{**dict(size=224, min_scale=0.08, randaugment=0, reprob=0, batch_size=64, accum=1,
                                         aug_repeats=1, seed=0), **more})

    def loader(images):
        for _ in DataLoader(images, batch_sampler=train.training_keys(len(images), images.settings, 0, n // 64),
                            num_workers=workers, collate_fn=tuple):
            pass

    paths = [p for p in (root / "train").glob("*/*") if p.is_file()]
    paths = (paths * (n // len(paths) + 1))[:n // 64 * 64]
    plain, recipe = (train.ImageFolder(root / "train", train.class_names(root / "train"), settings(**more))
                     for more in ({}, {"randaugment": 2, "reprob": 0.25}))
    candidates = [lambda: bare(paths), lambda: loader(plain), lambda: loader(recipe)]
    times = [[] for _ in candidates]
    for _ in range(rounds):
        for candidate, own in zip(candidates, times):
            start = time.perf_counter()
            candidate()
            own.append(time.perf_counter() - start)
    cores = [1, max(workers, 1), max(workers, 1)]
    return [len(paths) / min(own) / n for own, n in zip(times, cores)]


def main():
    parser = argparse.ArgumentParser(description="The loader against a bare loop of Pillow.")
    parser.add_argument("--data", type=pathlib.Path, help="with train/CLASS/ (default: photographs made here)")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--images", type=int, default=128, help="per round")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'images per second and core':28}{'bare loop':>11}{'loader':>9}{'/ bare':>8}{'with RandAugment':>18}{'/ bare':>8}")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name, make in ({args.data.name: lambda: args.data} if args.data else {
                f"{W}x{H}": lambda W=W, H=H: photographs(folder / f"{W}", (W, H), 64) for W, H in ((500, 375), (2000, 1500))
        }).items():
            bare_rate, rate, full = rates(make(), args.images, args.workers, args.rounds)
            print(f"{name:28}{bare_rate:11.1f}{rate:9.1f}{rate / bare_rate:8.2f}{full:18.1f}{full / bare_rate:8.2f}")


if __name__ == "__main__":
    main()
