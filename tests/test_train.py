"""The training program: its recipe piece by piece, runs that stop and go on to the same end, faults, mistakes."""
import contextlib
import errno
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image, ImageOps

import scalablevit
import train_minimal as train

PROGRAM = pathlib.Path(train.__file__)
QUICK = ["--size", "32", "--batch-size", "16", "--warmup-epochs", "0", "--lr", "0.128"]
RECIPE = ["--mixup", "0.8", "--cutmix", "1", "--reprob", "0.25", "--randaugment", "2", "--aug-repeats", "3"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs the program in this process: call(arguments) -> exit status, what it printed, its errors."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)                               # the tests themselves may run under nohup
    monkeypatch.setattr(os, "fsync", lambda file: None)                        # a busy disk takes many seconds over it

    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, args)])
        try:
            train.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def succeed(result):
    status, out, err = result
    assert status == 0, out + err
    return out


def fail(result):
    """The one sentence of a run that a mistake ended."""
    status, out, err = result
    assert status == 2 and "Traceback" not in err and len(err.splitlines()) == 1, out + err
    return err


def torchrun(*args, nproc=2, options=(), program=PROGRAM):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", *options, program]
    return subprocess.Popen([*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=ENVIRONMENT)


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights_of(output, name="last.pt"):
    return torch.load(output / name, weights_only=True)["model"]


def assert_same_end(a, b):
    """The same weights and the same log, to the last bit."""
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()
    ours, theirs = weights_of(a), weights_of(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def small_data_set(root, side=32, shapes=("disc", "bars"), **splits):
    """Two classes of the embedded data set, smaller and few."""
    rng = random.Random(0)
    for split, n in splits.items():
        for shape in shapes:
            (root / split / shape).mkdir(parents=True)
            for i in range(n):
                train.draw(shape, rng, side=side).save(root / split / shape / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """32 images make 4 steps of 8 for an epoch of two processes with a batch of 4, or one with 8."""
    return small_data_set(tmp_path_factory.mktemp("data"), train=32, val=10)


@pytest.fixture
def finished(data, tmp_path_factory, call):
    """A finished run of four epochs of four steps, with the recipe."""
    output = tmp_path_factory.getbasetemp() / "finished"
    if not output.exists():
        printed = succeed(call("--data", data, "--output", output, "--epochs", 4, *QUICK, *RECIPE, "--drop-path-rate", 0.1))
        (output / "printed").write_text(printed)
    return output


# ---------------------------------------------------------------------------- the recipe
def test_the_papers_run_is_the_default_of_s_b_and_l(monkeypatch):
    paper = dict(size=224, epochs=300, warmup_epochs=5, weight_decay=0.05, clip_grad=5, label_smoothing=0.1, mixup=0.8,
                 cutmix=1, reprob=0.25, randaugment=2, min_scale=0.08, aug_repeats=3, lr=1e-3, accum=1, batch_size=1024 // 8)
    for model, drop_path_rate in (("s", 0.2), ("b", 0.5), ("l", 0.5)):
        monkeypatch.setattr(sys, "argv", ["x", "--data", "x", "--model", model])
        settings = vars(train.parse_args()[1])
        assert settings.items() >= {**paper, "drop_path_rate": drop_path_rate}.items()


def test_tiny_gets_none_of_the_heavy_augmentation(monkeypatch):
    for args in ([], ["--data", "x"]):
        monkeypatch.setattr(sys, "argv", ["x", *args])
        settings = train.parse_args()[1]
        assert settings.mixup == settings.cutmix == settings.reprob == settings.randaugment == settings.drop_path_rate == 0
        assert settings.aug_repeats == 1


@given(st.integers(1, 50), st.integers(0, 20), st.floats(1e-4, 1e-2))
def test_the_learning_rate_warms_up_and_falls_along_a_cosine(steps, warmup, peak):
    steps += warmup
    rates = [train.learning_rate(i, steps, warmup, peak) for i in range(steps + 1)]
    assert rates[0] == pytest.approx(1e-6 if warmup else peak)
    assert rates[warmup] == pytest.approx(peak) and rates[-1] == pytest.approx(1e-5)
    assert rates[:warmup + 1] == sorted(rates[:warmup + 1]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_the_learning_rate_of_the_papers_run():
    """1251 steps of 1024 images an epoch: half way up, at the peak, a third and half way down, at the end."""
    rates = {epochs: train.learning_rate(round(epochs * 1251), 300 * 1251, 5 * 1251, 1e-3)
             for epochs in (0, 2.5, 5, 5 + 295 / 3, 5 + 295 / 2, 300)}
    assert list(rates.values()) == pytest.approx([1e-6, 5.005e-4, 1e-3, 7.525e-4, 5.05e-4, 1e-5], rel=1e-3)


@given(st.integers(1, 60), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4),
       st.integers(0, 5))
def test_the_sampler_repeats_images_and_shares_them_out(extra, world, b, accum, repeats, seed):
    settings = SimpleNamespace(batch_size=b, accum=accum, aug_repeats=repeats, seed=seed)
    n = world * accum * b + extra
    steps = n // (world * accum * b)
    keys = [list(train.training_keys(n, settings, 0, 3 * steps, world, rank)) for rank in range(world)]
    assert all(len(batch) == b for own in keys for batch in own) and all(len(own) == 3 * steps * accum for own in keys)
    orders = []
    for epoch in range(3):
        own = [[key for batch in keys[rank][epoch * steps * accum:(epoch + 1) * steps * accum] for key in batch]
               for rank in range(world)]
        everyone = sorted((place[2], image, place) for part in own for image, place in part)
        assert [position for position, _, _ in everyone] == list(range(steps * world * accum * b))    # each once, no gap
        assert all(place == (seed, epoch, position) for position, _, place in everyone)
        order = [image for _, image, _ in everyone]
        assert max(Counter(order[:-repeats]).values(), default=repeats) <= repeats
        assert all(len(set(order[i:i + repeats])) == 1 for i in range(0, len(order), repeats))        # in a row, and
        assert len(set(order)) == -(-len(order) // repeats)                                           # each no more often
        if world >= repeats:
            for image in set(order):
                assert all(sum(j == image for j, _ in part) <= 1 for part in own)                     # on as many processes
        orders.append(order)
    assert n < 12 or len(set(map(tuple, orders))) > 1                                                 # shuffled anew
    for rank in range(world):                                                                         # resumed anywhere
        first = seed % (3 * steps)
        assert list(train.training_keys(n, settings, first, 3 * steps, world, rank)) == keys[rank][first * accum:]


def test_partners_in_a_mix_are_the_same_however_a_step_is_split():
    """Pairs of positions that `mix` joins, for a step of 16 images."""
    pairs = set()
    for world, accum in ((1, 1), (2, 1), (1, 4), (2, 2), (4, 1)):
        b = 16 // (world * accum)
        settings = SimpleNamespace(batch_size=b, accum=accum, aug_repeats=3, seed=0)
        batches = [[place[2] for _, place in batch] for rank in range(world)
                   for batch in train.training_keys(40, settings, 1, 2, world, rank)]
        pairs.add(frozenset(frozenset((batch[i], batch[i - b // 2])) for batch in batches for i in range(b)))
    assert len(pairs) == 1


@given(st.integers(0, 10 ** 6), st.integers(2, 6), st.integers(2, 40), st.integers(2, 40))
def test_mixed_targets_sum_to_one_and_tell_the_share_of_each_image(seed, B, H, W):
    """Image i is i everywhere, so what is in a mixed one can be read off it."""
    images = torch.arange(B, dtype=torch.float64).view(B, 1, 1, 1).expand(B, 3, H, W)
    mixed, targets = train.mix(images, torch.eye(B, dtype=torch.float64), 0.8, 1.0, random.Random(seed))
    torch.testing.assert_close(targets.sum(1), torch.ones(B, dtype=torch.float64))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(B, dtype=torch.float64))
    cut = random.Random(seed).random() < 0.5
    if cut:
        other = (torch.arange(B) - B // 2) % B
        pasted = mixed[:, 0] == other.view(B, 1, 1)
        assert (pasted | (mixed[:, 0] == torch.arange(B).view(B, 1, 1))).all() and (pasted == pasted[0]).all()
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert torch.equal(pasted[0], rows[:, None] & columns)                                   # one rectangle
    else:
        assert all(len(image.unique()) == 1 for image in mixed.mul(1e6).round())                 # the same everywhere
    for settings, off in (((0, 0), True), ((0.8, 0), cut is None), ((0, 1), cut is None)):
        assert (train.mix(images, targets, *settings, random.Random(seed))[0] is images) == off


def test_mixup_and_cutmix_take_turns_and_their_lambdas_are_beta_distributed():
    images, targets, shares = torch.arange(2.).view(2, 1, 1, 1).expand(2, 3, 64, 64), torch.eye(2), {True: [], False: []}
    for seed in range(2000):
        mixed, mixed_targets = train.mix(images, targets, 0.8, 1.0, random.Random(seed))
        cut = bool(((mixed == 0) | (mixed == 1)).all())
        shares[cut].append(mixed_targets[0, 0].item())
    assert 0.46 < len(shares[True]) / 2000 < 0.54
    assert np.var(shares[False]) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)               # of Beta(0.8, 0.8)
    assert np.mean(shares[False]) == pytest.approx(0.5, abs=0.03)
    assert np.mean(shares[True]) > 0.55                         # of Beta(1, 1) 0.5, but the border cuts rectangles smaller


def test_random_erasing_takes_its_share_of_images_and_area():
    boxes = [train.erasing_box(224, 0.25, random.Random(seed)) for seed in range(8000)]
    taken = [(y, x, h, w) for y, x, h, w in boxes if h]
    assert len(taken) / len(boxes) == pytest.approx(0.25, abs=0.02)
    areas, ratios = [h * w / 224 ** 2 for *_, h, w in taken], [h / w for *_, h, w in taken]
    assert 0.019 < min(areas) < 0.03 and 0.32 < max(areas) < 0.336 and np.mean(areas) == pytest.approx(0.17, abs=0.01)
    assert 0.28 < min(ratios) < 0.32 and 3.1 < max(ratios) < 3.5 and np.median(ratios) == pytest.approx(1, abs=0.1)
    assert all(0 <= y and y + h <= 224 and 0 <= x and x + w <= 224 for y, x, h, w in taken)
    assert not any(any(train.erasing_box(224, 0, random.Random(seed))) for seed in range(100))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4))
def test_what_is_erased_is_noise_and_the_rest_stays(boxes):
    images, noise = torch.zeros(len(boxes), 3, 9, 12), torch.randn(3, 9, 12)
    expected = images.clone()
    for image, (y, x, h, w) in zip(expected, boxes):
        image[:, y:y + h, x:x + w] = noise[:, y:y + h, x:x + w]
    assert torch.equal(train.erase(images, torch.tensor(boxes), noise), expected)


def picture(size=(96, 80), seed=0):
    """Smooth and colourful, as photographs are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


def distance(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def test_stochastic_depth_differs_between_processes_and_steps_and_nothing_else_does(monkeypatch):
    settings = SimpleNamespace(seed=0, size=16, accum=1, mixup=0, cutmix=0, label_smoothing=0.1)
    batch = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 3, torch.zeros(8, 4, dtype=torch.long), {}

    def loss(rank, step, drop_path_rate):
        torch.manual_seed(0)
        model = scalablevit.scalablevit_tiny(num_classes=3, drop_path_rate=drop_path_rate).train()
        monkeypatch.setattr(train, "RANK", rank)
        return train.backward(model, iter([batch]), step, settings, False, 3)[0].item()

    assert loss(0, 0, 0.9) == loss(0, 0, 0.9)
    assert len({loss(0, 0, 0.9), loss(1, 0, 0.9), loss(0, 1, 0.9)}) == 3
    assert loss(0, 0, 0) == loss(1, 1, 0)


def test_randaugment_does_each_of_two_operations_half_the_time(monkeypatch):
    done = []
    monkeypatch.setattr(train, "RANDAUGMENT", [lambda image, m, s, i=i: done.append((i, m, s)) or image for i in range(15)])
    for seed in range(4000):
        train.randaugment(None, 2, random.Random(seed))
    operations, magnitudes, signs = zip(*done)
    assert len(done) / 4000 == pytest.approx(1, abs=0.05)
    assert all(abs(n / len(done) - 1 / 15) < 0.02 for n in Counter(operations).values()) and len(set(operations)) == 15
    assert np.mean(magnitudes) == pytest.approx(0.9, abs=0.01) and np.std(magnitudes) == pytest.approx(0.05, abs=0.01)
    assert max(magnitudes) == 1 and abs(np.mean(signs)) < 0.05


def test_randaugments_operations_do_what_deit_says():
    image = picture().point(lambda v: v // 2 + 40)              # of less than full contrast, which two operations mend
    pixels = np.asarray(image).astype(int)
    assert len(train.RANDAUGMENT) == 15
    results = [[operation(image, m, 1) for m in (0, 0.5, 0.9)] for operation in train.RANDAUGMENT]
    for operation, (none, half, much) in zip(train.RANDAUGMENT, results):
        assert much.size == image.size and much.mode == "RGB" and distance(image, much) > 0.1
        for m in (0.0, 1.0):
            operation(image, m, -1)
    for none, half, much in [results[3], *results[7:13]]:       # those with degrees but the shifts, which are below
        assert distance(image, none) <= distance(image, half) < distance(image, much)
    assert all(none == image for none, _, _ in [results[3], *results[7:]])
    assert results[2][2] == ImageOps.invert(image)
    assert len(np.unique(np.asarray(results[4][2]))) == 2       # posterize to one bit
    assert np.array_equal(np.asarray(results[5][2]), np.where(pixels < 26, pixels, 255 - pixels))
    assert np.array_equal(np.asarray(results[6][2]), np.where(pixels < 128, np.minimum(pixels + 99, 255), pixels))
    moved = np.asarray(results[13][2])[:, :96 - 43]             # 0.45 x 0.9 of the width: 39 pixels
    assert distance(moved[:, :50], pixels[:, 39:89]) < 3 and (np.asarray(results[13][2])[:, -30:] == train.GREY).all()


def test_biases_norms_and_the_peg_are_left_out_of_weight_decay(finished):
    groups = torch.load(finished / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    model = scalablevit.scalablevit_tiny(num_classes=2)
    exempt = len(model.no_weight_decay())
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert [len(group["params"]) for group in groups] == [len(list(model.parameters())) - exempt, exempt]


def test_accuracy_is_the_share_of_images_whose_largest_or_five_largest_logits_have_their_class():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return -(torch.arange(8) - torch.tensor([0, 1, 2, 2, 3])[:, None]).abs().float()     # the nearest are largest

    batch = torch.zeros(5, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 7]), None, {}
    assert train.evaluate(Fixed(), [batch, batch], bf16=False) == (60, 80)


# ---------------------------------------------------------------------------- images
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(0, 99))
def test_crops_lie_in_the_image_and_are_squares_of_the_size_asked_for(W, H, size, seed):
    for x, y, w, h in (train.random_crop(W, H, 0.08, random.Random(seed)), train.center_crop(W, H, size)):
        assert 0 <= x and 0 <= y and 0 < w and 0 < h and x + w <= W + 1e-6 and y + h <= H + 1e-6
    if max(W, H) / min(W, H) < 2:
        _, _, w, h = train.random_crop(W, H, 0.08, random.Random(seed))
        assert 0.06 < w * h / (W * H) <= 1 + 1e-9 and 0.37 < w / h < 2.7


def test_evaluation_resizes_and_takes_the_centre(tmp_path):
    """As resizing the whole picture and cutting its middle out does, for many shapes of it."""
    for i, (W, H) in enumerate([(320, 256), (256, 320), (300, 100), (50, 70), (641, 480), (256, 256)]):
        picture((W, H), i).save(tmp_path / "x.png")
        image, scale = picture((W, H), i), 64 / min(W, H)
        image = image.resize((round(W * scale), round(H * scale)), Image.BICUBIC)
        x, y = (image.width - 56) // 2, (image.height - 56) // 2
        ours = train.read(tmp_path / "x.png", 56, lambda W, H: train.center_crop(W, H, 56))
        assert distance(ours, image.crop((x, y, x + 56, y + 56))) < 0.2


def as_is(W, H):
    return 0, 0, W, H


def red_above_blue(**kwargs):
    image = Image.new("RGB", (40, 40), (200, 40, 40))
    image.paste((40, 40, 200), (0, 20, 40, 40))
    return image


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "transparent P", "animated",
                                  "wide", "1x1", "tif"])
def test_every_kind_of_image_is_read(mode, tmp_path):
    image = picture((40, 40))
    grey = np.asarray(image.convert("L"))
    path, expected, most = tmp_path / "bild.png", image, 0.1
    if mode in ("L", "LA", "1"):
        image.convert(mode).save(path)
        expected = image.convert(mode).convert("RGB")
    elif mode == "P":
        (image := image.convert(mode)).save(path)
        expected = image.convert("RGB")
    elif mode == "RGBA":
        image = image.convert(mode)
        image.putalpha(128)
        image.save(path)
        expected = Image.blend(expected, Image.new("RGB", (40, 40), "white"), 127 / 255)
        most = 1
    elif mode == "CMYK":
        image.convert("CMYK").save(path := tmp_path / "x.jpg", quality=100, subsampling=0)
        most = 3
    elif mode in ("I;16", "I"):
        wide = grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.int32) * 257
        Image.fromarray(wide).save(path := tmp_path / ("x.png" if mode == "I;16" else "x.tif"))
        expected = Image.fromarray(grey).convert("RGB")
    elif mode == "transparent P":
        image = red_above_blue().quantize(4)
        image.save(path, transparency=image.getpixel((0, 0)))
        expected = red_above_blue()
        expected.paste("white", (0, 0, 40, 20))
    elif mode == "animated":
        image.save(path := tmp_path / "x.gif", save_all=True, append_images=[ImageOps.invert(image)])
        most = 10
    elif mode == "wide":
        image.resize((20000, 2)).save(path)
        expected = image.resize((20000, 2)).resize((40, 40), Image.BICUBIC)
    elif mode == "1x1":
        Image.new("RGB", (1, 1), (9, 8, 7)).save(path)
        expected = Image.new("RGB", (40, 40), (9, 8, 7))
    elif mode == "tif":
        image.save(path := tmp_path / "x.tif")
    else:
        image.save(path)
    read = train.read(path, 40, as_is)
    assert read.mode == "RGB" and distance(read, expected) < most
    assert train.read(path, 40, lambda W, H: train.center_crop(W, H, 40)).size == (40, 40)
    assert train.read(path, 40, lambda W, H: train.random_crop(W, H, 0.08, random.Random(0))).size == (40, 40)


@pytest.mark.parametrize("pixels", [np.linspace(0, 1, 64, dtype=np.float32), np.arange(64, dtype=np.int32) << 20,
                                    -np.arange(64, dtype=np.int32)])
def test_numbers_of_unknown_range_are_no_image(pixels, tmp_path):
    Image.fromarray(pixels.reshape(8, 8)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="no known range|not within 16 bits"):
        train.read(tmp_path / "x.tif", 8, as_is)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_images_are_turned_as_their_exif_says(orientation, suffix, tmp_path):
    image, exif = picture((600, 400)), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{suffix}", exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    expected = ImageOps.exif_transpose(Image.open(tmp_path / f"x.{suffix}")).crop((10, 20, 210, 350)).resize((30, 30))
    assert distance(train.read(tmp_path / f"x.{suffix}", 30, lambda W, H: (10, 20, 200, 330)), expected) < 2


def test_draft_decoding_changes_nothing_that_can_be_seen(tmp_path, monkeypatch):
    image = Image.fromarray(np.asarray(picture((1600, 1200))) // 2 + np.random.default_rng(0).integers(
        0, 100, (1200, 1600, 1), dtype=np.uint8))                       # with grain
    image.save(tmp_path / "x.jpg", quality=90)
    for size, box in ((100, (3.5, 7, 1500, 1100)), (50, (200, 300, 230, 210)), (224, (0, 0, 600, 400))):
        sizes = []
        monkeypatch.setattr(Image.Image, "resize", lambda self, *a, own=Image.Image.resize, **k: (
            sizes.append(self.size), own(self, *a, **k))[1])
        drafted = train.read(tmp_path / "x.jpg", size, lambda W, H: box)
        monkeypatch.undo()
        whole = image.resize((size, size), Image.BICUBIC, box=(box[0], box[1], box[0] + box[2], box[1] + box[3]))
        assert distance(drafted, whole) < 1.5
        kept = sizes[0][0] / 1600                                       # of each side
        assert kept == (1 if size == 224 else 0.25 if size == 100 else 0.5)
        assert min(box[2:]) * kept >= 2 * size or kept == 1


def folder_of(root, *names):
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L", (8, 8)).save(root / name, format="png")


LIGHT = SimpleNamespace(size=4, min_scale=0.5, randaugment=0, reprob=0)


def test_names_in_any_script_and_links_are_read_and_hidden_and_other_files_are_not(tmp_path):
    folder_of(tmp_path / "x" / "disc", "0.PNG", "._0.png", "notes.txt", "Ελλάς 日本 🐈.jpg", "a b\nc.jpeg")
    folder_of(tmp_path / "elsewhere", "1.png")
    folder_of(tmp_path / "x" / "disc" / "deeper", "2.png")
    (tmp_path / "x" / ".cache").mkdir()
    (tmp_path / "x" / "disc" / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "x" / "disc" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x" / "disc" / "loop").symlink_to(tmp_path / "x" / "disc")
    (tmp_path / "x" / "disc" / "deeper" / "up").symlink_to("../..")
    with open(os.fsencode(tmp_path / "x" / "disc") + b"/\xff\xfe.png", "wb") as file:
        file.write((tmp_path / "elsewhere" / "1.png").read_bytes())
    assert train.class_names(tmp_path / "x") == ["disc"]
    folder = train.ImageFolder(tmp_path / "x", ["disc"], LIGHT)
    assert len(folder) == 7
    assert all(folder[i, place][3] == {} and folder[i, place][0].size == (4, 4) for i in range(7) for place in (None, (0, i)))


def test_an_image_depends_on_its_place_alone(data):
    settings = SimpleNamespace(size=32, min_scale=0.08, randaugment=2, reprob=0.5)
    folder = train.ImageFolder(data / "train", ["bars", "disc"], settings)
    random.seed(1), torch.manual_seed(1)
    first = folder[3, (0, 0, 7)]
    folder[3, (0, 0, 8)]
    again = folder[3, (0, 0, 7)]
    assert first == again
    assert len({folder[3, (0, 0, position)][0].tobytes() for position in range(8)}) == 8


# ---------------------------------------------------------------------------- runs
def test_a_run_leaves_a_log_and_plain_checkpoints(finished):
    log = log_of(finished)
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    assert all({"epoch", "loss", "top1", "top5", "lr", "unreadable"} == set(entry) for entry in log)
    printed = (finished / "printed").read_text()
    for word in ("epoch 4/4", "step 4/4", "16 = 1 x 1 x 16 images", "loss", "img/s", "left", "top-1", "top-5 100.00 %"):
        assert word in printed
    assert "\r" not in printed and printed.count("step") == 5 + 1              # the first step, and each epoch's last
    assert sorted(p.name for p in finished.iterdir()) == ["best.pt", "last.pt", "log.jsonl", "printed"]
    for name in ("best.pt", "last.pt"):
        scalablevit.scalablevit_tiny(num_classes=2).load_state_dict(weights_of(finished, name))
    best = torch.load(finished / "best.pt", weights_only=True)["log"][-1]
    assert best["top1"] == max(entry["top1"] for entry in log)


def test_in_a_terminal_progress_is_one_line(data, call, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    printed = succeed(call("--data", data, "--output", tmp_path / "out", "--epochs", 1, *QUICK))
    *_, progress, accuracy = printed.split("\r\x1b[K")
    assert progress.startswith("epoch 1/1  step 4/4") and len(progress) == 39 and accuracy.startswith("epoch 1/1  val top-1")


class Killed(BaseException):
    """What no handler in the program sees, as little as it sees a kill -9."""


def at_step(monkeypatch, step, happen):
    """happen() is called when the step is about to begin."""
    backward = train.backward
    monkeypatch.setattr(train, "backward", lambda net, batches, i, *rest: (
        happen() if i == step else None, backward(net, batches, i, *rest))[1])


def raiser(error):
    def happen(*_):
        raise error
    return happen


def test_under_nohup_a_run_outlives_its_terminal(data, call, tmp_path, monkeypatch):
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    succeed(call("--data", data, "--output", tmp_path / "out", "--epochs", 1, *QUICK))


@pytest.mark.parametrize("how, step, workers", [("killed", 8, 0), ("killed", 7, 2), ("SIGTERM", 6, 0), ("SIGINT", 10, 2), ("SIGHUP", 6, 0),
                                                ("SIGTERM in evaluation", 8, 0)])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(how, step, workers, data, finished, call, tmp_path, monkeypatch):
    """Saved every 3 steps and at each epoch's end, every 4 steps; stopped in the middle of an epoch or between two."""
    output, number = tmp_path / "out", getattr(signal, how.split()[0], None)
    with monkeypatch.context() as patch:
        if how == "killed":
            at_step(patch, step, raiser(Killed))
        elif how.endswith("evaluation"):
            evaluate, calls = train.evaluate, []
            patch.setattr(train, "evaluate", lambda *args: (
                calls.append(1), len(calls) == step // 4 and os.kill(os.getpid(), number), evaluate(*args))[2])
        else:
            at_step(patch, step, lambda: os.kill(os.getpid(), number))
        patch.chdir(data.parent)
        with pytest.raises(Killed) if how == "killed" else contextlib.nullcontext():
            status, out, err = call("--data", data.name, "--output", output, "--epochs", 4, "--save-every", 3, *QUICK, *RECIPE,
                                    "--drop-path-rate", 0.1, "--workers", workers)
            assert status == 128 + number and not err
            assert f"{number.name} came" in out and f"go on with: python {PROGRAM} --output {output} --resume" in out
    checkpoint = torch.load(output / "last.pt", weights_only=True)
    assert checkpoint["step"] == {8: 8, 7: 6, 6: 7, 10: 11}[step] and checkpoint["log"] == log_of(finished)[:len(checkpoint["log"])]
    succeed(call("--output", output, "--resume", "--workers", workers))
    assert_same_end(output, finished)


def test_a_finished_run_can_be_made_longer_and_is_never_overwritten(data, call, tmp_path):
    output = tmp_path / "out"
    succeed(call("--data", data, "--output", output, "--epochs", 1, *QUICK))
    before = (output / "last.pt").read_bytes()
    assert "--resume goes on with it" in fail(call("--data", data, "--output", output))
    assert "all 1 epochs are done" in succeed(call("--output", output, "--resume"))
    assert (output / "last.pt").read_bytes() == before
    succeed(call("--output", output, "--resume", "--epochs", 2))
    assert [entry["epoch"] for entry in log_of(output)] == [1, 2]


def test_runs_are_numbered(data, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        succeed(call("--data", data, "--epochs", 1, *QUICK))
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["1", "2"]


def test_eval_gives_the_accuracy_of_the_best_epoch(data, finished, call):
    best = max(entry["top1"] for entry in log_of(finished))
    sentence = f"top-1 {best:.2f} %, top-5 100.00 % of 20 images"
    assert sentence in succeed(call("--output", finished, "--eval"))
    assert sentence in succeed(call("--init", finished / "best.pt", "--eval", "--data", data, "--workers", 1))


def test_it_learns(call, tmp_path):
    """Two shapes, which a coin would tell apart half the time."""
    small_data_set(tmp_path / "data", train=200, val=30)
    succeed(call("--data", tmp_path / "data", "--output", tmp_path / "out", "--epochs", 10, *QUICK))
    log = log_of(tmp_path / "out")
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["top1"] >= 85


def test_accumulated_gradients_are_those_of_the_whole_batch(data, call, tmp_path):
    for accum in (1, 4):
        printed = succeed(call("--data", data, "--output", tmp_path / str(accum), "--epochs", 1, *QUICK, *RECIPE,
                               "--batch-size", 16 // accum, "--accum", accum))
        assert f"16 = 1 x {accum} x {16 // accum} images" in printed
    assert_close_end(tmp_path / "1", tmp_path / "4")


def assert_close_end(a, b):
    """The same but for float32's rounding; AdamW's first steps make much of it where a gradient is almost zero."""
    assert [entry["loss"] for entry in log_of(a)] == pytest.approx([entry["loss"] for entry in log_of(b)], rel=1e-4)
    ours, theirs = weights_of(a), weights_of(b)
    for name in ours:
        close = torch.isclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.998, name


def test_two_processes_take_the_steps_of_one_and_count_each_validation_image_once(data, call, tmp_path):
    """19 images to validate, so that the processes have unequal shares; the whole recipe but stochastic depth."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "train").symlink_to(data / "train")
    small_data_set(root, val=10)
    (root / "val" / "disc" / "9.png").unlink()
    options = ["--data", root, "--epochs", 1, *QUICK, *RECIPE, "--batch-size", 8, "--output"]
    process = torchrun(*options, tmp_path / "two", options=["--standalone"])
    succeed(call(*options, tmp_path / "one", "--batch-size", 16))
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "2 process(es) on cpu" in printed and "16 = 2 x 1 x 8 images" in printed, printed
    assert printed.count("val top-1") == 1                                     # one process speaks
    assert_close_end(tmp_path / "two", tmp_path / "one")
    top1 = log_of(tmp_path / "two")[0]["top1"]
    assert top1 * 19 / 100 == pytest.approx(round(top1 * 19 / 100)) and top1 == log_of(tmp_path / "one")[0]["top1"]


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="threads are named under Linux's /proc")
def test_the_data_set_is_drawn_once_for_all_and_the_groups_threads_end_with_the_run(tmp_path):
    """Without --data: one process draws, and the other waits.  A gloo thread that is still there when the interpreter
    ends may abort the process (it lets go of a tensor that Python knew, and may no longer call Python)."""
    (tmp_path / "program.py").write_text(f"""
import pathlib, sys, time
sys.path.insert(0, {str(PROGRAM.parent)!r})
import train_minimal as train

draw_data_set, run = train.draw_data_set, train.run

def draw_slowly(root):
    time.sleep(1)
    draw_data_set(root, train=8, val=2)

def names():
    return [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]

def run_and_look(*args):
    run(*args)
    assert any("gloo" in name for name in names()), names()

train.draw_data_set, train.run = draw_slowly, run_and_look
train.main()
time.sleep(0.5)                                                                # /proc may show a joined thread a moment
assert not any("gloo" in name for name in names()), names()
""")
    process = torchrun("--output", tmp_path / "out", "--epochs", 1, *QUICK, options=["--standalone"],
                       program=tmp_path / "program.py")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and printed.count("drawing a data set") == printed.count("val top-1") == 1, printed


def signalling(folder, name, step):
    """A script that runs the program, and whose process 1 sends itself a signal once when a step begins."""
    (folder / "program.py").write_text(f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import train_minimal as train

backward, sent = train.backward, pathlib.Path({str(folder / "sent")!r})

def signal_once(net, batches, step, *rest):
    if step == {step} and train.RANK == 1 and not sent.exists():
        sent.touch()
        os.kill(os.getpid(), signal.{name})
    return backward(net, batches, step, *rest)

train.backward = signal_once
train.main()
""")
    return folder / "program.py"


def test_two_nodes_train_together_and_outlive_a_killed_worker(data, call, tmp_path):
    """kill -9 of one node's process in step 7: both begin anew from step 6 and come to the end they would have come to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=1"]
    command = ["--data", data, "--epochs", 2, "--save-every", 3, *QUICK, *RECIPE, "--batch-size", 8, "--output"]
    program = signalling(tmp_path, "SIGKILL", 7)
    nodes = [torchrun(*command, tmp_path / "two", nproc=1, options=options, program=program) for _ in range(2)]
    succeed(call(*command, tmp_path / "one", "--batch-size", 16))
    printed = [node.communicate(timeout=150)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    assert sum(text.count("2 process(es) on cpu") for text in printed) == 2, printed                 # begun twice
    assert_close_end(tmp_path / "two", tmp_path / "one")


def test_all_processes_stop_after_the_same_step(data, tmp_path):
    """SIGTERM to one of two."""
    process = torchrun("--data", data, "--output", tmp_path / "out", "--epochs", 1000, *QUICK, "--batch-size", 8,
                       options=["--standalone"], program=signalling(tmp_path, "SIGTERM", 5))
    printed = process.communicate(timeout=120)[0]
    assert printed.count("SIGTERM came: stopped and saved after step 2 of epoch 2") == 1, printed
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 6


def test_torchruns_restart_goes_on_with_its_own_run_only(data, finished, call, tmp_path, monkeypatch):
    command = ["--data", data, "--output", tmp_path / "out", "--epochs", 4, "--save-every", 3, *QUICK, *RECIPE,
               "--drop-path-rate", 0.1]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "--output" in fail(call("--data", data))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 1, raiser(Killed))                                      # before anything was saved
        call(*command)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 7, raiser(Killed))
        call(*command)
    assert "other settings" in fail(call(*command, "--lr", 0.1))
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 6
    with monkeypatch.context() as patch:
        patch.setattr(os, "getppid", lambda: 1)
        assert "--resume goes on with it" in fail(call(*command))
    succeed(call(*command))
    assert_same_end(tmp_path / "out", finished)


# ---------------------------------------------------------------------------- faults
def whole(path):
    content = path.read_bytes()
    return len(content) == 3_000_000 and len(set(content)) == 1


def test_a_file_is_whole_at_any_moment_of_its_being_written_anew(tmp_path):
    path = tmp_path / "last.pt"
    train.write(path, bytes(3_000_000))
    for i in range(12):
        pid = os.fork()
        if pid == 0:
            for content in range(256):
                train.write(path, bytes([content]) * 3_000_000)
        time.sleep(0.003 * i)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert whole(path)


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda part, path: done.append(path))
    train.write(tmp_path / "last.pt", b"whole")
    assert done == [5, tmp_path / "last.pt"]


@pytest.mark.parametrize("fault", ["fsync", "limit"])
def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(fault, data, call, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def full():
        kept["last.pt"] = (output / "last.pt").read_bytes()
        if fault == "fsync":
            monkeypatch.setattr(os, "fsync", raiser(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        else:                                                                  # a write beyond this fails
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    kept = {}
    at_step(monkeypatch, 3, full)
    try:
        sentence = fail(call("--data", data, "--output", output, "--epochs", 2, "--save-every", 2, *QUICK))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        monkeypatch.undo()
    assert ("No space left" if fault == "fsync" else "File too large") in sentence and "untouched" in sentence
    assert (output / "last.pt").read_bytes() == kept["last.pt"] and not list(output.glob("*.part"))
    succeed(call("--output", output, "--resume"))
    assert len(log_of(output)) == 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(what, data, call, tmp_path, monkeypatch):
    output, cross_entropy = tmp_path / "out", train.F.cross_entropy

    def spoil():
        if what == "loss":
            monkeypatch.setattr(train.F, "cross_entropy", lambda *args, **kwargs: cross_entropy(*args, **kwargs) * torch.inf)
        else:
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))

    at_step(monkeypatch, 5, spoil)                                             # which would be saved at its end
    sentence = fail(call("--data", data, "--output", output, "--epochs", 2, "--save-every", 3, *QUICK))
    assert "at step 2 of epoch 2" in sentence and ("inf" if what == "loss" else "nan") in sentence
    assert "last.pt is untouched" in sentence
    checkpoint = torch.load(output / "last.pt", weights_only=True)
    assert checkpoint["step"] == 4 and all(w.isfinite().all() for w in checkpoint["model"].values())


def test_before_anything_was_saved_a_loss_that_is_not_finite_sends_nobody_to_resume(data, call, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan)))
    sentence = fail(call("--data", data, "--output", tmp_path / "out", *QUICK))
    assert "nothing was saved yet" in sentence and "--resume" not in sentence


def test_a_run_that_nobody_listens_to_goes_on(data, call, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(train, "print", broken, raising=False)
    assert call("--data", data, "--output", tmp_path / "out", "--epochs", 1, *QUICK)[0] == 0
    assert len(log_of(tmp_path / "out")) == 1


def test_out_of_gpu_memory_names_what_to_change(data, call, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, raiser(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")))
    sentence = fail(call("--data", data, "--output", tmp_path / "out", *QUICK, "--accum", "2"))
    assert "with --batch-size 16 --accum 2; the same steps" in sentence and "at a time: --batch-size 8 --accum 4" in sentence


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """110 + 110 little training images, of which one is truncated, and six to validate."""
    root = tmp_path_factory.mktemp("many")
    for split, n in (("train", 110), ("val", 3)):
        for name in ("a", "b"):
            folder_of(root / split / name, *[f"{i}.png" for i in range(n)])
    picture((64, 64)).save(root / "train" / "a" / "0.png", format="jpeg")
    (root / "train" / "a" / "0.png").write_bytes((root / "train" / "a" / "0.png").read_bytes()[:600])
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_once_and_replaced(workers, many, call, tmp_path):
    printed = succeed(call("--data", many, "--output", tmp_path / "out", "--epochs", 3, "--aug-repeats", 2, *QUICK,
                           "--batch-size", 55, "--size", 8, "--workers", workers))
    assert printed.count("cannot read") == 1 and f"cannot read {many / 'train' / 'a' / '0.png'} (" in printed
    assert log_of(tmp_path / "out")[-1]["unreadable"] == 1


def test_more_than_one_percent_of_them_stops_the_run(many, call, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(many, root)
    (root / "train" / "b" / "7.png").write_bytes(b"")
    (root / "train" / "b" / "8.png").write_text("no image")
    sentence = fail(call("--data", root, "--output", tmp_path / "out", *QUICK, "--size", 8, "--batch-size", 220))
    assert "3 of 220 training images cannot be read, more than 1 %" in sentence
    for file in (root / "train").glob("*/*"):
        file.write_bytes(b"")
    assert "more than 1 %" in fail(call("--data", root, "--output", tmp_path / "out", *QUICK, "--size", 8))


@pytest.mark.parametrize("content", ["truncated", "empty", "text", "bomb"])
def test_an_image_of_val_that_cannot_be_read_is_an_error(content, many, call, tmp_path):
    (tmp_path / "train").symlink_to(many / "train")
    shutil.copytree(many / "val", tmp_path / "val")
    file = tmp_path / "val" / "b" / "1.png"
    if content == "truncated":
        shutil.copy(many / "train" / "a" / "0.png", file)
    elif content == "bomb":
        Image.new("1", (10000, 9000)).save(file)
    else:
        file.write_text("" if content == "empty" else "no image")
    args = ["--data", tmp_path, "--output", tmp_path / "out", *QUICK, "--size", 8, "--epochs", 1]
    result = run_apart(*args) if content == "bomb" else call(*args)            # pytest has its own warnings
    assert f"cannot read {file} (" in fail(result) and ("decompression bomb" in result[2]) == (content == "bomb")
    if content == "empty":                                                     # the epoch is not lost
        shutil.copy(many / "val" / "b" / "1.png", file)
        succeed(call("--output", tmp_path / "out", "--resume"))
        assert len(log_of(tmp_path / "out")) == 1


def run_apart(*args):
    done = subprocess.run([sys.executable, PROGRAM, *map(str, args)], capture_output=True, text=True, env=ENVIRONMENT)
    return done.returncode, done.stdout, done.stderr


# ---------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("args, message", [
    (["--resume"], "need --output"),
    (["--eval"], "need --output"),
    (["--resume", "--eval", "--output", "x"], "neither --eval nor --init"),
    (["--resume", "--output", "x"], "nothing of that run was saved"),
    (["--epochs", "-2"], "--epochs must be between 1 and 1000000, got -2"),
    (["--lr", "nan"], "--lr must be between"),
    (["--workers", "-1"], "--workers must be 0 or more"),
    (["--eval", "--init", "x.pt"], "cannot load x.pt"),
    (["--data", "nowhere"], "nowhere/train must be a folder with one folder of images per class"),
    (["--init", PROGRAM], "cannot load"),
])
def test_mistakes_are_told_in_a_line(args, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(call(*args))
    assert not list(tmp_path.iterdir())


def test_a_flag_that_does_not_exist_is_told_and_the_usage_is_short(call):
    status, _, err = call("--model", "xl")
    assert status == 2 and len(err.splitlines()) == 2 and "choose from" in err


@pytest.mark.parametrize("change, message", [
    (lambda root: shutil.rmtree(root / "val"), "val must be a folder with one folder of images per class"),
    (lambda root: [p.unlink() for p in (root / "train" / "a").iterdir()], "train/a has no images"),
    (lambda root: [p.unlink() for p in (root / "val" / "a").iterdir()], "val/a has no images"),
    (lambda root: (root / "val" / "cat").mkdir(), "val has other classes than the 2 expected: 'cat' is one too many"),
    (lambda root: shutil.rmtree(root / "val" / "b"), "val has other classes than the 2 expected: 'b' is missing"),
    (lambda root: [p.unlink() for p in (root / "train" / "a").iterdir() if p.stem != "1"],
     "the 5 training images are fewer than the 16 = 1 x 1 x 16 of one step: lower --batch-size"),
])
def test_a_data_set_with_something_wrong_is_told_in_a_line(change, message, call, tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder_of(tmp_path / "data" / split / name, *[f"{i}.png" for i in range(4)])
    change(tmp_path / "data")
    assert message in fail(call("--data", tmp_path / "data", "--output", tmp_path / "out", *QUICK)).replace(os.sep, "/")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    (lambda last: last.update(model=scalablevit.scalablevit_tiny(num_classes=3).state_dict()), "the weights do not fit"),
    (lambda last: last["settings"].update(model="s"), "the weights do not fit scalablevit_s"),
    (lambda last: last.update(classes=["bars", "cat"]), "has other classes than the 2 expected: 'cat' is missing, 'disc' is one too many"),
    (lambda last: last.pop("optimizer"), "holds weights, but no run to go on with"),
    (lambda last: last.pop("extent"), "holds weights, but no run to go on with"),
    (lambda last: last.update(settings=3), "cannot load"),
    (lambda last: last.update(settings={"model": "huge"}), "cannot load"),
    (lambda last: last.update(extent=[64, 32]), "over 64 images in steps of 32, and cannot go on with 64 in steps of 16"),
])
def test_a_last_pt_that_does_not_fit_is_told_in_a_line(change, message, finished, call, tmp_path):
    last = torch.load(finished / "last.pt", weights_only=True)
    change(last)
    torch.save(last, tmp_path / "last.pt")
    assert message in fail(call("--output", tmp_path, "--resume"))


def test_init_takes_own_and_published_weights_and_a_fresh_head_for_other_classes(data, finished, call, tmp_path):
    published = {}
    for name, tensor in scalablevit.scalablevit_tiny(num_classes=7).state_dict().items():
        published[official_name(name)] = tensor
    torch.save({"model": published}, tmp_path / "published.pth")
    for file, fresh in ((tmp_path / "published.pth", True), (finished / "best.pt", False)):
        output = tmp_path / file.stem
        printed = succeed(call("--init", file, "--data", data, "--output", output, "--epochs", 1, *QUICK, "--lr", "1e-9"))
        assert ("head for other classes" in printed) == fresh
        before, after = torch.load(file, weights_only=True)["model"], weights_of(output)
        before = scalablevit.convert_official(before) if fresh else before
        name = "stages.0.blocks.0.attn.qkv.weight"                              # a vanishing learning rate moves nothing
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-5)
    assert "the weights do not fit scalablevit_s" in fail(call(
        "--init", finished / "best.pt", "--data", data, "--model", "s", "--output", tmp_path / "s"))


def official_name(name):
    """A name of ours in a published state dict; enough of them for a model whose last SSA keeps k and v apart."""
    for ours, theirs in ((".embed.conv.", ".proj."), (".embed.norm.", ".norm."), (".peg.conv.", ".proj.0.")):
        if ours in name:
            stage = name.split(".")[1]
            return f"{'pos_block' if 'peg' in ours else 'patch_embeds'}.{stage}{theirs}{name.rsplit('.', 1)[1]}"
    name = name.replace(".blocks.", ".").replace(".attn.lim.", ".attn.lim_func.").replace(".attn.reduce.", ".attn.reduction.")
    return name.replace(".attn.norm.", ".attn.norm_act.0.")


@pytest.mark.parametrize("content", [None, [], {}, 3, {"model": [1]}, {"model": {}}, {"model": {"norm.weight": 1}},
                                     {"model": {"patch_embeds.0.proj.weight": torch.zeros(1), "x": torch.zeros(1)}}])
def test_a_file_that_is_no_checkpoint_is_told_in_a_line(content, tmp_path):
    torch.save(content, tmp_path / "x.pt") if content is not None else (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(train.Mistake, match="cannot load .*x.pt: ") as caught:
        train.load(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"hello\n", b"epoch 1\n", b"\x80\x02}q", b"PK\x03\x04", bytes(range(256))])
def test_a_file_of_something_else_is_told_in_a_line(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(train.Mistake, match="cannot load .*x.pt: it is no checkpoint"):
        train.load(tmp_path / "x.pt")


@given(changes=st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_checkpoint_is_told_in_a_line_or_still_loads(changes):
    content = bytearray(train.packed({"model": {"norm.weight": torch.ones(300)}, "settings": {"model": "tiny", "lr": 1.0},
                                      "classes": ["a", "b"], "log": [{"epoch": 1, "loss": 1.5}]}))
    for place, byte in changes:
        content[place % len(content)] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.pt"
        path.write_bytes(content)
        try:
            assert "model" in train.load(path)
        except train.Mistake as mistake:
            assert "\n" not in str(mistake)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_never_runs_code(tmp_path):
    for i, save in enumerate((torch.save, lambda content, path: path.write_bytes(pickle.dumps(content)))):
        save({"model": Trap(str(tmp_path / "trapped"))}, tmp_path / f"{i}.pt")
        with pytest.raises(train.Mistake, match="holds more than tensors"):
            train.load(tmp_path / f"{i}.pt")
    assert not (tmp_path / "trapped").exists()


# ---------------------------------------------------------------------------- the embedded data set
def test_the_embedded_data_is_too_cluttered_for_a_linear_classifier():
    """Ridge regression on the pixels, the best of several strengths, on 2000 + 500 pictures of the ten classes."""
    def pictures(n, seed):
        rng = random.Random(seed)
        images = [train.draw(shape, rng) for shape in train.SHAPES for _ in range(n)]
        pixels = torch.stack([torch.from_numpy(np.array(image.resize((24, 24)))).flatten() for image in images])
        return pixels.double() / 255 - 0.5, torch.arange(len(train.SHAPES)).repeat_interleave(n)

    (x, y), (x_val, y_val) = pictures(200, 0), pictures(50, 1)
    target, eye = torch.eye(len(train.SHAPES), dtype=x.dtype)[y], torch.eye(x.shape[1], dtype=x.dtype)
    accuracy = max((x_val @ torch.linalg.solve(x.T @ x + strength * eye, x.T @ target)).argmax(1).eq(y_val).double().mean()
                   for strength in (1, 10, 100, 1000))
    assert accuracy < 0.5


def test_the_embedded_data_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        train.draw_data_set(tmp_path / name, train=1, val=1)
    a, b = (sorted((tmp_path / name).rglob("*.png")) for name in ("a", "b"))
    assert len(a) == 2 * len(train.SHAPES) == 20
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
