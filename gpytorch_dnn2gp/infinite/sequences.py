"""Sequences of different lengths as rows of one matrix, which is how inputs travel through GPyTorch and BoTorch.

    row of a sequence   x^1, ..., x^T, padding, T     max_length * d + 1 numbers: the tokens, then the length

Tokens are raw vectors, or embeddings. What stands in the padding does not matter, be it NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import first_index

READOUTS = ("last", "mean", "all")  # which states of a sequence a net reads
FORMAT = "Rows are made by infinite.pack(sequences): the tokens one after the other, padding, and the length at last."


@dataclass(frozen=True)
class Sequences:
    """A batch of them.

    Attributes:
        tokens: ``(*B, n, L, d)``, zero behind the end of each.
        lengths: ``(*B, n)``, integers from 1 to L.
    """

    tokens: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """True at tokens, false at padding, ``(*B, n, L)``."""
        return self._places < self.lengths.unsqueeze(-1)

    def reversed(self) -> Sequences:
        """Each from its last token to its first."""
        index = (self.lengths.unsqueeze(-1) - 1 - self._places) % self.tokens.shape[-2]
        return Sequences(self._taken(index), self.lengths)

    def at_the_right(self) -> tuple[Tensor, Tensor]:
        """Tokens with the padding before them, so that last ones stand side by side, and the mask of these."""
        before = self.tokens.shape[-2] - self.lengths.unsqueeze(-1)
        return self._taken((self._places - before) % self.tokens.shape[-2]), self._places >= before

    @property
    def _places(self) -> Tensor:
        return torch.arange(self.tokens.shape[-2], device=self.lengths.device)

    def _taken(self, index: Tensor) -> Tensor:
        return self.tokens.gather(-2, index.unsqueeze(-1).expand(self.tokens.shape))


def num_tokens(row: int, input_size: int) -> int:
    """L, for rows of so many numbers."""
    return (row - 1) // input_size


def pack(sequences: Sequence[Tensor] | Tensor, lengths: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """Sequences as rows of one matrix; :func:`unpack` takes them out.

    Args:
        sequences: a list of tensors ``(T_i, d)``, or ``(T_i,)`` for d = 1; or all of them padded, ``(*B, n, L, d)``.
        lengths: of padded ones, ``(*B, n)``, integers from 1 to L; None where none is shorter than L. They are not
            given for a list, which tells them.
        max_length: tokens to leave room for; by default as many as the longest has. What a GP is trained on and what it
            predicts must have the same.

    Returns:
        ``(*B, n, max_length * d + 1)``, of the tokens' dtype.

    Raises:
        ValueError: for an empty sequence, lengths that do not match, NaN or infinity in a token, tokens of several
            sizes or of none, a length beyond the dtype, or a ``max_length`` that is too small.
    """
    if isinstance(sequences, Tensor):
        tokens, lengths = _of_padded(sequences, lengths)
    else:
        if lengths is not None:
            raise ValueError("A list of sequences tells their lengths itself: leave lengths out.")
        tokens, lengths = _of_list(list(sequences))
    longest = tokens.shape[-2]
    if max_length is None:
        max_length = longest
    if not isinstance(max_length, int):
        raise ValueError(f"max_length is a number of tokens; got {max_length!r}.")
    if max_length < longest:
        raise ValueError(f"max_length={max_length} leaves no room for the {longest} tokens of the longest sequence.")
    checked = _checked(tokens, lengths)
    padded = torch.nn.functional.pad(checked.tokens, (0, 0, 0, max_length - longest))
    last = lengths.unsqueeze(-1).to(padded)
    if not torch.equal(last.long().squeeze(-1), checked.lengths):
        raise ValueError(f"{tokens.dtype} cannot hold a length of {int(checked.lengths.max())}: convert to float32.")
    return torch.cat([padded.flatten(-2), last], -1)


def unpack(x: Tensor, input_size: int) -> Sequences:
    """The sequences of a matrix that :func:`pack` made, differentiable in their tokens.

    Args:
        x: ``(*B, n, L * d + 1)``.
        input_size: d, numbers per token.

    Raises:
        ValueError: for rows of another width, lengths that are no integers from 1 to L, NaN or infinity in a token.
    """
    if not isinstance(input_size, int) or input_size < 1:
        raise ValueError(f"input_size is how many numbers a token has, 1 or more; got {input_size!r}.")
    length, rest = divmod(x.shape[-1] - 1, input_size)
    if rest or length < 1:
        raise ValueError(
            f"Rows of {x.shape[-1]} numbers hold no sequence of tokens with {input_size} numbers each and its length. "
            f"{FORMAT}"
        )
    return _checked(_tokens(x, input_size), x[..., -1].detach())


def split(x: Tensor, input_size: int) -> Sequences:
    """As :func:`unpack`, of rows that have been checked."""
    found = Sequences(_tokens(x, input_size), x[..., -1].detach().long())
    return Sequences(torch.where(found.mask.unsqueeze(-1), found.tokens, 0), found.lengths)


def _tokens(x: Tensor, input_size: int) -> Tensor:
    return x[..., :-1].unflatten(-1, (-1, input_size))


def _of_padded(tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    if tokens.dim() < 3 or not tokens.is_floating_point():
        raise ValueError(
            f"Padded sequences are one floating-point tensor (n, L, d); got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}. Give scalars as (n, L, 1), and embeddings instead of token numbers."
        )
    shape = tokens.shape[:-2]
    if lengths is None:
        lengths = torch.full(shape, tokens.shape[-2], device=tokens.device)
    lengths = torch.as_tensor(lengths, device=tokens.device)
    if lengths.shape != shape:
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}, but the sequences are {tuple(shape)}: one for each of them."
        )
    return tokens, lengths


def _of_list(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not sequences:
        raise ValueError("There are no sequences: the list is empty.")
    sequences = [torch.as_tensor(s) for s in sequences]
    sequences = [s.unsqueeze(-1) if s.dim() == 1 else s for s in sequences]
    first = sequences[0]
    for i, s in enumerate(sequences):
        if s.dim() != 2 or not s.is_floating_point() or s.shape[-1] != first.shape[-1] or s.dtype != first.dtype:
            raise ValueError(
                f"Sequence {i} is {s.dtype} of shape {tuple(s.shape)}, the first {first.dtype} of shape "
                f"{tuple(first.shape)}: each is a floating-point tensor (T_i, d), d and dtype the same for all."
            )
    lengths = torch.tensor([len(s) for s in sequences], device=first.device)
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), lengths


def _checked(tokens: Tensor, lengths: Tensor) -> Sequences:
    longest, size = tokens.shape[-2:]
    if size == 0:
        raise ValueError(f"Tokens have no numbers: the sequences have the shape {tuple(tokens.shape)}.")
    bad = ~((lengths >= 1) & (lengths <= longest) & (lengths == lengths.round()))
    if bad.any():
        at = first_index(bad)
        given = float(lengths[at])
        why = "it is empty; drop it" if given == 0 else f"lengths are integers from 1 to {longest}"
        raise ValueError(f"The sequence at index {at} has length {given:g}: {why}. {FORMAT}")
    lengths = lengths.long()
    found = Sequences(tokens, lengths)
    mask = found.mask.unsqueeze(-1)
    bad = (mask & ~tokens.detach().isfinite()).any(-1)
    if bad.any():
        *at, token = bad.nonzero()[0].tolist()
        at = at[0] if len(at) == 1 else tuple(at)
        raise ValueError(
            f"The sequence at index {at} has a NaN or infinity in its token {token}. Remove or impute such tokens "
            "first, or shorten the sequence."
        )
    return Sequences(torch.where(mask, tokens, 0), lengths)
