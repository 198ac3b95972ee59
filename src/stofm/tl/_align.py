"""``stofm.tl.align``: one space for images of tissue and expression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._config import check_seed
from stofm._keys import Obsm
from stofm.align.config import AlignOptions
from stofm.align.fitting import fit_aligner
from stofm.heads.request import resolve_slices

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    import torch

    from stofm.align.aligner import Aligner
    from stofm.align.config import Preset


def align(
    data: Any,
    *,
    genes: str | Sequence[str] = "pca",
    donor_key: str | None = None,
    image_key: str = Obsm.X_IMAGE,
    options: AlignOptions | Preset = "stofm",
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    device: str | torch.device = "auto",
    checkpoint: str | PathLike[str] | None = None,
    table_key: str | None = None,
    show_progress_bar: bool = True,
) -> Aligner:
    """Align the image of tissue with expression, of spots and of their niches.

    Features of images are those of :func:`stofm.im.embed`; no image is read. Four branches (image and
    genes, of the spot and of its niche) are projected on the unit sphere, and at each level attention
    fuses the image with the genes for the loss across scales. Three losses bring together the image and the genes of a spot,
    those of a niche, and a spot and its niche, against other spots of the batch.

    Features of every branch are scaled slide by slide: else the stain, or depth, would tell slides
    apart and with it the partner. The niche's genes are the mean log-normalised expression of the
    spots within half the side of its patch, itself included.

    Parameters
    ----------
    data
        AnnData of one or several slices with coordinates, raw counts and features of images, or a
        SpatialData with such a table; or a list or dict of them, which are different slices.
    genes
        - ``"pca"``: principal components of log-normalised expression.
        - ``"mlp"``: the expression itself, of the 1,000 genes that vary most.
        - ``"stofm"``: ``X_stofm_cell`` for the spot and ``X_stofm`` for the niche.
        - An entry of ``obsm``, averaged for the niche; or two, for the spot and the niche.
    donor_key
        Column of ``obs`` with the donor of each slice. The donor with the fewest spots is held out:
        losses and retrieval on it are logged, and the weights with its lowest loss are kept. None:
        nothing is held out.
    image_key
        What the names of the image features in ``obsm`` start with.
    options
        ``"stofm"``, ``"st-align"`` (as ST-Align is described), or :class:`stofm.tl.AlignOptions`.
    library_key
        Column of ``obs`` that names each cell's slice.

    Returns
    -------
    The :class:`stofm.tl.Aligner`, whose method ``transform`` writes ``obsm["X_aligned"]``. Nothing is
    written to `data`.

    Other Parameters
    ----------------
    layer
        Layer with raw counts; by default the one that was embedded, if any, else ``adata.X``.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), in the unit of :func:`stofm.im.embed`.
    seed
        Seed of first weights, batches and dropout.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device. Started by torchrun or SLURM, several
        processes share each batch, each on a device of its own.
    checkpoint
        File that training is written to every ten minutes and at its end. The same call goes on from
        it after a stop, and ends as if there had been none. Delete it when the aligner is saved.
    table_key
        Table of a SpatialData.
    show_progress_bar
        Show a bar.

    Raises
    ------
    KeyError
        There are no features of images, or a column, entry or layer is missing.
    ValueError
        Features are of different encoders or patches, slices share no gene, a slice has several
        donors, an option is not usable, or `checkpoint` is of another training.
    FloatingPointError
        The loss is NaN or infinite.

    See Also
    --------
    stofm.im.embed : features of the image.
    stofm.tl.predict_genes : expression from the image.

    References
    ----------
    ST-Align: Multi-Scale Image-Gene Foundation Modeling for Spatial Transcriptomics via Spot-Niche
    Alignment (openreview.net/forum?id=EWzPy228cM).

    Examples
    --------
    >>> import stofm as st
    >>> slides = st.datasets.simulate_slice(300, 60, technology="visium", n_slices=2, image=True)
    >>> st.im.embed(slides, "statistics")
    >>> aligner = st.tl.align(slides, options=st.tl.AlignOptions(epochs=2))
    >>> aligner.transform(slides)
    >>> slides.obsm["X_aligned"].shape
    (600, 128)
    """
    check_seed(seed)
    chosen = AlignOptions.of(options)
    slices = resolve_slices(data, library_key, spatial_key, table_key)
    params = {
        "genes": genes if isinstance(genes, str) else list(genes),
        "donor_key": donor_key,
        "library_key": library_key,
        "layer": layer,
        "spatial_key": spatial_key,
        "seed": int(seed),
    }
    return fit_aligner(
        slices,
        genes=genes,
        donor_key=donor_key,
        image_key=image_key,
        options=chosen,
        layer=layer,
        spatial_key=spatial_key,
        seed=int(seed),
        device=device,
        checkpoint=checkpoint,
        show_progress_bar=show_progress_bar,
        params=params,
    )
