"""The training program: its settings, data and recipe; runs that are stopped and go on; edits; mistakes.

Most tests call `main` in this process, on 17 + 5 noise images of two classes, in steps of 40 ms.
"""
import argparse
import contextlib
import io
import functools
import json
import os
import pathlib
import pickle
import re
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
from torch.utils._pytree import tree_map

import scalablevit
import train_minimal as train
from test_train_data import Killed, draw, interrupt, picture

slow = pytest.mark.slow
FILE = pathlib.Path(train.__file__)
QUICK = ["--size", 16, "--batch-size", 2, "--accum", 2, "--epochs", 2]                   # 4 steps an epoch
RECIPE = [*QUICK, "--warmup-epochs", 0.5, "--drop-path-rate", 0.1, "--mixup", 0.8, "--cutmix", 1,
          "--reprob", 0.25, "--randaugment", 2, "--aug-repeats", 3]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "DEVICE", torch.device("cpu"))
    monkeypatch.setitem(train.GENERAL, "bf16", False)
    monkeypatch.setitem(train.GENERAL, "workers", 0)
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data"))


@pytest.fixture
def finished(data):
    """The folder of a run that nothing stopped, and its arguments."""
    if not (data / "run").exists():
        main("--data", data, *RECIPE, "--output", data / "run")
    return data / "run", ["--data", data, *RECIPE]


def load(file):
    return torch.load(file, weights_only=True)


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def state(output):
    """Weights, optimizer, settings, steps and logs, tensors as bytes."""
    files = load(output / "last.pt"), load(output / "best.pt"), log_of(output)
    return tree_map(lambda x: x.numpy().tobytes() if torch.is_tensor(x) else x, files)


PAPER = dict(size=224, epochs=300, warmup_epochs=5, batch_size=128, lr=1e-3, weight_decay=0.05, clip_grad=5,
             label_smoothing=0.1, mixup=0.8, cutmix=1, reprob=0.25, randaugment=2, min_scale=0.08,
             aug_repeats=3, drop_path_rate=0.2)
LIGHT = dict(mixup=0, cutmix=0, reprob=0, randaugment=0, aug_repeats=1, drop_path_rate=0)


@pytest.mark.parametrize("flags, expected", [
    (["--model", "s"], PAPER), (["--model", "b"], PAPER | dict(drop_path_rate=0.5)),
    (["--model", "l", "--lr", "0.1"], PAPER | dict(drop_path_rate=0.5, lr=0.1)),
    (["--data", "x"], LIGHT | dict(size=112, epochs=100)), ([], LIGHT | dict(size=56, epochs=8))])
def test_the_recipe_is_that_of_the_model_and_of_the_data(flags, expected):
    assert vars(train.parse_args(flags)[0]).items() >= expected.items()


def test_a_setting_is_the_command_lines_else_the_runs_else_the_recipes(capsys, tmp_path):
    saved = {"model": "tiny", "data": "x\n", "bf16": True, "lr": 0.5, "seed": 3}
    torch.save({"settings": saved}, tmp_path / "last.pt")
    args, _ = train.parse_args(["--output", str(tmp_path), "--no-bf16", "--lr", "0.5", "--data", "y"])
    expected = dict(lr=0.5, seed=3, size=112, bf16=False, data="y")
    assert vars(args).items() >= expected.items()
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


@pytest.mark.parametrize("change, message", [
    (lambda root: [os.rename(root / f"{split}/1", root / f"{split}-1") for split in ("train", "val")],
     "must have a folder for each of two or more classes"),
    (lambda root: [os.rename(root / "val", root / "old"), os.rename(root / "old/0", root / "val")],
     "Couldn't find any class folder in"),
    (lambda root: os.rename(root / "val", root / "old"), "No such file or directory"),
    (lambda root: (root / "val/2").mkdir(), "Found no valid file for the classes 2"),
    (lambda root: shutil.copytree(root / "val/1", root / "val/\x1b[3mcat"), "val: ['\\\\x1b[3mcat']"),
    (lambda root: shutil.copytree(root / "val/1", root / "val/.cat"), "a step takes more images than")])
def test_data_that_cannot_be_trained_on_give_one_line(change, message, fail, tmp_path):
    root = draw(tmp_path / "da\x1bta", n=8)
    change(root)
    assert message in fail("--data", root, "--output", "out", *QUICK, "--batch-size", 5)
    assert not pathlib.Path("out").exists()


def test_a_run_writes_its_log_and_its_best_epoch_for_eval_and_predict(finished, monkeypatch):
    output, args = finished
    first, second = log_of(output)
    top1, compiled = max(first["top1"], second["top1"]), mock.Mock()
    assert load(output / "last.pt")["log"] == [first, second]
    assert load(output / "best.pt")["log"][-1]["top1"] == top1
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    assert main("--eval", "--init", output / "best.pt", "--compile") == f"top-1 {top1:.2f} %\n"
    assert compiled.call_count == 1
    picture().save("a\n.png")
    image = train.transform(argparse.Namespace(size=16), False)(picture())
    chances = scalablevit.load_model(output / "best.pt")(train.normalize(image[None]))[0].softmax(0)
    a, b = chances.argsort(descending=True).tolist()
    assert main("--predict", "a\n.png", "--output", output) == (
        f"'a\\n.png': '{a}' {100 * chances[a]:.1f} %, '{b}' {100 * chances[b]:.1f} %\n")


def stop_and_go_on(args, output, owner, name, number, program=train):
    """Kill the run before the number-th call of owner.name; its command goes on from what was saved."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, name, number)
        with pytest.raises(Killed):
            main(*args, "--output", output, program=program)
    new = not [*output.glob("*.pt")]
    assert (", step 0 of" in main(*args, "--output", output, program=program)) == new


MOMENTS = {"step": (train.F, "cross_entropy"), "evaluation": (train, "evaluate"), "save": (torch, "save"),
           "replace": (os, "replace"), "log": (pathlib.Path, "write_text")}


@pytest.mark.parametrize("workers, every, numbers", [
    (0, 3, {"step": [11], "evaluation": [2], "save": [2]}), (0, 500, {"replace": [2], "log": [2]}),
    pytest.param(0, 1, {"step": range(1, 17), "save": range(1, 10), "replace": range(1, 10)}, marks=slow),
    pytest.param(2, 3, {"step": [1, 5, 14], "save": [3], "replace": [4]}, marks=slow)])
def test_a_stopped_run_goes_on_bit_for_bit(workers, every, numbers, finished, tmp_path):
    for moment in numbers:
        for number in numbers[moment]:
            output = tmp_path / f"{moment}{number}"
            stop_and_go_on([*finished[1], "--save-every", every, "--workers", workers], output,
                           *MOMENTS[moment], number)
            assert state(output) == state(finished[0])


def test_a_finished_run_says_so_and_more_epochs_go_on(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    assert main("--output", "out").endswith("step 8 of 8\nfinished: more --epochs, or another --output\n")
    assert state(tmp_path / "out") == state(finished[0])
    printed = main("--output", "out", "--epochs", 3, "--weight-decay", 0.3)
    assert "epochs: 2 in 'out/last.pt', now 3\n" in printed
    assert [entry["epoch"] for entry in log_of(tmp_path / "out")] == [1, 2, 3]
    groups = load("out/last.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0]  # 0: biases, norms and the PEG


def test_a_run_goes_on_with_the_optimizer_s_settings_of_the_file(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "out")
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, betas=(0.8, 0.9)))
    main("--output", "out", "--epochs", 3)
    groups = load("out/last.pt")["optimizer"]["param_groups"]
    assert [group["betas"] for group in groups] == [(0.8, 0.9)] * 2


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
    "logging": {"import scalablevit\n": "import scalablevit, service\n", "            loss_sum = 0.0\n": """\
            loss_sum = 0.0
            if RANK == 0:
                service.log(log[-1])
"""}}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_takes_effect_and_resumes_bit_for_bit(name, finished, tmp_path, monkeypatch):
    """At most 10 lines in 3 places of the file."""
    text, program, service = FILE.read_text(), types.ModuleType("edited"), mock.Mock()
    for old, new in EDITS[name].items():
        if text.count(old) != 1:
            pytest.fail(f"the edit {name!r} looks for {old!r}, once in train_minimal.py", pytrace=False)
        text = text.replace(old, new)
    assert len(set(text.splitlines()) - set(FILE.read_text().splitlines())) <= 10
    monkeypatch.setitem(sys.modules, "service", service)
    exec(compile(text, "edited.py", "exec"), program.__dict__)
    program.DEVICE = torch.device("cpu")
    main(*finished[1], "--output", "whole", program=program)
    args = [*finished[1], "--save-every", 3]
    stop_and_go_on(args, tmp_path / "parts", *MOMENTS["step"], 15, program)
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    last, plain, log = load("whole/last.pt"), load(finished[0] / "last.pt"), log_of(tmp_path / "whole")
    if name == "SGD":
        assert "momentum_buffer" in last["optimizer"]["state"][0]
    if name == "linear probe":
        torch.manual_seed(0)
        first = scalablevit.scalablevit_tiny(num_classes=2).state_dict()
        changed = {name for name in first if not torch.equal(first[name], last["model"][name])}
        assert changed == {"head.weight", "head.bias"}
    if name == "average":
        assert torch.equal(last["raw"]["norm.weight"], plain["model"]["norm.weight"])
        assert not torch.equal(last["raw"]["norm.weight"], last["model"]["norm.weight"])
        assert main("--eval", "--output", "whole") == f"top-1 {max(entry['top1'] for entry in log):.2f} %\n"
    if name == "logging":
        assert service.log.mock_calls == 2 * [mock.call(entry) for entry in log]


@pytest.mark.parametrize("classes, arguments", [(2, {}), (3, {}), (2, {"rc": (1.25,) * 4})])
def test_init_takes_own_and_published_weights_and_a_new_head(classes, arguments, data, monkeypatch):
    model = scalablevit.scalablevit_tiny(num_classes=classes, **arguments)
    weights, content = model.state_dict(), {"model": model.state_dict(), "config": model.config}
    if arguments:                                                   # published
        content = {"model": {"patch_embeds.0.norm.weight": torch.ones(2)}, "args": argparse.Namespace(lr=1)}
        monkeypatch.setattr(scalablevit, "convert_official", lambda published: weights)
    torch.save(content, "x.pt")
    main("--init", "x.pt", "--data", data, *QUICK, "--lr", 1e-9, "--warmup-epochs", 0)
    last = load("runs/tiny/last.pt")["model"]
    kept = "stages.0.blocks.0.attn.qkv.weight"
    assert torch.allclose(last[kept], weights[kept], atol=1e-3)
    assert last["head.weight"].shape[0] == 2
    assert torch.allclose(last["head.weight"], weights["head.weight"][:2], atol=1e-3) == (classes == 2)
    printed = main("--init", "x.pt", "--data", data, "--size", 16, "--eval")
    assert printed.startswith(f"'x.pt' names no classes; assumed for its {classes}: ['0', '1']\ntop-1 ")


class Trap:
    """Creates a file when unpickled."""

    def __reduce__(self):
        return open, ("trapped", "w")


@pytest.mark.parametrize("content, message", [
    *[(content, "not a checkpoint") for content in (b"", b"PK\3\4" * 99, pickle.dumps(Trap(), 2), None, [1],
                                                    torch.ones(3), {"log": Trap()})],
    ({"model": {"norm.weight": torch.ones(3)}}, "cannot be loaded"),
    ({"classes": ["0", "\x1b"]}, "has other classes")])
def test_a_damaged_checkpoint_gives_one_line_and_is_kept(content, message, finished, fail, tmp_path):
    for name in ("last.pt", "best.pt"):
        shutil.copy(finished[0] / name, name)
        if content is None:
            os.truncate(name, 99999)
        elif isinstance(content, bytes):
            pathlib.Path(name).write_bytes(content)
        else:
            torch.save({**load(name), **content} if isinstance(content, dict) else content, name)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for args in (finished[1], ["--eval"]):
        assert message in fail(*args, "--output", ".")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("args, message", [
    (["--model", "s", "--init", "own.pt"], "no scalablevit_s: change --model"),
    (["--init", "nan.pt"], "not finite"), (["--init", "nowhere.pt"], "FileNotFoundError"),
    (["--eval", "--init", "nowhere.pt"], "FileNotFoundError"), (["--eval"], "best.pt"),
    (["--predict", "own.pt"], "best.pt"), (["--data", "no\x1bwhere"], "x1bwhere"),
    (["--fuse"], "scalablevit_kernels"), (["--output", "weights"], "has None steps per epoch, not 4"),
    (["--output", "run", "--batch-size", "1"], "has 4 steps per epoch, not 8")])
def test_mistakes_give_one_line(args, message, finished, data, fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "scalablevit_kernels", None)
    shutil.copytree(finished[0], "run")
    content = load("run/last.pt")
    torch.save(content, "own.pt")
    pathlib.Path("weights").mkdir()
    torch.save(content["model"], "weights/last.pt")                 # instead of a run's checkpoint
    content["model"]["norm.weight"][0] = torch.nan
    torch.save(content, "nan.pt")
    assert message in fail(*QUICK, "--output", "out", "--data", data, *args)
    assert not pathlib.Path("out").exists()


def python(*args, **environment):
    """Exit status and what `python args` prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": FILE.parent} | environment
    result = subprocess.run([sys.executable, *map(str, args)], env=environment, timeout=300, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode, result.stdout


def torchrun(*args, program=FILE):
    """Two processes, in the folders 0 and 1."""
    for rank in "01":
        pathlib.Path(rank).mkdir(exist_ok=True)
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python",
                  "sh", "-c", 'cd $RANK && exec "$0" "$@"', sys.executable, program, *args)


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill_and_evaluate_exactly(data, tmp_path):
    args = ["--data", data, *RECIPE, "--batch-size", 1, "--save-every", 1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, printed = torchrun(*args, "--output", whole)
    assert status == 0, printed
    assert printed.count("step 0 of 8") == 1                        # only one process prints
    assert "strides" not in printed
    dying = FILE.read_text().replace("    total = 0.0\n", "    total = 0.0\n    if (RANK, step) == (1, 5):\n"
                                     "        os.kill(os.getpid(), 9)\n")
    (tmp_path / "dying.py").write_text(dying)
    assert torchrun(*args, "--output", parts, program=tmp_path / "dying.py")[0] != 0
    assert load(parts / "last.pt")["step"] in (4, 5)                # rank 0 may be ended before its save
    assert torchrun(*args, "--output", parts)[0] == 0
    assert state(parts) == state(whole)
    top1 = max(entry["top1"] for entry in log_of(whole))
    assert main("--eval", "--output", whole) == f"top-1 {top1:.2f} %\n"


@pytest.mark.slow
def test_two_processes_and_accumulation_train_like_one_batch(data, tmp_path):
    args = ["--data", data, *QUICK, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0.1]
    assert torchrun(*args, "--batch-size", 1, "--output", tmp_path / "two")[0] == 0
    main(*args, "--batch-size", 4, "--accum", 1, "--output", "one")
    one, two = (load(f"{name}/last.pt")["model"] for name in ("one", "two"))
    for name in one:                                                # AdamW's first steps amplify rounding
        assert torch.isclose(one[name], two[name], atol=1e-4).float().mean() > 0.99


@pytest.mark.slow
def test_processes_that_disagree_end_with_one_line(tmp_path):
    """Other classes in equal numbers."""
    draw(tmp_path / "0/data")
    draw(tmp_path / "1/data", classes=("0", "cat"))
    status, printed = torchrun("--data", "data", *QUICK, "--batch-size", 1)
    assert status != 0
    assert "processes differ in step, steps, classes or settings" in printed
    assert "UserError" not in printed                               # as a traceback would say


@pytest.mark.parametrize("other", [(4, 4, "ab", 1), (8, 5, "ab", 1), (8, 4, "ac", 1), (8, 4, "ab", 2)])
def test_processes_must_agree(other, monkeypatch):
    """In step, steps, classes and settings."""
    sent = []

    def gather(everyone, mine):
        sent.append(mine)
        everyone[:] = [sent[0], mine]

    def check(step, steps, classes, settings):
        train.check_run({"step": step, "steps": steps}, steps, classes, argparse.Namespace(settings=settings))

    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    check(*other)
    with pytest.raises(train.UserError, match="processes differ"):
        check(8, 4, "ab", 1)


@pytest.mark.slow
def test_spawned_workers_without_fcntl_as_on_windows(finished, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import multiprocessing, sys\nsys.modules['fcntl'] = None\n"
                                               "multiprocessing.set_start_method('spawn', force=True)\n")
    args = [*finished[1], "--data", draw(tmp_path / "data"), "--workers", 1, "--no-bf16", "--output", "out"]
    os.truncate("data/train/1/05.png", 200)
    for expected in (2, 0):
        status, printed = python(FILE, *args, PYTHONPATH=tmp_path, CUDA_VISIBLE_DEVICES="")
        assert status == expected, printed
        assert len(re.findall("cannot read.*", printed)) == status // 2
        assert "Traceback" not in printed
        shutil.copy(finished[1][1] / "train/1/05.png", "data/train/1/05.png")
    assert log_of(tmp_path / "out") == log_of(finished[0])
