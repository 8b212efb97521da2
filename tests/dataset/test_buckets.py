import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.dataset.buckets import bucket_for, epoch_batches
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.images.crop import Crop, center_crop, crop_to_bucket
from sdxl_lora_core.settings import declared

RESOLUTIONS = (64, 128, 496, 512, 528, 768, 1024, 1536)
SIZES = (
    (1, 1),
    (1024, 1024),
    (3000, 2000),
    (2000, 3000),
    (1920, 1080),
    (333, 334),
    (16384, 1),
    (1, 16384),
    (4000, 1000),
)


@pytest.mark.parametrize(
    ("size", "resolution", "bucket"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((50, 50), 1024, (1024, 1024)),
        ((3000, 2000), 1024, (1216, 832)),
        ((2000, 3000), 1024, (832, 1216)),
        ((1920, 1080), 1024, (1344, 768)),
        ((10000, 100), 1024, (2048, 512)),
        ((300, 200), 128, (160, 96)),
        ((128, 128), 128, (128, 128)),
        ((80, 40), 128, (160, 96)),  # as near to 192x80: the squarer one
    ],
)
def test_well_known_sizes_get_the_buckets_that_sdxl_was_trained_on(size, resolution, bucket):
    assert bucket_for(*size, resolution) == bucket


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_buckets_keep_to_step_area_and_orientation(size, resolution):
    width, height = bucket_for(*size, resolution)
    step = 64 if resolution >= 512 else 16
    assert width % step == height % step == 0
    assert 0 < width * height <= resolution**2
    assert bucket_for(size[1], size[0], resolution) == (height, width)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_no_bucket_of_the_same_area_limit_is_nearer(resolution):
    step = 64 if resolution >= 512 else 16
    sides = range(step, 2 * resolution + 1, step)
    rivals = [(w, resolution**2 // w // step * step) for w in sides if resolution // 2 <= w <= resolution]
    rivals += [(h, w) for w, h in rivals]
    for size in ((1000, 1000), (1000, 700), (1000, 1300), (1000, 1999)):
        wanted = math.log(size[0] / size[1])
        distance = abs(math.log(np.divide(*bucket_for(*size, resolution))) - wanted)
        assert distance <= min(abs(math.log(w / h) - wanted) for w, h in rivals) + 1e-6


def test_a_square_stays_square_at_every_accepted_resolution():
    allowed = declared(DatasetConfig, "resolution").range
    resolutions = range(allowed.low, allowed.high + 1, allowed.step)
    assert len(resolutions) == 253
    for resolution in resolutions:
        width, height = bucket_for(1000, 1000, resolution)
        assert width == height == resolution // (64 if resolution >= 512 else 16) * (64 if resolution >= 512 else 16)


def test_a_picture_without_pixels_has_no_bucket():
    with pytest.raises(ValueError, match="0x10"):
        bucket_for(0, 10, 512)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bucket", [(1024, 1024), (832, 1216), (96, 144)])
def test_a_crop_covers_the_bucket_with_the_smallest_resize_and_lies_in_the_middle(size, bucket):
    crop = center_crop(*size, bucket)
    assert (crop.bucket_w, crop.bucket_h) == bucket
    assert crop.resized_w == bucket[0] or crop.resized_h == bucket[1]
    assert crop.resized_w >= bucket[0] and crop.resized_h >= bucket[1]
    assert crop.left == (crop.resized_w - bucket[0]) // 2 and crop.top == (crop.resized_h - bucket[1]) // 2
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    assert abs(crop.resized_w - size[0] * scale) <= 0.5 and abs(crop.resized_h - size[1] * scale) <= 0.5


def test_a_crop_by_hand():
    assert center_crop(300, 200, (128, 128)) == Crop(192, 128, 32, 0, 128, 128)


@pytest.mark.parametrize("size", [(301, 200), (200, 301), (64, 50), (900, 333)])
def test_cropping_in_one_step_equals_resize_then_crop(size):
    # Mid-grey noise: Pillow may do rows or columns first, which clips full-range noise differently in between.
    noise = np.random.default_rng(0).integers(80, 176, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    crop = center_crop(*size, (128, 96))
    resized = image.resize((crop.resized_w, crop.resized_h), Image.Resampling.LANCZOS)
    reference = resized.crop((crop.left, crop.top, crop.left + crop.bucket_w, crop.top + crop.bucket_h))
    difference = np.abs(np.asarray(crop_to_bucket(image, crop), int) - np.asarray(reference, int))
    assert difference.max() <= 1


def test_a_thread_of_a_picture_is_cropped_without_the_gigabytes_of_its_resize():
    image = Image.new("RGB", (16384, 1), "red")
    cropped = crop_to_bucket(image, center_crop(*image.size, (2048, 512)))
    assert cropped.size == (2048, 512) and cropped.getpixel((7, 7)) == (255, 0, 0)


BUCKETS = [(64, 64)] * 7 + [(96, 48)] * 4 + [(48, 96)]
REPEATS = [1, 2, 3, 1, 1, 1, 1, 2, 2, 1, 1, 5]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_an_epoch_shows_every_picture_as_often_as_it_repeats_and_one_bucket_per_batch(batch_size):
    batches = epoch_batches(BUCKETS, REPEATS, batch_size, seed=1, epoch=0)
    assert Counter(index for batch in batches for index in batch) == Counter(dict(enumerate(REPEATS)))
    assert all(len({BUCKETS[index] for index in batch}) == 1 for batch in batches)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    per_bucket = Counter()
    for bucket, count in zip(BUCKETS, REPEATS, strict=True):
        per_bucket[bucket] += count
    assert len(batches) == sum(math.ceil(count / batch_size) for count in per_bucket.values())


def test_order_is_a_function_of_seed_and_epoch():
    np.random.seed(3)
    one = epoch_batches(BUCKETS, REPEATS, 2, seed=5, epoch=1)
    np.random.seed(4)
    assert epoch_batches(BUCKETS, REPEATS, 2, seed=5, epoch=1) == one
    for seed, epoch in ((5, 0), (5, 2), (6, 1), (0, 5), (1, 5), (2**64 - 1, 1)):
        assert epoch_batches(BUCKETS, REPEATS, 2, seed, epoch) != one


def test_order_never_changes_between_versions():
    assert epoch_batches([(64, 64)] * 6, [1] * 6, 2, seed=0, epoch=0) == [[4, 0], [5, 1], [2, 3]]


def test_short_batches_and_buckets_come_anywhere_in_the_order():
    places, first = Counter(), Counter()
    for epoch in range(300):
        batches = epoch_batches([(64, 64)] * 7, [1] * 7, 2, seed=0, epoch=epoch)
        places[[len(batch) for batch in batches].index(1)] += 1
        first[batches[0][0]] += 1
    assert set(places) == {0, 1, 2, 3} and min(places.values()) > 40
    assert set(first) == set(range(7)) and min(first.values()) > 15


def test_wrong_counts_are_named():
    with pytest.raises(ValueError, match="2 buckets and 1 repeats"):
        epoch_batches([(64, 64)] * 2, [1], 1, 0, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        epoch_batches([(64, 64)], [1], 0, 0, 0)
