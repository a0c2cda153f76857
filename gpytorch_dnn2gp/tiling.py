"""Memory budgets, chunks and progress bars.

Work over many examples runs in chunks whose largest intermediate tensor fits a budget; a matrix that has to be held
whole is refused, with its size, before any work starts.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator

import psutil
import torch
from tqdm.auto import tqdm

# Part of the free memory that one matrix may take, and that one chunk of work may take.
MATRIX_FRACTION = 0.5
CHUNK_FRACTION = 0.05
CACHE_FRACTION = 0.1  # what may stay in memory to save recomputation
MAX_CHUNK_BYTES = 256 * 2**20  # larger chunks are not faster: they leave the processor's caches

_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("memory_limit", default=None)


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Within this context the package acts as if ``num_bytes`` of memory were free."""
    if num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive; got {num_bytes}.")
    token = _limit.set(int(num_bytes))
    try:
        yield
    finally:
        _limit.reset(token)


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that are free on ``device``, or the limit set by :func:`memory_limit`."""
    limit = _limit.get()
    if limit is not None:
        return limit
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def element_size(dtype: torch.dtype) -> int:
    """Bytes of one number."""
    return torch.finfo(dtype).bits // 8


def fits(num_elements: int, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether tensors of ``num_elements`` in all may be held in memory."""
    return num_elements * element_size(dtype) <= MATRIX_FRACTION * free_memory(device)


def cache_fits(num_elements: int, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether ``num_elements`` may be kept in memory only to save recomputing them."""
    return num_elements * element_size(dtype) <= CACHE_FRACTION * free_memory(device)


def gigabytes(num_bytes: float) -> str:
    """A size for messages."""
    return f"{num_bytes / 1e9:.3g} GB"


def require_memory(num_elements: int, dtype: torch.dtype, device: torch.device | str, what: str, instead: str) -> None:
    """Raise a ``MemoryError`` that names the size of ``what`` and what to use ``instead``, unless it fits."""
    if not fits(num_elements, dtype, device):
        raise MemoryError(
            f"{what} would take {gigabytes(num_elements * element_size(dtype))}, more than {MATRIX_FRACTION:.0%} of "
            f"the {gigabytes(free_memory(device))} free on {device}. {instead}"
        )


def chunk_length(elements_per_item: int, dtype: torch.dtype, device: torch.device | str) -> int:
    """How many items of ``elements_per_item`` numbers each make one chunk; at least one."""
    budget = min(MAX_CHUNK_BYTES, CHUNK_FRACTION * free_memory(device))
    return max(1, int(budget // max(1, elements_per_item * element_size(dtype))))


def rows_that_fit(elements_per_row: int, dtype: torch.dtype, device: torch.device | str) -> int:
    """How many rows of ``elements_per_row`` numbers each may be held beside the work on them; at least one."""
    return max(1, int(MATRIX_FRACTION / 2 * free_memory(device) // max(1, elements_per_row * element_size(dtype))))


def chunks(num_items: int, length: int) -> list[slice]:
    """Slices that cover ``range(num_items)``, each of at most ``length``; an empty one for no items."""
    return [slice(start, min(start + length, num_items)) for start in range(0, num_items, length)] or [slice(0, 0)]


def progress(items: Iterable | None, description: str, show: bool | None = None, **kwargs) -> tqdm:
    """A progress bar over ``items``; ``show``: True, False, or None for "only on a terminal, after half a second"."""
    disable = None if show is None else not show
    return tqdm(items, desc=description, disable=disable, delay=0.5 if show is None else 0, leave=False, **kwargs)
