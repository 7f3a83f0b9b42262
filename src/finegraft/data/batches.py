"""The order in which rows become batches: similar lengths together, so that little is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from finegraft.errors import DataError


class LengthBucketedSampler(Sampler[int]):
    """Row numbers in an order whose consecutive ``batch_size`` chunks hold rows of similar length.

    Shuffled (training): the rows are permuted, cut into pools of ``pool`` batches, sorted by length inside
    each pool, and the batches are then permuted again, so that a batch is drawn from a random part of the
    data and lengths come in no order. The order depends on ``seed`` and the epoch alone. Not shuffled
    (evaluation): longest first, so that memory runs out at once or not at all.

    Args:
        lengths: length of each row, in any unit.
        batch_size: rows in a batch of the loader that draws from this sampler; a smaller batch comes last.
        shuffle: training order (default) or order of length.
        seed: a non-negative number from which every order is drawn; default 0.
        pool: batches sorted together; larger pads less and mixes less; default 50.

    Raises:
        DataError: ``batch_size`` or ``pool`` is below 1, or there are no rows.

    Example:
        >>> list(LengthBucketedSampler([1, 9, 2, 8], batch_size=2, shuffle=False))
        [1, 3, 2, 0]
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, shuffle: bool = True, seed: int = 0, pool: int = 50
    ) -> None:
        if batch_size < 1 or pool < 1:
            raise DataError(f"batch_size and pool must be at least 1, not {batch_size} and {pool}")
        if len(lengths) == 0:
            raise DataError("there are no rows to draw batches from")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.shuffle, self.seed, self.pool = batch_size, shuffle, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = self._shuffled() if self.shuffle else np.argsort(-self.lengths, kind="stable")
        return iter(order.tolist())

    def _shuffled(self) -> np.ndarray:
        random = np.random.default_rng((self.seed, self.epoch))
        rows = random.permutation(len(self.lengths))
        width = self.batch_size * self.pool
        pools = [rows[start : start + width] for start in range(0, len(rows), width)]
        rows = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in pools])
        whole = len(rows) - len(rows) % self.batch_size
        batches = random.permutation(rows[:whole].reshape(-1, self.batch_size))
        return np.concatenate([batches.ravel(), rows[whole:]])
