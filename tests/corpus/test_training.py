"""Training on a corpus."""

from __future__ import annotations

import numpy as np
import pytest

import stofm as st
from stofm.genes import GeneVocabulary
from stofm.nn import Stofm
from stofm.train import OptimizerConfig, Recipe, StageConfig
from stofm.train.recipe import train_recipe

FAST = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, batch_size=2, accumulation=2)
STAGES = [
    StageConfig(name="cell_encoder", max_steps=3, optimizer=FAST),
    StageConfig(
        name="joint", epochs=1, subslice_cells=17, sampled_cells=3, max_steps=3, optimizer=FAST
    ),
]


@pytest.fixture
def corpus(files, tmp_path, vocabulary):
    st.corpus.build(
        files,
        tmp_path / "corpus",
        vocabulary=vocabulary,
        min_genes=0,
        shard_bytes=30_000,
        show_progress_bar=False,
    )
    return tmp_path / "corpus"


@pytest.fixture
def train(tmp_path, model):
    def run(data, out, trained=model, **options):
        quiet = {"n_threads": 1, "device": "cpu", "show_progress_bar": False}
        given = {"stage": STAGES, "out_dir": tmp_path / out, **quiet, **options}
        result = st.tl.train(data, trained, **given)
        return {name: value.numpy() for name, value in result.model.state_dict().items()}

    return run


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_a_corpus_gives_the_weights_that_its_files_give(train, corpus, files, tmp_path):
    assert same(train(corpus, "two"), train(files, "one"))
    # Nothing is copied.
    assert not (tmp_path / "two" / "work" / "slices").exists()


def test_a_recipe_divides_a_corpus_by_its_files(corpus, tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    entries = {
        "stage": [{"name": "cell_encoder", "max_steps": 1, "optimizer": {"warmup_steps": 0}}],
        "data": {"validation": ["files/e.h5ad"], "exclude": ["b.*", "none.h5ad"]},
        "model": {"checkpoint": str(tmp_path / "model")},
    }
    quiet = {"device": "cpu", "show_progress_bar": False}
    result = train_recipe(corpus, Recipe.from_dict(entries), out_dir=tmp_path / "run", **quiet)
    names = [
        [o.split()[0] for o in result.run["settings"][k]] for k in ("slices", "held_out_slices")
    ]
    assert names == [["a", "c", "d"], ["e"]]
    entries["data"] = {"validation": ["f.h5ad"]}
    with pytest.raises(FileNotFoundError, match=r"'f\.h5ad' names no file of the corpus"):
        train_recipe(corpus, Recipe.from_dict(entries), out_dir=tmp_path / "no", **quiet)


def test_a_vocabulary_is_fitted_on_a_corpus(train, corpus, tmp_path, model, vocabulary):
    result = st.tl.train(
        corpus,
        model.config,
        stage=STAGES[:1],
        out_dir=tmp_path / "run",
        device="cpu",
        show_progress_bar=False,
    )
    genes = result.model.vocabulary.gene_ids
    assert len(genes) > 50
    assert set(genes) <= set(vocabulary.gene_ids)


def test_another_vocabulary_ranks_the_counts_again(train, corpus, files, vocabulary, model):
    other = GeneVocabulary(
        gene_ids=vocabulary.gene_ids,
        symbols=vocabulary.symbols,
        tokens=vocabulary.tokens[::-1],
        medians=vocabulary.medians[::-1],
        special=dict(vocabulary.special),
    )
    renamed = Stofm(model.config, other, seed=1)
    assert same(train(corpus, "two", renamed), train(files, "one", renamed))
    assert not same(train(corpus, "three"), train(corpus, "four", renamed))


def test_training_takes_a_mixture_of_the_slices_of_a_corpus(files, tmp_path, vocabulary, model):
    rows = "".join(f"files/{name}.h5ad\t{name}\n" for name in "abcde")
    (tmp_path / "files.tsv").write_text("source\ttechnology\n" + rows)
    quiet = {"show_progress_bar": False}
    corpus = tmp_path / "corpus"
    st.corpus.build(tmp_path / "files.tsv", corpus, vocabulary=vocabulary, min_genes=0, **quiet)
    options = {"stage": StageConfig(name="cell_encoder"), "device": "cpu", **quiet}
    mixture = {"technology": {"a": 0, "b": 0, "c": 0.5}}
    out = tmp_path / "run"
    run = st.tl.train(corpus, model, out_dir=out, mixture=mixture, **options).run
    assert run["stages"][0]["cells"] in (15 + 43 + 32, 16 + 43 + 32)
    assert run["settings"]["run"]["mixture"] == mixture
    with pytest.raises(ValueError, match="mixture"):
        st.tl.train(corpus, model, out_dir=out, resume=True, **options)
    options["stage"] = StageConfig(name="spatial", subslice_cells=10, optimizer=FAST, epochs=2)
    mixture = {"technology": {"e": 0.25}}
    run = st.tl.train(corpus, model, out_dir=tmp_path / "two", mixture=mixture, **options).run
    # Of 5 + 4 + 4 + 5 + 4 sub-slices; of the last four, one in each epoch.
    assert run["stages"][0]["steps"] == 2 * 5
    with pytest.raises(ValueError, match=r"names \['z'\], and the slices to train on have"):
        st.tl.train(
            corpus, model, out_dir=tmp_path / "no", mixture={"technology": {"z": 1}}, **options
        )
