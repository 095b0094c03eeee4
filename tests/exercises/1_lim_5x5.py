"""Exercise 1: LIM with a 5x5 kernel.

Why     LIM carries information one token across a window's border; a 5x5 kernel carries it two tokens across.
Where   `IWSA.__init__` in scalablevit.py: an argument `kernel_size`, 3 unless given, which `self.lim` uses;
        `depthwise` takes a kernel size.
"""
from helpers import random_tokens, randomised, windows_by_hand
from report import same_numbers, same_tokens
from scalablevit import IWSA
from test_receptive_field import field, same_window, where, within


def test_a_token_sees_two_tokens_across_the_border():
    sees = field(IWSA(4, 2, 4, kernel_size=5), 9, 10)
    same_tokens(sees, where(9, 10, same_window(4)) | where(9, 10, within(2)))


def test_it_is_still_window_attention_and_a_depthwise_convolution():
    module, x = randomised(IWSA(8, 2, 4, kernel_size=5)), random_tokens(1, 9, 10, 8)
    assert module.lim.weight.shape == (8, 1, 5, 5)
    same_numbers(module(x), windows_by_hand(module, x, interactive=[module.lim.weight, module.lim.bias]))


def test_the_default_is_the_paper_s():
    assert IWSA(8, 2, 4).lim.kernel_size == (3, 3)
