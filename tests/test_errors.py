"""Bad arguments and bad images raise ValueError on one line that says what was given and what is accepted."""
import pytest
import torch

from scalablevit import SSA, WSA, ScalableViT, count_macs, scalablevit_tiny

SMALL = dict(dim=8, depths=(2, 2), heads=(1, 2), rc=(1.0, 1.0), rn=(1 / 4, 1), num_classes=3, head_hidden=None)


def message(call):
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("bad, words", [
    # heads divide C in the window attentions, and both C and C' in SSA
    (dict(heads=(3, 2)), ["heads", "divide", "heads=3", "C=8"]),
    (dict(heads=(1, 5), pattern=("wsa", "wsa")), ["heads", "divide", "heads=5", "C=16"]),
    (dict(heads=(3, 2), pattern=("ssa", "ssa")), ["heads", "divide", "heads=3", "C=8"]),
    (dict(heads=(4, 2), rc=(1.25, 1)), ["heads", "divide", "C'", "heads=4", "C=8", "rc=1.25", "C'=10"]),
    (dict(rc=(0.1, 1)), ["rc=0.1", "C'=0"]),
    # pattern
    (dict(pattern=("iwsa", "mlp")), ["pattern", "mlp", "wsa, swsa, lem, iwsa, ssa"]),
    (dict(pattern=("IWSA", "SSA")), ["pattern", "IWSA", "wsa, swsa, lem, iwsa, ssa"]),
    (dict(pattern=("ssa",)), ["pattern", "two of", "('ssa',)"]),
    (dict(pattern=("wsa", "iwsa", "ssa")), ["pattern", "two of", "('wsa', 'iwsa', 'ssa')"]),
    (dict(pattern="ssa"), ["pattern", "two of", "'ssa'"]),
    # one entry per stage
    (dict(depths=(2, 2, 2)), ["depths", "one entry per stage", "depths=(2, 2, 2)", "heads=(1, 2)"]),
    (dict(heads=(1,)), ["heads", "one entry per stage", "heads=(1,)"]),
    (dict(rc=()), ["one entry per stage", "rc=()"]),
    (dict(rn=(1, 1, 1)), ["one entry per stage", "rn=(1, 1, 1)"]),
    (dict(depths=(), heads=(), rc=(), rn=()), ["one entry per stage", "depths=()"]),
    # r_n
    (dict(rn=(1 / 3, 1)), ["rn", "1/integer²", "1/4, 1/9", "0.333"]),
    (dict(rn=(0.2, 1)), ["rn", "1/integer²", "0.2"]),
    (dict(rn=(4, 1)), ["rn", "1/integer²", "4"]),
    (dict(rn=(0, 1)), ["rn", "1/integer²", "0"]),
    (dict(rn=(-1, 1)), ["rn", "1/integer²", "-1"]),
    # at least 1
    (dict(window=0), ["window", "at least 1", "0"]),
    (dict(window=-7), ["window", "at least 1", "-7"]),
    (dict(dim=0), ["dim", "at least 1", "0"]),
    (dict(in_chans=0), ["in_chans", "at least 1", "0"]),
    (dict(depths=(2, 0)), ["depths", "at least 1", "0"]),
    (dict(heads=(0, 2)), ["heads", "at least 1", "0"]),
    (dict(head_hidden=0), ["head_hidden", "at least 1", "0"]),
    # of the wrong type
    (dict(dim="64"), ["dim", "integer", "'64'"]),
    (dict(window=7.0), ["window", "integer", "7.0"]),
    (dict(heads=(1.0, 2)), ["heads", "integer", "1.0"]),
    (dict(depths=2), ["depths", "lists", "depths=2"]),
    (dict(rn=0.25), ["rn", "lists", "rn=0.25"]),
    (dict(pattern=None), ["pattern", "two of", "None"]),
    (dict(pattern=("iwsa", ["ssa"])), ["pattern", "two of", "['ssa']"]),
    # ranges
    (dict(rc=(float("nan"), 1)), ["rc", "positive number", "nan"]),
    (dict(rc=(1.0, -5)), ["rc", "positive number", "-5"]),
    (dict(mlp_ratio=-1), ["mlp_ratio", "positive number", "-1"]),
    (dict(mlp_ratio="4"), ["mlp_ratio", "positive number", "'4'"]),
    (dict(num_classes=-1), ["num_classes", "0 (no classifier) or more", "-1"]),
    (dict(drop_path_rate=-0.1), ["drop_path_rate", "[0, 1)", "-0.1"]),
    (dict(drop_path_rate=1), ["drop_path_rate", "[0, 1)", "1"]),
], ids=str)
def test_bad_arguments(bad, words):
    text = message(lambda: ScalableViT(**(SMALL | bad)))
    for word in words:
        assert word in text, text


def test_the_arguments_that_the_table_above_spoils_are_good():
    assert ScalableViT(**SMALL)(torch.zeros(2, 3, 20, 9)).shape == (2, 3)


@pytest.mark.parametrize("rn", [1, 1 / 4, 1 / 9, 1 / 16, 1 / 25, 1 / 49, 1 / 64, 1 / 100, 0.111111111])
def test_one_over_a_square_is_good_for_r_n(rn):
    assert ScalableViT(**(SMALL | dict(rn=(rn, 1))))(torch.zeros(1, 3, 20, 9)).shape == (1, 3)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (2, 32, 32, 3), (3, 32, 32), (32, 32), (1, 2, 3, 32, 32),
                                   (1, 3, 0, 32)])
def test_bad_images(shape):
    model = scalablevit_tiny(num_classes=2)
    for call in (model, model.forward_features):
        text = message(lambda: call(torch.zeros(shape)))
        assert "(B, 3, H, W)" in text and str(tuple(shape)) in text


def test_in_chans_is_what_images_are_checked_against():
    assert "(B, 5, H, W)" in message(lambda: scalablevit_tiny(in_chans=5)(torch.zeros(1, 3, 32, 32)))


def test_reset_classifier_refuses_a_negative_number():
    text = message(lambda: scalablevit_tiny().reset_classifier(-3))
    assert "num_classes" in text and "-3" in text and "0 (no classifier)" in text


def test_attentions_check_their_own_arguments():
    assert "heads=3" in message(lambda: WSA(8, 3))
    assert "C'=10" in message(lambda: SSA(8, 4, 1.25, 1 / 4))
    assert "1/integer²" in message(lambda: SSA(8, 2, 1.0, 0.3))


@pytest.mark.parametrize("size", [224, (224,), (0, 224), (224.0, 224), "224"])
def test_count_macs_refuses_what_is_no_size(size):
    text = message(lambda: count_macs(scalablevit_tiny(), size))
    assert "two positive integers (H, W)" in text and repr(size) in text


def test_a_misspelt_argument_is_a_type_error():
    with pytest.raises(TypeError, match="num_clases"):
        scalablevit_tiny(num_clases=10)
