"""Logits and maps in ONNX Runtime, with a dynamic batch size (needs onnxscript and onnxruntime)."""
import pytest
import torch

from scalablevit import scalablevit_tiny

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Outputs(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images), *self.model.forward_features(images)


@pytest.mark.slow
def test_onnx_runtime_computes_the_same(tmp_path):
    """For an image size not divisible by 7 or the reductions, and batch sizes other than the traced one."""
    model = Outputs(scalablevit_tiny(num_classes=5, depths=(2, 1, 1, 1))).eval()
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(2, 3, 67, 90),), file, dynamo=True, input_names=["images"],
                      verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 67, 90)
        answers = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = model(images)
        for answer, wanted in zip(answers, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(answer), wanted, rtol=1e-4, atol=1e-5)
