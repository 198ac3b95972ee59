from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import stofm as st
from stofm.__main__ import main
from stofm.align.config import AlignOptions
from stofm.align.recipe import AlignRecipe

if TYPE_CHECKING:
    from anndata import AnnData

RECIPE = """
files = "*.h5ad"
seed = 3
[options]
d_model = 12
d_hidden = 16
max_steps = 2
"""


def test_the_recipe_is_st_align() -> None:
    file = Path(__file__).parents[2] / "recipes" / "st-align.toml"
    if not file.is_file():
        pytest.skip("no recipes/ beside the tests")
    found, preset = AlignRecipe.from_toml(file), AlignOptions.st_align()
    schedule = {"n_clusters", "slides_per_batch", "batch_size", "epochs", "max_steps"}
    differ = {k for k, v in asdict(found.options).items() if v != getattr(preset, k)}
    assert differ == schedule | {"learning_rate"}


def test_the_command(tmp_path: Path) -> None:
    options = {"technology": "visium", "n_slices": 2, "image": True}
    slides: AnnData = st.datasets.simulate_slice(113, 40, **options)
    st.im.embed(slides, "statistics", device="cpu", show_progress_bar=False)
    (tmp_path / "slides").mkdir()
    tables = {}
    for name in ("slice0", "slice1"):
        tables[name] = slides[slides.obs["slice_id"] == name].copy()
        tables[name].write_h5ad(tmp_path / "slides" / f"{name}.h5ad")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    paths = [str(tmp_path / name) for name in ("recipe.toml", "slides", "aligner")]
    call = ["align", paths[0], "--data", paths[1], "--out", paths[2], "--device", "cpu", "--quiet"]
    assert main(call) == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["aligner", "recipe.toml", "slides"]
    direct = st.tl.align(
        tables, seed=3, options=AlignOptions(d_model=12, d_hidden=16, max_steps=2), device="cpu"
    )
    assert st.tl.Aligner.load(paths[2]).fingerprint == direct.fingerprint


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "aligner"
    call = ["align", str(recipe), "--data", str(tmp_path), "--out", str(out)]
    assert main(call) == 1
    assert "There is no recipe" in capsys.readouterr().err
    recipe.write_text(RECIPE)
    assert main(call) == 1
    assert "files = '*.h5ad' names no file in" in capsys.readouterr().err
    recipe.write_text("[options]\nd_modl = 3")
    assert main(call) == 1
    assert "d_model" in capsys.readouterr().err
    out.mkdir()
    (out / "notes").write_text("mine")
    recipe.write_text(RECIPE)
    assert main([*call, "--overwrite"]) == 1
    assert "aligner" in capsys.readouterr().err
