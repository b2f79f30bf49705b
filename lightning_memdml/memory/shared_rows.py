"""How many rows of a memory share a class or an image with a batch at most, without asking the device in the step."""

from __future__ import annotations

import numpy as np


class SharedRowCounts:
    """Counts the rows of each class and of each image as rows come and go, on the host.

    A loss on a GPU needs a bound of the rows that share a class or an image with its batch. The batch is not known when
    rows are stored, so the bound is that of the worst batch: the largest classes and the images with most rows. It
    depends on the number of anchors of one rank, so it does not grow with the number of ranks.

    An update costs as much as the rows that come and go, not as the memory. Numbers below `slots` have a counter each;
    larger and negative ones may share a counter, which can only raise the bound.

    Args:
        rows: Rows of the memory at most.

    Example:
        >>> counts = SharedRowCounts(rows=6)
        >>> counts.update(entering=np.array([[7, 7, 7, 8, 8, 9], [-1, -1, -1, -1, -1, -1]]))
        >>> counts.bounds()  # for 1, 2 and 4 anchors, and more: the 3 of class 7, with the 2 of class 8, all
        (4, 8, 8)
    """

    def __init__(self, rows: int) -> None:
        slots = 1 << max(16, (4 * rows - 1).bit_length())
        self._classes, self._images = _Counter(slots), _Counter(slots)
        self._rows = 0

    def update(self, entering: np.ndarray, leaving: np.ndarray | None = None) -> None:
        """Count rows that come and rows that go.

        Args:
            entering: Labels and indices of the rows that come, `(2, n)` int64; a negative index is unknown.
            leaving: Those of the rows that go, `(2, m)`.
        """
        for ids, sign in ((entering, 1), (leaving, -1)):
            if ids is None or ids.shape[1] == 0:
                continue
            self._classes.add(ids[0], sign)
            self._images.add(ids[1][ids[1] >= 0], sign)
            self._rows += sign * ids.shape[1]

    def bounds(self) -> tuple[int, ...]:
        """Return the bounds for 1, 2, 4, ... anchors; the last one holds for any number.

        They are powers of two, so that a compiled training step does not meet new numbers in every step.
        """
        anchors = 1 << np.arange(max(1, self._rows).bit_length() + 1)
        most = np.minimum(self._classes.largest(anchors) + self._images.largest(anchors), self._rows).tolist()
        last = most.index(self._rows)  # one anchor for each row has all of them
        return tuple(1 << max(0, rows - 1).bit_length() for rows in most[: last + 1])


class _Counter:
    """A count for each number, and how many numbers have each count."""

    def __init__(self, slots: int) -> None:
        self._count = np.zeros(slots, dtype=np.int32)
        self._having = np.zeros(1, dtype=np.int64)  # how many numbers have count 0 (not kept), 1, 2, ...

    def add(self, ids: np.ndarray, sign: int) -> None:
        slots, times = np.unique(ids & (len(self._count) - 1), return_counts=True)
        before = self._count[slots]
        after = before + sign * times
        self._count[slots] = after
        top = max(int(after.max(initial=0)) + 1, len(self._having))
        change = np.bincount(after, minlength=top) - np.bincount(before, minlength=top)
        change[: len(self._having)] += self._having
        self._having = np.trim_zeros(change, "b") if change[1:].any() else np.zeros(1, dtype=np.int64)
        self._having[0] = 0

    def largest(self, numbers: np.ndarray) -> np.ndarray:
        """Return the sum of so many of the largest counts, for each of the numbers."""
        having = self._having[:0:-1]
        counts = np.arange(len(having), 0, -1)
        ends, sums = ([0, *part.cumsum()] for part in (having, having * counts))
        return np.rint(np.interp(numbers, ends, sums)).astype(
            np.int64
        )  # a straight line between them: all counts are equal
