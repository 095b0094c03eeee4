"""The classifier and the backbone in ONNX Runtime, with a dynamic batch size (needs onnxscript and onnxruntime)."""
import pytest
import torch

from scalablevit import scalablevit_tiny

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Backbone(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return tuple(self.model.forward_features(images))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["classifier", "backbone"])
def test_onnx_runtime_computes_the_same(part, tmp_path):
    """For an image size not divisible by 7 or the reductions, and batch sizes other than the traced one."""
    model = scalablevit_tiny(num_classes=5, depths=(2, 1, 1, 1)).eval()
    model = Backbone(model).eval() if part == "backbone" else model
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(2, 3, 67, 90),), file, dynamo=True, input_names=["images"], verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 67, 90)
        with torch.no_grad():
            expected = model(images)
        expected = expected if part == "backbone" else (expected,)
        answers = session.run(None, {"images": images.numpy()})
        assert len(answers) == len(expected)
        for answer, wanted in zip(answers, expected):
            assert (torch.from_numpy(answer) - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
