"""Runs of docs/detection.py and docs/segmentation.py: stopped and gone on, evaluated, on two processes, refused."""
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
pytestmark = pytest.mark.slow                                       # trainings: a minute in all
DOCS = pathlib.Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import dense
import detection
import scalablevit
import segmentation
import train_minimal
from train_minimal import UserError

DETECTION = ["--size", 32, "--min-size", 32, "--width", 8, "--proposals", 16, "--batch-size", 2, "--mosaics", 6,
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


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """finished(framework): the folder of a whole run."""
    folders = {}

    def folder(framework):
        if framework not in folders:
            folders[framework] = run(framework, data, tmp_path_factory.mktemp(framework))
        return folders[framework]
    return folder


class Stop(BaseException):
    """As a signal: nothing catches it."""


def stop_after(monkeypatch, step, last):
    """End the program before the step that follows `last`."""
    def stopping(program, net, optimizer, batches, number, args):
        if number > last:
            raise Stop
        return step(program, net, optimizer, batches, number, args)
    monkeypatch.setattr(dense, "train_step", stopping)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("retinanet", "upernet")]


@pytest.mark.parametrize("framework", ["mask_rcnn", "semantic_fpn", *SLOW])
def test_a_run_stopped_three_times_ends_as_one_that_was_not(framework, data, finished, tmp_path, monkeypatch):
    """Stopped in steps 2, 4 and 5; saved after every step, so that each goes on where it stopped."""
    step = dense.train_step
    for last in (1, 3, 4):
        stop_after(monkeypatch, step, last)
        with pytest.raises(Stop):
            run(framework, data, tmp_path, "--save-every", 1)
        assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == last + 1
    monkeypatch.setattr(dense, "train_step", step)
    run(framework, data, tmp_path)
    whole, pieces = (torch.load(folder / "last.pt", weights_only=True) for folder in (finished(framework), tmp_path))
    assert log_of(tmp_path) == log_of(finished(framework))
    for name, weight in whole["model"].items():
        assert torch.equal(weight, pieces["model"][name]), name


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_run_stopped_while_it_saves_goes_on(number, data, finished, tmp_path, monkeypatch):
    """Before its first last.pt only best.pt is there: it is gone on from, not replaced."""
    saves = []

    def stopping(state, file):
        saves.append(file)
        if len(saves) == number:
            raise Stop
        train_minimal.save(state, file)
    monkeypatch.setattr(dense, "save", stopping)
    with pytest.raises(Stop):
        run("semantic_fpn", data, tmp_path)
    monkeypatch.setattr(dense, "save", train_minimal.save)
    before = (tmp_path / "best.pt").exists()
    opened = []
    monkeypatch.setattr(dense, "load", lambda file: opened.append(file.name) or train_minimal.load(file))
    run("semantic_fpn", data, tmp_path)
    if number == 2:
        assert before
        assert opened[0] == "best.pt"
    assert log_of(tmp_path) == log_of(finished("semantic_fpn"))


def test_a_step_draws_the_same_numbers_whatever_was_drawn_before():
    """So does a run that goes on, where dropout and the samples of Mask R-CNN are concerned."""
    program = argparse.Namespace(loss=lambda net, images: net(images).sum() * torch.rand(()))
    args = argparse.Namespace(accum=2, seed=0, bf16=False)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    losses = []
    for step, before in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(before)
        batches = iter([[torch.ones(1, 2)]] * 2)
        losses.append(dense.train_step(program, net, optimizer, batches, step, args))
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("framework", PROGRAMS)
def test_a_file_alone_says_all_that_a_prediction_needs(framework, finished, tmp_path, capsys):
    program = PROGRAMS[framework][0]
    shutil.copy(finished(framework) / "best.pt", tmp_path / "moved.pt")
    Image.new("RGB", (50, 70), (200, 0, 0)).save(tmp_path / "photo.jpg")
    program.main(["--init", str(tmp_path / "moved.pt"), "--predict", str(tmp_path / "photo.jpg")])
    name = "detection" if program is detection else "segmentation"
    file = tmp_path / f"photo.{name}.png"
    assert str(file) in capsys.readouterr().out
    assert Image.open(file).width % 50 == 0
    model, classes = program.load_model(tmp_path / "moved.pt")
    assert classes[-2:] == ["green", "red"]
    assert not model.training
    program.draw(program.open_image(tmp_path / "photo.jpg"), program.find(
        model, program.open_image(tmp_path / "photo.jpg")), classes)


@pytest.mark.parametrize("framework", ["mask_rcnn", "semantic_fpn"])
def test_eval_reports_the_best_evaluation_of_the_run(framework, finished, capsys):
    folder = finished(framework)
    capsys.readouterr()
    PROGRAMS[framework][0].main(["--output", str(folder), "--eval"])
    printed = capsys.readouterr().out
    best = max(entry["score"] for entry in log_of(folder))
    found = re.search("segm AP ([0-9.]+)" if framework == "mask_rcnn" else "one scale: mean IoU ([0-9.]+)", printed)
    assert float(found[1]) == pytest.approx(best, abs=0.051)
    assert ("MS: mean IoU" in printed) == (framework == "semantic_fpn")


@pytest.mark.parametrize("framework, evaluations", [("mask_rcnn", [3, 6]), ("semantic_fpn", [1, 2, 3, 4, 5, 6])])
def test_a_run_leaves_its_weights_log_settings_and_a_picture(framework, evaluations, data, finished):
    folder = finished(framework)
    assert [entry["step"] for entry in log_of(folder)] == evaluations
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["step"] == 6
    assert state["settings"]["framework"] == framework
    assert state["settings"]["data"] == str(data)
    assert state["config"]["dim"] == 24
    assert state["classes"][-2:] == ["green", "red"]
    assert (folder / "best.pt").exists()
    assert not list(folder.glob("*.part"))
    assert Image.open(folder / f"{framework}.png").width == 360                         # one mosaic for validation


def test_a_finished_run_says_so_and_more_epochs_go_on(data, finished, tmp_path, capsys):
    output = tmp_path / "copy"
    shutil.copytree(finished("retinanet"), output)
    run("retinanet", data, output)
    assert "finished" in capsys.readouterr().out
    run("retinanet", data, output, "--epochs", 3)
    assert "epochs: 2 in" in capsys.readouterr().out
    assert [entry["step"] for entry in log_of(output)] == [3, 6, 9]


def losses_of(folder):
    return [entry["loss"] for entry in log_of(folder)]


def test_accumulation_equals_one_batch(data, finished, tmp_path):
    """RetinaNet averages over images, so its loss may be split; Mask R-CNN and batch normalization may not."""
    run("retinanet", data, tmp_path, "--batch-size", 1, "--accum", 2)
    assert losses_of(tmp_path) == pytest.approx(losses_of(finished("retinanet")), rel=1e-3)


def test_checkpointing_changes_no_loss(data, finished, tmp_path):
    run("semantic_fpn", data, tmp_path, "--checkpointing")
    assert losses_of(tmp_path) == pytest.approx(losses_of(finished("semantic_fpn")), rel=1e-5)


@pytest.mark.parametrize("framework, close", [("retinanet", 0.1), ("upernet", 0.1), ("mask_rcnn", 0.3)])
def test_bf16_changes_losses_a_little(framework, close, data, finished, tmp_path):
    """More in Mask R-CNN, whose eight proposals are then others."""
    run(framework, data, tmp_path, "--bf16")
    assert losses_of(tmp_path)[0] == pytest.approx(losses_of(finished(framework))[0], rel=close)
    assert losses_of(tmp_path) != losses_of(finished(framework))


@pytest.mark.parametrize("flags, said", [([], True), (["--no-fuse"], False)])
def test_without_the_kernels_a_run_says_so_in_one_line_and_goes_on(flags, said, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scalablevit_kernels", None)
    run("semantic_fpn", data, tmp_path, "--steps", 1, *flags)
    assert ("scalablevit_kernels is not installed" in capsys.readouterr().out) == said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers, data, finished, tmp_path):
    run("semantic_fpn", data, tmp_path, "--workers", workers)
    assert log_of(tmp_path) == log_of(finished("semantic_fpn"))


# ---------------------------------------------------------------------------- COCO and ADE20K
def shapes(split):
    """Portrait, landscape and square."""
    return {f"{split}{i}": size for i, size in enumerate([(50, 30), (30, 60), (40, 40)])}


@pytest.fixture
def coco(tmp_path):
    """Three pictures of different shapes in each split; ids begin at 0; no iscrowd, no area."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        content = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "left"}, {"id": 9, "name": "right"}]}
        (tmp_path / f"{split}2017").mkdir()
        for i, (name, (H, W)) in enumerate(shapes(split).items()):
            Image.new("RGB", (W, H), (90 * i, 20, 40)).save(tmp_path / f"{split}2017" / f"{name}.jpg")
            content["images"].append({"id": i, "file_name": f"{name}.jpg", "height": H, "width": W})
            for category, x in ((0, 0), (9, W // 2)):
                corners = [x, 0, x + W // 2, 0, x + W // 2, H, x, H]
                content["annotations"].append({"id": len(content["annotations"]), "image_id": i, "category_id": category,
                                               "bbox": [x, 0, W // 2 + 0.005, H], "segmentation": [corners]})
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("framework", ["mask_rcnn", "retinanet"])
def test_a_coco_folder_with_pictures_of_any_shape_is_trained_on_to_the_last_picture(framework, coco, tmp_path):
    output = run(framework, coco, tmp_path / "run", "--accum", 1, "--batch-size", 1, "--lr", 1e-3)
    assert [entry["step"] for entry in log_of(output)] == [3, 6]
    assert torch.load(output / "last.pt", weights_only=True)["classes"] == ["left", "right"]
    assert (output / f"{framework}.png").exists()


@pytest.fixture
def ade20k(tmp_path):
    """Three pictures of different shapes in each split: left is class 1, right class 2, the last rows are none."""
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\tleft\n2\tright\n")
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            (tmp_path / folder / split).mkdir(parents=True)
        for name, (H, W) in shapes(split).items():
            labels = np.ones((H, W), np.uint8)
            labels[:, W // 2:] = 2
            labels[-5:] = 0
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{name}.png")
            Image.fromarray(90 * labels).convert("RGB").save(tmp_path / "images" / split / f"{name}.jpg")
    return tmp_path


@pytest.mark.parametrize("framework", ["semantic_fpn", "upernet"])
def test_an_ade20k_folder_with_pictures_of_any_shape_is_trained_on_to_the_last_picture(framework, ade20k, tmp_path):
    output = run(framework, ade20k, tmp_path / "run", "--accum", 1, "--lr", 1e-3)
    assert [entry["step"] for entry in log_of(output)] == [1, 2, 3, 4, 5, 6]
    assert torch.load(output / "last.pt", weights_only=True)["classes"] == ["left", "right"]
    assert (output / f"{framework}.png").exists()


def test_a_run_on_coco_that_is_killed_in_training_reads_the_rest_in_the_same_order(coco, tmp_path, monkeypatch):
    """Also the flips are those of the run that was not stopped."""
    orders = {}
    step = dense.train_step
    for name, stops in (("whole", []), ("pieces", [2])):
        seen = orders[name] = []
        loss = detection.loss

        def recording(net, images, targets):
            seen.append([image.float().mean().item() for image in images] + [t["boxes"].tolist() for t in targets])
            return loss(net, images, targets)
        monkeypatch.setattr(detection, "loss", recording)
        for last in stops:
            stop_after(monkeypatch, step, last)
            with pytest.raises(Stop):
                run("retinanet", coco, tmp_path / name, "--batch-size", 1, "--accum", 1, "--save-every", 1)
            monkeypatch.setattr(dense, "train_step", step)
        run("retinanet", coco, tmp_path / name, "--batch-size", 1, "--accum", 1)
        monkeypatch.setattr(detection, "loss", loss)
    assert orders["pieces"] == orders["whole"]


# ---------------------------------------------------------------------------- two processes
def torchrun(framework, data, output, *more, wait=True):
    program, settings = PROGRAMS[framework]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               program.__file__, "--data", data, "--output", output, *settings, *more]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [str(word) for word in command]
    if wait:
        return subprocess.run(command, capture_output=True, text=True, env=environment)
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(data, finished, tmp_path):
    """The losses of RetinaNet, up to rounding."""
    done = torchrun("retinanet", data, tmp_path, "--batch-size", 1)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path) == pytest.approx(losses_of(finished("retinanet")), rel=1e-3)


@pytest.mark.slow
def test_two_processes_killed_go_on_as_if_they_had_not_been(data, tmp_path):
    """Killed as soon as the first save is there; torchrun starts them again."""
    run_twice = [tmp_path / "whole", tmp_path / "killed"]
    for output in run_twice:
        command = ["--batch-size", 2, "--mosaics", 24, "--save-every", 1]
        if output.name == "killed":
            process = torchrun("retinanet", data, output, *command, wait=False)
            while not (output / "last.pt").exists():
                assert process.poll() is None
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            stopped = torch.load(output / "last.pt", weights_only=True)["step"]
            assert stopped < 12
        done = torchrun("retinanet", data, output, *command)
        assert done.returncode == 0, done.stderr
    whole, killed = (torch.load(output / "last.pt", weights_only=True)["model"] for output in run_twice)
    assert log_of(run_twice[1]) == log_of(run_twice[0])
    for name, weight in whole.items():
        assert torch.equal(weight, killed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["mask_rcnn", "semantic_fpn"])
def test_an_evaluation_by_two_processes_is_that_of_one(framework, data, finished, capsys):
    """Of an odd number of images, after training in which BatchNorm saw other images in each process."""
    program, _ = PROGRAMS[framework]
    shared = torchrun(framework, data, finished(framework), "--eval", "--mosaics", 24)
    assert shared.returncode == 0, shared.stderr
    capsys.readouterr()
    run(framework, data, finished(framework), "--eval", "--mosaics", 24)
    alone = capsys.readouterr().out
    kept = [line for line in alone.splitlines() if "AP" in line or "IoU" in line]
    assert len(kept) == 1
    assert kept[0] in shared.stdout


@pytest.mark.slow
def test_the_score_after_training_on_two_processes_is_that_of_its_file(data, tmp_path, capsys):
    """Its BatchNorm statistics are one process's: they are the same for all in an evaluation."""
    done = torchrun("semantic_fpn", data, tmp_path, "--mosaics", 64, "--lr", 1e-2)
    assert done.returncode == 0, done.stderr
    args, state = dense.parse_args(segmentation, ["--output", str(tmp_path), "--init", str(tmp_path / "last.pt"), "--eval"])
    model = dense.build_model(segmentation, args, state, state["classes"])
    score, _ = dense.evaluate(segmentation, model, segmentation.load_data(args, "val"), args)
    assert log_of(tmp_path)[-1]["score"] == pytest.approx(score, abs=1e-6)


# ---------------------------------------------------------------------------- refused in one line
def refused(framework, *command):
    with pytest.raises(UserError) as error:
        run(framework, *command)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("framework", ["semantic_fpn", "upernet"])
def test_a_batch_of_one_is_refused_under_batch_normalization(framework, data, tmp_path):
    assert "--batch-size 2" in refused(framework, data, tmp_path, "--batch-size", 1)


@pytest.mark.parametrize("framework", ["retinanet", "semantic_fpn"])
def test_fewer_images_than_a_step_takes_are_refused(framework, data, tmp_path):
    assert "lower --batch-size" in refused(framework, data, tmp_path, "--mosaics", 1)


def test_a_last_batch_of_one_is_left_out(data, tmp_path):
    run("upernet", data, tmp_path, "--mosaics", 3, "--steps", 3)
    assert log_of(tmp_path)[-1]["step"] == 3


@pytest.mark.parametrize("kind, words", [
    ("nan", "is not finite"), ("other size", "is no scalablevit_tiny"), ("empty", "cannot be loaded"),
    ("missing", "cannot be loaded"), ("other names", "cannot be loaded")])
def test_initial_weights_that_do_not_fit_are_refused(kind, words, data, tmp_path):
    weights = scalablevit.scalablevit_tiny(num_classes=3).state_dict()
    if kind == "nan":
        weights["stages.1.embed.norm.weight"][0] = float("nan")
    if kind == "other size":
        weights = scalablevit.ScalableViT(dim=8, depths=(1,) * 4, heads=(1,) * 4, num_classes=3, head_hidden=None)
        weights = {"model": weights.state_dict(), "config": weights.config}
    if kind == "empty":
        weights = {}
    if kind == "other names":
        weights = {"encoder." + name: weight for name, weight in weights.items()}
    file = tmp_path / "init.pt"
    if kind != "missing":
        torch.save(weights, file)
    message = refused("semantic_fpn", data, tmp_path / "run", "--init", file)
    assert words in message
    assert "init.pt" in message


def test_initial_weights_under_prefixed_names_are_those_without(data, tmp_path):
    weights = scalablevit.scalablevit_tiny(num_classes=3).state_dict()
    torch.save({"model": {"module." + name: weight for name, weight in weights.items()}}, tmp_path / "init.pt")
    backbone = dense.pretrained("tiny", tmp_path / "init.pt")
    assert backbone.training
    assert backbone.state_dict().keys() == weights.keys() - {"head.weight", "head.bias"}
    for name, weight in backbone.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_other_data_or_another_model_than_the_runs_is_refused(data, finished, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(finished("semantic_fpn"), output)
    assert "another model" in refused("semantic_fpn", data, output, "--width", 16)
    assert "steps per epoch" in refused("semantic_fpn", data, output, "--mosaics", 20)
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "red").rename(tmp_path / "data" / split / "blue")
    assert "classes" in refused("semantic_fpn", tmp_path / "data", output)


def test_classes_in_only_one_of_train_and_val_are_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "blue")
    assert "the same classes" in refused("semantic_fpn", tmp_path / "data", tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "loss", lambda net, images, labels: net(
        segmentation.normalize(images)).sum() * float("nan"))
    assert "the loss is nan" in refused("semantic_fpn", data, tmp_path)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("command, words", [
    (["--data", "nowhere"], "train/CLASS/*"), (["--lr", "0"], "lr must be more than 0"),
    (["--eval"], "must be a file that this program has saved"),
    (["--predict", "x.jpg"], "must be a file that this program has saved")])
def test_the_program_ends_with_one_line_and_status_2(command, words, tmp_path, monkeypatch, capsys):
    for program in (detection, segmentation):
        monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path), *command])
        with pytest.raises(SystemExit) as end:
            dense.run_program(program)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert words in error


def test_a_file_of_the_other_program_is_refused(finished):
    with pytest.raises(UserError, match="has saved"):
        detection.load_model(finished("semantic_fpn") / "best.pt")


def test_an_eps_to_predict_is_refused(finished, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 48\nshowpage\n")
    with pytest.raises(UserError, match="photo.jpg"):
        segmentation.main(["--init", str(finished("semantic_fpn") / "best.pt"),
                           "--predict", str(tmp_path / "photo.jpg")])


def test_digits_are_drawn_where_there_is_no_data(tmp_path, monkeypatch):
    drawn = []

    def draw(root):
        drawn.append(root)
        for split in ("train", "val"):
            for name in "01":
                (root / split / name).mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(root / split / name / "0.png")
    monkeypatch.setattr(train_minimal, "draw_digits", draw)
    segmentation.main([str(word) for word in [*SEGMENTATION, "--steps", 1, "--output", tmp_path]])
    assert drawn == [tmp_path / "digits"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["classes"] == ["background", "0", "1"]
