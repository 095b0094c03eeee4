"""Runs of docs/detection.py and docs/segmentation.py: settings, stopped and gone on, on two processes, refused."""
import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import dense
import detection
import scalablevit
import segmentation
import train_minimal
from test_dense_data import ade20k, content, EPS, open_coco  # noqa: F401
from train_minimal import UserError

DETECTION = ["--size", 32, "--width", 8, "--groups", 2, "--regions", 8, "--batch-size", 2, "--mosaics", 6,
             "--epochs", 2, "--warmup-steps", 2]
SEGMENTATION = ["--size", 32, "--width", 8, "--batch-size", 2, "--mosaics", 8, "--steps", 6]
PROGRAMS = {
    "mask_rcnn": (detection, [*DETECTION, "--framework", "mask_rcnn"]),
    "retinanet": (detection, [*DETECTION, "--framework", "retinanet"]),
    "semantic_fpn": (segmentation, [*SEGMENTATION, "--framework", "semantic_fpn"]),
    "upernet": (segmentation, [*SEGMENTATION, "--framework", "upernet"])}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train/ and val/ of two classes, red and green with noise."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, color in (("green", (0, 200, 0)), ("red", (200, 0, 0))):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                noise = rng.integers(0, 50, (24, 24, 3), np.uint8)
                Image.fromarray(noise + np.array(color, np.uint8)).save(root / split / name / f"{i}.png")
    return root


def run(framework, data, output, *more):
    program, settings = PROGRAMS[framework]
    command = ["--data", data, "--output", output, *settings, *more]
    program.main([str(word) for word in command])
    return output


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """finished(framework): the folder of a whole run."""
    folders = {}

    def folder(framework):
        if framework not in folders:
            folders[framework] = run(framework, data, tmp_path_factory.mktemp(framework))
        return folders[framework]
    return folder


def state_of(output):
    return torch.load(output / "last.pt", weights_only=True)


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses_of(output):
    return [entry["loss"] for entry in log_of(output)]


def assert_same(ours, theirs):
    """Not a bit differs in logs and weights."""
    assert log_of(ours) == log_of(theirs)
    weights = state_of(theirs)["model"]
    for name, weight in state_of(ours)["model"].items():
        assert torch.equal(weight, weights[name]), name


class Stop(BaseException):
    """As a signal: nothing catches it."""


def stopped(monkeypatch, name, number, *command):
    """Run until the function `name` of dense.py is called for the number-th time."""
    function = getattr(dense, name)
    calls = []

    def stopping(*args):
        calls.append(name)
        if len(calls) == number:
            raise Stop
        return function(*args)
    with monkeypatch.context() as patch:
        patch.setattr(dense, name, stopping)
        with pytest.raises(Stop):
            run(*command)


# ---------------------------------------------------------------------------- settings
@pytest.mark.parametrize("program, choices, expected", [
    (detection, ["retinanet"], dict(lr=1e-4, weight_decay=1e-4, epochs=12, min_size=800)),
    (detection, ["retinanet", "--schedule", "3x"], dict(lr=1e-4, weight_decay=5e-2, epochs=36, min_size=480)),
    (detection, ["mask_rcnn"], dict(lr=2e-4, weight_decay=1e-4, epochs=12, min_size=800)),
    (detection, ["mask_rcnn", "--schedule", "3x"], dict(lr=1e-4, weight_decay=5e-2, epochs=36, min_size=480)),
    (segmentation, ["semantic_fpn"], dict(lr=1e-4, weight_decay=1e-4, steps=80_000, power=0.9, size=512)),
    (segmentation, ["upernet"], dict(lr=6e-5, weight_decay=1e-2, steps=160_000, power=1.0, size=512))])
def test_the_settings_are_appendix_cs_and_table_8s(program, choices, expected, tmp_path):
    flags = ["--framework", choices[0], *choices[1:], "--data", "x", "--output", str(tmp_path)]
    args, _ = dense.parse_args(program, flags)
    assert vars(args).items() >= expected.items()
    assert args.step_size == 16
    if program is detection:
        with torch.device("meta"):
            model = detection.build(scalablevit.scalablevit_tiny(num_classes=0), 81, args)
        assert model.transform.min_size == tuple(range(args.min_size, 801))             # the last is for evaluation
        assert model.transform.max_size == 1333


def rate(step, args):
    """The learning rate of a step."""
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters())
    program = argparse.Namespace(loss=lambda net, images, targets: net(images[0]).sum())
    args = argparse.Namespace(accum=1, seed=0, bf16=False, step_size=16, **args)
    dense.train_step(program, net, optimizer, iter([[(torch.ones(1), 0)]]), step, args)
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("schedule, epochs, falls", [("1x", 12, (8, 11)), ("3x", 36, (27, 33))])
def test_the_learning_rate_follows_appendix_c(schedule, epochs, falls):
    """500 warm-up steps; a tenth after each epoch that the appendix names; for segmentation a polynomial."""
    per_epoch = 7330                                                # of COCO's 117266 images with objects, 16 a step
    args = dict(lr=1.0, total=epochs * per_epoch, warmup_steps=500, power=0.0)
    args.update(fall=detection.RECIPES["schedule"][schedule]["fall"])
    for step, expected in ((0, 1 / 500), (249, 0.5), (499, 1), (500, 1)):
        assert rate(step, args) == pytest.approx(expected)
    for i, fall in enumerate(falls):
        assert rate(fall * per_epoch - 1, args) == pytest.approx(0.1 ** i)
        assert rate(fall * per_epoch + 1, args) == pytest.approx(0.1 ** (i + 1))
    args.update(warmup_steps=0, power=0.9, fall=1.0)
    assert rate(0, args) == pytest.approx(1)
    assert rate(args["total"] // 2, args) == pytest.approx(0.5 ** 0.9)


@pytest.mark.parametrize("framework", PROGRAMS)
def test_every_trained_parameter_gets_a_gradient(framework, data, tmp_path):
    """So that DistributedDataParallel finds each; the backbone's last norm, which only a classifier uses, is frozen."""
    program, settings = PROGRAMS[framework]
    command = ["--data", data, "--output", tmp_path, *settings, "--no-fuse"]
    args, _ = dense.parse_args(program, [str(word) for word in command])
    dataset = dense.load_data(program, args, "train")
    model = dense.build_model(program, args, {}, dataset.classes)
    program.loss(model, *zip(dataset[0, 0], dataset[1, 1])).backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()


# ---------------------------------------------------------------------------- runs
@pytest.mark.slow
@pytest.mark.parametrize("framework", PROGRAMS)
def test_a_run_stopped_three_times_ends_as_one_that_was_not(framework, data, finished, tmp_path, monkeypatch):
    """Saved after every step, so that each goes on where it stopped: after steps 2, 4 and 5."""
    for number, step in ((3, 2), (3, 4), (2, 5)):
        stopped(monkeypatch, "train_step", number, framework, data, tmp_path, "--save-every", 1)
        assert state_of(tmp_path)["step"] == step
    run(framework, data, tmp_path)
    assert_same(tmp_path, finished(framework))
    evaluations = [3, 6] if PROGRAMS[framework][0] is detection else [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in log_of(tmp_path)] == evaluations
    state = state_of(tmp_path)
    assert state["settings"]["framework"] == framework
    assert state["settings"]["data"] == str(data)
    assert state["classes"] == ["background", "green", "red"]
    assert not list(tmp_path.glob("*.part"))
    assert Image.open(tmp_path / f"{framework}.png").width == 6 * 360


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_run_stopped_while_it_saves_goes_on(number, data, finished, tmp_path, monkeypatch, capsys):
    """Before its first last.pt only best.pt is there: it is gone on from, not replaced."""
    stopped(monkeypatch, "save", number, "semantic_fpn", data, tmp_path)
    capsys.readouterr()
    run("semantic_fpn", data, tmp_path)
    assert f"step {min(number // 2, 1)} of 6" in capsys.readouterr().out
    assert log_of(tmp_path) == log_of(finished("semantic_fpn"))


@pytest.mark.slow
@pytest.mark.parametrize("framework", PROGRAMS)
def test_a_file_alone_says_all_that_evaluation_and_prediction_need(framework, finished, tmp_path, capsys):
    program = PROGRAMS[framework][0]
    shutil.copy(finished(framework) / "best.pt", tmp_path / "moved.pt")
    init = ["--init", str(tmp_path / "moved.pt")]
    capsys.readouterr()
    program.main([*init, "--eval"])
    found = re.findall("(?:AP|IoU) ([0-9.]+) %", capsys.readouterr().out)[-1]
    assert float(found) == pytest.approx(max(entry["score"] for entry in log_of(finished(framework))), abs=0.051)
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (50, 70), (200, 0, 0)).save(photo)
    program.main([*init, "--predict", str(photo)])
    file = tmp_path / f"photo.{program.__name__}.png"
    assert str(file) in capsys.readouterr().out
    assert Image.open(file).width % 50 == 0
    model, classes = program.load_model(tmp_path / "moved.pt")
    assert classes == ["background", "green", "red"]
    assert not model.training
    image = program.open_image(photo)
    program.draw(image, program.find(model, image), classes)


@pytest.mark.slow
def test_a_finished_run_says_so_and_more_epochs_go_on(data, finished, tmp_path, capsys):
    output = tmp_path / "copy"
    shutil.copytree(finished("retinanet"), output)
    run("retinanet", data, output)
    assert "step 6 of 6" in capsys.readouterr().out
    run("retinanet", data, output, "--epochs", 3)
    assert "epochs: 2 in" in capsys.readouterr().out
    assert [entry["step"] for entry in log_of(output)] == [3, 6, 9]


@pytest.mark.slow
@pytest.mark.parametrize("framework, flags, close", [
    ("retinanet", ["--batch-size", 1, "--accum", 2], 1e-3),         # others average over batches, not images
    ("semantic_fpn", ["--checkpointing"], 1e-5), ("semantic_fpn", ["--no-fuse"], 1e-3),
    ("semantic_fpn", ["--workers", 2], 0), ("upernet", ["--bf16"], 0.1),
    ("mask_rcnn", ["--bf16"], 0.4)])                                # its proposals are then others
def test_what_saves_time_or_memory_changes_losses_little(framework, flags, close, data, finished, tmp_path):
    run(framework, data, tmp_path, *flags)
    assert losses_of(tmp_path)[0] == pytest.approx(losses_of(finished(framework))[0], rel=close)
    if "--bf16" in flags:
        assert losses_of(tmp_path) != losses_of(finished(framework))


@pytest.mark.slow
def test_without_data_digits_are_drawn_and_detection_starts_from_segmentation(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_minimal, "draw_digits", lambda root: shutil.copytree(data, root))
    monkeypatch.setattr(segmentation, "MOSAIC", dict(size=32, width=8, batch_size=2, accum=1, mosaics=8))
    detection.main([str(word) for word in [*DETECTION, "--segment", 1, "--lr", 1e-9, "--output", tmp_path]])
    assert state_of(tmp_path)["classes"] == ["background", "green", "red"]
    for name, weight in torch.load(tmp_path / "segmentation" / "backbone.pt", weights_only=True)["model"].items():
        assert torch.allclose(state_of(tmp_path)["model"]["backbone.backbone." + name], weight, atol=1e-6)


# ---------------------------------------------------------------------------- COCO and ADE20K
@pytest.mark.slow
@pytest.mark.parametrize("framework", PROGRAMS)
def test_pictures_of_any_shape_are_trained_on_to_the_last_picture(framework, request, tmp_path):
    kind, batch, classes = "ade20k", 2, [f"name {i}" for i in range(1, 151)]
    if PROGRAMS[framework][0] is detection:
        kind, batch, classes = "open_coco", 1, ["background", "wide", "high"]
        request.getfixturevalue(kind)()                             # writes the JSON
    request.getfixturevalue(kind)
    output = run(framework, tmp_path, tmp_path / "run", "--accum", 1, "--batch-size", batch)
    assert state_of(output)["step"] in (4, 6)
    assert state_of(output)["classes"] == classes
    assert (output / f"{framework}.png").exists()


# ---------------------------------------------------------------------------- two processes
def torchrun(framework, data, output, *more, wait=True):
    program, settings = PROGRAMS[framework]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               program.__file__, "--data", data, "--output", output, *settings, *more]
    process = subprocess.Popen(
        [str(word) for word in command], env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not wait:
        return process
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(data, finished, tmp_path):
    """The losses of RetinaNet, up to rounding."""
    torchrun("retinanet", data, tmp_path, "--batch-size", 1)
    assert losses_of(tmp_path) == pytest.approx(losses_of(finished("retinanet")), rel=1e-3)


@pytest.mark.slow
def test_two_processes_killed_go_on_as_if_they_had_not_been(data, tmp_path):
    """Killed as soon as the first save is there; torchrun starts them again."""
    command = ["--batch-size", 2, "--mosaics", 24, "--save-every", 1]
    torchrun("retinanet", data, tmp_path / "whole", *command)
    process = torchrun("retinanet", data, tmp_path / "killed", *command, wait=False)
    while not (tmp_path / "killed" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert state_of(tmp_path / "killed")["step"] < 12
    torchrun("retinanet", data, tmp_path / "killed", *command)
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["mask_rcnn", "semantic_fpn"])
def test_an_evaluation_by_two_processes_is_that_of_one(framework, data, tmp_path, capsys):
    """Also after training in which BatchNorm saw other images in each process; of an odd number of images."""
    torchrun(framework, data, tmp_path, "--mosaics", 24, "--lr", 1e-2)
    shutil.copy(tmp_path / "last.pt", tmp_path / "best.pt")
    capsys.readouterr()
    run(framework, data, tmp_path, "--eval", "--mosaics", 24)
    alone = [line for line in capsys.readouterr().out.splitlines() if re.search("AP|IoU", line)]
    assert len(alone) == 1
    assert alone[0] in torchrun(framework, data, tmp_path, "--eval", "--mosaics", 24)
    score = float(re.findall("(?:AP|IoU) ([0-9.]+) %", alone[0])[-1])
    assert log_of(tmp_path)[-1]["score"] == pytest.approx(score, abs=0.051)


# ---------------------------------------------------------------------------- refused in one line
def refused(framework, *command):
    with pytest.raises(UserError) as error:
        run(framework, *command)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("framework, flags, words", [
    ("retinanet", ["--mosaics", 1], "lower --batch-size"), ("semantic_fpn", ["--batch-size", 1], "--batch-size 2"),
    ("upernet", ["--batch-size", 1], "--batch-size 2"),
    ("upernet", ["--init", "none.pt"], "none.pt' cannot be loaded")])
def test_settings_with_which_one_cannot_train_are_refused(framework, flags, words, data, tmp_path):
    assert words in refused(framework, data, tmp_path, *flags)


@pytest.mark.slow
def test_initial_weights_that_do_not_fit_are_refused_and_prefixed_names_are_read(data, tmp_path):
    file = tmp_path / "init.pt"
    weights = scalablevit.scalablevit_tiny(num_classes=3).state_dict()
    other = scalablevit.ScalableViT(dim=8, depths=(1,) * 4, heads=(1,) * 4, num_classes=3, head_hidden=None)
    for content, words in (
            ({**weights, "stages.1.embed.norm.weight": torch.full((48,), torch.nan)}, "is not finite"), ({}, "loaded"),
            ({"model": other.state_dict(), "config": other.config}, "is no scalablevit_tiny"),
            ({"encoder." + name: weight for name, weight in weights.items()}, "loaded")):
        torch.save(content, file)
        assert re.search(f"init.pt' .*{words}", refused("semantic_fpn", data, tmp_path / "run", "--init", file))
    torch.save({"model": {"module." + name: weight for name, weight in weights.items()}}, file)
    args, _ = dense.parse_args(segmentation, ["--init", str(file), "--output", str(tmp_path)])
    backbone = dense.build_model(segmentation, args, {}, ["a", "b"]).backbone.backbone
    for name, weight in backbone.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.slow
def test_other_data_than_the_runs_or_classes_in_one_split_are_refused(data, finished, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(finished("semantic_fpn"), output)
    assert "steps per epoch" in refused("semantic_fpn", data, output, "--mosaics", 20)
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "blue")
    assert "the run has other classes" in refused("semantic_fpn", tmp_path / "data", output)
    assert "the same classes" in refused("semantic_fpn", tmp_path / "data", tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "loss", lambda net, images, labels: net(
        segmentation.normalize(torch.stack(images))).sum() * float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        run("semantic_fpn", data, tmp_path)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("program", [detection, segmentation])
@pytest.mark.parametrize("command, words", [
    (["--data", "nowhere"], "nowhere"), (["--framework", "x"], "framework must be one of"),
    (["--eval"], "must be a file that this program has saved"),
    (["--predict", "x.jpg"], "must be a file that this program has saved")])
def test_the_program_ends_with_one_line_and_status_2(program, command, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        dense.run_program(lambda: program.main(["--output", str(tmp_path), *command]))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert words in error


@pytest.mark.slow
def test_a_file_of_the_other_program_and_an_eps_to_predict_are_refused(finished, tmp_path):
    file = finished("semantic_fpn") / "best.pt"
    with pytest.raises(UserError, match="framework must be one of"):
        detection.load_model(file)
    (tmp_path / "photo.jpg").write_bytes(EPS)
    with pytest.raises(UserError, match="photo.jpg"):
        segmentation.main(["--init", str(file), "--predict", str(tmp_path / "photo.jpg")])
