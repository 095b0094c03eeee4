"""docs/segmentation.py: any backbone, metrics, multi-scale testing.  The training loop is in test_dense_runs.py."""
import pathlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import v2

pytest.importorskip("torchvision")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import dense
import segmentation
from helpers import architectures
from scalablevit import ScalableViT, scalablevit_tiny
from segmentation import SemanticFPN, UperNet


@pytest.mark.parametrize("make", [SemanticFPN, UperNet])
@settings(max_examples=15)
@given(kwargs=architectures(), H=st.integers(1, 70), W=st.integers(1, 70), classes=st.integers(1, 4))
def test_any_backbone_and_any_size(make, kwargs, H, W, classes):
    if make is UperNet:
        kwargs = kwargs | {name: (kwargs[name] * 2)[:4] for name in ("depths", "heads", "rc", "rn")}    # >= 2 stages
    model = make(ScalableViT(**kwargs | {"num_classes": 0}), classes, width=8).eval()
    with torch.no_grad():
        assert model(torch.randn(2, kwargs["in_chans"], H, W)).shape == (2, classes, H, W)


@pytest.mark.parametrize("make", ["semantic_fpn", "upernet"])
def test_every_trained_parameter_gets_a_gradient(make):
    """The backbone's last norm, which only a classifier uses, is frozen."""
    args, _ = dense.parse_args(segmentation, ["--framework", make, "--output", "none", "--no-fuse"])
    model = dense.build_model(segmentation, args, {}, ["a", "b", "c"])
    segmentation.loss(model, torch.randint(0, 256, (2, 3, 64, 64)).byte(), torch.randint(0, 3, (2, 64, 64))).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()}
    assert without == set()


@pytest.mark.parametrize("framework, steps, power, lr, weight_decay", [
    ("semantic_fpn", 80_000, 0.9, 1e-4, 1e-4), ("upernet", 160_000, 1.0, 6e-5, 1e-2)])
def test_the_settings_are_appendix_cs_and_table_8s(framework, steps, power, lr, weight_decay):
    args, _ = dense.parse_args(segmentation, ["--framework", framework, "--data", "ade", "--output", "none"])
    assert (args.steps, args.lr, args.weight_decay) == (steps, lr, weight_decay)
    assert (args.size, args.step_size) == (512, 16)
    args.total = args.steps
    assert segmentation.learning_rate(0, args) == pytest.approx(lr)
    assert segmentation.learning_rate(steps // 2, args) == pytest.approx(lr * 0.5 ** power)


# ------------------------------------------------------------------------------------------------ metrics
@given(st.integers(2, 17), st.integers(0, 10 ** 6), st.sampled_from([torch.uint8, torch.int16, torch.int64]))
def test_mean_iou_by_hand(classes, seed, kind):
    """Class by class, with sets of pixels; unlabeled pixels and absent classes are ignored."""
    random = torch.Generator().manual_seed(seed)
    occurring = classes - seed % 2
    labels, found = (torch.randint(occurring, (2, 1, 3, 4), generator=random) for _ in range(2))
    labels[torch.rand(labels.shape, generator=random) < 0.2] = 255
    pixels, scores = list(enumerate(zip(labels.flatten().tolist(), found.flatten().tolist()))), []
    for c in range(classes):
        in_label = {i for i, (label, _) in pixels if label == c}
        in_found = {i for i, (label, answer) in pixels if answer == c and label != 255}
        if in_label | in_found:
            scores.append(len(in_label & in_found) / len(in_label | in_found))
    answers = iter(nn.functional.one_hot(found, classes).permute(0, 1, 4, 2, 3).float())
    batches = [(None, batch.to(kind)) for batch in labels]
    measured, pixels = segmentation.mean_iou(lambda images: next(answers), batches, classes)
    right = (labels == found)[labels != 255].double().mean().item()
    assert measured == pytest.approx(100 * sum(scores) / len(scores)) if scores else measured != measured
    assert pixels == pytest.approx(100 * right, nan_ok=True)


def test_multi_scale_averages_over_scales_and_flips():
    """With a model whose logits are the image itself, which records the sizes it sees."""
    seen = []

    def model(images):
        seen.append(tuple(images.shape))
        return torch.cat([images, torch.zeros_like(images)], dim=1)

    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 12, 16)
    out = segmentation.multi_scale(model, ramp, scales=(0.5, 1.0, 1.75))
    assert seen == [(1, 1, 6, 8)] * 2 + [(1, 1, 12, 16)] * 2 + [(1, 1, 21, 28)] * 2
    assert torch.allclose(out.sum(dim=1), torch.ones(1, 12, 16))
    assert torch.allclose(out[:, 0], ramp[:, 0].sigmoid(), atol=0.03)                   # flipped back: the ramp rises


# ------------------------------------------------------------------------------------------------ pictures
@pytest.mark.parametrize("H, W", [(40, 90), (90, 40), (700, 500)])
def test_an_image_of_any_shape_is_drawn_above_a_legend_of_what_occurs(H, W):
    image = torch.full((3, H, W), 100, dtype=torch.uint8)
    labels = torch.full((H, W), 255)
    labels[:20] = 1
    picture = segmentation.draw(image, labels, ["cat", "dog"])
    assert picture.height == H * picture.width // W + 20            # one class, one line
    pixels = v2.functional.pil_to_tensor(picture)
    assert pixels[:, picture.height - 25, 5].tolist() == [100] * 3
    assert pixels[:, 5, 5].tolist() == pytest.approx([(100 + part) / 2 for part in dense.color(1)], abs=1)
    assert pixels[:, -10, 10].tolist() == list(dense.color(1))


def test_classes_are_described_line_by_line_with_their_names_escaped():
    labels = torch.tensor([[0, 0, 0, 1]])
    assert list(segmentation.describe(labels, ["k\u00f6nig", "dog"])) == [
        "'k\\xf6nig' 75.0 % of pixels", "'dog' 25.0 % of pixels"]
