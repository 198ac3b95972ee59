from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import sparse

import stofm as st
from stofm.heads.request import Request
from stofm.perturb.reading import Subject

GENE = "ENSG00000000007"
LIBRARY = {"library_key": "library"}


@pytest.fixture
def model(responsive_model):
    return responsive_model


@pytest.fixture
def perturb(adata, model):
    """`st.tl.perturb` with little to compare with."""

    def call(data=adata, **options):
        return st.tl.perturb(data, **{"model": model, "null": 0, **LIBRARY, **options})

    return call


def set_gene(adata, count):
    counts = adata.X.toarray()
    counts[:, adata.var_names.get_loc(GENE)] = count
    adata.X = sparse.csr_matrix(counts)


def same(first, second):
    """Whether two AnnData hold the same."""
    return (
        np.array_equal(first.X.toarray(), second.X.toarray())
        and first.obs.equals(second.obs)
        and first.var.equals(second.var)
        and set(first.obsm) == set(second.obsm)
        and set(first.uns) == set(second.uns)
    )


def test_deleting_a_gene_is_embedding_without_it(adata, model, perturb):
    cells = adata.obs["kind"] == "1"
    effect = perturb(genes={GENE: "delete"}, cells="kind == '1'")
    subject = Subject.read(adata, Request(model, show_progress_bar=False, **LIBRARY), None)
    st.tl.embed(adata, model, **LIBRARY)
    np.testing.assert_allclose(
        subject.tissue.embeddings(np.arange(adata.n_obs)), adata.obsm["X_stofm"], atol=1e-6
    )
    is_edited = cells & (adata[:, GENE].X.toarray()[:, 0] > 0)
    table = effect.cells
    assert set(table.index[table["role"] == "edited"]) <= set(table.index[is_edited])
    assert (table["role"] == "edited").sum() > 0
    assert effect.genes.loc[GENE, "n_cells"] == (table["role"] == "edited").sum()
    assert effect.overall["effect"] == pytest.approx(table["l2"][table["role"] == "edited"].mean())
    assert (table["l2"][table["role"] == "neighbor"] > 0).any()


def test_the_table_of_the_user_stays_as_it_is(adata, perturb):
    before = adata.copy()
    perturb(genes={GENE: "first"}, goal={"kind": "2"}, null=3)
    for edit in ({"remove": True}, {"shuffle": "kind"}, {"replace": "kind == '0'"}):
        perturb(cells=adata.obs_names[:20], **edit)
    assert same(adata, before)


def test_cells_outside_the_input_are_named_so(adata, perturb):
    set_gene(adata, 0)
    with pytest.warns(UserWarning, match="in the input of none of the 184 selected cells"):
        effect = perturb(genes={GENE: "delete"}, null=4)
    assert effect.genes.loc[GENE, "status"] == "not_in_input"
    assert np.isnan(effect.genes.loc[GENE, "effect"])
    assert np.isnan(effect.genes.loc[GENE, "p"])
    assert set(effect.cells["role"]) == {"not_in_input"}
    assert effect.cells["l2"].isna().all()


def test_a_count_that_is_there_already_changes_nothing(adata, perturb):
    set_gene(adata, 3)
    effect = perturb(genes={GENE: 3})
    assert (effect.cells["l2"] == 0).all()
    assert (effect.cells["cosine"] == 0).all()
    assert effect.overall["effect"] == 0


def test_a_count_of_many_moves_the_gene_forward(perturb):
    more, first = perturb(genes={GENE: 1000}), perturb(genes={GENE: "first"})
    assert more.overall["n_edited"] == first.overall["n_edited"] == 184
    # The model of the tests reads the order alone.
    np.testing.assert_allclose(more.cells["l2"], first.cells["l2"], atol=1e-6)


def test_genes_are_tested_together_and_each_by_itself(perturb):
    genes = {GENE: "delete", "GENE12": "first"}
    effect = perturb(genes=genes, null=9)
    assert effect.genes.index.tolist() == list(genes)
    assert effect.genes["edit"].tolist() == ["delete", "first"]
    alone = perturb(genes={"GENE12": "first"}, null=9)
    assert effect.genes.loc["GENE12", "effect"] == pytest.approx(alone.overall["effect"])
    assert effect.genes.loc["GENE12", "p"] == pytest.approx(alone.genes.loc["GENE12", "p"])
    assert effect.overall["effect"] != pytest.approx(alone.overall["effect"])
    assert effect.genes["n_null"].tolist() == [9, 9]
    assert (effect.genes["fdr"] >= effect.genes["p"]).all()


def test_removed_cells_leave_neighbors_that_shift(adata, perturb):
    names = adata.obs_names[:12]
    effect = perturb(remove=True, cells=names, null=5)
    role = effect.cells["role"]
    assert set(role.index[role == "removed"]) == set(names)
    assert effect.cells.loc[names, "l2"].isna().all()
    assert effect.overall["n_receivers"] == (role == "neighbor").sum()
    assert effect.overall["effect"] > 0
    assert effect.overall["n_null"] == 5
    assert len(effect.genes) == 0


@pytest.mark.parametrize(
    "edit",
    [
        {"replace": "kind == '0'"},
        {"move": (40.0, -20.0)},
        {"detach": "kind == '0'"},
        {"shuffle": True},
        {"shuffle": "library"},
    ],
    ids=lambda edit: next(iter(edit)),
)
def test_other_edits_shift_the_edited_cells_reproducibly(perturb, edit):
    effect = perturb(cells="kind == '1'", null=4, seed=3, **edit)
    assert effect.overall["effect"] > 0
    assert effect.overall["n_null"] == 4
    again = perturb(cells="kind == '1'", null=4, seed=3, **edit)
    assert again.overall == effect.overall
    assert again.cells.equals(effect.cells)


def test_nothing_to_detach_from_and_nowhere_to_move_is_0(adata, perturb):
    here, there = ((adata.obs["library"] == name).to_numpy() for name in ("left", "right"))
    assert perturb(detach=there, cells=here).overall["effect"] == 0
    assert perturb(move=(0, 0)).overall["effect"] == 0
    adata.obs["own"] = adata.obs_names
    assert perturb(shuffle="own").overall["effect"] == 0


def test_a_whole_slice_has_no_null_of_its_own(perturb):
    effect = perturb(shuffle=True, null=3)
    assert effect.overall["n_null"] == 0
    assert np.isnan(effect.overall["p"])


def test_receivers_and_a_goal_say_what_the_effect_is(adata, model, perturb):
    options = {"genes": {GENE: "delete"}, "cells": "kind == '1'"}
    effect = perturb(receivers="kind == '2'", goal={"kind": "0", "library": "left"}, **options)
    st.tl.embed(adata, model, **LIBRARY)
    is_goal = (adata.obs["kind"] == "0") & (adata.obs["library"] == "left")
    goal = adata.obsm["X_stofm"][is_goal].mean(axis=0)
    is_receiver = adata.obs["kind"] == "2"
    towards = effect.cells["towards"]
    assert effect.overall["effect"] == pytest.approx(towards[is_receiver].mean())
    assert effect.overall["n_receivers"] == is_receiver.sum()
    gaps = np.linalg.norm(adata.obsm["X_stofm"] - goal, axis=1)
    is_shifted = effect.cells["l2"] > 0
    assert (towards[is_shifted] != 0).all()
    assert (np.abs(towards) <= np.minimum(effect.cells["l2"], gaps) + 1e-5)[is_shifted].all()


@pytest.fixture
def head(adata, model, few_epochs):
    """A head that reads the embedding alone."""
    options = st.tl.HeadOptions(n_neighbors=0, n_components=0)
    how = {"label_key": "kind", "model": model, "use_rep": "X_stofm", "options": options}
    return st.tl.annotate(adata, **how, **LIBRARY)


def test_a_class_of_a_head_is_a_goal(adata, model, perturb, head):
    options = {"genes": {GENE: "delete"}, "cells": "kind == '1'"}
    st.tl.annotate(adata, head=head, model=model, **LIBRARY)
    before = adata.obsm["stofm_annotation_proba"]
    towards = {
        name: perturb(goal=(head, name), **options).cells["towards"] for name in head.classes
    }
    for name, values in towards.items():
        after = before[name] + values.fillna(0.0)
        assert after.between(-1e-6, 1 + 1e-6).all()
    assert np.abs(sum(towards.values())).max() < 1e-5
    assert max(values.abs().max() for values in towards.values()) > 1e-3
    tested = perturb(goal=(head, "2"), null=4, **options)
    edited = tested.cells["role"] == "edited"
    assert tested.genes.loc[GENE, "effect"] == pytest.approx(towards["2"][edited].mean())
    assert tested.genes.loc[GENE, "n_null"] == 4


def test_slices_are_edited_as_if_alone(adata, model, perturb):
    both = perturb(genes={GENE: "delete"})
    left = adata[adata.obs["library"] == "left"].copy()
    alone = st.tl.perturb(left, genes={GENE: "delete"}, model=model, null=0)
    np.testing.assert_allclose(both.cells.loc[left.obs_names, "l2"], alone.cells["l2"], atol=1e-5)


def test_a_macro_effect_lets_virtual_cells_move(perturb):
    options = {"genes": {GENE: "delete"}, "cells": "kind == '1' and library == 'left'"}
    micro, macro = (perturb(recompute=way, **options) for way in ("micro", "macro"))
    assert not np.allclose(macro.cells["l2"], micro.cells["l2"])
    assert set(macro.cells["role"]) <= {"edited", "neighbor", "far", "not_in_input", "out_of_reach"}
    right = micro.cells["role"] == "out_of_reach"
    assert right.any()
    assert (macro.cells["l2"][right & (micro.cells["distance"].isna())] == 0).all()
    assert (perturb(genes={GENE: "delete"}, recompute="macro", remove=False).cells["l2"] > 0).any()
    nothing = perturb(move=(0, 0), recompute="macro")
    assert (nothing.cells["l2"] == 0).all()


def test_shifted_and_scaled_coordinates_change_nothing(adata, perturb):
    options = {"genes": {GENE: "delete"}, "cells": "kind == '1'"}
    expected = perturb(**options).cells
    adata.obsm["spatial"] = adata.obsm["spatial"] * 0.3 - [900.0, 70.0]
    found = perturb(**options).cells
    np.testing.assert_allclose(found["l2"], expected["l2"], atol=1e-5)
    np.testing.assert_allclose(found["distance"], expected["distance"] * 0.3)
    assert found["role"].equals(expected["role"])


def test_masks_names_and_queries_select_the_same(adata, perturb):
    mask = (adata.obs["kind"] == "1").to_numpy()
    found = [
        perturb(genes={GENE: "delete"}, cells=cells).cells
        for cells in (
            mask,
            adata.obs["kind"] == "1",
            (adata.obs["kind"] == "1").sample(frac=1, random_state=0),
            adata.obs_names[mask],
            adata.obs_names[mask].tolist(),
            "kind == '1'",
        )
    ]
    assert all(one.equals(found[0]) for one in found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"genes": {"ENSG00000000999": "delete"}}, KeyError, "no gene .* Nearest"),
        (
            {"genes": {"ENSG90000000001": "delete"}},
            ValueError,
            "not in the vocabulary of model 'ti",
        ),
        ({"genes": {GENE: "silence"}}, ValueError, "'delete', 'first' or a count, found 'silence'"),
        ({"genes": {GENE: -1}}, ValueError, "or a count, found -1"),
        ({"genes": {GENE: "delete", "GENE7": "first"}}, ValueError, "are the same"),
        ({}, ValueError, "Pass one edit: genes, remove.* found none"),
        ({"genes": {GENE: "first"}, "remove": True}, ValueError, "found .'genes', 'remove'."),
        ({"remove": True, "cells": "kind == '9'"}, ValueError, "selects no cells.*holds .'0', '1'"),
        ({"remove": True, "cells": "type == '9'"}, ValueError, "is not a query of obs .*columns"),
        (
            {"remove": True, "cells": "kind = '9'"},
            ValueError,
            "is not a query of obs|gives no truth",
        ),
        ({"remove": True, "cells": np.ones(7, dtype=bool)}, ValueError, "there are 184 cells"),
        ({"remove": True, "cells": ["cell1", "x"]}, KeyError, "1 of 2 names in `cells`"),
        ({"remove": True, "cells": np.arange(4)}, TypeError, "expected a mask of the cells, names"),
        ({"remove": True}, ValueError, "removes all .* cells of a slice"),
        ({"shuffle": "region"}, KeyError, "There is no obs.'region'."),
        ({"move": (1.0,)}, ValueError, "move must be .x, y., finite"),
        (
            {"remove": True, "goal": {"region": 1}},
            KeyError,
            "There is no obs.'region'.",
        ),
        (
            {"remove": True, "goal": {"kind": "7"}},
            ValueError,
            "No cell has obs.'kind'. == '7'.*holds",
        ),
        ({"remove": True, "goal": "2"}, TypeError, "goal must be columns of obs .*found '2'"),
        ({"remove": True, "goal": ("kind", "2")}, TypeError, "Expected a head for annotation"),
        ({"remove": True, "recompute": "all"}, ValueError, "recompute must be one of"),
        ({"remove": True, "null": -2}, ValueError, "null must be a whole number"),
        ({"remove": True, "seed": -2}, ValueError, "seed must"),
    ],
)
def test_messages(perturb, options, error, message):
    with pytest.raises(error, match=message):
        perturb(**options)


def test_embeddings_and_goals_of_another_model_are_refused(adata, model, perturb, head):
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.se2_transformer.input_projection.weight)
    st.tl.embed(adata, other, **LIBRARY)
    st.tl.domains(adata, n_domains=3)
    with pytest.raises(
        ValueError, match=r"obsm.'X_stofm'. is by tiny .*Pass the model that made it"
    ):
        perturb(remove=True, cells="kind == '1'", model=None)
    with pytest.raises(ValueError, match=r"obs.'stofm_domain'. is by tiny"):
        perturb(remove=True, cells="kind == '1'", goal={"stofm_domain": "1"})
    with pytest.raises(ValueError, match=r"The head was fitted to embeddings from tiny"):
        perturb(model=other, remove=True, cells="kind == '1'", goal=(head, "1"))
    with pytest.raises(ValueError, match=r"no class '9' for `goal`; it has \['0', '1', '2'\]"):
        perturb(remove=True, cells="kind == '1'", goal=(head, "9"))
    found = perturb(model=other, remove=True, cells="kind == '1'", goal={"stofm_domain": "1"})
    assert np.isfinite(found.overall["effect"])


def test_views_and_tables_of_spatialdata_are_read(adata, model, perturb):
    options = {"genes": {GENE: "delete"}}
    expected = perturb(**options).cells
    assert perturb(adata[:, ::1], **options).cells.equals(expected)
    SpatialData = pytest.importorskip("spatialdata").SpatialData
    sdata = SpatialData(tables={"table": adata.copy()})
    assert perturb(sdata, **options).cells.equals(expected)
    assert perturb(sdata, table_key="table", **options).cells.equals(expected)
