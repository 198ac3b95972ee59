"""Goals of an edit: cells with given values in ``obs``, or a class of a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stofm._keys import Obsm
from stofm.heads.annotation import AnnotationHead
from stofm.heads.embeddings import describe_origin, origin_by, same_origin
from stofm.heads.head import require_head
from stofm.heads.network import apply_head
from stofm.heads.trust import calibrated_probabilities, log_scores
from stofm.perturb.reading import require_model, values_in

if TYPE_CHECKING:
    from stofm.nn import Stofm
    from stofm.perturb.reading import Subject

#: From embeddings (m, d) to how near they are to a goal, (m,).
Goal = Callable[[NDArray[Any]], NDArray[Any]]


def read_goal(subject: Subject, wanted: Any) -> Goal | None:
    """Function that says how near embeddings are to a goal as users name one; None without a goal.

    The negative distance from the mean unedited embedding of the cells that have the wanted values in
    ``obs``, or the probability of a class.
    """
    if wanted is None:
        return None
    if isinstance(wanted, tuple) and len(wanted) == 2:
        return _to_class(*wanted, subject.tissue.model)
    if not isinstance(wanted, Mapping):
        raise TypeError(
            "goal must be columns of obs with their values, such as {'cell_type': 'B'}, or a head "
            f"and one of its classes, (head, 'B'); found {wanted!r}."
        )
    adata, is_goal = subject.adata, np.ones(subject.adata.n_obs, dtype=bool)
    for column, value in wanted.items():
        is_goal &= subject.labels(column) == str(value)
        require_model(adata, column, f"obs[{column!r}]", subject.tissue.model)
    if not is_goal.any():
        said = ", ".join(f"obs[{name!r}] == {str(value)!r}" for name, value in wanted.items())
        there_are = values_in(adata, " ".join(map(str, wanted)))
        raise ValueError(f"No cell has {said}, the `goal`.{there_are}")
    center = subject.tissue.embeddings(np.flatnonzero(is_goal)).mean(axis=0, dtype=np.float64)
    return lambda embeddings: -np.linalg.norm(embeddings - center, axis=1)


def _to_class(head: AnnotationHead, name: str, model: Stofm) -> Goal:
    require_head(head, AnnotationHead)
    if name not in head.classes:
        raise ValueError(f"The head has no class {name!r} for `goal`; it has {list(head.classes)}.")
    probabilities, k = class_probabilities(head, model), head.classes.index(name)
    return lambda embeddings: probabilities(embeddings)[:, k].astype(np.float64)


def class_probabilities(head: AnnotationHead, model: Stofm) -> Goal:
    """Probabilities (m, n_classes) of the classes of a head, from embeddings by a model.

    Raises
    ------
    ValueError
        The head uses something other than the embedding, or belongs to another model.
    """
    if head.use_rep != (Obsm.X,) or set(head.reads) != {"embedding"}:
        raise ValueError(
            f"The head uses obsm{list(head.use_rep)} and {sorted(set(head.reads))}; of edited cells "
            f"the embedding alone is known. Fit one with use_rep={Obsm.X!r} and "
            "options=st.tl.HeadOptions(n_neighbors=0, n_components=0)."
        )
    made, own = head.origin[Obsm.X], origin_by(model)[Obsm.X]
    if not same_origin(made, own):
        raise ValueError(
            f"The head was fitted to embeddings from {describe_origin(made)}, and `model` is "
            f"{describe_origin(own)}; pass that model."
        )

    def probabilities(embeddings: NDArray[Any]) -> NDArray[Any]:
        features = embeddings.astype(np.float32)
        weighted = zip(head.networks, head.weights, strict=True)
        votes = [weight * apply_head(one, features, "classes") for one, weight in weighted]
        return calibrated_probabilities(log_scores(np.sum(votes, axis=0)), head.temperature)

    return probabilities
