"""What the training program learns from: batches, augmentation, images, the digits that it draws."""
import argparse
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import train_minimal as train


class Killed(BaseException):
    """Caught by nothing in the program, like kill -9."""


def interrupt(patch, owner, name, number):
    """Be killed before the number-th call (from 1) of owner.name."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return real(*args, **kwargs)
    patch.setattr(owner, name, wrapped)


def draw(root, n=17, classes=("0", "1")):
    """n training images and 5 for validation: an odd number, for two processes."""
    for split, n in (("train", n), ("val", 5)):
        for i in range(n):
            folder = root / split / classes[i % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i + n).integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return root


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def batches(n, world, accum, b, start=0, **args):
    """For each process, its list of batches of (index, seed) in three epochs."""
    args, shares = argparse.Namespace(accum=accum, step_size=world * accum * b, epochs=3, **args), []
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
    steps = [step for seed in (0, 1) for step in batches(64, 1, 1, 64, aug_repeats=1, seed=seed)[0]]
    assert len({tuple(image for image, _ in step) for step in steps}) == 6
    batch = batches(128, 1, 1, 128, aug_repeats=3, seed=0)[0][0]    # v2.MixUp mixes i with i - 1
    assert all(batch[i][0] != batch[i - 1][0] for i in range(128))


@given(st.integers(0, 10 ** 6), st.integers(2, 5), st.integers(4, 30), st.integers(4, 30), st.booleans())
def test_mixed_targets_match_the_share_of_each_image(seed, B, H, W, cut):
    """All pixels of image i are i, so a mixed image reveals its parts."""
    args = argparse.Namespace(reprob=0.0, mixup=0.8 * (not cut), cutmix=1.0 * cut, num_classes=B)
    torch.manual_seed(seed)
    images = torch.arange(B).float().view(B, 1, 1, 1).repeat(1, 3, H, W)
    mixed, targets = train.augment(images, torch.arange(B), args)   # (B, 3, H, W), (B, B)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(B).float())
    torch.testing.assert_close(mixed, mixed.round() if cut else mixed[:, :1, :1, :1].expand_as(mixed))


def test_random_erasing_crops_flips_and_randaugment_have_their_probabilities(monkeypatch):
    args = argparse.Namespace(size=56, min_scale=0.25, randaugment=2, reprob=0.25, mixup=0.0, cutmix=0.0)
    erased, labels = train.augment(torch.zeros(1000, 3, 24, 24), torch.arange(1000), args)
    assert erased.flatten(1).any(1).float().mean() == pytest.approx(0.25, abs=0.04)
    assert erased[erased != 0].std() == pytest.approx(1, abs=0.05)  # noise, not a constant
    assert labels.tolist() == list(range(1000))
    operation = mock.Mock(side_effect=lambda image: image)
    monkeypatch.setattr(train.v2, "RandAugment", mock.Mock(return_value=operation))
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 100).astype(np.uint8)[:, None], (80, 1, 3)))
    crops = torch.stack([train.transform(args, True)(ramp) for _ in range(400)]).float()
    width = (crops[..., -1] - crops[..., 0]).mean((1, 2)) / 255     # negative when flipped
    assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.08)
    assert 0.35 < width.abs().min() < 0.6
    assert operation.call_count / 400 == pytest.approx(1, abs=0.1)  # two, each with p = 1/2


def picture(W=60, H=40):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((W, H), Image.BICUBIC)    # smooth, like photographs


def distance(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_rotated_as_exif_says_and_evaluated_at_the_centre(suffix):
    for orientation, how in enumerate([0, 3, 1, 5, 4, 6, 2], 2):    # Image.Transpose's numbers
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture().save(f"x.{suffix}", exif=exif, quality=100)
        assert distance(train.load_image(f"x.{suffix}"), picture().transpose(how)) < 5
    for W, H in [(128, 64), (64, 96)]:
        ours = train.transform(argparse.Namespace(size=56), False)(picture(2 * W, 2 * H)).permute(1, 2, 0)
        centre = (W / 2 - 28, H / 2 - 28, W / 2 + 28, H / 2 + 28)
        assert distance(ours, picture(2 * W, 2 * H).resize((W, H), Image.BICUBIC).crop(centre)) < 0.5


@pytest.mark.parametrize("save, reason", [
    (lambda file: Image.fromarray(np.ones((9, 9), np.uint16)).save(file, "png"), "more than 8 bits"),
    (lambda file: Image.fromarray(np.ones((9, 9), np.float32)).save(file, "tiff"), "more than 8 bits"),
    (lambda file: picture().save(file, "eps"), "cannot identify"),  # would start Ghostscript
    (lambda file: [picture().save(file, "png"), os.truncate(os.fsencode(file), 900)], "truncated"),
    (lambda file: file.mkdir(), "Is a directory")])
def test_an_unreadable_image_gives_one_line_with_its_name_escaped(save, reason, tmp_path):
    save(tmp_path / "a\x1b[31m\nb\udcff.jpg")
    with pytest.raises(train.UserError, match=reason) as error:
        train.load_image(tmp_path / "a\x1b[31m\nb\udcff.jpg")
    assert "a\\x1b[31m\\nb\\udcff.jpg'" in str(error.value)
    assert str(error.value).isprintable()


def test_hidden_files_and_folders_are_no_images_and_seeds_decide_on_augmentation(tmp_path):
    root = draw(tmp_path / ".hidden") / "train"
    for name in ("0/.Trash-1000", "0/deeper", "0/deeper/.also", ".ipynb_checkpoints"):
        shutil.copytree(root / "1", root / name)
    (root / "1/01.png").rename(root / "1/._01.png")
    args = argparse.Namespace(size=16, min_scale=0.1, randaugment=2)
    images = train.Images(root, train.transform(args, True))
    names = [os.path.relpath(file, root) for file, _ in images.samples]
    assert images.classes == ["0", "1"]
    assert len(names) == 9 + 8 + 7                                  # 0, 0/deeper, 1
    assert not [name for name in names if name[0] == "." or "/." in name]
    first = [images[2, seed][0] for seed in range(9)]
    assert all(torch.equal(images[2, seed][0], first[seed]) for seed in reversed(range(9)))
    assert len({str(image.tolist()) for image in first}) == 9


def test_the_digits_are_drawn_alike_and_appear_when_complete(tmp_path):
    with mock.patch.object(train, "range", lambda n: range(n // 100), create=True):
        for root in (tmp_path / "runs/tiny/digits", tmp_path / "again"):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                interrupt(patch, Image.Image, "save", 45)
                train.draw_digits(root)
            assert not root.exists()
            train.draw_digits(root)
    drawn, again = (sorted((tmp_path / root).rglob("*.png")) for root in ("runs", "again"))
    assert [file.read_bytes() for file in drawn] == [file.read_bytes() for file in again]
    assert len(drawn) == 50


@pytest.mark.slow
def test_a_linear_classifier_of_the_digits_stays_under_60_percent(tmp_path):
    """Ridge regression on 16 × 16 pixels."""
    train.draw_digits(tmp_path / "digits")
    files = sorted(tmp_path.glob("digits/*/*/*.png"))               # 4000 for training come first
    pixels = np.stack([np.array(Image.open(file).resize((16, 16))).ravel() for file in files])
    labels = torch.tensor([int(file.parent.name) for file in files])
    x, x_val = torch.from_numpy(pixels / 255 - 0.5).split([4000, 1000])
    targets = x.T @ torch.eye(10).double()[labels[:4000]]
    for strength in (10, 1000):
        guesses = (x_val @ torch.linalg.solve(x.T @ x + strength * torch.eye(768), targets)).argmax(1)
        assert (guesses == labels[4000:]).double().mean() < 0.6
