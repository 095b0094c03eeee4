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

import segmentation
from helpers import architectures
from scalablevit import ScalableViT
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


@pytest.mark.parametrize("H, W", [(40, 90), (700, 500)])
def test_an_image_of_any_shape_is_drawn_with_a_legend_of_what_occurs(H, W):
    image = torch.full((3, H, W), 100, dtype=torch.uint8)
    labels = torch.full((H, W), 255)
    labels[H // 2:] = 1
    pixels = v2.functional.pil_to_tensor(segmentation.draw(image, labels, ["cat", "dog"]))
    assert pixels.shape[1] == H * pixels.shape[2] // W
    assert pixels[:, pixels.shape[1] // 3, -5].tolist() == [100] * 3
    assert pixels[:, -5, -5].tolist() != [100] * 3
    assert pixels[:, :40, :80].min() == 0                           # the legend's outline
    assert segmentation.describe(labels, ["cat", "dog"])[1] == ["dog"]
