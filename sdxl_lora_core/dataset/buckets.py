"""Aspect-ratio buckets: which size a picture is trained at, how it is cut, which pictures share a batch.

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
    """The bucket (width, height) nearest in aspect ratio, on a logarithmic scale, for a picture of any size >= 1.

    Sides are multiples of 64 px from resolution 512 up, of 16 px below; the area is at most resolution squared.
    """
    if width < 1 or height < 1:
        raise ValueError(f"the picture is {width}x{height}: both sides have to be at least 1 pixel")
    wanted = math.log(width / height)

    def badness(bucket: Bucket) -> tuple[float, float]:
        shape = math.log(bucket[0] / bucket[1])
        # Rounded, and ties to the squarer one, so that a picture turned by 90 degrees gets its bucket turned.
        return round(abs(shape - wanted), 9), round(abs(shape), 9)

    return min(_buckets(resolution), key=badness)


def epoch_batches(
    buckets: Sequence[Bucket], repeats: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """One epoch as batches of indices into `buckets`: each index repeats[i] times, one bucket per batch.

    A bucket's last batch may be short; nothing is dropped or filled up. The order depends on (seed, epoch) only: it
    sorts by hashes, so it is the same on every machine and with every version of every library.
    """
    if len(buckets) != len(repeats):
        raise ValueError(f"there are {len(buckets)} buckets and {len(repeats)} repeats: give one of each per picture")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give 1 or more")
    queues: defaultdict[Bucket, list[tuple[bytes, int]]] = defaultdict(list)
    for index, (bucket, count) in enumerate(zip(buckets, repeats, strict=True)):
        queues[bucket] += [(digest(seed, epoch, index, turn), index) for turn in range(count)]
    batches = [batch for queue in queues.values() for batch in _cut(sorted(queue), batch_size)]
    # A hash of the first lot, not the lot: lots rise within a bucket, which would keep its short batch for the end.
    batches.sort(key=lambda batch: hashlib.sha256(batch[0][0]).digest())
    return [[index for _, index in batch] for batch in batches]


def _buckets(resolution: int) -> list[Bucket]:
    step = 64 if resolution >= 512 else 16
    area = resolution * resolution
    shortest = max(step, resolution // 2 // step * step)
    wide = [(area // side // step * step, side) for side in range(shortest, resolution + 1, step)]
    return [*wide, *((height, width) for width, height in wide)]


def _cut(queue: list[tuple[bytes, int]], size: int) -> list[list[tuple[bytes, int]]]:
    return [queue[start : start + size] for start in range(0, len(queue), size)]
