"""Fitting an aligner to slides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.tables import label_text
from stofm._files import local
from stofm._logging import logger
from stofm.align.aligner import Aligner, Reference
from stofm.align.expression import GeneBranch
from stofm.align.inputs import Spots, read_images
from stofm.align.network import LEVELS
from stofm.align.training import AlignSamples, project, score_retrieval, train
from stofm.nn.device import choose_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    import torch
    from numpy.typing import NDArray

    from stofm.align.config import AlignOptions
    from stofm.heads.request import SliceTables

#: Spots that are kept for prediction; of more, every second or third one is.
_MOST_KEPT: Final = 10_000


def fit_aligner(
    slices: SliceTables,
    *,
    genes: str | Sequence[str],
    donor_key: str | None,
    image_key: str,
    options: AlignOptions,
    layer: str | None,
    spatial_key: str,
    seed: int,
    device: str | torch.device,
    checkpoint: str | PathLike[str] | None,
    show_progress_bar: bool,
    params: dict[str, Any],
) -> Aligner:
    """Fit an aligner; see :func:`stofm.tl.align`."""
    images, origin = read_images(slices, image_key)
    spots = Spots.read(
        slices, origin.sides[1], spatial_key, key=image_key, self_in_niche=options.self_in_niche
    )
    features = {name: spots.standardised(one[spots.rows]) for name, one in images.items()}
    donors = _donors(slices, spots, donor_key)
    branch, of_genes, expression = GeneBranch.fit(
        genes, slices, spots, layer=layer, n_components=options.n_components
    )
    features |= of_genes
    held_out = _held_out(donors, spots, donor_key)
    clusters = None
    if options.negatives == "other_clusters":
        from sklearn.cluster import KMeans

        n = min(options.n_clusters, len(spots))
        clusters = KMeans(n, n_init=3, random_state=seed).fit_predict(features["spot_genes"])
    where = spots.where(clusters)

    trained_on, validation = (
        AlignSamples(features, where, spots, slides, options, seed)
        for slides in ([k for k in range(len(spots.parts)) if k not in held_out], held_out)
    )
    network, history = train(
        trained_on,
        validation if held_out else None,
        device=device,
        checkpoint=None if checkpoint is None else local(checkpoint),
        show_progress_bar=show_progress_bar,
    )
    aligned = project(network, features, choose_device(device))
    retrieval = score_retrieval(aligned, spots, held_out)
    for (split, level), own in retrieval.groupby(["split", "level"], sort=False):
        logger.info(
            "%s, %s: within its slide the partner is among the 10 nearest for %.1f%% of the spots "
            "(by chance %.1f%%).",
            *(split, level, 100 * own["top_10"].mean(), 100 * own["chance_10"].mean()),
        )
    kept = np.arange(0, len(spots), -(-len(spots) // _MOST_KEPT))
    reference = Reference(
        image=np.concatenate([features[f"{level}_image"] for level in LEVELS], axis=1)[kept],
        aligned_image=np.concatenate([*aligned["image"].values()], axis=1)[kept],
        aligned_genes=np.concatenate([*aligned["genes"].values()], axis=1)[kept],
        expression=sparse.csr_matrix((len(kept), 0), dtype=np.float32)
        if expression is None
        else expression[kept],
        group=np.repeat(donors, [p.stop - p.start for p in spots.parts])[kept],
    )
    return Aligner(network, origin, branch, reference, history, retrieval, params)


def _donors(slices: SliceTables, spots: Spots, donor_key: str | None) -> NDArray[np.int64]:
    """Number of each slide's donor; slides are their own donors where these are not told."""
    if donor_key is None:
        return np.arange(len(spots.parts))

    def read(table: Any) -> NDArray[np.object_]:
        if donor_key not in table.obs:
            raise KeyError(
                f"There is no obs[{donor_key!r}] that names donors; its columns are "
                f"{list(map(str, table.obs.columns))[:20]}."
            )
        return label_text(table.obs[donor_key])

    values = np.concatenate(slices.each(read)).astype(str)[spots.rows]
    found = []
    for name, part in zip(spots.names, spots.parts, strict=True):
        donors = np.unique(values[part])
        if len(donors) != 1 or donors[0] == "":
            raise ValueError(
                f"obs[{donor_key!r}] must name the one donor of each slice; slice {name!r} has "
                f"{donors.tolist()[:5]}."
            )
        found.append(donors[0])
    codes: NDArray[np.int64] = np.unique(found, return_inverse=True)[1]
    return codes


def _held_out(donors: NDArray[np.int64], spots: Spots, donor_key: str | None) -> list[int]:
    """Slides of the donor with the fewest spots, which are held out if donors are told."""
    if donor_key is None:
        return []
    if donors.max(initial=0) == 0:
        raise ValueError(
            f"obs[{donor_key!r}] names one donor, and one has to be held out: leave `donor_key` out, "
            "or pass slides of several donors."
        )
    sizes = np.bincount(donors, weights=[part.stop - part.start for part in spots.parts])
    found: list[int] = np.flatnonzero(donors == sizes.argmin()).tolist()
    names = [spots.names[k] for k in found]
    logger.info("Slides %s, of the donor with the fewest spots, are held out.", names)
    return found
