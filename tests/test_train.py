"""The training program as a user runs it: a run that learns, its files, resume, evaluation, two processes, mistakes."""
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import scalablevit
import train_minimal as train

PROGRAM = pathlib.Path(train.__file__)
QUICK = ["--size", "32", "--workers", "0", "--global-batch", "16", "--warmup-epochs", "0", "--lr", "2e-3"]


def run(*args, processes=1, ok=True, cwd=None):
    """Run the program; its output, after checking how it ended."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*launch, PROGRAM, *map(str, args)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def small_data_set(root, **splits):
    """Two classes of the embedded data set, smaller and few."""
    rng = random.Random(0)
    for split, n in splits.items():
        for shape in ("disc", "bars"):
            (root / split / shape).mkdir(parents=True)
            for i in range(n):
                train.draw(shape, rng, side=32).save(root / split / shape / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data_set(tmp_path_factory.mktemp("data"), train=32, val=10)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run of four epochs."""
    output = tmp_path_factory.mktemp("run") / "out"
    printed = run("--data", data, "--output", output, "--epochs", 4, *QUICK)
    return output, printed


def test_a_run_leaves_a_log_and_plain_checkpoints(finished):
    output, printed = finished
    log = log_of(output)
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    assert all({"epoch", "loss", "top1", "lr", "seconds"} <= set(entry) for entry in log)
    for word in ("epoch 4/4", "step 4/4", "loss", "img/s", "left", "top-1"):
        assert word in printed
    assert sorted(p.name for p in output.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    for name in ("best.pt", "last.pt"):
        checkpoint = torch.load(output / name, weights_only=True)
        scalablevit.scalablevit_tiny(num_classes=2).load_state_dict(checkpoint["model"])
    best = torch.load(output / "best.pt", weights_only=True)["log"][-1]
    assert best["top1"] == max(entry["top1"] for entry in log)


def test_a_run_that_was_killed_goes_on_to_the_same_end(data, finished, tmp_path):
    output = tmp_path / "out"
    with subprocess.Popen([sys.executable, PROGRAM, "--data", os.path.relpath(data), "--output", output, "--epochs", "4",
                           *QUICK], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as program:
        next(line for line in program.stdout if line.startswith("epoch 3/4"))
        program.kill()
    assert len(log_of(output)) < 4
    run("--output", output, "--resume", "--workers", 0, cwd=tmp_path)                    # and from another folder
    resumed, whole = (torch.load(o / "last.pt", weights_only=True) for o in (output, finished[0]))
    assert [{**entry, "seconds": 0} for entry in resumed["log"]] == [{**entry, "seconds": 0} for entry in whole["log"]]
    for name, tensor in whole["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name


def test_a_finished_run_can_be_made_longer_and_is_never_overwritten(data, finished, tmp_path):
    output = tmp_path / "out"
    run("--data", data, "--output", output, "--epochs", 1, *QUICK)
    before = (output / "last.pt").read_bytes()
    assert "--resume goes on with it" in run("--data", data, "--output", output, ok=False)
    assert "all 1 epochs are done" in run("--output", output, "--resume", "--workers", 0)
    assert (output / "last.pt").read_bytes() == before
    run("--output", output, "--resume", "--epochs", 2, "--workers", 0)
    assert [entry["epoch"] for entry in log_of(output)] == [1, 2]


def test_eval_gives_the_accuracy_of_the_best_epoch(data, finished):
    output, _ = finished
    best = max(entry["top1"] for entry in log_of(output))
    assert f"top-1 {best:.2f} % of 20 images" in run("--output", output, "--eval", "--workers", 0)
    assert f"top-1 {best:.2f} % of 20 images" in run("--init", output / "best.pt", "--eval", "--data", data, "--workers", 0)


def test_accuracy_is_the_share_of_images_whose_largest_logit_is_their_class():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.eye(4)[[0, 1, 2, 2, 3]]

    batch = torch.zeros(5, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 0])
    assert train.evaluate(Fixed(), [batch, batch], torch.device("cpu"), bf16=False) == 60


def test_biases_norms_and_the_peg_are_left_out_of_weight_decay(finished):
    groups = torch.load(finished[0] / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    model = scalablevit.scalablevit_tiny(num_classes=2)
    exempt = len(model.no_weight_decay())
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert [len(group["params"]) for group in groups] == [len(list(model.parameters())) - exempt, exempt]


def test_it_learns(tmp_path):
    """Two shapes, which a coin would tell apart half the time."""
    small_data_set(tmp_path / "data", train=200, val=30)
    run("--data", tmp_path / "data", "--output", tmp_path / "out", "--epochs", 10, *QUICK)
    log = log_of(tmp_path / "out")
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["top1"] >= 85


def test_two_processes_train_one_model(data, tmp_path):
    output = tmp_path / "out"
    printed = run("--data", data, "--output", output, "--epochs", 2, *QUICK, processes=2)
    assert "2 process(es) on cpu" in printed and "16 = 2 x 1 x 8 images" in printed
    assert printed.count("val top-1") == 2                                       # one process speaks
    assert [entry["epoch"] for entry in log_of(output)] == [1, 2]
    alone = run("--output", output, "--eval", "--workers", 0)
    assert alone == run("--output", output, "--eval", "--workers", 0, processes=2)


def test_accumulated_gradients_are_those_of_the_whole_batch(data, tmp_path):
    models = []
    for batch in (16, 4):
        output = tmp_path / str(batch)
        assert f"16 = 1 x {16 // batch} x {batch}" in run("--data", data, "--output", output, "--epochs", 1, "--batch", batch, *QUICK)
        models.append(torch.load(output / "last.pt", weights_only=True)["model"])
    for name in models[0]:
        torch.testing.assert_close(models[0][name], models[1][name], rtol=1e-3, atol=1e-4)


def test_init_takes_own_and_published_weights_and_a_fresh_head_for_other_classes(data, finished, tmp_path):
    published = {}
    for name, tensor in scalablevit.scalablevit_tiny(num_classes=7).state_dict().items():
        published[official_name(name)] = tensor
    torch.save({"model": published}, tmp_path / "published.pth")
    for file, fresh in ((tmp_path / "published.pth", True), (finished[0] / "best.pt", False)):
        output = tmp_path / file.stem
        printed = run("--init", file, "--data", data, "--output", output, "--epochs", 1, *QUICK, "--lr", "1e-9")
        assert ("head for other classes" in printed) == fresh
        before, after = (torch.load(f, weights_only=True)["model"] for f in (file, output / "last.pt"))
        before = scalablevit.convert_official(before) if fresh else before
        name = "stages.0.blocks.0.attn.qkv.weight"                              # a vanishing learning rate moves nothing
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-5)


def official_name(name):
    """A name of ours in a published state dict; enough of them for a model whose last SSA keeps k and v apart."""
    for ours, theirs in ((".embed.conv.", ".proj."), (".embed.norm.", ".norm."), (".peg.conv.", ".proj.0.")):
        if ours in name:
            stage = name.split(".")[1]
            return f"{'pos_block' if 'peg' in ours else 'patch_embeds'}.{stage}{theirs}{name.rsplit('.', 1)[1]}"
    name = name.replace(".blocks.", ".").replace(".attn.lim.", ".attn.lim_func.").replace(".attn.reduce.", ".attn.reduction.")
    return name.replace(".attn.norm.", ".attn.norm_act.0.")


@pytest.mark.parametrize("args, message", [
    (["--resume"], "need --output"),
    (["--eval"], "need --output"),
    (["--resume", "--eval", "--output", "x"], "neither --eval nor --init"),
    (["--resume", "--output", "x"], "no epoch of that run was finished"),
    (["--epochs", "-2"], "--epochs must be between 1 and 1000000, got -2"),
    (["--lr", "nan"], "--lr must be between"),
    (["--eval", "--init", "x.pt"], "cannot load x.pt"),
    (["--data", "nowhere"], "nowhere/train must be a folder with one folder of images per class"),
    (["--init", PROGRAM], "cannot load"),
    (["--model", "xl"], "choose from"),
])
def test_mistakes_are_told_in_a_line(args, message, tmp_path):
    error = run(*args, "--workers", 0, *([] if "--resume" in args or "--eval" in args else ["--output", tmp_path / "out"]), ok=False)
    assert message in error.replace(os.sep, "/") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, [], {}, 3, {"model": [1]}, {"model": {}}, {"model": {"norm.weight": 1}},
                                     {"model": {"patch_embeds.0.proj.weight": torch.zeros(1), "x": torch.zeros(1)}}])
def test_a_file_that_is_no_checkpoint_is_told_in_a_line(content, tmp_path):
    torch.save(content, tmp_path / "x.pt") if content is not None else (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="cannot load .*x.pt: ") as caught:
        train.load(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    (tmp_path / "disc").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("0.PNG", "._0.png", "notes.txt"):
        Image.new("L", (8, 8)).save(tmp_path / "disc" / name, format="png")
    assert train.class_names(tmp_path) == ["disc"]
    folder = train.ImageFolder(tmp_path, ["disc"], lambda image: train.resize_and_center_crop(image, 4))
    assert len(folder) == 1 and folder[0][0].shape == (3, 4, 4)


def test_a_class_that_only_val_has_is_refused(data, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "disc").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "disc" / "0.png")
    (tmp_path / "val" / "cat").mkdir()
    assert "'cat', not among the 1 trained ones" in run("--data", tmp_path, "--output", tmp_path / "out", ok=False)


def test_the_embedded_data_is_too_cluttered_for_a_linear_classifier():
    """Ridge regression on the pixels, the best of several strengths, on 2000 + 500 pictures of the ten classes."""
    def pictures(n, seed):
        rng = random.Random(seed)
        images = [train.draw(shape, rng) for shape in train.SHAPES for _ in range(n)]
        pixels = torch.stack([torch.from_numpy(train.np.array(image.resize((24, 24)))).flatten() for image in images])
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


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
def test_both_crops_give_squares_of_the_size_asked_for(W, H, size):
    image = Image.new("RGB", (W, H))
    assert train.resize_and_center_crop(image, size).size == (size, size)
    assert train.random_resized_crop(image, size, 0.08).size == (size, size)


def test_evaluation_takes_the_centre():
    """At 224 pixels the paper's crop of a 256 x 320 picture leaves 16 and 48 pixels at the sides."""
    picture = Image.new("RGB", (320, 256), "black")
    picture.paste("white", (48, 16, 48 + 224, 16 + 224))
    assert train.resize_and_center_crop(picture, 224).getextrema() == ((255, 255),) * 3


@given(st.integers(1, 50), st.integers(0, 20), st.floats(1e-4, 1e-2))
def test_the_learning_rate_warms_up_and_falls_along_a_cosine(steps, warmup, lr):
    steps += warmup
    rates = [lr * train.lr_factor(i, steps, warmup, lr) for i in range(steps + 1)]
    assert rates[0] == pytest.approx(1e-6 if warmup else lr)
    assert rates[warmup] == pytest.approx(lr) and rates[-1] == pytest.approx(1e-5)
    assert rates[:warmup + 1] == sorted(rates[:warmup + 1]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
