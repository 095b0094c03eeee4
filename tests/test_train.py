"""The training program: each part of the recipe, stopped and resumed runs, corrupt files, user errors."""
import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import scalablevit
import train_minimal as train

PROGRAM = pathlib.Path(train.__file__)
QUICK = ["--size", 32, "--batch-size", 8, "--warmup-epochs", 0, "--lr", 0.128]
RECIPE = ["--mixup", 0.8, "--cutmix", 1, "--reprob", 0.25, "--randaugment", 2, "--aug-repeats", 3]


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the program in this process: call(arguments) -> exit status, stdout, stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(os, "fsync", lambda file: None)                        # takes seconds on a busy disk

    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, args)])
        for number, handler in handlers.items():                               # as in a new process
            signal.signal(number, handler)
        try:
            train.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def succeed(result):
    status, out, err = result
    assert status == 0, out + err
    return out


def fail(result):
    """The one-line error message of a run with a user error."""
    status, out, err = result
    assert status == 2 and "Traceback" not in err and len(err.splitlines()) == 1, out + err
    return err


def log_of(output, key):
    return [json.loads(line)[key] for line in (output / "log.jsonl").read_text().splitlines()]


def load(output, name="last.pt"):
    return torch.load(output / name, weights_only=True)


def assert_same_end(a, b, exactly=True):
    """The same weights and log: bitwise, or up to rounding errors, which AdamW's first steps amplify."""
    ours, theirs = load(a)["model"], load(b)["model"]
    if exactly:
        assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log_of(a, "loss") == pytest.approx(log_of(b, "loss"), rel=1e-4) and log_of(a, "top1") == log_of(b, "top1")
    assert all(torch.isclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4).float().mean() > 0.99 for name in theirs)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits 0 and 1: 32 training images (4 steps of 8 per epoch) and 9 validation images (odd, for two processes)."""
    root = tmp_path_factory.mktemp("data") / "data"
    train.draw_digits(root, 16, 5, side=32)
    for split, digit in [(split, str(digit)) for split in ("train", "val") for digit in range(2, 10)]:
        shutil.rmtree(root / split / digit)
    (root / "val" / "1" / "004.png").unlink()
    return root


@pytest.fixture
def finished(data, tmp_path_factory, call):
    """The folder and the arguments of a finished run: three epochs of four steps with the full recipe."""
    output = tmp_path_factory.getbasetemp() / "finished"
    args = ["--data", data, "--epochs", 3, *QUICK, *RECIPE, "--drop-path-rate", 0.1]
    if not output.exists():
        printed = succeed(call(*args, "--output", output))
        (output / "printed").write_text(printed)
    return output, args


def interpose(patch, owner, name, number, happen):
    """Call happen() before the number-th call (from 1) of owner.name."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            happen()
        return real(*args, **kwargs)
    patch.setattr(owner, name, wrapped)


def sending(number):
    return lambda: os.kill(os.getpid(), number)


# ---------------------------------------------------------------------------- the recipe
def test_s_b_and_l_default_to_the_papers_recipe_and_tiny_to_light_augmentation(monkeypatch, tmp_path, call):
    chosen = []
    monkeypatch.setattr(train, "ImageFolder", lambda root, args, train: chosen.append(vars(args)) or sys.exit())
    paper = dict(size=224, epochs=300, warmup_epochs=5, weight_decay=0.05, clip_grad=5, label_smoothing=0.1, mixup=0.8,
                 cutmix=1, reprob=0.25, randaugment=2, min_scale=0.08, aug_repeats=3, lr=1e-3, accum=1, batch_size=128)
    for model, drop_path_rate in (("s", 0.2), ("b", 0.5), ("l", 0.5)):
        call("--data", "x", "--output", tmp_path, "--model", model)
        assert chosen[-1].items() >= (paper | {"model": model, "drop_path_rate": drop_path_rate}).items()
    (tmp_path / "digits").mkdir()
    for data, size in (["--data", "x"], 112), ([], 56):
        call(*data, "--output", tmp_path, "--lr", 0.3)
        assert chosen[-1].items() >= dict(model="tiny", size=size, mixup=0, cutmix=0, reprob=0, randaugment=0,
                                          drop_path_rate=0, aug_repeats=1, lr=0.3).items()


@given(st.integers(1, 50), st.integers(0, 20), st.floats(1e-4, 1e-2))
def test_the_learning_rate_has_linear_warmup_and_cosine_decay(steps, warmup, peak):
    rates = [train.learning_rate(i, steps + warmup, warmup, peak) for i in range(steps + warmup + 1)]
    assert rates[0] == pytest.approx(1e-6 if warmup else peak) and rates[-1] == pytest.approx(1e-5)
    assert rates[:warmup] == pytest.approx(list(np.linspace(1e-6, peak, warmup, endpoint=False)))
    turned = np.arccos(np.clip(2 * (np.array(rates[warmup:]) - 1e-5) / (peak - 1e-5) - 1, -1, 1))
    assert turned == pytest.approx(np.linspace(0, np.pi, steps + 1), abs=1e-5)


def batches(n, world, first=0, steps=3, **args):
    """For each process, its list of batches of keys."""
    keys = []
    for rank in range(world):
        with mock.patch.multiple(train, RANK=rank, WORLD_SIZE=world):
            keys.append(list(train.training_batches(n, argparse.Namespace(**args), first, steps)))
    return keys


@given(st.integers(0, 60), st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4),
       st.integers(0, 5))
def test_the_sampler_repeats_images_and_distributes_them(extra, world, b, accum, repeats, seed):
    n, args = world * accum * b + extra, dict(batch_size=b, accum=accum, aug_repeats=repeats, seed=seed)
    steps = n // (world * accum * b)                                           # per epoch, for three epochs
    own = batches(n, world, steps=3 * steps, **args)
    assert all(len(part) == 3 * steps * accum and all(len(batch) == b for batch in part) for part in own)
    orders = []
    for epoch in range(3):
        shares = [sum(part[epoch * steps * accum:(epoch + 1) * steps * accum], []) for part in own]
        counts, taken = Counter(index for share in shares for index, _ in share), steps * world * accum * b
        assert set(counts) <= set(range(n)) and max(counts.values()) <= repeats
        assert len(counts) == -(-taken // repeats)                             # all but one image `repeats` times
        assert len({seed for share in shares for _, seed in share}) == taken   # with different augmentation
        if world >= repeats:                                                   # copies go to different processes
            assert all(len({index for index, _ in share}) == len(share) for share in shares)
        orders.append(str(shares[0]))
    assert len(set(orders)) == 3                                               # epochs differ
    first = seed % (3 * steps)                                                 # resumed at any step
    assert batches(n, world, first=first, steps=3 * steps, **args) == [part[first * accum:] for part in own]


def test_mixed_pairs_do_not_depend_on_the_number_of_processes_and_are_never_copies():
    pairs = set()
    for world, accum in ((1, 1), (2, 1), (1, 4), (2, 2), (4, 1)):
        b = 16 // (world * accum)
        own = batches(40, world, first=1, steps=2, batch_size=b, accum=accum, aug_repeats=3, seed=0)
        every = [batch for part in own for batch in part]
        pairs.add(frozenset(frozenset((batch[i], batch[i - b // 2])) for batch in every for i in range(b)))
    assert len(pairs) == 1 and all(len({index for index, _ in pair}) == 2 for pair in pairs.pop())


@given(st.integers(0, 10 ** 6), st.integers(1, 3), st.integers(2, 40), st.integers(2, 40), st.booleans())
def test_mixed_targets_match_the_share_of_each_image(seed, half, H, W, cut):
    """All pixels of image i are i, so a mixed image reveals its parts."""
    B, args = 2 * half, argparse.Namespace(mixup=0.8 * (not cut), cutmix=1.0 * cut)
    images, other = torch.arange(B).double().view(B, 1, 1, 1).repeat(1, 3, H, W), (torch.arange(B) - half) % B
    torch.manual_seed(seed)
    mixed, targets = train.mix(images, torch.eye(B).double(), args)
    torch.testing.assert_close(targets.sum(1), torch.ones(B).double())
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(B).double())
    assert all(set(row.nonzero().flatten().tolist()) <= {i, int(other[i])} for i, row in enumerate(targets))
    if cut:                                                                    # the same rectangle in all images
        pasted = mixed[:, 0] == other.view(B, 1, 1)
        assert (pasted | (mixed[:, 0] == torch.arange(B).view(B, 1, 1))).all() and (pasted == pasted[0]).all()
        assert torch.equal(pasted[0], pasted[0].any(1)[:, None] & pasted[0].any(0))
    else:
        torch.testing.assert_close(mixed, mixed[:, :1, :1, :1].expand_as(mixed))


def image_folder(root, train_images=True, **more):
    args = dict(size=32, min_scale=0.08, randaugment=0, reprob=0.0)
    return train.ImageFolder(root, argparse.Namespace(**args | more), train_images)


def test_random_erasing_and_randaugment_have_their_probabilities(data, monkeypatch):
    """Erases 0.02 to 1/3 of the area in a quarter of the images; two operations, each with probability 1/2."""
    operation = mock.Mock(side_effect=lambda image: image)
    randaugment = mock.Mock(return_value=operation)
    monkeypatch.setattr(train.v2, "RandAugment", randaugment)
    folder = image_folder(data / "train", size=64, reprob=0.25, randaugment=2)
    masks = torch.stack([folder[0, seed][1] for seed in range(1000)])                             # (1000, 1, 64, 64)
    erased = (masks == 0).float().mean((1, 2, 3))
    assert (erased > 0).float().mean() == pytest.approx(0.25, abs=0.04)
    assert 0.01 < erased[erased > 0].min() and 0.3 < erased.max() < 0.36
    assert operation.call_count / 1000 == pytest.approx(1, abs=0.1)
    assert randaugment.call_args.args == (1, 9) and randaugment.call_args.kwargs["num_magnitude_bins"] == 11


@pytest.mark.parametrize("size", [(640, 200), (500, 375), (90, 120)])
def test_random_crops_match_torchvision(size, data):
    """Red encodes the column and green the row, so the output reveals the crop."""
    (W, H), folder = size, image_folder(data / "train", size=64)
    columns, rows = np.meshgrid(np.linspace(0, 255, W), np.linspace(0, 255, H))
    image = Image.fromarray(np.stack([columns, rows, rows], -1).round().astype(np.uint8))
    torchvisions = train.v2.Compose([train.v2.RandomResizedCrop(64, (0.08, 1)), train.v2.RandomHorizontalFlip()])
    means = []
    for transform in (folder.random_crop, torchvisions):
        crops = []
        for seed in range(800):
            torch.manual_seed(seed)
            crop = np.asarray(transform(image), dtype=float) / 255                            # (64, 64, 3)
            w, h = 2 * (crop[:, 48, 0] - crop[:, 16, 0]).mean(), 2 * (crop[48, :, 1] - crop[16, :, 1]).mean()
            assert crop.shape == (64, 64, 3) and 0.7 < abs(w) * W / (h * H) < 1.43            # fails if clipped
            crops.append([w < 0, abs(w), h, abs(w) * h, crop[..., 0].mean(), crop[..., 1].mean(), crop[..., 1].std()])
        means.append(np.mean(crops, axis=0))
    assert means[0] == pytest.approx(means[1], abs=0.03) and means[0][0] == pytest.approx(0.5, abs=0.06)


def test_top1_and_top5_accuracy():
    logits = -(torch.arange(8) - torch.tensor([0, 1, 2, 2, 3])[:, None]).abs().float()      # largest at the given class
    model, loader = mock.Mock(return_value=logits), mock.MagicMock()
    loader.__iter__.return_value = 2 * [(torch.zeros(5, 2, 2, 3).byte(), None, torch.tensor([0, 1, 2, 3, 7]), [""])]
    loader.dataset.samples = range(10)
    assert train.evaluate(model, loader, bf16=False) == [60, 80]


# ---------------------------------------------------------------------------- images
def picture(size=(60, 40), seed=0):
    """Smooth and colorful, like photographs."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


def distance(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


TURNED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
          6: lambda a: np.rot90(a, -1), 7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1), 8: np.rot90}     # by EXIF


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_rotated_according_to_exif_and_corrupt_exif_is_ignored(suffix, tmp_path):
    for orientation, turned in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture().save(tmp_path / f"x.{suffix}", exif=exif, quality=100)
        assert distance(train.read_image(tmp_path / f"x.{suffix}", 60), turned(np.asarray(picture()))) < 5
    if suffix == "jpg":                                                        # decoded smaller, but >= 3 x size
        picture((1600, 1200)).save(tmp_path / "x.jpg")
        assert [train.read_image(tmp_path / "x.jpg", size).size for size in (50, 51)] == [(200, 150), (400, 300)]
    for mode in ("RGB", "L", "1", "P", "RGBA", "LA") if suffix == "png" else ("RGB", "CMYK") if suffix == "jpg" else ():
        image = picture().convert(mode)
        image.save(tmp_path / f"x.{suffix}", exif=b"Exif\0\0garbage")
        read = train.read_image(tmp_path / f"x.{suffix}", 60)
        assert read.mode == "RGB" and distance(read, image.convert("RGB")) < 8


def test_evaluation_resizes_and_center_crops_without_erasing(tmp_path):
    for i, (W, H) in enumerate([(320, 256), (256, 320), (300, 100), (50, 70), (256, 256)]):
        (tmp_path / str(i) / "x").mkdir(parents=True)
        picture((W, H), i).save(tmp_path / str(i) / "x" / "x.png")
        scale = 64 / min(W, H)
        image = picture((W, H), i).resize((int(W * scale), int(H * scale)), Image.BICUBIC)
        x, y = round((image.width - 56) / 2), round((image.height - 56) / 2)
        ours, mask, _, _ = image_folder(tmp_path / str(i), False, size=56, reprob=1.0)[0, 0]
        assert distance(ours, image.crop((x, y, x + 56, y + 56))) < 0.5 and mask.all()


def folder_of(root, *names):
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L", (8, 8)).save(root / name, format="png")


def test_image_folder_skips_hidden_files_other_files_and_symlinked_subfolders(tmp_path):
    folder_of(tmp_path / "x" / "a", "0.PNG", "._0.png", "notes.txt", "notes.pdf", "Ελλάς 日.jpg", "a b\nc.jpeg")
    folder_of(tmp_path / "elsewhere", "1.png")
    folder_of(tmp_path / "x" / "a" / "deeper", "2.png")
    folder_of(tmp_path / "x" / ".hidden", "3.png")
    (tmp_path / "x" / "a" / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "x" / "b").symlink_to(tmp_path / "elsewhere")
    for name in ("loop", "again"):
        (tmp_path / "x" / "a" / name).symlink_to(tmp_path / "x" / "a")
        (tmp_path / "x" / "a" / "deeper" / name).symlink_to("../..")
    shutil.copy(tmp_path / "elsewhere" / "1.png", os.fsencode(tmp_path / "x" / "a") + b"/\xff\xfe.png")
    folder = image_folder(tmp_path / "x")
    assert folder.classes == ["a", "b"] and [label for _, label in folder.samples] == 6 * [0] + [1]
    assert all(folder[i, 0][3] == "" and folder[i, 0][0].shape == (32, 32, 3) for i in range(7))


# ---------------------------------------------------------------------------- runs
def test_a_run_writes_a_log_and_checkpoints_and_eval_reports_the_best_epoch(
        finished, data, call, monkeypatch):
    output, _ = finished
    printed, best = (output / "printed").read_text(), max(log_of(output, "top1"))
    assert sorted(p.name for p in output.iterdir()) == [".lock", "best.pt", "last.pt", "log.jsonl", "printed"]
    assert log_of(output, "epoch") == [1, 2, 3] and log_of(output, "unreadable") == [0, 0, 0]
    assert [set(entry) for entry in load(output)["log"]] == 3 * [{"epoch", "loss", "top1", "top5", "lr", "unreadable"}]
    for word in ("32 images, 2 classes, 8 images per step", "step 12/12  loss", "epoch 3", "top-1", "top-5 100.00 %"):
        assert word in printed
    assert load(output, "best.pt")["log"][-1]["top1"] == best
    for args in (["--output", output], ["--init", output / "best.pt", "--data", data, "--workers", 1]):
        assert f"top-1 {best:.2f} %  top-5 100.00 %" in succeed(call("--eval", *args))
    monkeypatch.setattr(train, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):                                     # must not look like success
        call("--output", output, "--eval")


class Killed(BaseException):
    """Not caught by any handler in the program, like kill -9."""


@pytest.mark.parametrize("how, where, number, workers, saved", [
    ("kill", "cross_entropy", 8, 0, 6), ("kill", "cross_entropy", 10, 2, 9), ("kill", "replace", 6, 0, 4),
    ("kill", "fsync", 7, 0, 4), ("kill", "evaluate", 2, 0, 8), ("SIGTERM", "cross_entropy", 6, 0, 6),
    ("SIGINT", "cross_entropy", 8, 2, 8), ("SIGTERM", "evaluate", 2, 0, 9)])
def test_a_resumed_run_ends_with_the_same_weights(how, where, number, workers, saved, finished, call, tmp_path):
    """Saves every 3 steps and after each epoch (4 steps); stopped during a step, a save or an evaluation."""
    output, args = finished
    args = [*args, "--output", tmp_path / "out", "--save-every", 3, "--workers", workers]
    owner = {"cross_entropy": train.F, "evaluate": train}.get(where, os)
    with pytest.MonkeyPatch.context() as patch:
        happen = mock.Mock(side_effect=Killed) if how == "kill" else sending(getattr(signal, how))
        interpose(patch, owner, where, number, happen)
        with pytest.raises(Killed) if how == "kill" else contextlib.nullcontext():
            status, out, err = call(*args)
            assert status == 128 + getattr(signal, how) and not err and f"stopped after step {saved} of 12" in out
    assert load(tmp_path / "out")["step"] == saved
    succeed(call(*args))
    assert_same_end(tmp_path / "out", output)


def test_a_folder_with_another_run_is_refused_and_resume_changes_its_settings(finished, call, tmp_path):
    output, args = finished
    shutil.copytree(output, tmp_path / "out")
    args, resume = [*args, "--output", tmp_path / "out"], ["--resume", "--output", tmp_path / "out"]
    succeed(call(*args))                                                       # the same run, already finished
    for more in (["--lr", 0.1], ["--seed", 1], ["--epochs", 4]):
        was = {more[0][2:]: load(output)["settings"][more[0][2:]]}
        assert f"holds a run with {was} (--resume" in fail(call(*args, *more))
    assert "was trained with --model tiny, not s" in fail(call(*args, "--model", "s"))
    assert "is a run of [images, per step] [32, 8], not [32, 16]" in fail(call(*resume, "--batch-size", 16))
    for more in (["--eval"], ["--init", output / "best.pt"]):
        assert "neither --init nor --eval" in fail(call(*resume, *more))
    assert (tmp_path / "out" / "last.pt").read_bytes() == (output / "last.pt").read_bytes()
    (tmp_path / "out" / "last.pt").unlink()
    assert "would replace" in fail(call(*args))
    assert (tmp_path / "out" / "best.pt").read_bytes() == (output / "best.pt").read_bytes()
    last = load(output)
    for state in last["optimizer"]["state"].values():                          # fused AdamW would write out of bounds
        state["exp_avg"] = torch.zeros(()).expand(state["exp_avg"].shape)
    torch.save(last, tmp_path / "out" / "last.pt")
    succeed(call(*resume, "--weight-decay", 0.3, "--epochs", 4))
    assert log_of(tmp_path / "out", "epoch") == [1, 2, 3, 4]
    model = scalablevit.scalablevit_tiny(num_classes=2)
    exempt = len(model.no_weight_decay())
    for folder, decay in ((output, 0.05), (tmp_path / "out", 0.3)):            # 0 for biases, norms and the PEG
        last = load(folder)
        groups = last["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [decay, 0] and last["settings"]["weight_decay"] == decay
        assert [len(group["params"]) for group in groups] == [len(list(model.parameters())) - exempt, exempt]


def test_a_folder_that_another_process_is_writing_to_is_refused(data, call, tmp_path):
    ready, done = os.pipe(), os.pipe()
    if os.fork() == 0:
        lock = open(tmp_path / ".lock", "w")
        fcntl.lockf(lock, fcntl.LOCK_EX)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    result = call("--data", data, "--output", tmp_path, *QUICK)
    os.write(done[1], b"x")
    os.wait()
    assert "another process is writing to it" in fail(result)


def test_gradient_accumulation_equals_one_large_batch(data, call, tmp_path):
    for accum in (1, 4):
        succeed(call("--data", data, "--output", tmp_path / str(accum), "--epochs", 1, *QUICK, *RECIPE,
                     "--batch-size", 8 // accum, "--accum", accum))
    assert_same_end(tmp_path / "1", tmp_path / "4", exactly=False)


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs the thread names in Linux's /proc")
def test_two_processes_equal_one_and_survive_a_crash_and_sigterm_under_torchrun(data, call, tmp_path):
    """One of two processes is killed in step 6, and both restart from step 5; torchrun gets SIGTERM in step 7, and a
    second torchrun resumes.  gloo's threads must end with the run, as a leftover one may abort the process on exit."""
    (tmp_path / "program.py").write_text(f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(PROGRAM.parent)!r})
import train_minimal as train

cross_entropy, destroy, calls = train.F.cross_entropy, train.dist.destroy_process_group, []

def kill_once(*args, folder=pathlib.Path({str(tmp_path)!r}), **kwargs):
    calls.append(1)
    if len(calls) == 6 and train.RANK == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if len(calls) == 2 and train.RANK == 0 and (folder / "killed").exists() and not (folder / "stopped").exists():
        (folder / "stopped").touch()
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(2)                                                          # until torchrun has passed it on
    return cross_entropy(*args, **kwargs)

def gloo():
    return any("gloo" in (task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir())

train.F.cross_entropy = kill_once
train.dist.destroy_process_group = lambda: destroy() if gloo() else sys.exit("no thread is named gloo any more")
train.main()
time.sleep(0.5)                                                                # /proc may still list a joined thread
assert not gloo()
""")
    args = list(map(str, ["--data", data, "--epochs", 2, *QUICK, *RECIPE, "--save-every", 5]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*torchrun, tmp_path / "program.py", *args, "--batch-size", "4", "--output", tmp_path / "two"]
    printed = []
    for stopped in (True, False):
        process = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        printed.append(process.stdout)
        assert (process.returncode != 0) == stopped and (tmp_path / "killed").exists(), process.stdout
        assert load(tmp_path / "two")["step"] == (7 if stopped else 8), process.stdout
    assert printed[0].count("2 classes, 8 images per step") == 2 and "stopped after step 7 of 8" in printed[0]
    assert printed[1].count("epoch 2  loss") == 1, printed
    succeed(call(*args, "--output", tmp_path / "one"))
    assert_same_end(tmp_path / "two", tmp_path / "one", exactly=False)


# ---------------------------------------------------------------------------- checkpoints
def test_a_model_with_other_arguments_is_rebuilt_from_its_checkpoint(data, call, tmp_path, monkeypatch):
    args = ["--data", data, "--output", tmp_path / "out", *QUICK, "--epochs", 2]
    make = scalablevit.scalablevit_tiny
    with monkeypatch.context() as patch:
        other = dict(pattern=("ssa", "wsa"), window=3)
        patch.setattr(scalablevit, "scalablevit_tiny", lambda **kwargs: make(**other | kwargs))
        interpose(patch, train.F, "cross_entropy", 6, sending(signal.SIGTERM))
        assert call(*args)[0] == 128 + signal.SIGTERM
    succeed(call(*args))
    best = load(tmp_path / "out", "best.pt")
    assert tuple(best["config"]["pattern"]) == ("ssa", "wsa") and best["config"]["window"] == 3
    assert f"top-1 {best['log'][-1]['top1']:.2f} %" in succeed(call("--eval", "--output", tmp_path / "out"))
    scalablevit.ScalableViT(**best["config"]).load_state_dict(best["model"])


@pytest.mark.parametrize("kind", ["own", "own, other classes", "own, more classes", "without config", "state dict",
                                  "published"])
def test_init_loads_own_and_published_weights_and_a_new_head_if_classes_differ(kind, data, call, tmp_path, monkeypatch):
    classes = {"own, other classes": ["cat", "dog"], "own, more classes": ["0", "1", "2"]}.get(kind, ["0", "1"])
    published = {"rc": (1.25, 1.25, 1.25, 1.25)} if kind == "published" else {}
    model = scalablevit.scalablevit_tiny(num_classes=len(classes), **published)
    weights = model.state_dict()
    content = {"model": weights, "classes": classes, "settings": {"model": "tiny", "lr": 1.0}, "config": model.config}
    if kind == "without config":                                               # from an older version of this program
        content.pop("config")
    if kind == "state dict":
        content = weights
    if kind == "published":
        content = {"model": {"patch_embeds.0.proj.weight": 0, "head.weight": 0}, "args": argparse.Namespace(lr=1)}
        monkeypatch.setattr(scalablevit, "convert_official", lambda published: weights)
    torch.save(content, tmp_path / "x.pt")
    args = ["--init", tmp_path / "x.pt", "--data", data, "--epochs", 1, *QUICK, "--lr", "1e-9"]   # no change
    fresh = "fresh head" in succeed(call(*args, "--output", tmp_path / "out"))
    last = load(tmp_path / "out")["model"]
    kept = [last[name].shape == weights[name].shape and torch.allclose(last[name], weights[name], atol=1e-5)
            for name in ("stages.0.blocks.0.attn.qkv.weight", "head.weight")]
    assert kept == [True, not fresh] and fresh == (classes != ["0", "1"])
    sentence = fail(call(*args, "--output", tmp_path / "s", "--model", "s"))
    assert ("was trained with --model tiny, not s" if "settings" in content else "cannot build the model") in sentence


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path="trapped"):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def moment(change, key="exp_avg"):
    """Changes the optimizer's moment of the first parameter."""
    return lambda last: last["optimizer"]["state"][0].update({key: change(last["optimizer"]["state"][0][key])})


@pytest.mark.parametrize("change, message", [
    (moment(lambda m: m[:1]), "cannot build"),
    (moment(lambda m: m.repeat(2, *[1] * (m.ndim - 1)), "exp_avg_sq"), "cannot build"),
    (moment(lambda m: torch.empty(m.shape, device="meta")), "cannot build"),
    (lambda last: last["optimizer"]["state"].pop(5), "cannot build"),
    (lambda last: last.update(step="x"), "is corrupt"),
    (lambda last: last["model"].update({"norm.weight": torch.ones(3)}), "cannot build"),
    (lambda last: last["config"].update(dim=48), "cannot build"),
    (lambda last: last.update(config=3), "cannot load"),
    (lambda last: last.update(classes=["0", "cat"]), "has other classes"),
    (lambda last: last.update(settings=[]), "cannot load"),
    (lambda last: last["settings"].update(lr="x"), "cannot load"),
    (lambda last: last["settings"].update(size=torch.ones(2)), "cannot load"),
    (lambda last: last.update(step=4), "is corrupt"),
    (lambda last: last.update(step=12.0), "is corrupt"),
    (lambda last: last["log"][0].update(top1=torch.ones(2)), "cannot build"),
    (lambda last: last["settings"].update(extent=[64, 8]), "[64, 8], not [32, 8]"),
    (lambda last: last.update(log=Trap()), "cannot load"),
])
def test_a_corrupt_last_pt_gives_a_one_line_error(change, message, finished, call, tmp_path, monkeypatch):
    output, args = finished
    last = load(output)
    change(last)
    torch.save(last, tmp_path / "last.pt")
    monkeypatch.chdir(tmp_path)
    assert message in fail(call(*args, "--output", tmp_path)) and not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04" * 99, pickle.dumps(Trap(), 2), [], {"model": [1]},
                                     {"model": {}}, {"model": {"patch_embeds.0.proj.weight": 1, "x": 1}}])
def test_a_file_that_is_not_a_checkpoint_gives_a_one_line_error(content, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, tmp_path / "x.pt")
    assert "cannot load" in fail(call("--eval", "--init", "x.pt")) and not (tmp_path / "trapped").exists()


def test_evaluating_weights_with_nan_is_an_error(finished, data, call, tmp_path):
    best = load(finished[0], "best.pt")
    best["model"]["norm.weight"][0] = torch.nan
    torch.save(best, tmp_path / "x.pt")
    assert "not finite" in fail(call("--eval", "--init", tmp_path / "x.pt", "--data", data))


# ---------------------------------------------------------------------------- unreadable images and user errors
def test_unreadable_training_images_are_reported_once_replaced_and_counted(data, call, tmp_path):
    """With and without workers, and in a resumed run; one file name cannot be encoded, one file has 16-bit pixels."""
    shutil.copytree(data, tmp_path / "data")
    folder = tmp_path / "data" / "train" / "1"
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:600])
    os.rename(folder / "004.png", os.fsencode(folder) + b"/\xff\xfe.png")
    with open(os.fsencode(folder) + b"/\xff\xfe.png", "w") as file:
        file.write("no image")
    (folder / "005.png").unlink()
    os.mkfifo(folder / "005.png")
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(folder / "006.png")
    for workers in (0, 2):
        args = ["--data", tmp_path / "data", *QUICK, "--epochs", 2, "--workers", workers,
                "--output", tmp_path / str(workers)]
        with pytest.MonkeyPatch.context() as patch:
            interpose(patch, train.F, "cross_entropy", 7, sending(signal.SIGTERM))
            printed = call(*args)[1]
        printed += succeed(call(*args))
        assert printed.count("replaced by another image") == 4
        for name in ("003", "\\udcff\\udcfe", "005", "006"):
            assert printed.count(f"cannot read {folder}/{name}.png (") == 1
        assert log_of(tmp_path / str(workers), "unreadable") == [4, 4]
    assert_same_end(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize("fault", ["truncated", "FIFO"])
def test_an_unreadable_validation_image_ends_the_run_without_losing_the_epoch(fault, data, call, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data" / "val" / "1" / "001.png"
    content = file.read_bytes()
    file.write_bytes(content[:200]) if fault == "truncated" else (file.unlink(), os.mkfifo(file))
    args = ["--data", tmp_path / "data", "--output", tmp_path / "out", *QUICK, "--epochs", 1]
    assert f"cannot read {file} (" in fail(call(*args)) and load(tmp_path / "out")["step"] == 4
    file.unlink()
    file.write_bytes(content)
    succeed(call(*args))
    assert log_of(tmp_path / "out", "epoch") == [1]
    (tmp_path / "data" / "val" / "cat").mkdir()
    assert ".png, " in (sentence := fail(call(*args))) and f"in {tmp_path / 'data' / 'val'}/cat" in sentence
    shutil.copy(file, tmp_path / "data" / "val" / "cat")
    assert "only in train or val: ['cat']" in fail(call(*args))


@pytest.mark.parametrize("args, message", [
    (["--resume", "--output", "x"], "--resume needs x/last.pt"),
    (["--eval", "--output", "x"], "cannot load x/best.pt"),
    (["--init", PROGRAM, "--data", "x"], "cannot load"),
    (["--data", "nowhere"], "nowhere/val/*"),
    (["--data", "DATA", "--output", PROGRAM], "cannot write to"),
    (["--data", "DATA", "--batch-size", 8, "--drop-path-rate", 1],
     "cannot build the model of tiny: ValueError: drop_path_rate must be in [0, 1), got 1.0"),
    (["--data", "DATA", "--batch-size", 64], "a step takes 64 images, but there are 32: lower --batch-size"),
])
def test_user_errors_give_one_line(args, message, call, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(call(*[data if arg == "DATA" else arg for arg in args]))


@pytest.mark.parametrize("name", train.PAPER)
def test_settings_out_of_range_give_one_line(name, call, data, tmp_path):
    kind, flag = type(train.PAPER[name]), "--" + name.replace("_", "-")
    wrong = [-1] if name in ("warmup_epochs", "randaugment", "lr", "seed") else [-1, kind(2)] if name in (
        "label_smoothing", "reprob", "min_scale") else [-1, 0] if kind is int else [-1]
    for value in wrong + [10 ** 30 if kind is int else "nan"] + ["inf"] * (kind is float):
        assert f"{name} must be from" in fail(call("--data", data, "--output", tmp_path, flag, value))


def test_a_clip_grad_of_0_does_not_clip(data, call, tmp_path):
    args = ["--data", data, *QUICK, "--epochs", 1, "--clip-grad"]
    for clip in (0, 1e9, 1e-9):
        succeed(call(*args, clip, "--output", tmp_path / str(clip)))
    assert_same_end(tmp_path / "0", tmp_path / "1000000000.0")
    assert log_of(tmp_path / "0", "loss") != log_of(tmp_path / "1e-09", "loss")


def test_an_error_in_a_transform_is_not_taken_for_an_unreadable_image(data):
    with pytest.raises(ZeroDivisionError), mock.patch.object(train.ImageFolder, "random_crop", lambda *_: 1 / 0):
        image_folder(data / "train")[0, 0]


def test_the_digits_are_reproducible_and_too_varied_for_a_linear_classifier(tmp_path):
    """Ridge regression on the pixels of 2000 + 500 images of the ten classes, the best of several strengths."""
    def pixels(split):
        files = sorted((tmp_path / "digits" / split).glob("*/*.png"))
        images = np.stack([np.array(Image.open(file).resize((16, 16))).ravel() for file in files])
        return torch.from_numpy(images).double() / 255 - 0.5, torch.tensor([int(file.parent.name) for file in files])

    train.draw_digits(tmp_path / "digits", 200, 50)
    (x, y), (x_val, y_val) = pixels("train"), pixels("val")
    for strength in (1, 10, 100, 1000):
        weights = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]), x.T @ torch.eye(10).double()[y])
        assert (x_val @ weights).argmax(1).eq(y_val).double().mean() < 0.5 and len(x) == 2000
    for name in ("a", "b"):
        train.draw_digits(tmp_path / name, 1, 1)
    a, b = ([p.read_bytes() for p in sorted((tmp_path / name).rglob("*.png"))] for name in ("a", "b"))
    assert len(a) == 20 and a == b


def test_the_bare_command_draws_the_digits_once_and_resumes_its_run(call, tmp_path, monkeypatch):
    draw, drawn = train.draw_digits, []
    monkeypatch.setattr(train, "draw_digits", lambda root: drawn.append(root) or draw(root, 2, 1, 32))
    monkeypatch.chdir(tmp_path)
    for flags in ([], [], ["--resume", "--epochs", 2]):
        succeed(call(*flags or ["--epochs", 1, *QUICK]))
    assert log_of(tmp_path / "runs" / "tiny", "epoch") == [1, 2] and len(drawn) == 1


def test_an_uncaught_error_ends_the_process_although_data_loading_workers_ignore_signals(data, tmp_path):
    command = [sys.executable, PROGRAM, "--data", data, "--output", tmp_path, *QUICK, "--workers", 1, "--lr", 1e12]
    process = subprocess.run(list(map(str, command)), text=True, capture_output=True, timeout=300)
    assert process.returncode == 1 and "non-finite" in process.stderr
