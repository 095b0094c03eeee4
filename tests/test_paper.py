"""The paper's numbers: Table 1, parameters and FLOPs of Table 2, the ablations, and the differences in Table 3.

The models are built on the "meta" device: shapes without memory.
"""
import pytest
import torch

from scalablevit import (IWSA, LEM, SSA, WSA, count_macs, scalablevit_b, scalablevit_l, scalablevit_s,
                         scalablevit_tiny)


def build(make, **kwargs):
    with torch.device("meta"):
        return make(**kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def gmacs(model, size=(224, 224)):
    cost = count_macs(model, size)
    return cost["modules"] / 1e9, (cost["modules"] + cost["attention"]) / 1e9


# ------------------------------------------------------------------------------------------------ Table 1
TABLE_1 = {scalablevit_s: (64, (2, 2, 20, 2), (2, 4, 8, 16), (1.25, 1.25, 1.25, 1.0)),
           scalablevit_b: (96, (2, 2, 14, 6), (3, 6, 12, 24), (2.0, 1.25, 1.25, 1.0)),
           scalablevit_l: (128, (2, 6, 12, 4), (4, 8, 16, 32), (0.25, 0.5, 1.0, 1.0))}


@pytest.mark.parametrize("make", TABLE_1)
def test_table_1(make):
    """Channels, blocks, heads, r_c and r_n per stage, read off the modules that were built."""
    dim, depths, heads, rc = TABLE_1[make]
    model = build(make)
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    for i, (stage, s) in enumerate(zip(model.stages, (8, 4, 2, 1))):                    # r_n = 1/64, 1/16, 1/4, 1
        assert stage.embed.conv.out_channels == dim * 2 ** i
        assert [type(block.attn) for block in stage.blocks] == [IWSA, SSA] * (depths[i] // 2)
        for block in stage.blocks:
            assert block.attn.heads == heads[i] and block.mlp.fc1.out_features == 4 * dim * 2 ** i
        for block in stage.blocks[::2]:
            assert block.attn.window == 7 and block.attn.lim.kernel_size == (3, 3)
        for block in stage.blocks[1::2]:
            assert block.attn.s == s and block.attn.q.out_features == dim * 2 ** i * rc[i]
    convs = [stage.embed.conv for stage in model.stages]
    assert [conv.kernel_size + conv.stride for conv in convs] == [(7, 7, 4, 4)] + 3 * [(3, 3, 2, 2)]


# ------------------------------------------------------------------------------------------------ Table 2: parameters
def test_parameters_to_the_last_one():
    assert parameters(build(scalablevit_s)) == 32_000_472
    assert parameters(build(scalablevit_b)) == 81_881_624
    assert parameters(build(scalablevit_l)) == 109_288_840
    assert parameters(build(scalablevit_s, head_hidden=None)) == 26_307_032


def test_rc_of_the_last_stage_plays_no_part():
    """With r_n = 1 there is nothing to scale."""
    assert parameters(build(scalablevit_s, rc=(1.25, 1.25, 1.25, 1.25))) == 32_000_472


def test_parameters_as_table_2_prints_them():
    """S: 32M, rounded.  B: 81M, which is 81.88M with the decimals cut off.  L's 104M is not what its code has."""
    assert round(parameters(build(scalablevit_s)) / 1e6) == 32
    assert parameters(build(scalablevit_b)) // 10 ** 6 == 81


def test_tiny_has_one_to_two_million_parameters():
    assert 1e6 < parameters(build(scalablevit_tiny)) < 2e6


# ------------------------------------------------------------------------------------------------ Table 2: FLOPs
@pytest.mark.parametrize("make, modules, with_attention, table_2", [
    (scalablevit_s, 4.09, 4.26, 4.2),
    (scalablevit_b, 8.56, 8.79, 8.6),
    (scalablevit_l, 14.67, 14.98, 14.7)])
def test_macs_at_224(make, modules, with_attention, table_2):
    """Measured on the published code (L without its head, of 0.008 G), and what Table 2 prints.

    Rounded, B and L are what Table 2 prints; for S it prints 4.2, 0.1 more than there is.
    """
    here, here_with_attention = gmacs(build(make))
    assert here == pytest.approx(modules, abs=0.015)
    assert here_with_attention == pytest.approx(with_attention, abs=0.015)
    assert round(here, 1) == pytest.approx(table_2, abs=0.11 if make is scalablevit_s else 1e-9)


@pytest.mark.parametrize("larger, smaller, retinanets", [(scalablevit_b, scalablevit_s, 92),
                                                         (scalablevit_l, scalablevit_b, 127)])
def test_differences_between_detectors_at_800x1280(larger, smaller, retinanets):
    """RetinaNets differ by their backbones alone: B − S 92 G, L − B 127 G.

    The published code computes full windows beyond the border and counts them (93 and 127 G); here real tokens only
    are counted (91 and 125 G), so 2% are allowed.
    """
    here, there = (gmacs(build(make, num_classes=0), (800, 1280))[0] for make in (larger, smaller))
    assert here - there == pytest.approx(retinanets, rel=0.02)


# ------------------------------------------------------------------------------------------------ Table 5(a)
@pytest.mark.parametrize("pattern, rc, millions", [
    (("wsa", "wsa"), None, 30), (("iwsa", "iwsa"), None, 30), (("ssa", "ssa"), None, 34), (("ssa", "ssa"), (1, 1, 1, 1), 32),
    (("swsa", "ssa"), None, 32), (("ssa", "iwsa"), None, 32), (("iwsa", "ssa"), None, 32)])
def test_table_5a(pattern, rc, millions):
    model = build(scalablevit_s, pattern=pattern, **({} if rc is None else {"rc": rc}))
    assert round(parameters(model) / 1e6) == millions


@pytest.mark.parametrize("pattern, rc, millions", [
    (("iwsa", "iwsa"), None, 30.44), (("ssa", "ssa"), None, 33.56), (("ssa", "ssa"), (1, 1, 1, 1), 31.78),
    (("swsa", "ssa"), None, 31.97), (("iwsa", "ssa"), None, 32.00)])
def test_table_5a_as_measured_on_the_published_structure(pattern, rc, millions):
    model = build(scalablevit_s, pattern=pattern, **({} if rc is None else {"rc": rc}))
    assert round(parameters(model) / 1e6, 2) == millions


# ------------------------------------------------------------------------------------------------ Tables 5(b) and 7
@pytest.mark.parametrize("peg", [False, True])
@pytest.mark.parametrize("kind", ["wsa", "lem", "iwsa"])
def test_tables_5b_and_7(peg, kind):
    """PEG, LEM and LIM in all combinations of the tables: 32M each, as printed; what each adds is a few thousand."""
    model = build(scalablevit_s, pattern=(kind, "ssa"), peg=peg)
    base = build(scalablevit_s, pattern=("wsa", "ssa"), peg=False)
    assert round(parameters(model) / 1e6) == 32
    widths, depths = (64, 128, 256, 512), (2, 2, 20, 2)
    added = 0
    if kind != "wsa":                                               # 3x3 weights and a bias per channel, every other block
        added += sum(10 * C * depth // 2 for C, depth in zip(widths, depths))
    if peg:                                                         # the same, once a stage
        added += sum(10 * C for C in widths)
    assert parameters(model) - parameters(base) == added
    first = model.stages[0].blocks[0].attn
    assert type(first) is {"wsa": WSA, "lem": LEM, "iwsa": IWSA}[kind]
