"""Memory budgets, chunks, progress bars, and matrices in files.

Work over many examples runs in chunks whose largest intermediate tensor fits a budget; a matrix that has to be held
whole is refused, with its size, before any work starts. One that is larger than memory goes to a file, tile by tile.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm

# Part of the free memory that one matrix may take, and that one chunk of work may take.
MATRIX_FRACTION = 0.5
CHUNK_FRACTION = 0.05
CACHE_FRACTION = 0.1  # what may stay in memory to save recomputation
ALWAYS_BYTES = 2**20  # is free on any machine that got this far
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


def _is_small(num_elements: int, dtype: torch.dtype) -> bool:
    """Whether it always fits: asking how much is free takes longer than small work itself."""
    return _limit.get() is None and num_elements * element_size(dtype) <= ALWAYS_BYTES


def fits(num_elements: int, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether tensors of ``num_elements`` in all may be held in memory."""
    return _is_small(num_elements, dtype) or num_elements * element_size(dtype) <= MATRIX_FRACTION * free_memory(device)


def cache_fits(num_elements: int, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether ``num_elements`` may be kept in memory only to save recomputing them."""
    return _is_small(num_elements, dtype) or num_elements * element_size(dtype) <= CACHE_FRACTION * free_memory(device)


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
    return max(1, numbers_per_chunk(dtype, device) // max(1, elements_per_item))


def numbers_that_fit(dtype: torch.dtype, device: torch.device | str) -> int:
    """How many numbers may be held beside the work on them."""
    return int(MATRIX_FRACTION / 2 * free_memory(device) // element_size(dtype))


def numbers_per_chunk(dtype: torch.dtype, device: torch.device | str) -> int:
    """How many numbers one chunk of work may touch."""
    return int(min(MAX_CHUNK_BYTES, CHUNK_FRACTION * free_memory(device)) // element_size(dtype))


def rows_that_fit(elements_per_row: int, dtype: torch.dtype, device: torch.device | str) -> int:
    """How many rows of ``elements_per_row`` numbers each may be held beside the work on them; at least one."""
    return max(1, numbers_that_fit(dtype, device) // max(1, elements_per_row))


def chunks(stop: int, length: int, start: int = 0) -> list[slice]:
    """Slices that cover ``range(start, stop)``, each of at most ``length``; an empty one for no items."""
    return [slice(i, min(i + length, stop)) for i in range(start, stop, length)] or [slice(start, start)]


def progress(items: Iterable | None, description: str, show: bool | None = None, **kwargs) -> tqdm:
    """A progress bar over ``items``; ``show``: True, False, or None for "only on a terminal, after half a second"."""
    disable = None if show is None else not show
    return tqdm(items, desc=description, disable=disable, delay=0.5 if show is None else 0, leave=False, **kwargs)


class MatrixFile:
    """A matrix that is written to a ``.npy`` file tile by tile, and resumed where an earlier run was interrupted.

    While it grows the file is called ``<path>.partial``, and beside it ``<path>.journal`` tells what it is made from
    and which tiles are on disk. Both survive a killed process; the next run with the same inputs goes on with them, in
    chunks of the same size, so that it ends in the same numbers. Complete, the file gets its name.

    Args:
        path: of the ``.npy`` file to be.
        shape: ``(rows, columns)``, or ``(G, rows, columns)`` for G matrices of the same tiles.
        dtype: of its entries.
        key: says what the entries are computed from; a resumed file must have the same.
        device: where the entries are computed: its free memory decides the chunks.

    Raises:
        FileExistsError: ``path`` exists already.
        ValueError: an interrupted file is there that was made from something else.
        OSError: not enough free disk; names the size.
    """

    SECONDS = 5.0  # between two times that finished tiles are made safe: so much work can be lost

    def __init__(
        self,
        path: str | os.PathLike,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        key: str,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path = Path(path)
        self._partial, self._journal = (self.path.with_name(self.path.name + end) for end in (".partial", ".journal"))
        if self.path.suffix != ".npy":
            raise ValueError(f"file must end in .npy, numpy's own format; got '{self.path}'.")
        if self.path.exists():
            raise FileExistsError(f"'{self.path}' exists already. Delete it, or choose another file.")
        self._header = {"key": key, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        self._done: set[tuple[int, int, int, int]] = set()
        self._pending: list[tuple[int, int, int, int]] = []
        self._saved = time.monotonic()
        journal = self._journal.read_text() if self._journal.exists() and self._partial.exists() else ""
        complete = journal[: journal.rfind("\n") + 1]  # what follows was being written when the process ended
        if complete:
            os.truncate(self._journal, len(complete))
            self._resume(*complete.splitlines())
        else:
            self._begin(device)

    def _begin(self, device: torch.device | str) -> None:
        size = int(np.prod(self._header["shape"], dtype=np.int64)) * np.dtype(self._header["dtype"]).itemsize
        free = shutil.disk_usage(self.path.absolute().parent).free
        if size > free:
            raise OSError(
                f"'{self.path}' would take {gigabytes(size)}, more than the {gigabytes(free)} that are free there. "
                "Choose another disk, or fewer examples."
            )
        self.free_memory = free_memory(device)
        options = {"mode": "w+", "dtype": self._header["dtype"], "shape": tuple(self._header["shape"])}
        self._array = np.lib.format.open_memmap(self._partial, **options)
        self._array.flush()
        self._append(json.dumps({**self._header, "free_memory": self.free_memory}), mode="w")

    def _resume(self, header: str, *lines: str) -> None:
        known = json.loads(header)
        self.free_memory = known.pop("free_memory")
        if known != self._header:
            raise ValueError(
                f"'{self._partial}' was begun with another net, other inputs or another prior. Delete it and "
                f"'{self._journal}', or choose another file."
            )
        self._done = {tuple(map(int, line.split())) for line in lines}
        self._array = np.lib.format.open_memmap(self._partial, mode="r+")

    def __enter__(self) -> MatrixFile:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._save()
        self._array._mmap.close()
        if error is None:
            os.replace(self._partial, self.path)
            self._journal.unlink()

    def has(self, rows: slice, columns: slice) -> bool:
        """Whether this tile was finished by an earlier run."""
        return (rows.start, rows.stop, columns.start, columns.stop) in self._done

    def write(self, rows: slice, columns: slice, tile: Tensor, mirrored: bool = False) -> None:
        """Put one tile in its place, and with ``mirrored`` its transpose too."""
        self._array[..., rows, columns] = tile.cpu().numpy()
        if mirrored:
            self._array[..., columns, rows] = tile.mT.cpu().numpy()
        self._pending.append((rows.start, rows.stop, columns.start, columns.stop))
        if time.monotonic() - self._saved >= self.SECONDS:
            self._save()

    def _save(self) -> None:
        """First the tiles, then the note that they are there."""
        self._array.flush()
        if self._pending:
            self._append("\n".join(" ".join(map(str, tile)) for tile in self._pending), mode="a")
        self._pending, self._saved = [], time.monotonic()

    def _append(self, text: str, mode: str) -> None:
        with open(self._journal, mode) as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    def tensor(self) -> Tensor:
        """The complete matrix, read from the file as it is used; changes to the tensor do not reach the file."""
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))
