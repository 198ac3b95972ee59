from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from stofm.image.slide import Level, Slide, of_array, of_file, reflect

if TYPE_CHECKING:
    from pathlib import Path


def whole(slide: Slide, level: int = 0) -> np.ndarray:
    height, width = slide.levels[level].shape
    return slide.read(level, (0, height, 0, width), 1)


def test_reflection_is_that_of_numpy_and_goes_on_beyond_it() -> None:
    row = np.arange(5)
    np.testing.assert_array_equal(row[reflect(-4, 9, 5)], np.pad(row, 4, mode="symmetric"))
    np.testing.assert_array_equal(reflect(-7, 8, 1), 0)
    np.testing.assert_array_equal(reflect(-20, -15, 5), row)


def test_a_window_beyond_the_border_is_reflected(rng: np.random.Generator) -> None:
    stored = rng.integers(0, 256, (11, 7, 3), dtype=np.uint8)
    found = of_array(stored).read(0, (-3, 14, -5, 9), 1)
    expected = np.pad(stored, ((3, 3), (5, 2), (0, 0)), mode="symmetric") / 255
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_step_takes_means_of_squares(rng: np.random.Generator) -> None:
    stored = rng.integers(0, 256, (13, 8, 3), dtype=np.uint8)
    found = of_array(stored).read(0, (0, 4, 0, 2), 3)
    expected = stored[:12, :6].reshape(4, 3, 2, 3, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (1, 9, 7)])
def test_one_channel_becomes_grey(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    stored = rng.integers(0, 256, shape, dtype=np.uint8)
    found = whole(of_array(stored))
    assert found.shape == (9, 7, 3)
    np.testing.assert_allclose(found[..., 2], stored.reshape(9, 7) / 255, atol=1e-6)


def test_what_is_transparent_becomes_white() -> None:
    stored = np.zeros((5, 4, 4), dtype=np.uint8)
    stored[..., 0] = 255
    stored[:2, :, 3] = 255
    found = whole(of_array(stored))
    np.testing.assert_allclose(found[:2], np.broadcast_to([1.0, 0.0, 0.0], (2, 4, 3)))
    np.testing.assert_allclose(found[2:], 1.0)


def test_16_bits_are_scaled_by_their_bright_values(caplog: pytest.LogCaptureFixture) -> None:
    stored = np.full((40, 30, 3), 2000, dtype=np.uint16)
    stored[:20] = 4000
    with caplog.at_level("INFO", "stofm"):
        found = whole(of_array(stored))
    np.testing.assert_allclose(found[:20], 1.0)
    np.testing.assert_allclose(found[20:], 0.5)
    assert "values from 0 to 4000 become 0 to 1" in caplog.text


@pytest.mark.parametrize(("factor", "white"), [(1.0, 1.0), (255.0, 255.0)])
def test_floats_keep_their_scale(factor: float, white: float, rng: np.random.Generator) -> None:
    assert of_array(rng.uniform(0, factor, (20, 20, 3))).white == white


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((5, 6, 2)), "axes YXC and the shape"),
        (np.zeros((2, 5, 6, 3)), r"has the shape \(2, 5, 6, 3\); expected"),
        (np.zeros((0, 6, 3)), "expected height, width and 1, 3 or 4 channels"),
        (np.full((5, 6, 3), np.nan), "NaN or infinite values"),
    ],
)
def test_what_is_no_image_is_refused(stored: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_array(stored)


# Files


def write_pyramid(path: Path, stored: np.ndarray, **options: Any) -> None:
    with tifffile.TiffWriter(path, ome=path.name.endswith(".ome.tif")) as file:
        file.write(stored, subifds=1, tile=(32, 32), photometric="rgb", **options)
        file.write(stored[::2, ::2], subfiletype=1, tile=(32, 32), photometric="rgb")


def test_a_pyramid_is_read_window_by_window(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = rng.integers(0, 256, (150, 90, 3), dtype=np.uint8)
    options = {"metadata": {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}}
    write_pyramid(tmp_path / "slide.ome.tif", stored, **options)
    slide = of_file(tmp_path / "slide.ome.tif")
    assert [level.shape for level in slide.levels] == [(150, 90), (75, 45)]
    assert slide.levels[0].chunks == (32, 32)
    assert slide.microns_per_pixel == 0.25
    np.testing.assert_allclose(whole(slide), stored / 255, atol=1e-6)
    np.testing.assert_allclose(whole(slide, 1), stored[::2, ::2] / 255, atol=1e-6)
    slide.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metadata": {"PhysicalSizeX": 500.0, "PhysicalSizeXUnit": "nm"}}, 0.5),
        ({"metadata": {}}, None),
    ],
)
def test_micrometres_of_ome(tmp_path: Path, options: dict[str, Any], expected: float) -> None:
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros((30, 20, 3), np.uint8), ome=True, **options)
    slide = of_file(tmp_path / "a.ome.tif")
    assert slide.microns_per_pixel == expected
    slide.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}, 0.25),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),  # of a screen
        ({"description": "Aperio Image\n30x20|AppMag = 20|MPP = 0.4990"}, 0.499),
        ({}, None),
    ],
)
def test_micrometres_of_plain_tiff(
    tmp_path: Path, options: dict[str, Any], expected: float
) -> None:
    stored = np.zeros((30, 20, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stored, metadata=None, **options)
    slide = of_file(tmp_path / "a.tif")
    assert slide.microns_per_pixel == pytest.approx(expected)
    slide.close()


def test_grey_16_bit_tiff(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.full((30, 20), 900, np.uint16))
    slide = of_file(tmp_path / "a.tif")
    np.testing.assert_allclose(whole(slide), np.ones((30, 20, 3)))
    slide.close()


def test_pictures_are_read_with_their_palette(tmp_path: Path) -> None:
    stored = np.zeros((6, 5, 3), np.uint8)
    stored[:3] = (255, 0, 0)
    Image.fromarray(stored).convert("P").save(tmp_path / "a.png")
    np.testing.assert_allclose(whole(of_file(tmp_path / "a.png"))[:3, :, 0], 1.0)


def test_files_that_are_not_there_or_no_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no image file"):
        of_file(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_text("text")
    with pytest.raises(ValueError, match=r"a\.tif can't be read .* no image"):
        of_file(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((5, 30, 20), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match="Choose a plane and the channels"):
        of_file(tmp_path / "b.tif")


@pytest.mark.parametrize(("name", "module"), [("a.tif", "tifffile"), ("a.png", "PIL")])
def test_libraries_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'stofm\[image\]'"):
        of_file(tmp_path / name)


def test_an_overview_is_small_and_tells_its_edges(rng: np.random.Generator) -> None:
    stored = np.kron(rng.integers(0, 256, (20, 30, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    levels = [Level(stored, "YXC"), Level(stored[::2, ::2], "YXC")]
    part, edges = Slide.make(levels, "made").overview(np.array([45, 61]), np.array([265, 139]), 25)
    assert edges == (40, 272, 144, 56)
    assert part.shape == (11, 29, 3)
