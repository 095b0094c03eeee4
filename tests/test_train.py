"""The training program: its settings, data and recipe; runs that are stopped and go on; edits; mistakes.

Most tests call `main` in this process, on 17 + 5 noise images of two classes, in steps of 40 ms.
Those marked `slow` start processes or stop a run at every moment.
"""
import argparse
import builtins
import contextlib
import difflib
import io
import json
import os
import pathlib
import pickle
import runpy
import signal
import subprocess
import sys
import types
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import scalablevit
import train_minimal as train

FILE = pathlib.Path(train.__file__)
QUICK = ["--size", 16, "--batch-size", 2, "--accum", 2, "--epochs", 2]         # 4 steps an epoch
RECIPE = [*QUICK, "--warmup-epochs", 0.5, "--drop-path-rate", 0.1, "--mixup", 0.8, "--cutmix", 1,
          "--reprob", 0.25, "--randaugment", 2, "--aug-repeats", 3]


class Killed(BaseException):
    """Caught by nothing in the program, like kill -9."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(train, "GENERAL", dict(train.GENERAL, bf16=False, workers=0))
    monkeypatch.chdir(tmp_path)


def main(*args, program=train):
    """What the program prints: here under a replaced stdout and without sys.argv, as in a notebook."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        program.main([str(arg) for arg in args])
    return printed.getvalue()


@pytest.fixture
def fail(monkeypatch, capsys):
    """fail(arguments) -> the one line with which `python train_minimal.py` ends."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(FILE), *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(FILE), run_name="__main__")
        assert end.value.code == 2
        return one_line(capsys.readouterr().err)
    return run


def one_line(error):
    assert error.startswith("train_minimal.py: ")
    assert error[:-1].isprintable(), error                          # no second line, no escape
    assert error.isascii()
    return error


def interrupt(patch, owner, name, number):
    """Be killed before the number-th call (from 1) of owner.name."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return real(*args, **kwargs)
    patch.setattr(owner, name, wrapped)


def draw(folder, n, classes=("0", "1"), seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        file = folder / classes[i % len(classes)] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(file)


def draw_data(root, n=17, classes=("0", "1")):
    """n training images and 5 for validation: an odd number, for two processes."""
    draw(root / "train", n, classes)
    draw(root / "val", 5, classes, seed=1)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def finished(data, tmp_path_factory):
    """The folder of a run that nothing stopped, and its arguments."""
    output, args = tmp_path_factory.getbasetemp() / "finished", ["--data", data, *RECIPE]
    if not output.exists():
        main(*args, "--output", output)
    return output, args


def load(file):
    return torch.load(file, weights_only=True)


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def flat(value, place=""):
    """{place: tensor or other value} of all that is in nested dictionaries and lists."""
    if not isinstance(value, (dict, list, tuple)):
        return {place: value}
    found = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found.update(flat(inner, f"{place}/{key}"))
    return found


def differing(ours, theirs):
    """The places at which two files differ in a bit: weights, optimizer, settings, step, log."""
    a, b = flat(load(ours)), flat(load(theirs))
    assert a.keys() == b.keys()
    return [p for p in a if not (torch.equal(a[p], b[p]) if torch.is_tensor(a[p]) else a[p] == b[p])]


def assert_same(ours, theirs):
    for name in ("last.pt", "best.pt"):
        assert differing(ours / name, theirs / name) == []
    assert (ours / "log.jsonl").read_text() == (theirs / "log.jsonl").read_text()


# ---------------------------------------------------------------------------- settings
PAPER = dict(size=224, epochs=300, warmup_epochs=5, batch_size=128, accum=1, lr=1e-3, seed=0,
             weight_decay=0.05, clip_grad=5, label_smoothing=0.1, mixup=0.8, cutmix=1, reprob=0.25,
             randaugment=2, min_scale=0.08, aug_repeats=3)
LIGHT = dict(mixup=0, cutmix=0, reprob=0, randaugment=0, aug_repeats=1, drop_path_rate=0)


@pytest.mark.parametrize("flags, expected", [
    (["--model", "s"], dict(PAPER, drop_path_rate=0.2)),
    (["--model", "b"], dict(PAPER, drop_path_rate=0.5)),
    (["--model", "l", "--lr", "0.1", "--bf16"], dict(PAPER, drop_path_rate=0.5, lr=0.1, bf16=True)),
    (["--data", "x"], dict(LIGHT, size=112, model="tiny", bf16=False)),
    ([], dict(LIGHT, size=56, epochs=8, model="tiny", output=pathlib.Path("runs/tiny"))),
])
def test_the_recipe_is_that_of_the_model_and_of_the_data(flags, expected):
    args, run = train.parse_args(flags)
    assert vars(args).items() >= expected.items()
    assert run == {}


def test_a_setting_is_the_command_lines_else_the_runs_else_the_recipes(capsys, tmp_path):
    saved = {"model": "tiny", "data": "x\n", "bf16": True, "lr": 0.5, "seed": 3}
    torch.save({"settings": saved, "model": {}}, tmp_path / "last.pt")
    args, run = train.parse_args(["--output", str(tmp_path), "--no-bf16", "--lr", "0.5", "--data", "y"])
    assert (args.lr, args.seed, args.size, args.bf16, args.data) == (0.5, 3, 112, False, "y")
    assert run["settings"] == saved
    file = ascii(str(tmp_path / "last.pt"))
    assert capsys.readouterr().out == (f"data: 'x\\n' in {file}, now 'y'\n"
                                       f"bf16: True in {file}, now False\n")


@given(st.integers(1, 40), st.floats(0, 20), st.floats(1e-4, 1e-2))
def test_the_learning_rate_has_linear_warmup_and_cosine_decay(more, warmup, lr):
    epochs = np.linspace(0, warmup + more, 50)
    args = argparse.Namespace(lr=lr, step_size=2048, warmup_epochs=warmup, epochs=warmup + more)
    rates = [train.learning_rate(epoch, args) for epoch in epochs]
    fraction = np.clip((epochs - warmup) / more, 0, 1)
    cosine = 1e-5 + (2 * lr - 1e-5) * (1 + np.cos(np.pi * fraction)) / 2
    linear = 1e-6 + (2 * lr - 1e-6) * epochs / max(warmup, 1e-300)
    assert rates == pytest.approx(np.where(epochs < warmup, linear, cosine))


# ---------------------------------------------------------------------------- batches and images
def batches(n, world, accum, b, start=0, **args):
    """For each process, its list of batches of (index, seed) in three epochs."""
    args = argparse.Namespace(accum=accum, step_size=world * accum * b, epochs=3, **args)
    shares = []
    for rank in range(world):
        with mock.patch.multiple(train, RANK=rank, WORLD_SIZE=world):
            shares.append(list(train.training_batches(n, n // args.step_size, start, args)))
    return shares


@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4),
       st.integers(0, 5), st.integers(0, 99))
def test_steps_repeat_images_and_are_shared_by_the_processes(extra, world, accum, b, repeats, seed, start):
    size = world * accum * b
    n, settings = size + extra, dict(aug_repeats=repeats, seed=seed)
    [everything] = batches(n, 1, 1, size, **settings)               # of one process, without accum
    steps, different = n // size, -(-size // repeats)
    assert [len(step) for step in everything] == [size] * 3 * steps
    seeds = {key[1] for step in everything for key in step}
    assert len(seeds) == 3 * steps * size
    for epoch in range(3):
        shown = []
        for step in everything[epoch * steps:(epoch + 1) * steps]:
            images = [image for image, _ in step]
            assert len(set(images[:different])) == different        # each once before any again
            assert images[different:] == images[:-different or None][:size - different]
            shown += images[:different]
        assert len(set(shown)) == steps * different                 # each in one step only
        assert set(shown) <= set(range(n))
    shares = batches(n, world, accum, b, **settings)
    for rank, share in enumerate(shares):                           # each place has one process
        for i, batch in enumerate(share):
            assert batch == everything[i // accum][rank + i % accum * world::accum * world]
    start %= 3 * steps
    assert batches(n, world, accum, b, start, **settings) == [s[start * accum:] for s in shares]


def test_epochs_and_seeds_shuffle_differently_and_mixed_neighbours_are_never_copies():
    orders = set()
    for seed in (0, 1):
        [steps] = batches(64, 1, 1, 64, aug_repeats=1, seed=seed)
        orders.update(tuple(image for image, _ in step) for step in steps)
    assert len(orders) == 6
    for b in range(8, 129):                                         # v2.MixUp mixes i with i - 1
        [[batch, *_]] = batches(b, 1, 1, b, aug_repeats=3, seed=0)
        assert all(batch[i][0] != batch[i - 1][0] for i in range(b)), b


@given(st.integers(0, 10 ** 6), st.integers(2, 5), st.integers(4, 30), st.integers(4, 30), st.booleans())
def test_mixed_targets_match_the_share_of_each_image(seed, B, H, W, cut):
    """All pixels of image i are i, so a mixed image reveals its parts."""
    args = argparse.Namespace(reprob=0.0, mixup=0.8 * (not cut), cutmix=1.0 * cut, num_classes=B)
    labels = torch.arange(B)
    torch.manual_seed(seed)
    images = labels.float().view(B, 1, 1, 1).repeat(1, 3, H, W)
    mixed, targets = train.augment(images, labels, args)            # (B, 3, H, W), (B, B)
    torch.testing.assert_close(targets.sum(1), torch.ones(B))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ labels.float())
    assert ((targets > 0).sum(1) <= 2).all()
    if cut:                                                         # whole pixels, of two images
        assert torch.equal(mixed, mixed.round())
    else:
        torch.testing.assert_close(mixed, mixed[:, :1, :1, :1].expand_as(mixed))


def test_each_batch_is_mixed_or_cut_and_a_quarter_of_the_images_is_erased():
    args = argparse.Namespace(reprob=0.25, mixup=0.0, cutmix=0.0, num_classes=2)
    images, labels = torch.zeros(1000, 3, 24, 24), torch.zeros(1000, dtype=torch.long)
    erased, unchanged = train.augment(images, labels, args)
    share = (erased != 0).float().mean((1, 2, 3))
    assert (share > 0).float().mean() == pytest.approx(0.25, abs=0.04)
    assert share[share > 0].min() > 0.01
    assert 0.3 < share.max() < 0.36
    assert erased[erased != 0].std() == pytest.approx(1, abs=0.05)  # noise, not a constant
    assert torch.equal(unchanged, labels)
    args, cut = argparse.Namespace(reprob=0.0, mixup=0.8, cutmix=1.0, num_classes=2), 0
    pair = torch.arange(2.0).view(2, 1, 1, 1).repeat(1, 3, 24, 24)
    for _ in range(300):
        mixed, _ = train.augment(pair, torch.arange(2), args)
        cut += torch.equal(mixed, mixed.round())
    assert cut / 300 == pytest.approx(0.5, abs=0.1)


def picture(size=(60, 40)):
    """Smooth and colorful, like photographs."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


def distance(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def test_training_crops_flip_and_augment_and_evaluation_does_neither(monkeypatch):
    operation = mock.Mock(side_effect=lambda image: image)
    monkeypatch.setattr(train.v2, "RandAugment", mock.Mock(return_value=operation))
    args = argparse.Namespace(size=56, min_scale=0.25, randaugment=2)
    columns = np.broadcast_to(np.linspace(0, 255, 100)[:, None], (80, 100, 3))
    ramp = Image.fromarray(np.stack([np.tile(np.linspace(0, 255, 100), (80, 1))] * 3, -1).astype(np.uint8))
    crops = torch.stack([train.transform(args, True)(ramp) for _ in range(400)]).float()
    width = (crops[..., -1] - crops[..., 0]).mean((1, 2)) / 255     # negative when flipped
    assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.08)
    assert width.abs().min() > 0.35
    assert operation.call_count / 400 == pytest.approx(1, abs=0.1)  # two, each with p = 1/2
    for W, H in [(320, 256), (256, 320), (300, 100), (50, 70)]:
        image, scale = picture((W, H)), 64 / min(W, H)
        resized = image.resize((int(W * scale), int(H * scale)), Image.BICUBIC)
        x, y = round((resized.width - 56) / 2), round((resized.height - 56) / 2)
        ours = train.transform(args, False)(image).permute(1, 2, 0)
        assert distance(ours, resized.crop((x, y, x + 56, y + 56))) < 0.5
    assert ours.dtype == torch.uint8
    white = train.normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


TURNED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
          5: lambda a: np.swapaxes(a, 0, 1), 6: lambda a: np.rot90(a, -1),
          7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1), 8: np.rot90}         # by EXIF


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_rotated_as_exif_says(suffix, tmp_path):
    for orientation, turned in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture().save(tmp_path / f"x.{suffix}", exif=exif, quality=100)
        image = train.load_image(tmp_path / f"x.{suffix}")
        assert distance(image, turned(np.asarray(picture()))) < 5
        assert image.mode == "RGB"


def save_16_bit(file):
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(file, "png")


def save_floats(file):
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(file, "tiff")


@pytest.mark.parametrize("save, reason", [
    (save_16_bit, "more than 8 bits a channel"), (save_floats, "more than 8 bits a channel"),
    (lambda file: picture().save(file, "eps"), "cannot identify"),  # would start Ghostscript
    (lambda file: file.write_bytes(FILE.read_bytes()), "cannot identify"),
    (lambda file: (picture().save(file, "png"), os.truncate(file, 900)), ""),
    (lambda file: file.mkdir(), "Is a directory"),
])
def test_an_unreadable_image_gives_one_line_with_its_name_escaped(save, reason, tmp_path):
    file = tmp_path / "a\x1b[31m\nb\udcff.jpg"
    save(file)
    with pytest.raises(train.UserError, match=reason) as error:
        train.load_image(file)
    assert "a\\x1b[31m\\nb\\udcff.jpg" in str(error.value)
    assert str(error.value).isprintable()
    assert str(error.value).isascii()


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path):
    root = tmp_path / ".hidden above" / "x"
    draw(root, 4)
    for folder in (".ipynb_checkpoints", "0/.Trash-1000", "0/deeper/.also"):
        draw(root / folder, 2)
    draw(root / "0", 1, classes=("deeper",))
    (root / "1" / "01.png").rename(root / "1" / "._01.png")
    (root / "0" / "notes.txt").touch()
    images = train.Images(root, None)
    assert images.classes == ["0", "1"]
    names = [os.path.relpath(file, root) for file, _ in images.samples]
    assert names == ["0/00.png", "0/02.png", "0/deeper/00.png", "1/03.png"]
    assert images.targets == [] or len(images[3, 0]) == 2


def test_an_item_is_augmented_by_its_seed_alone(data):
    args = argparse.Namespace(size=16, min_scale=0.08, randaugment=2)
    images = train.Images(data / "train", train.transform(args, True))
    first = [images[3, seed][0] for seed in range(9)]
    torch.manual_seed(5)
    again = [images[3, seed][0] for seed in reversed(range(9))]
    assert all(map(torch.equal, first, reversed(again)))
    assert len({image.numpy().tobytes() for image in first}) == 9


def remove(*names):
    def change(root):
        for name in names:
            os.rename(root / name, root / name.replace("/", "-"))
    return change


def flatten(root):
    os.rename(root / "val" / "0", root / "flat")
    os.rename(root / "val", root / "old")
    os.rename(root / "flat", root / "val")


@pytest.mark.parametrize("change, message", [
    (remove("train/1", "val/1"), "must have a folder for each of two or more classes"),
    (flatten, "Couldn't find any class folder in"),
    (remove("val"), "No such file or directory"),
    (lambda root: draw(root / "val", 1, ["\x1b[31mcat"]), "in only one of train and val: ['\\\\x1b[31mcat']"),
    (lambda root: draw(root / "val", 1, ["0", ".cat"]), "a step takes more images than there are"),
])
def test_data_that_cannot_be_trained_on_give_one_line(change, message, fail, tmp_path):
    root = draw_data(tmp_path / "da\nta", n=8)
    change(root)
    assert message in fail("--data", root, "--output", "out", *QUICK, "--batch-size", 5)
    assert not pathlib.Path("out").exists()
