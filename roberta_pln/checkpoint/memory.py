"""Arrays in memory that a framework can take over, filled by several threads."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Key = TypeVar("Key")

ALIGNMENT: Final = 64
"""Bytes; what TensorFlow and JAX ask of memory that they take over."""


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array with any values, aligned so that a framework can take over its memory instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def can_be_taken_over(array: Array) -> bool:
    """Whether a framework can work in the array's own memory."""
    return array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous and array.flags.writeable


def transpose(array: Array) -> Array:
    """The array with its axes reversed, in C order and in memory of its own."""
    [(_, turned)] = arranged([(None, array, True)])
    return turned


def arranged(arrays: Iterable[tuple[Key, Array, bool]]) -> Iterator[tuple[Key, Array]]:
    """Arrays that can be taken over, in their order; threads work on the next ones meanwhile.

    Args:
        arrays: a key, which is handed through, the array, and whether its axes are to be reversed. An array that is
            to stay as it is and can be taken over is not copied.
    """
    waiting: deque[tuple[Key, Array, list[Future[None]]]] = deque()

    def first() -> tuple[Key, Array]:
        key, array, parts = waiting.popleft()
        for part in parts:
            part.result()
        return key, array

    with ThreadPoolExecutor(_THREADS) as threads:
        for key, array, turned in arrays:
            filled, parts = (array, []) if not turned and can_be_taken_over(array) else _filling(array, turned)
            waiting.append((key, filled, [threads.submit(part) for part in parts]))
            if len(waiting) > _AHEAD:
                yield first()
        while waiting:
            yield first()


def _filling(array: Array, turned: bool) -> tuple[Array, list[Callable[[], None]]]:
    """Room for a copy or the transpose, and the pieces of work that fill it.

    A matrix is turned in blocks, since column after column is six times slower.
    """
    result = empty(array.shape[::-1] if turned else array.shape, array.dtype)
    if array.ndim != 2:
        return result, [partial(np.copyto, result, array.T if turned else array)]

    def copy(start: int) -> None:
        result[start : start + _SHARE] = array[start : start + _SHARE]

    def turn(start: int) -> None:
        for row in range(start, min(start + _SHARE, len(array)), _BLOCK):
            result[:, row : row + _BLOCK] = array[row : row + _BLOCK].T

    return result, [partial(turn if turned else copy, start) for start in range(0, len(array), _SHARE)]


_BLOCK: Final = 64
"""Rows whose columns fit into the processor's first cache."""
_SHARE: Final = 8 * _BLOCK
"""Rows that one thread works on at a time."""
_THREADS: Final = min(8, os.cpu_count() or 1)
"""More are no faster: they wait for memory."""
_AHEAD: Final = 8
"""Arrays that are worked on while the one before them is used."""
