from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch

from stofm.image import patches
from stofm.image.patches import read_patches
from stofm.image.slide import Level, Slide, of_array


def cut_all(
    slide: Slide, centers: np.ndarray, side: float, n_pixels: int, batch_size: int = 7
) -> torch.Tensor:
    found = torch.full((len(centers), 3, n_pixels, n_pixels), torch.nan)
    for rows, batch in read_patches(slide, centers, side, n_pixels, batch_size):
        assert len(rows) <= batch_size
        assert torch.isnan(found[rows]).all()  # each is given once
        found[rows] = batch
    return found


@pytest.fixture
def stored(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (90, 130, 3), dtype=np.uint8)


def test_a_patch_of_the_images_own_pixels_is_a_slice_of_it(stored: np.ndarray) -> None:
    found = cut_all(of_array(stored), np.array([[40.0, 30.0]]), 12.0, 12)
    expected = stored[24:36, 34:46].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_pixels_lie_where_a_plain_interpolation_has_them(stored: np.ndarray) -> None:
    center, side, n = (41.3, 27.8), 9.0, 5
    found = cut_all(of_array(stored), np.array([center]), side, n)[0]
    for i, j in itertools.product(range(n), repeat=2):
        x, y = (center[k] + ((j, i)[k] + 0.5) / n * side - side / 2 - 0.5 for k in (0, 1))
        left, top = int(x), int(y)
        right, bottom = x - left, y - top
        corners = stored[top : top + 2, left : left + 2].astype(float)
        weights = np.outer([1 - bottom, bottom], [1 - right, right])
        expected = (corners * weights[..., None]).sum(axis=(0, 1)) / 255
        np.testing.assert_allclose(found[:, i, j], expected, atol=1e-4)


def test_a_large_patch_is_averaged_before_it_is_interpolated() -> None:
    board = np.indices((120, 120)).sum(axis=0) % 2 * 255
    found = cut_all(of_array(board.astype(np.uint8)), np.array([[60.0, 60.0]]), 64.0, 8)
    np.testing.assert_allclose(found, 0.5, atol=1e-3)


def test_beyond_the_border_it_is_reflected(stored: np.ndarray) -> None:
    centers = np.array([[2.0, 88.0], [130.0, 0.0], [-40.0, 300.0]])
    found = cut_all(of_array(stored), centers, 16.0, 16)
    wide = np.pad(stored, ((400, 400), (400, 400), (0, 0)), mode="symmetric")
    for patch, (x, y) in zip(found, centers.astype(int) + 400, strict=True):
        expected = wide[y - 8 : y + 8, x - 8 : x + 8].transpose(2, 0, 1) / 255
        np.testing.assert_allclose(patch, expected, atol=1e-4)


def test_an_image_smaller_than_a_patch() -> None:
    found = cut_all(of_array(np.full((3, 5, 3), 51, np.uint8)), np.array([[1.0, 2.0]]), 50.0, 8)
    np.testing.assert_allclose(found, 0.2, atol=1e-5)


def test_rows_follow_their_order_and_need_no_others(
    stored: np.ndarray, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    centers = rng.uniform((-5, -5), (135, 95), (67, 2))
    slide, cut, order = of_array(stored), (23.0, 8), rng.permutation(67)
    found = cut_all(slide, centers, *cut)
    np.testing.assert_array_equal(cut_all(slide, centers[order], *cut), found[order])
    monkeypatch.setattr(patches, "_PIECE", 16)  # in many pieces
    np.testing.assert_allclose(cut_all(slide, centers, *cut, 3), found, atol=1e-4)
    np.testing.assert_allclose(cut_all(slide, centers[5:6], *cut), found[5:6], atol=1e-4)


def test_the_smallest_level_that_is_fine_enough_is_read(stored: np.ndarray) -> None:
    levels = [
        np.full((side, side, 3), value, np.uint8) for side, value in ((128, 0), (64, 51), (32, 102))
    ]
    slide = Slide.make([Level(one, "YXC") for one in levels], "made")
    center = np.array([[64.0, 64.0]])
    for side, value in ((8.0, 0.0), (15.9, 0.0), (16.0, 0.2), (40.0, 0.4)):
        found = cut_all(slide, center, side, 8)
        np.testing.assert_allclose(found, value, atol=1e-6)


def test_no_more_of_the_image_is_read_than_its_pieces(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "_PIECE", 64)
    sizes = []

    class Recorded(Level):
        def read(self, rows: slice, columns: slice) -> np.ndarray:
            sizes.append((rows.stop - rows.start) * (columns.stop - columns.start))
            return super().read(rows, columns)

    slide = Slide.make([Recorded(np.zeros((700, 900, 3), np.uint8), "YXC")], "made")
    cut_all(slide, rng.uniform(0, 700, (400, 2)), 10.0, 8, 64)
    assert max(sizes) <= (65 + 10 + 6) ** 2
    assert len(sizes) > 100


def test_memory_is_that_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_PIECE", 250)
    slide, peaks = of_array(np.zeros((2000, 2000, 3), np.uint8)), []
    for side in (250, 2000):
        lattice = np.stack(np.mgrid[10:side:25, 10:side:25], axis=-1).reshape(-1, 2)
        centers = lattice.astype(float)
        tracemalloc.start()
        for _ in read_patches(slide, centers, 10.0, 8, 64):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] < 3e6, peaks
