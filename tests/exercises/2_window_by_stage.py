"""Exercise 2: a window size per stage.

Why     At 224 pixels the third stage has 14 x 14 tokens: a window that covers all of them costs little there.
Where   `ScalableViT.__init__` in scalablevit.py: let `window` have one value per stage, passed to that stage's blocks;
        `check_arguments` should check it like `heads`.  A single integer must still mean the same window everywhere.
"""
import pytest
import torch

from scalablevit import ScalableViT

NET = dict(dim=8, depths=(1, 2, 1), heads=(1, 2, 2), rc=(1, 1, 1), rn=(1 / 16, 1 / 4, 1), head_hidden=None,
           num_classes=5)


def test_each_stage_has_its_own_window():
    model = ScalableViT(**NET, window=(7, 3, 2), pattern=("iwsa", "wsa"))
    assert [[block.attn.window for block in stage.blocks] for stage in model.stages] == [[7], [3, 3], [2]]
    assert model(torch.randn(2, 3, 45, 60)).shape == (2, 5)


def test_a_single_number_applies_to_all_stages():
    model = ScalableViT(**NET, window=5)
    assert [stage.blocks[0].attn.window for stage in model.stages] == [5, 5, 5]


@pytest.mark.parametrize("window", [(7, 7), (7, 7, 0), 0])
def test_invalid_windows_raise(window):
    with pytest.raises(ValueError, match="window"):
        ScalableViT(**NET, window=window)
