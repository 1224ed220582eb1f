"""Limits on the dimensions of images."""

import pytest

from natzoo.images import MAX_PIXELS, MAX_RATIO, check_image_size


@pytest.mark.parametrize("size", [(1, 1), (1, MAX_RATIO), (5 * MAX_RATIO, 5), (13_000, 13_000)])
def test_accepted(size):
    check_image_size(*size)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (1, 65_535), (65_535, 1), (1, MAX_RATIO + 1), (14_000, 14_000)])
def test_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        check_image_size(*size)


def test_the_largest_image():
    check_image_size(MAX_PIXELS // 10_000, 10_000)
    with pytest.raises(ValueError, match=str(MAX_PIXELS)):
        check_image_size(MAX_PIXELS // 10_000 + 1, 10_000)
