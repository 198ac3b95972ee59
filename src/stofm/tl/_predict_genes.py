"""``stofm.tl.predict_genes``: expression of genes from the image of the tissue alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from stofm._config import check_one_of, check_seed
from stofm._edge.tables import all_or_nothing, make_frame, refuse_foreign, write_frame, write_record
from stofm._keys import Obsm
from stofm.align.network import LEVELS
from stofm.align.prediction import Method, Views, find_in_panel, predict
from stofm.align.training import project
from stofm.heads.head import refuse_reserved
from stofm.heads.request import resolve_slices
from stofm.nn.device import choose_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from stofm.align.aligner import Aligner


def predict_genes(
    data: Any,
    aligner: Aligner,
    *,
    genes: Sequence[str] | None = None,
    method: Method = "ridge",
    image_key: str = Obsm.X_IMAGE,
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    device: str | torch.device = "auto",
    key_added: str = Obsm.PREDICTED,
    table_key: str | None = None,
    copy: bool = False,
) -> Any:
    """Predict the expression of genes from the image of the tissue.

    Alignment makes spots of different places differ, which is not what prediction needs; so it has
    models of its own, fitted to the spots that the aligner keeps of its slides. Ridge regression and
    the network use the image's features as they are, of the spot beside its niche, scaled by slide;
    retrieval uses the aligned space, and ``"aligned"`` both.

    Each gene has a score: every donor that was aligned (every slide, if donors are not told) is left
    out in turn and predicted from the others. A gene whose score is near 0 can't be told from these
    images. For ``"aligned"`` and ``"retrieval"`` scores are too good, as the aligner has seen the
    slides that are left out here.

    Parameters
    ----------
    data
        AnnData or SpatialData of one or several slides, or a list or dict of them, with features of
        images by :func:`stofm.im.embed` with the aligner's encoder. Counts are not read.
    aligner
        By :func:`stofm.tl.align`, of slides with counts.
    genes
        Genes to predict, by the names or ids of the aligned slides. None: all that these share.
    method
        - ``"ridge"``: linear; each gene has the strength with the least error on left-out spots.
        - ``"aligned"``: mean of ridge regression on the features and on the aligned image.
        - ``"retrieval"``: weighted mean of the 50 spots whose aligned genes are nearest to the image.
        - ``"mlp"``: a network with two hidden layers.
    library_key
        Column of ``obs`` that names each cell's slice.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData, in the form of `data`. Sets:

    ``adata.obsm['stofm_predicted' | key_added]`` : DataFrame
        float32 (n_obs, n_genes) log-normalised expression, ``log1p(10,000 x count / total)`` with the
        total over the genes that all aligned slides share.
    ``adata.uns['stofm']['stofm_predicted']`` : dict
        Parameters, among them the genes whose counts are the total, fingerprint of the aligner, and
        ``scores``: a DataFrame by gene with ``pearson`` and
        ``mse`` on left-out donors or slides, NaN if a single one was aligned.

    Other Parameters
    ----------------
    image_key
        What the names of the image features in ``obsm`` start with.
    spatial_key
        Entry of ``obsm`` with the coordinates, in the unit of :func:`stofm.im.embed`.
    seed
        Seed of the network.
    device
        Where the aligner computes: ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    key_added
        Entry of ``obsm`` to write.
    table_key
        Table of a SpatialData.
    copy
        Return changed copies and leave `data` as it is.

    Raises
    ------
    KeyError
        There are no features of images, or a gene is not in the aligned slides.
    ValueError
        Features are of another encoder or other patches, or the aligner has no expression.

    See Also
    --------
    stofm.tl.align : fits the aligner.
    stofm.pl.gene_prediction : draws predicted beside measured values.
    stofm.tl.impute : genes from other genes.

    References
    ----------
    Xie et al. 2023, Spatially resolved gene expression prediction from histology images via bi-modal
    contrastive learning (NeurIPS), for retrieval.

    Examples
    --------
    >>> import stofm as st
    >>> slides = st.datasets.simulate_slice(300, 60, technology="visium", n_slices=3, image=True)
    >>> st.im.embed(slides, "statistics")
    >>> is_new = slides.obs["slice_id"] == "slice2"
    >>> aligner = st.tl.align(slides[~is_new], options=st.tl.AlignOptions(epochs=2))
    >>> new = slides[is_new].copy()
    >>> st.tl.predict_genes(new, aligner, genes=["GFAP", "MBP"])
    >>> new.obsm["stofm_predicted"].shape
    (300, 2)
    """
    check_seed(seed)
    check_one_of("method", method, get_args(Method))
    columns = find_in_panel(aligner.genes.panel, genes)
    refuse_reserved(key_added, Obsm.PREDICTED, spatial_key, library_key)
    slices = resolve_slices(data, library_key, spatial_key, table_key, copy=copy)
    slices.each(lambda table: refuse_foreign(table, key_added, obsm=[key_added]))
    target = slices.copied() if copy else slices
    spots, features = aligner.read(target, "image", image_key, spatial_key)
    aligned = project(aligner.network, features, choose_device(device))
    query = Views(
        np.concatenate([features[f"{level}_image"] for level in LEVELS], axis=1),
        np.concatenate([*aligned["image"].values()], axis=1),
    )
    chosen = np.array(list(columns.values()))
    found, scores = predict(aligner.reference, query, chosen, method=method, seed=int(seed))
    scores.index = list(columns)
    values, names = spots.to_tables(found), list(columns)
    inputs = [gene.name for gene in aligner.genes.panel]
    params = {"method": method, "image_key": image_key, "seed": int(seed), "inputs": inputs}
    more = {"scores": scores, "fingerprint": aligner.fingerprint}
    with all_or_nothing(*target.tables):
        for table, place in zip(target.tables, target.places, strict=True):
            write_record(table, key_added, params, **more)
            write_frame(table, key_added, make_frame(table, values[place], names), names)
    return target.as_given() if copy else None
