"""``stofm.tl.screen``: many genes, each edited by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from stofm._keys import Obsm
from stofm.heads.request import Request
from stofm.perturb.perturbing import Question, screen_genes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    import torch

    from stofm.heads.annotation import AnnotationHead
    from stofm.nn import Stofm


def screen(
    adata: Any,
    genes: Sequence[str] | Literal["expressed"] = "expressed",
    *,
    edit: Literal["delete", "first"] = "delete",
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
) -> pd.DataFrame:
    """Edit genes one by one in the same cells, and rank them by how far that moves the embeddings.

    What ranks high is what the model is sensitive to, beyond other genes that are detected as often:
    a question for an experiment, not its answer. See :func:`stofm.tl.perturb`, whose result for a
    single gene has more detail.

    Parameters
    ----------
    adata
        Annotated data of one or several slices with raw counts and coordinates, or a SpatialData with
        such a table. It is not changed.
    genes
        Names of genes, or ``"expressed"``: those in the input of 5 % of the cells or more.
    edit
        ``"delete"`` or ``"first"``.
    cells, receivers, goal, recompute
        Which cells are edited, whose shift counts, and what is computed anew: see
        :func:`stofm.tl.perturb`.
    null
        Genes that each is compared with, of like detection and mean count in the same cells: of the
        genes that are screened if they are more than these, else of all. 0 for none.

    Returns
    -------
    pandas.DataFrame
        A row for each gene, highest z first (highest effect without a null), with the columns of
        :attr:`stofm.tl.PerturbationEffect.genes`. Sets nothing.

    Other Parameters
    ----------------
    model, library_key, layer, spatial_key, seed, device, table_key, show_progress_bar
        See :func:`stofm.tl.perturb`.

    Raises
    ------
    KeyError, ValueError, FloatingPointError
        See :func:`stofm.tl.perturb`.

    See Also
    --------
    stofm.tl.perturb : one edit, in detail.
    stofm.pl.perturbation : draws the effect.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 60, seed=0)
    >>> table = st.tl.screen(adata, null=20)
    >>> table.index.name
    'gene'
    """
    request = Request(
        model, Obsm.X, library_key, layer, spatial_key, seed, device, show_progress_bar
    )
    question = Question.read(
        adata, request, table_key, cells, receivers, goal, recompute=recompute, n_null=null
    )
    return screen_genes(question, genes, edit)
