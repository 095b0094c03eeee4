"""What an exercise prints when it fails: where, and by how much, instead of two tensors."""
import pytest
import torch


def picture(seen, expected):
    """Maps (H, W) of booleans as text: . right, x missing, + too much."""
    signs = {(True, True): ".", (False, False): ".", (False, True): "x", (True, False): "+"}
    lines = []
    for found, wanted in zip(seen.tolist(), expected.tolist()):
        lines.append(" ".join(signs[pair] for pair in zip(found, wanted)))
    return "\n".join(lines)


def same_tokens(sees, expected):
    """Fail with a map of the first token (row, column) that depends on other tokens than expected (H, W, H, W)."""
    wrong = (sees != expected).flatten(2).any(-1).nonzero().tolist()
    if wrong:
        row, column = wrong[0]
        drawn = picture(sees[row, column], expected[row, column])
        pytest.fail(f"{len(wrong)} of {sees[..., 0, 0].numel()} tokens do not depend on what they should.  Token "
                    f"({row}, {column}), where . is right, x missing, + too much:\n{drawn}", pytrace=False)


def same_numbers(found, expected):
    """Fail with the ratio if it is the same everywhere, or with a map of where numbers (…, H, W, C) differ."""
    if found.shape != expected.shape:
        pytest.fail(f"the shape is {tuple(found.shape)}, not {tuple(expected.shape)}", pytrace=False)
    close = torch.isclose(found, expected, rtol=1e-7, atol=1e-7)
    if close.all():
        return
    ratio = (found / expected).flatten()
    if torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-5):
        pytest.fail(f"the ratio to what it should be is {ratio[0].item():.4g} everywhere", pytrace=False)
    right = close.all(-1).reshape(-1, *close.shape[-3:-1])[0]       # (H, W), of the first sample
    drawn = picture(right, torch.ones_like(right))
    largest = (found - expected).abs().max().item()
    pytest.fail(f"outputs differ by up to {largest:.2g}; tokens, where . is right and x is wrong:\n{drawn}",
                pytrace=False)
