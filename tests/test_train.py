"""The training program: its settings, data and recipe; runs that are stopped and go on; edits; mistakes.

Most tests call `main` in this process, on 17 + 5 noise images of two classes, in steps of 40 ms.
"""
import argparse
import contextlib
import io
import json
import os
import pathlib
import pickle
import runpy
import shutil
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch.utils._pytree import tree_flatten

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


def draw(root, n=17, classes=("0", "1")):
    """n training images and 5 for validation: an odd number, for two processes."""
    for split, n in (("train", n), ("val", 5)):
        for i in range(n):
            folder = root / split / classes[i % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i + n).integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data"))


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


def assert_same(ours, theirs):
    """Not a bit differs in weights, optimizer, settings, steps and logs."""
    for name in ("last.pt", "best.pt"):
        (a, places), (b, others) = tree_flatten(load(ours / name)), tree_flatten(load(theirs / name))
        assert places == others
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b)), name
    assert log_of(ours) == log_of(theirs)


# ---------------------------------------------------------------------------- settings
PAPER = dict(size=224, epochs=300, warmup_epochs=5, batch_size=128, lr=1e-3, weight_decay=0.05, clip_grad=5,
             label_smoothing=0.1, mixup=0.8, cutmix=1, reprob=0.25, randaugment=2, min_scale=0.08, aug_repeats=3)
LIGHT = dict(mixup=0, cutmix=0, reprob=0, randaugment=0, aug_repeats=1, drop_path_rate=0)


@pytest.mark.parametrize("flags, expected", [
    (["--model", "s"], PAPER | dict(drop_path_rate=0.2)), (["--model", "b"], PAPER | dict(drop_path_rate=0.5)),
    (["--model", "l", "--lr", "0.1"], PAPER | dict(drop_path_rate=0.5, lr=0.1)),
    (["--data", "x"], LIGHT | dict(size=112, epochs=100)), ([], LIGHT | dict(size=56, epochs=8))])
def test_the_recipe_is_that_of_the_model_and_of_the_data(flags, expected):
    assert vars(train.parse_args(flags)[0]).items() >= expected.items()


def test_a_setting_is_the_command_lines_else_the_runs_else_the_recipes(capsys, tmp_path):
    saved = {"model": "tiny", "data": "x\n", "bf16": True, "lr": 0.5, "seed": 3}
    torch.save({"settings": saved}, tmp_path / "last.pt")
    args, _ = train.parse_args(["--output", str(tmp_path), "--no-bf16", "--lr", "0.5", "--data", "y"])
    assert (args.lr, args.seed, args.size, args.bf16, args.data) == (0.5, 3, 112, False, "y")
    file = ascii(str(tmp_path / "last.pt"))
    assert capsys.readouterr().out == f"data: 'x\\n' in {file}, now 'y'\nbf16: True in {file}, now False\n"


@given(st.integers(1, 40), st.floats(0, 20), st.floats(1e-4, 1e-2))
def test_the_learning_rate_has_linear_warmup_and_cosine_decay(more, warmup, lr):
    epochs = np.linspace(0, warmup + more, 50)
    args = argparse.Namespace(lr=lr, step_size=2048, warmup_epochs=warmup, epochs=warmup + more)
    cosine = 1e-5 + (2 * lr - 1e-5) * (1 + np.cos(np.pi * (epochs - warmup) / more)) / 2
    linear = 1e-6 + (2 * lr - 1e-6) * epochs / max(warmup, 1e-300)
    rates = [train.learning_rate(epoch, args) for epoch in epochs]
    assert rates == pytest.approx(np.where(epochs < warmup, linear, cosine))


# ---------------------------------------------------------------------------- batches and images
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
    steps = batches(64, 1, 1, 64, aug_repeats=1, seed=0)[0] + batches(64, 1, 1, 64, aug_repeats=1, seed=1)[0]
    assert len({str([image for image, _ in step]) for step in steps}) == 6
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
    assert (erased != 0).any(3).any(2).any(1).float().mean() == pytest.approx(0.25, abs=0.04)
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
    (lambda file: Image.fromarray(np.ones((9, 9), np.uint16)).save(file, "png"), "more than 8 bits a channel"),
    (lambda file: Image.fromarray(np.ones((9, 9), np.float32)).save(file, "tiff"), "more than 8 bits a channel"),
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
    images = train.Images(root, train.transform(argparse.Namespace(size=16, min_scale=0.1, randaugment=2), True))
    names = [os.path.relpath(file, root) for file, _ in images.samples]
    assert images.classes == ["0", "1"]
    assert len(names) == 9 + 8 + 7                                  # 0, 0/deeper, 1
    assert not [name for name in names if name[0] == "." or "/." in name]
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
    (lambda root: (root / "val/2").mkdir(), "Found no valid file for the classes 2"),
    (lambda root: shutil.copytree(root / "val/1", root / "val/\x1b[31mcat"), "train and val: ['\\\\x1b[31mcat']"),
    (lambda root: shutil.copytree(root / "val/1", root / "val/.cat"), "a step takes more images than there are")])
def test_data_that_cannot_be_trained_on_give_one_line(change, message, fail, tmp_path):
    root = draw(tmp_path / "da\x1bta", n=8)
    change(root)
    assert message in fail("--data", root, "--output", "out", *QUICK, "--batch-size", 5)
    assert not pathlib.Path("out").exists()


# ---------------------------------------------------------------------------- runs
def test_a_run_writes_its_log_and_its_best_epoch_for_eval_and_predict(finished, monkeypatch):
    output, args = finished
    top1 = [entry["top1"] for entry in log_of(output)]
    assert load(output / "last.pt")["log"] == log_of(output)
    assert load(output / "best.pt")["log"][-1]["top1"] == max(top1)
    assert len(top1) == 2
    compiled = mock.Mock()
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    assert main("--eval", "--init", output / "best.pt", "--compile") == f"top-1 {max(top1):.2f} %\n"
    assert compiled.call_count == 1
    picture().save("a\n.png")
    image = train.transform(argparse.Namespace(size=16), False)(picture())
    chances = scalablevit.load_model(output / "best.pt")(train.normalize(image[None]))[0].softmax(0)
    a, b = chances.argsort(descending=True).tolist()
    assert main("--predict", "a\n.png", "--output", output) == (
        f"'a\\n.png': '{a}' {100 * chances[a]:.1f} %, '{b}' {100 * chances[b]:.1f} %\n")


def stop_and_go_on(args, output, owner, name, number, program=train):
    """Kill the run before the number-th call of owner.name, and give its command again."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, name, number)
        with pytest.raises(Killed):
            main(*args, "--output", output, program=program)
    if (output / "log.jsonl").exists():
        log_of(output)                                              # can be read
    return main(*args, "--output", output, program=program)


MOMENTS = {"step": (train.F, "cross_entropy"), "evaluation": (train, "evaluate"), "save": (torch, "save"),
           "replace": (os, "replace"), "log": (pathlib.Path, "write_text")}


@pytest.mark.parametrize("workers, every, numbers", [
    (0, 3, {"step": [11], "evaluation": [2], "save": [2], "replace": [3]}), (2, 1, {"step": [14], "evaluation": [1]}),
    (0, 500, {"replace": [2], "log": [1, 2]}),
    pytest.param(0, 1, {"step": range(1, 17), "save": range(1, 10), "replace": range(1, 10)}, marks=pytest.mark.slow),
    pytest.param(2, 3, {"step": range(1, 17), "save": range(1, 6), "replace": range(1, 6)}, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(workers, every, numbers, finished, tmp_path):
    for moment in numbers:
        for number in numbers[moment]:
            output = tmp_path / f"{moment}{number}"
            stop_and_go_on([*finished[1], "--save-every", every, "--workers", workers], output,
                           *MOMENTS[moment], number)
            assert_same(output, finished[0])


def test_a_finished_run_says_so_and_more_epochs_go_on(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    assert main("--output", "out").endswith("step 8 of 8\nfinished: more --epochs, or another --output\n")
    assert_same(tmp_path / "out", finished[0])
    assert "epochs: 2 in 'out/last.pt', now 3\n" in main("--output", "out", "--epochs", 3, "--weight-decay", 0.3)
    assert [entry["epoch"] for entry in log_of(tmp_path / "out")] == [1, 2, 3]
    groups = load("out/last.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0]  # 0: biases, norms and the PEG


# ---------------------------------------------------------------------------- edits
EDITS = {  # name: {text in the file: its replacement}
    "SGD": {"torch.optim.AdamW(groups, fused=True)": "torch.optim.SGD(groups, momentum=0.9)"},
    "linear probe": {"    if args.fuse:\n": """\
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("head")
    if args.fuse:
"""},
    "average": {"    net = Dist": """\
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    if run:                                                         # "model" is the average
        ema.n_averaged += 1
        model.load_state_dict(run["raw"])
    optimizer.register_step_post_hook(lambda *_: ema.update_parameters(model))
    net = Dist""", "evaluate(model, val_set": "evaluate(ema.module, val_set",
                "model=model.state_dict(),": "model=ema.module.state_dict(), raw=model.state_dict(),"},
    "logging": {"import scalablevit\n": "import scalablevit\nimport service\n", "            loss_sum = 0.0\n": """\
            loss_sum = 0.0
            if RANK == 0:
                service.log(log[-1])
"""}}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_takes_effect_and_resumes_bit_for_bit(name, finished, data, tmp_path, monkeypatch):
    """At most 10 lines in 3 places of the file."""
    text, program, service = FILE.read_text(), types.ModuleType("edited"), mock.Mock()
    for old, new in EDITS[name].items():
        if text.count(old) != 1:
            pytest.fail(f"the edit {name!r} looks for {old!r}, once in train_minimal.py", pytrace=False)
        text = text.replace(old, new)
    assert len(set(text.splitlines()) - set(FILE.read_text().splitlines())) <= 10
    assert len(EDITS[name]) <= 3
    monkeypatch.setitem(sys.modules, "service", service)
    exec(compile(text, "edited.py", "exec"), program.__dict__)
    program.DEVICE = torch.device("cpu")
    main(*finished[1], "--output", tmp_path / "whole", program=program)
    calls = service.log.mock_calls[:]
    stop_and_go_on([*finished[1], "--save-every", 3], tmp_path / "parts", train.F, "cross_entropy", 15, program)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    last, plain = load("whole/last.pt"), load(finished[0] / "last.pt")["model"]
    torch.manual_seed(0)
    first = scalablevit.scalablevit_tiny(num_classes=2).state_dict()
    changed = {name for name in first if not torch.equal(first[name], last["model"][name])}
    assert (changed == {"head.weight", "head.bias"}) == (name == "linear probe")
    assert ("momentum_buffer" in last["optimizer"]["state"][len(first) - 1]) == (name == "SGD")
    if name == "average":
        assert torch.equal(last["raw"]["norm.weight"], plain["norm.weight"])
        assert main("--eval", "--output", "whole") == f"top-1 {max(e['top1'] for e in last['log']):.2f} %\n"
    if name == "logging":
        assert calls == [mock.call(entry) for entry in log_of(tmp_path / "whole")]
        assert service.log.mock_calls == calls + calls


# ---------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("classes, arguments", [(2, {}), (3, {}), (2, {"rc": (1.25,) * 4})])
def test_init_takes_own_and_published_weights_and_a_new_head_for_other_classes(classes, arguments, data, monkeypatch):
    model = scalablevit.scalablevit_tiny(num_classes=classes, **arguments)
    weights, content = model.state_dict(), {"model": model.state_dict(), "config": model.config}
    if arguments:                                                   # published
        content = {"model": {"patch_embeds.0.norm.weight": torch.ones(2)}, "args": argparse.Namespace(lr=1)}
        monkeypatch.setattr(scalablevit, "convert_official", lambda published: weights)
    torch.save(content, "x.pt")
    main("--init", "x.pt", "--data", data, *QUICK, "--lr", 1e-9, "--warmup-epochs", 0)
    last = load("runs/tiny/last.pt")["model"]
    assert torch.allclose(last["norm.weight"], weights["norm.weight"], atol=1e-3)
    assert last["head.weight"].shape[0] == 2
    assert torch.allclose(last["head.weight"], weights["head.weight"][:2], atol=1e-3) == (classes == 2)
    printed = main("--init", "x.pt", "--data", data, "--size", 16, "--eval")
    assert printed.startswith("'x.pt' names no classes; assumed: ['0', '1']\ntop-1 ")


class Trap:
    """Creates a file when unpickled."""

    def __reduce__(self):
        return open, ("trapped", "w")


@pytest.mark.parametrize("content, message", [
    (b"", "is not a checkpoint"), (b"PK\3\4" * 99, "is not a checkpoint"), (pickle.dumps(Trap(), 2), "not a checkpoint"),
    (None, "is not a checkpoint"), ([1], "is not a checkpoint"), (torch.ones(3), "is not a checkpoint"),
    ({"log": Trap()}, "is not a checkpoint"), ({"model": {"norm.weight": torch.ones(3)}}, "cannot be loaded"),
    ({"model": {"norm.weight": torch.tensor(torch.nan)}}, "cannot be loaded"), ({"classes": ["0", "\x1b"]}, "has other classes")])
def test_a_damaged_checkpoint_gives_one_line_and_nothing_is_overwritten(content, message, finished, fail, tmp_path):
    for name in ("last.pt", "best.pt"):
        shutil.copy(finished[0] / name, name)
        if content is None:
            os.truncate(name, 99999)
        elif isinstance(content, bytes):
            pathlib.Path(name).write_bytes(content)
        else:
            torch.save({**load(name), **content} if isinstance(content, dict) else content, name)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert message in fail(*finished[1], "--output", ".")
    assert message in fail("--eval", "--output", ".")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("args, message", [
    (["--model", "s", "--init", "own.pt"], "is no scalablevit_s: change --model"), (["--init", "nan.pt"], "is not finite"),
    (["--init", "nowhere.pt"], "FileNotFoundError"), (["--eval", "--init", "nowhere.pt"], "FileNotFoundError"),
    (["--eval"], "best.pt"), (["--predict", "own.pt"], "best.pt"), (["--data", "no\x1bwhere"], "x1bwhere"),
    (["--fuse"], "scalablevit_kernels"), (["--output", "run", "--batch-size", "1"], "has 4 steps per epoch, not 8")])
def test_mistakes_give_one_line(args, message, finished, data, fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "scalablevit_kernels", None)
    shutil.copytree(finished[0], "run")
    content = load("run/last.pt")
    torch.save(content, "own.pt")
    content["model"]["norm.weight"][0] = torch.nan
    torch.save(content, "nan.pt")
    assert message in fail(*QUICK, "--output", "out", "--data", data, *args)
    assert not pathlib.Path("out").exists()


# ---------------------------------------------------------------------------- the digits
def test_the_digits_are_drawn_alike_and_appear_when_complete(tmp_path):
    with mock.patch.object(train, "range", lambda n: range(n // 100), create=True):
        for root in ("runs/tiny/digits", "again"):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                interrupt(patch, Image.Image, "save", 45)
                train.draw_digits(pathlib.Path(root))
            assert not pathlib.Path(root).exists()
            train.draw_digits(pathlib.Path(root))
    drawn, again = (sorted((tmp_path / root).rglob("*.png")) for root in ("runs/tiny/digits", "again"))
    assert [file.read_bytes() for file in drawn] == [file.read_bytes() for file in again]
    assert len(drawn) == 50


def test_a_linear_classifier_of_the_digits_stays_under_60_percent(tmp_path):
    """Ridge regression on 16 × 16 pixels, the best of several strengths."""
    train.draw_digits(tmp_path / "digits")
    files = sorted(tmp_path.glob("digits/*/*/*.png"))               # 4000 for training come first
    pixels = np.stack([np.array(Image.open(file).resize((16, 16))).ravel() for file in files])
    labels = torch.tensor([int(file.parent.name) for file in files])
    x, x_val = torch.from_numpy(pixels / 255 - 0.5).split([4000, 1000])
    for strength in (1, 10, 100, 1000):
        targets = x.T @ torch.eye(10).double()[labels[:4000]]
        guesses = (x_val @ torch.linalg.solve(x.T @ x + strength * torch.eye(768), targets)).argmax(1)
        assert (guesses == labels[4000:]).double().mean() < 0.6
