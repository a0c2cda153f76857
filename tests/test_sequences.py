"""The format of ragged sequences: what goes in comes out, whatever the padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpytorch_dnn2gp import infinite
from gpytorch_dnn2gp.infinite.sequences import unpack

F64 = torch.float64


def ragged(lengths, d, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, d, dtype=F64, generator=generator) for length in lengths]


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), d=st.integers(1, 3), room=st.integers(0, 3))
def test_what_goes_in_comes_out(lengths, d, room):
    sequences = ragged(lengths, d)
    x = infinite.pack(sequences, max_length=max(lengths) + room)
    assert x.shape == (len(lengths), (max(lengths) + room) * d + 1)
    out = unpack(x, d)
    assert out.lengths.tolist() == lengths
    for i, s in enumerate(sequences):
        assert torch.equal(out.tokens[i][out.mask[i]], s)
        assert not out.tokens[i][~out.mask[i]].any()


def test_padded_and_listed_sequences_are_the_same():
    sequences = ragged([3, 1, 4], 2)
    x = infinite.pack(sequences)
    padded = torch.full((3, 4, 2), torch.nan, dtype=F64)
    for i, s in enumerate(sequences):
        padded[i, : len(s)] = s
    assert torch.equal(infinite.pack(padded, torch.tensor([3, 1, 4])), x)
    assert torch.equal(infinite.pack(padded[2:]), x[2:])
    batch = torch.randn(2, 5, 4, 3)
    assert infinite.pack(batch, torch.tensor([[4, 3, 2, 1, 1], [1, 2, 3, 4, 4]])).shape == (2, 5, 13)


def test_scalars_are_tokens_of_one_number():
    assert torch.equal(infinite.pack([torch.ones(2), torch.ones(1)]), torch.tensor([[1.0, 1, 2], [1, 0, 1]]))


def test_gradients_reach_tokens_and_not_padding():
    x = infinite.pack(ragged([2, 3], 2)).requires_grad_()
    (g,) = torch.autograd.grad(unpack(x, 2).tokens.sum(), x)
    assert torch.equal(g, torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]], dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_the_tokens_own(dtype):
    x = infinite.pack([torch.ones(3, 2, dtype=dtype)])
    assert x.dtype == unpack(x, 2).tokens.dtype == dtype
