"""Invalid arguments raise ValueError with one line that says what was given and what is accepted."""
import numpy as np
import pytest
import torch

from helpers import small
from scalablevit import SSA

NAN = float("nan")
BAD = [  # arguments and words of the message
    # heads divide C in every kind, and C' in SSA
    (dict(heads=(3, 2)), ["heads", "divide", "heads=3", "C=8"]),
    (dict(heads=(1, 5), pattern=("wsa", "wsa")), ["heads", "divide", "heads=5", "C=16"]),
    (dict(heads=(4, 2)), ["heads", "divide", "C'", "heads=4", "C=8", "rc=1.25", "C'=10"]),
    (dict(rc=(0.1, 1)), ["rc=0.1", "C'=0"]),
    (dict(rc=(-5, 1)), ["rc=-5", "C'=-40"]),
    (dict(pattern=("iwsa", "mlp")), ["pattern", "mlp", "wsa, swsa, lem, iwsa, ssa"]),
    (dict(pattern=("IWSA", "SSA")), ["pattern", "IWSA", "wsa, swsa, lem, iwsa, ssa"]),
    (dict(pattern=("wsa", "iwsa", "ssa")), ["pattern", "two of", "('wsa', 'iwsa', 'ssa')"]),
    (dict(pattern="ssa"), ["pattern", "two of", "'ssa'"]),
    (dict(depths=(2, 2, 2)), ["depths", "one entry per stage", "depths=(2, 2, 2)", "heads=(1, 2)"]),
    (dict(heads=(1,)), ["heads", "one entry per stage", "heads=(1,)"]),
    (dict(rc=()), ["one entry per stage", "rc=()"]),
    (dict(rn=(1, 1, 1)), ["one entry per stage", "rn=(1, 1, 1)"]),
    (dict(depths=(), heads=(), rc=(), rn=()), ["one entry per stage", "depths=()"]),
    *[(dict(rn=(rn, 1)), ["rn", "1/integer²", "1/4, 1/9", str(rn)]) for rn in (0.3333, 0.2, 4, 0, -1, NAN)],
    *[({name: value}, [name, "integers of at least 1", str(value)])
      for name in ("window", "dim", "in_chans", "num_classes", "head_hidden")
      for value in (2.5, -1, NAN, True)],
    *[({name: (1, value)}, [name, "integers of at least 1", str(value)])
      for name in ("depths", "heads") for value in (2.0, NAN, 0)],
    *[({name: 0}, [name, "at least 1", "0"]) for name in ("window", "dim", "in_chans")],
    (dict(num_classes=np.int64(3)), ["num_classes", "integer"]),    # weights_only would refuse the checkpoint
    *[(dict(drop_path_rate=rate), ["drop_path_rate", "[0, 1)", str(rate)]) for rate in (-0.1, 1, NAN)]]


@pytest.mark.parametrize("bad, words", BAD, ids=str)
def test_bad_arguments(bad, words):
    with pytest.raises(ValueError) as caught:
        small(**bad)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("good", [
    dict(heads=[1, 2], depths=[1, 2]), dict(heads=(4, 2), pattern=("wsa", "swsa")),
    *[dict(rn=(rn, 1)) for rn in (1, 1 / 4, 1 / 9, 1 / 25, 1 / 49, 1 / 64, 1 / 100)]], ids=str)
def test_good_arguments(good):
    """Including lists; r_c only matters if SSA is used."""
    assert small(**good)(torch.zeros(2, 3, 20, 9)).shape == (2, 5)


@pytest.mark.parametrize("rn, s", [(0.111111111, 3), (0.1111111112, 3), (1 / 49, 7), (0.020408163, 7)])
def test_r_n_is_rounded_to_one_over_a_square(rn, s):
    assert SSA(8, 2, rn=rn).s == s
