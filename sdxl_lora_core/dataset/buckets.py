"""Aspect ratio buckets: the size that an image is trained at, and which images share a batch.

Pure arithmetic. The scheme is NovelAI's (https://github.com/NovelAI/novelai-aspect-ratio-bucketing) with SDXL's limits:
sides from half to twice the resolution (SDXL report, arXiv:2307.01952, appendix I).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

from ..hashed_random import digest
from ..images.crop import Bucket


def bucket_for(width: int, height: int, resolution: int) -> Bucket:
    """The bucket (width, height) in px whose log aspect ratio is nearest to that of an image of width x height px.

    Sides are multiples of 64 px from resolution 512 up, of 16 px below; the area is at most resolution squared.
    """
    if width < 1 or height < 1:
        raise ValueError(f"the image is {width}x{height}: both sides must be at least 1 pixel")
    wanted = math.log(width / height)

    def distance(bucket: Bucket) -> tuple[float, float]:
        shape = math.log(bucket[0] / bucket[1])
        # Rounded, and ties to the squarer one, so that an image rotated by 90 degrees gets the rotated bucket.
        return round(abs(shape - wanted), 9), round(abs(shape), 9)

    return min(_buckets(resolution), key=distance)


def epoch_batches(
    buckets: Sequence[Bucket], repeats: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """One epoch as batches of indices into `buckets`: index i repeats[i] times, one bucket per batch.

    The last batch of a bucket may be smaller; no image is dropped or duplicated. The order depends on (seed, epoch)
    only: it comes from sorting hashes, so it is the same on every machine and with every version of the libraries.
    """
    if len(buckets) != len(repeats):
        raise ValueError(f"there are {len(buckets)} buckets and {len(repeats)} repeats: give one of each per image")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give 1 or more")
    queues: defaultdict[Bucket, list[tuple[bytes, int]]] = defaultdict(list)
    for index, (bucket, count) in enumerate(zip(buckets, repeats, strict=True)):
        queues[bucket] += [(digest(seed, epoch, index, turn), index) for turn in range(count)]
    batches = [batch for queue in queues.values() for batch in _cut(sorted(queue), batch_size)]
    # By a second hash: within a bucket the keys are already sorted, so the smaller last batch would always come last.
    batches.sort(key=lambda batch: hashlib.sha256(batch[0][0]).digest())
    return [[index for _, index in batch] for batch in batches]


def is_added_square(bucket: Bucket, resolution: int) -> bool:
    """Whether the bucket is a square that versions before 0.4 did not have at this resolution."""
    return bucket[0] == bucket[1] and bucket not in _rectangles(resolution)


def _buckets(resolution: int) -> list[Bucket]:
    """All buckets. Where the resolution is not a multiple of the step, no rectangle of its area may be square."""
    side = resolution // _step(resolution) * _step(resolution)
    return [*_rectangles(resolution), (side, side)]


def _rectangles(resolution: int) -> list[Bucket]:
    step, area = _step(resolution), resolution * resolution
    shortest = max(step, resolution // 2 // step * step)
    wide = [(area // side // step * step, side) for side in range(shortest, resolution + 1, step)]
    return [*wide, *((height, width) for width, height in wide)]


def _step(resolution: int) -> int:
    return 64 if resolution >= 512 else 16


def _cut(queue: list[tuple[bytes, int]], size: int) -> list[list[tuple[bytes, int]]]:
    return [queue[start : start + size] for start in range(0, len(queue), size)]
