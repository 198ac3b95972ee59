"""``stofm.tl.perturb``: what a model makes of edited genes, cells and edges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from stofm._keys import Obsm
from stofm.heads.request import Request
from stofm.perturb.perturbing import Question, perturb_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from stofm.heads.annotation import AnnotationHead
    from stofm.nn import Stofm
    from stofm.perturb.effect import PerturbationEffect


def perturb(
    adata: Any,
    *,
    genes: Mapping[str, Literal["delete", "first"] | float] | None = None,
    remove: bool = False,
    replace: Any = None,
    move: Sequence[float] | None = None,
    detach: Any = None,
    shuffle: bool | str = False,
    cells: Any = None,
    receivers: Any = None,
    goal: Mapping[str, object] | tuple[AnnotationHead, str] | None = None,
    recompute: Literal["micro", "macro"] = "micro",
    null: int = 100,
    model: Stofm | str | Path | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    device: str | torch.device = "auto",
    table_key: str | None = None,
    show_progress_bar: bool = True,
) -> PerturbationEffect:
    """Edit a slice in the model's input, and compare the embeddings of its cells before and after.

    Shifts of embeddings are sensitivities of a model, not sizes of a biological effect: they say what
    the model reads, and are worth as much as the model. The test compares them with those of random
    edits of the same kind.

    Unlike other functions of ``st.tl`` it writes nothing to `adata`: its result is of an edit that
    `adata` does not hold, and many may be asked for.

    Pass one of `genes`, `remove`, `replace`, `move`, `detach` and `shuffle`. Cells, genes and places
    that are named by `cells`, `replace`, `detach` and `receivers` are given by a boolean mask (n_obs,),
    names from ``adata.obs_names``, or a query of ``adata.obs`` such as ``"cell_type == 'CAF'"``.

    Parameters
    ----------
    adata
        Annotated data of one or several slices with raw counts and coordinates, or a SpatialData with
        such a table.
    genes
        What becomes of genes, by name: ``"delete"`` takes them out of the cell's list of genes and
        leaves the values of others, ``"first"`` puts them in front of it, a number sets their count,
        which changes the cell's total too.
    remove
        Take the cells away.
    replace
        Cells that the selected ones are replaced by, each by one drawn at random; places stay.
    move
        Move the cells by (x, y), in the unit of the coordinates.
    detach
        Cells that the selected ones don't read any more: there is no attention to them, and no mean
        over them.
    shuffle
        Deal the positions of the cells out anew among them, slice by slice, or within each group of a
        column of ``obs``. With ``cells=None`` the whole tissue is rewired.
    cells
        Cells to edit; all by default.
    receivers
        Cells over which the effect is averaged. By default the edited ones; where cells are removed,
        their neighbours.
    goal
        Columns of ``obs`` and their values, such as ``{"stofm_domain": "3"}``: the effect is then by
        how much nearer receivers come to the mean embedding of the cells that have all of these. Or a
        head of :func:`stofm.tl.annotate` and one of its classes, ``(head, "Tumour")``: by how much its
        probability rises. The head must be fitted to ``use_rep="X_stofm"`` with
        ``HeadOptions(n_neighbors=0, n_components=0)``.
    null
        Random edits to compare with: of as many other genes, of like detection and mean count in the
        same cells; or of as many other cells, of like number of genes and counts. 0 for none.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.

    Returns
    -------
    stofm.tl.PerturbationEffect
        ``cells``, a DataFrame of all cells: role, distance to the nearest edited cell, shift.
        ``genes``, a DataFrame of the edited genes: effect, null, z, p and FDR (Benjamini-Hochberg).
        ``overall``, the same of the edit as a whole. Sets nothing.

    Other Parameters
    ----------------
    recompute
        ``"micro"`` keeps sub-slices, clusters and virtual cells, and computes sub-slices with edited
        cells only. ``"macro"`` cuts and clusters the edited slice anew, and computes all of it.
    model
        A :class:`stofm.Stofm`, a checkpoint folder or a hub id; by default that of the goal's head, or
        ``"stofm-mini"``. Computes in float32, as differences count.
    layer
        Layer with raw counts; by default ``X``, or the layer that was embedded.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), any unit.
    seed
        Seed of the clustering, as in :func:`stofm.tl.embed`, and of all that is drawn.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    table_key
        Table of a SpatialData.
    show_progress_bar
        Show bars.

    Raises
    ------
    KeyError
        There is no such gene, column, layer or cell.
    ValueError
        A gene is not in the vocabulary, no cells are selected, a slice would be empty, `adata` holds
        embeddings or a goal by another model, or counts, genes or coordinates are not usable.
    FloatingPointError
        The device gave NaN.

    See Also
    --------
    stofm.tl.screen : many genes, one by one.
    stofm.pl.perturbation : a map of the shift.

    References
    ----------
    Deleting genes from a cell's list, and putting them first, follows Geneformer (Theodoris et al.
    2023, Nature 618:616); its cells have no neighbours.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 60, seed=0)
    >>> gene = adata.var_names[0]
    >>> effect = st.tl.perturb(adata, genes={gene: "delete"}, null=10)
    >>> effect.genes.loc[gene, "status"]
    'tested'
    """
    request = Request(
        model, Obsm.X, library_key, layer, spatial_key, seed, device, show_progress_bar
    )
    question = Question.read(
        adata, request, table_key, cells, receivers, goal, recompute=recompute, n_null=null
    )
    return perturb_table(
        question,
        genes=genes,
        remove=remove,
        replace=replace,
        move=move,
        detach=detach,
        shuffle=shuffle,
    )
