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
import shutil
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import scalablevit
import train_minimal as train

FILE = pathlib.Path(train.__file__)
QUICK = ["--size", 16, "--batch-size", 2, "--accum", 2, "--epochs", 2]                   # 4 steps an epoch
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
        with pytest.raises(SystemExit, check=lambda end: end.code == 2):
            runpy.run_path(str(FILE), run_name="__main__")
        error = capsys.readouterr().err
        assert error.startswith("train_minimal.py: ")
        assert error[:-1].isprintable(), error                      # no second line, no escape
        return error
    return run


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


def assert_same(ours, theirs):
    """Not a bit differs in weights, optimizer, settings, steps and logs."""
    for name in ("last.pt", "best.pt"):
        a, b = flat(load(ours / name)), flat(load(theirs / name))
        assert a.keys() == b.keys()
        assert [p for p in a if not (torch.equal(a[p], b[p]) if torch.is_tensor(a[p]) else a[p] == b[p])] == []
    assert (ours / "log.jsonl").read_text() == (theirs / "log.jsonl").read_text()


def assert_close(ours, theirs):
    """Up to rounding, which AdamW's first steps amplify."""
    a, b = load(f"{ours}/last.pt")["model"], load(f"{theirs}/last.pt")["model"]
    assert min(torch.isclose(a[name], b[name], atol=1e-4).float().mean() for name in a) > 0.99


# ---------------------------------------------------------------------------- settings
PAPER = dict(size=224, epochs=300, warmup_epochs=5, batch_size=128, accum=1, lr=1e-3, weight_decay=0.05, seed=0,
             clip_grad=5, label_smoothing=0.1, mixup=0.8, cutmix=1, reprob=0.25, randaugment=2, min_scale=0.08,
             aug_repeats=3)
LIGHT = dict(model="tiny", mixup=0, cutmix=0, reprob=0, randaugment=0, aug_repeats=1, drop_path_rate=0)


@pytest.mark.parametrize("flags, expected", [
    (["--model", "s"], dict(PAPER, drop_path_rate=0.2)), (["--model", "b"], dict(PAPER, drop_path_rate=0.5)),
    (["--model", "l", "--lr", "0.1", "--bf16"], dict(PAPER, drop_path_rate=0.5, lr=0.1, bf16=True)),
    (["--data", "x"], dict(LIGHT, size=112, epochs=100, bf16=False)),
    ([], dict(LIGHT, size=56, epochs=8, output=pathlib.Path("runs/tiny")))])
def test_the_recipe_is_that_of_the_model_and_of_the_data(flags, expected):
    args, run = train.parse_args(flags)
    assert vars(args).items() >= expected.items()
    assert run == {}


def test_a_setting_is_the_command_lines_else_the_runs_else_the_recipes(capsys, tmp_path):
    saved = {"model": "tiny", "data": "x\n", "bf16": True, "lr": 0.5, "seed": 3}
    torch.save({"settings": saved, "model": {}}, tmp_path / "last.pt")
    args, run = train.parse_args(["--output", str(tmp_path), "--no-bf16", "--lr", "0.5", "--data", "y"])
    assert (args.lr, args.seed, args.size, args.bf16, args.data) == (0.5, 3, 112, False, "y")
    file = ascii(str(tmp_path / "last.pt"))
    assert capsys.readouterr().out == f"data: 'x\\n' in {file}, now 'y'\nbf16: True in {file}, now False\n"


@given(st.integers(1, 40), st.floats(0, 20), st.floats(1e-4, 1e-2))
def test_the_learning_rate_has_linear_warmup_and_cosine_decay(more, warmup, lr):
    epochs = np.linspace(0, warmup + more, 50)
    args = argparse.Namespace(lr=lr, step_size=2048, warmup_epochs=warmup, epochs=warmup + more)
    rates = [train.learning_rate(epoch, args) for epoch in epochs]
    turned = np.pi * np.clip((epochs - warmup) / more, 0, 1)
    cosine = 1e-5 + (2 * lr - 1e-5) * (1 + np.cos(turned)) / 2
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
    n, args = size + extra, dict(aug_repeats=repeats, seed=seed)
    [everything] = batches(n, 1, 1, size, **args)                   # of one process, without accum
    steps, different = n // size, -(-size // repeats)
    assert [len(step) for step in everything] == [size] * 3 * steps
    assert len({key[1] for key in sum(everything, [])}) == 3 * steps * size    # seeds
    for epoch in range(3):
        shown = []
        for step in everything[epoch * steps:(epoch + 1) * steps]:
            images = [image for image, _ in step]
            assert images == (images[:different] * repeats)[:size]
            shown += images[:different]
        assert len(set(shown)) == len(shown)                        # in one step only, once before again
        assert set(shown) <= set(range(n))
    shares = batches(n, world, accum, b, **args)
    for rank, share in enumerate(shares):                           # each place has one process
        for i, batch in enumerate(share):
            assert batch == everything[i // accum][rank + i % accum * world::accum * world]
    start %= 3 * steps
    assert batches(n, world, accum, b, start, **args) == [share[start * accum:] for share in shares]


def test_epochs_and_seeds_shuffle_differently_and_mixed_neighbours_are_never_copies():
    steps = batches(64, 1, 1, 64, aug_repeats=1, seed=0)[0] + batches(64, 1, 1, 64, aug_repeats=1, seed=1)[0]
    assert len({str([image for image, _ in step]) for step in steps}) == 6
    for b in range(8, 129):                                         # v2.MixUp mixes i with i - 1
        batch = batches(b, 1, 1, b, aug_repeats=3, seed=0)[0][0]
        assert all(batch[i][0] != batch[i - 1][0] for i in range(b)), b


@given(st.integers(0, 10 ** 6), st.integers(2, 5), st.integers(4, 30), st.integers(4, 30), st.booleans())
def test_mixed_targets_match_the_share_of_each_image(seed, B, H, W, cut):
    """All pixels of image i are i, so a mixed image reveals its parts."""
    args = argparse.Namespace(reprob=0.0, mixup=0.8 * (not cut), cutmix=1.0 * cut, num_classes=B)
    torch.manual_seed(seed)
    images = torch.arange(B).float().view(B, 1, 1, 1).repeat(1, 3, H, W)
    mixed, targets = train.augment(images, torch.arange(B), args)   # (B, 3, H, W), (B, B)
    torch.testing.assert_close(targets.sum(1), torch.ones(B))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(B).float())
    expected = mixed.round() if cut else mixed[:, :1, :1, :1].expand_as(mixed)     # whole pixels, or all alike
    torch.testing.assert_close(mixed, expected)


def test_a_batch_is_mixed_or_cut_and_a_quarter_of_the_images_is_erased():
    args = argparse.Namespace(reprob=0.25, mixup=0.0, cutmix=0.0)
    erased, labels = train.augment(torch.zeros(1000, 3, 24, 24), torch.arange(1000), args)
    share = (erased != 0).float().mean((1, 2, 3))
    assert (share > 0).float().mean() == pytest.approx(0.25, abs=0.04)
    assert 0.3 < share.max() < 0.36
    assert erased[erased != 0].std() == pytest.approx(1, abs=0.05)  # noise, not a constant
    assert labels.tolist() == list(range(1000))
    args, cut = argparse.Namespace(reprob=0.0, mixup=0.8, cutmix=1.0, num_classes=2), 0
    for _ in range(300):
        pair = torch.arange(2.0).view(2, 1, 1, 1).repeat(1, 3, 24, 24)
        mixed, _ = train.augment(pair, torch.arange(2), args)
        cut += torch.equal(mixed, mixed.round())
    assert cut / 300 == pytest.approx(0.5, abs=0.1)


def picture(size=(60, 40)):
    """Smooth and colorful, like photographs."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


def distance(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def test_training_crops_flips_and_augments_and_evaluation_crops_the_centre(monkeypatch):
    operation = mock.Mock(side_effect=lambda image: image)
    monkeypatch.setattr(train.v2, "RandAugment", mock.Mock(return_value=operation))
    args = argparse.Namespace(size=56, min_scale=0.25, randaugment=2)
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 100).astype(np.uint8)[:, None], (80, 1, 3)))
    crops = torch.stack([train.transform(args, True)(ramp) for _ in range(400)]).float()
    width = (crops[..., -1] - crops[..., 0]).mean((1, 2)) / 255     # negative when flipped
    assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.08)
    assert 0.35 < width.abs().min() < 0.6
    assert operation.call_count / 400 == pytest.approx(1, abs=0.1)  # two, each with p = 1/2
    for W, H in [(320, 256), (256, 320), (300, 100), (50, 70)]:
        scale = 64 / min(W, H)
        resized = picture((W, H)).resize((int(W * scale), int(H * scale)), Image.BICUBIC)
        x, y = round((resized.width - 56) / 2), round((resized.height - 56) / 2)
        ours = train.transform(args, False)(picture((W, H))).permute(1, 2, 0)
        assert distance(ours, resized.crop((x, y, x + 56, y + 56))) < 0.5


TURNED = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: np.swapaxes(a, 0, 1),
          lambda a: np.rot90(a, -1), lambda a: np.swapaxes(np.rot90(a, 2), 0, 1), np.rot90]      # 1 to 8


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_rotated_as_exif_says(suffix):
    for orientation, turned in enumerate(TURNED, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture().save(f"x.{suffix}", exif=exif, quality=100)
        assert distance(train.load_image(f"x.{suffix}"), turned(np.asarray(picture()))) < 5


def gray(dtype, value):
    return Image.fromarray(np.full((9, 9), value, dtype))


@pytest.mark.parametrize("save, reason", [
    (lambda file: gray(np.uint16, 30000).save(file, "png"), "more than 8 bits a channel"),
    (lambda file: gray(np.float32, 0.5).save(file, "tiff"), "more than 8 bits a channel"),
    (lambda file: picture().save(file, "eps"), "cannot identify"),  # would start Ghostscript
    (lambda file: file.write_bytes(b"hello"), "cannot identify"),
    (lambda file: file.write_bytes(pathlib.Path("x.png").read_bytes()[:900]), "file"),
    (lambda file: file.mkdir(), "Is a directory")])
def test_an_unreadable_image_gives_one_line_with_its_name_escaped(save, reason, tmp_path):
    picture().save("x.png")
    save(tmp_path / "a\x1b[31m\nb\udcff.jpg")
    with pytest.raises(train.UserError, match=reason) as error:
        train.load_image(tmp_path / "a\x1b[31m\nb\udcff.jpg")
    assert "a\\x1b[31m\\nb\\udcff.jpg'" in str(error.value)
    assert str(error.value).isprintable()


def test_hidden_files_and_folders_are_no_images_and_no_classes_and_seeds_augment(tmp_path):
    root = tmp_path / ".hidden above"
    for folder in (".ipynb_checkpoints", "0/.Trash-1000", "0/deeper/.also", "."):
        draw(root / folder, 4)
    (root / "1/01.png").rename(root / "1/._01.png")
    (root / "1/03.png").rename(root / "0/deeper/05.png")
    draw(root, 1, ["1"])
    images = train.Images(root, train.transform(argparse.Namespace(size=16, min_scale=0.1, randaugment=2), True))
    assert [os.path.relpath(file, root) for file, _ in images.samples] == [
        "0/00.png", "0/02.png", "0/deeper/05.png", "1/00.png"]
    assert images.classes == ["0", "1"]
    first = [images[2, seed][0] for seed in range(9)]
    again = [images[2, seed][0] for seed in reversed(range(9))]
    assert all(map(torch.equal, first, reversed(again)))
    assert len({str(image.tolist()) for image in first}) == 9


@pytest.mark.parametrize("change, message", [
    (lambda root: [os.rename(root / f"{split}/1", root / f"{split}-1") for split in ("train", "val")],
     "must have a folder for each of two or more classes"),
    (lambda root: [os.rename(root / "val", root / "old"), os.rename(root / "old/0", root / "val")],
     "Couldn't find any class folder in"),
    (lambda root: os.rename(root / "val", root / "old"), "No such file or directory"),
    (lambda root: draw(root / "val", 1, ["\x1b[31mcat"]), "in only one of train and val: ['\\\\x1b[31mcat']"),
    (lambda root: (root / "val/2").mkdir(), "Found no valid file for the classes 2"),
    (lambda root: draw(root / "val", 1, [".cat"]), "a step takes more images than there are")])
def test_data_that_cannot_be_trained_on_give_one_line(change, message, fail, tmp_path):
    root = draw_data(tmp_path / "da\x1bta", n=8)
    change(root)
    assert message in fail("--data", root, "--output", "out", *QUICK, "--batch-size", 5)
    assert not pathlib.Path("out").exists()
