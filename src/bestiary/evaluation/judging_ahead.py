"""On a GPU, judge pictures in a second thread while the next ones are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from bestiary.evaluation.judge import Judge


class JudgingAhead:
    """Features that judges have already computed, by the picture's pixels.

    Features may round differently in other batches. A CPU does not use this, so its results stay bit-identical.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        import torch

        self.judges = judges
        self._on_gpu = judges[0].device.startswith("cuda")
        # A new thread uses the first GPU by default, not this process's GPU.
        start = partial(torch.cuda.set_device, torch.cuda.current_device()) if self._on_gpu else None
        self._pool = ThreadPoolExecutor(1, "judge", initializer=start)
        self._begun: list[tuple[Sequence[Image], Future[list[Tensor]]]] = []
        self._known: dict[str, list[Tensor]] = {}  # a feature vector (D,) of each judge

    def see(self, pictures: Sequence[Image]) -> None:
        """Start to judge these pictures and return immediately."""
        self._begun.append((pictures, self._pool.submit(self._judge, pictures)))

    def features(self, judge: Judge, pictures: Sequence[Image]) -> Tensor:
        """Like `judge.image_features`: unit vectors (B, D). Only pictures that were not seen before are judged now."""
        import torch

        self._collect()
        number = next(index for index, each in enumerate(self.judges) if each is judge)
        keys = [_key(picture) for picture in pictures]
        unseen = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._known}
        judged = dict(zip(unseen, judge.image_features(list(unseen.values())), strict=True))
        vectors = [judged[key] if key in judged else self._known[key][number] for key in keys]
        return torch.stack(vectors) if vectors else judge.image_features([])

    def _collect(self) -> None:
        """Wait for all started work."""
        for pictures, future in self._begun:
            if future.exception() is not None:  # such as a full memory: these pictures are judged again after drawing
                continue
            for picture, *vectors in zip(pictures, *future.result(), strict=True):
                self._known[_key(picture)] = vectors
        self._begun.clear()

    def _judge(self, pictures: Sequence[Image]) -> list[Tensor]:
        """Each judge's features, computed in parallel to the main thread's kernels."""
        import torch

        with torch.cuda.stream(torch.cuda.Stream()) if self._on_gpu else nullcontext():
            return [judge.image_features(pictures) for judge in self.judges]


def _key(picture: Image) -> str:
    return hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
