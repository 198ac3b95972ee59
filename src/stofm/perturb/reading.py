"""What an edit applies to and aims at: cells, genes and goals as a user names them, and the tissue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from stofm._edge.counts import peek_counts, read_counts
from stofm._edge.gene_mapping import find_columns, names_by_source
from stofm._edge.slices import read_places
from stofm._edge.tables import label_text, resolve_table
from stofm._edge.tokens import compute_tokens, token_params
from stofm._keys import Obsm
from stofm._messages import nearest_names, require_name
from stofm.genes import rank_genes
from stofm.heads.annotation import AnnotationHead
from stofm.heads.embeddings import (
    describe_origin,
    origin_by,
    origin_of,
    recorded_options,
    same_origin,
)
from stofm.heads.head import require_head
from stofm.heads.network import apply_head
from stofm.heads.trust import calibrated_probabilities, log_scores
from stofm.nn import choose_device
from stofm.nn.model import load_model
from stofm.perturb.tissue import Tissue

if TYPE_CHECKING:
    from anndata import AnnData

    from stofm._edge.gene_mapping import Columns
    from stofm.genes import RankedTokens
    from stofm.heads.request import Request
    from stofm.nn import Stofm

#: Number of rows of counts that are read at once.
_ROWS_AT_ONCE: Final = 8192


@dataclass(frozen=True, eq=False)
class Subject:
    """A table and its tissue; `columns` are its genes, and `layer` holds its counts."""

    adata: AnnData
    tissue: Tissue
    columns: Columns
    layer: str | None

    @classmethod
    def read(
        cls, data: Any, request: Request, table_key: str | None, head: AnnotationHead | None = None
    ) -> Subject:
        """Read counts, positions and slices with the options that the table was embedded with.

        If the request has no model, it is that of `head`, or the embedded one.
        """
        require_head(head, AnnotationHead)
        # The user's table stays as it is: for a SpatialData, a copy gets the coordinates.
        adata = resolve_table(data, table_key, copy=not hasattr(data, "obsm"))
        asked = request.model if request.model is not None or head is None else head.model
        model = load_model(asked)
        model.warn_if_untrained()
        if asked is None:
            require_model(adata, Obsm.X, f"obsm[{Obsm.X!r}]", model)
        options = recorded_options(adata, request)
        layer = options["layer"]
        places = read_places(
            adata, spatial_key=options["spatial_key"], library_key=options["library_key"]
        )
        columns = find_columns(adata, model.vocabulary)
        params = token_params(model, layer=layer) | {"max_tokens": max(adata.n_vars, 1)}
        ranked = compute_tokens(adata, columns, params, show_progress_bar=request.show_progress_bar)

        def recount(rows: NDArray[np.int64], counts: Mapping[int, float]) -> RankedTokens:
            block = _with_counts(peek_counts(adata, layer, rows)[0], columns.token_ids, counts)
            return rank_genes(
                block,
                columns.token_ids,
                columns.medians,
                max_tokens=params["max_tokens"],
                values="depth_power" in params,
                depth_power=params.get("depth_power", 1.0),
            )

        tissue = Tissue(
            model=model,
            ranked=ranked,
            recount=recount,
            coordinates=places.coordinates,
            slices=places.slices.rows,
            seed=request.seed,
            device=choose_device(request.device),
            show_progress_bar=request.show_progress_bar,
        )
        return cls(adata, tissue, columns, layer)

    @cached_property
    def places_of_genes(self) -> dict[str, int]:
        """Column of each gene by every name that the table has for it; ``var_names`` come first."""
        found: dict[str, int] = {}
        for own in reversed(list(names_by_source(self.adata).values())):
            for place, name in enumerate(own):
                found.setdefault(name, place)
        return found

    def gene(self, name: str) -> int:
        """Token of a gene, by a name that the table or the vocabulary has for it."""
        vocabulary = self.tissue.model.vocabulary
        place = self.places_of_genes.get(name) if name else None
        if place is None:
            known = (vocabulary.symbols == name) | (vocabulary.gene_ids == name)
            tokens = vocabulary.tokens[known]
            places = np.flatnonzero(np.isin(self.columns.token_ids, tokens)).tolist()
            place = next(iter(places), None)
        if place is None:
            near = nearest_names(name, filter(None, self.places_of_genes))
            raise KeyError(f"There is no gene {name!r} in adata.{near}")
        token = int(self.columns.token_ids[place])
        if token < 0:
            raise ValueError(
                f"The gene {name!r} is not in the vocabulary of model {self.tissue.model.name!r}, "
                "which does not read it, so no edit of it changes anything. "
                "st.pp.map_genes(adata) reports which genes are read."
            )
        return token

    def names(self, tokens: NDArray[np.integer]) -> list[str]:
        """Name of each gene in ``var_names``; of the first column if it has several."""
        place = {int(t): k for k, t in reversed(list(enumerate(self.columns.token_ids)))}
        return [str(self.adata.var_names[place[int(token)]]) for token in tokens]

    def select(self, chosen: Any, argument: str) -> NDArray[np.int64]:
        """Rows of cells: by a mask, names, or a query of ``obs``; all for None."""
        adata = self.adata
        if chosen is None:
            return np.arange(adata.n_obs)
        is_chosen = _mask(adata, chosen, argument)
        if not is_chosen.any():
            raise ValueError(f"`{argument}` selects no cells.{values_in(adata, chosen)}")
        return np.flatnonzero(is_chosen)

    def types(self, column: str) -> tuple[NDArray[np.int64], list[str]]:
        """Number of each cell's type by a column of ``obs``, -1 for none, and names of the types."""
        import pandas as pd

        text = pd.Series(self.labels(column))
        codes, names = pd.factorize(text.where(text != "", None), sort=True)
        return codes.astype(np.int64), [str(name) for name in names]

    def labels(self, column: str) -> NDArray[Any]:
        """Value of a column of ``obs`` for each cell, as text; empty if missing."""
        require_name(column, self.adata.obs, f"There is no obs[{column!r}].")
        return label_text(self.adata.obs[column])

    def gene_statistics(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log of detection and of mean count of each token's gene in some cells, (n_tokens, 2)."""
        n_tokens = self.tissue.model.vocabulary.n_tokens
        is_known = self.columns.token_ids >= 0
        sums, n_detected = np.zeros((2, n_tokens))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = peek_counts(self.adata, self.layer, rows[start : start + _ROWS_AT_ONCE])[0]
            for found, values in ((sums, block), (n_detected, block.astype(bool))):
                own = np.asarray(values.sum(axis=0, dtype=np.float64)).ravel()
                np.add.at(found, self.columns.token_ids[is_known], own[is_known])
        means = (sums + 1.0) / len(rows)
        return np.log(np.column_stack([n_detected + 1.0, means]))

    def cell_statistics(self) -> NDArray[np.float64]:
        """Log of the number of genes and the total count of each cell, (n_obs, 2)."""
        totals = [
            np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            for block in read_counts(self.adata, layer=self.layer)
        ]
        both = np.column_stack([self.tissue.ranked.n_tokens, np.concatenate(totals)])
        return np.asarray(np.log1p(both))


def _with_counts(
    block: sparse.csr_matrix, token_ids: NDArray[np.integer], counts: Mapping[int, float]
) -> sparse.csr_matrix:
    """Counts in which some genes are set; if a gene has several columns, the first one is."""
    columns = [np.flatnonzero(token_ids == gene) for gene in counts]
    is_kept = ~np.isin(np.arange(block.shape[1]), np.concatenate(columns))
    found = sparse.lil_matrix(block.multiply(is_kept), dtype=np.float64)
    for own, count in zip(columns, counts.values(), strict=True):
        found[:, own[0]] = count
    return sparse.csr_matrix(found)


def _mask(adata: AnnData, chosen: Any, argument: str) -> NDArray[np.bool_]:
    import pandas as pd

    expected = (
        "expected a mask of the cells, names from adata.obs_names, or a query of adata.obs such as "
        "\"cell_type == 'CAF'\""
    )
    found = chosen
    if isinstance(chosen, str):
        try:
            found = adata.obs.eval(chosen, engine="python")
        except Exception as error:
            there = [str(name) for name in adata.obs.columns]
            raise ValueError(
                f"{argument}={chosen!r} is not a query of obs ({error}); obs has the columns {there}. "
                "Quote values: \"cell_type == 'CAF'\"; put names with spaces in backticks."
            ) from error
        if np.shape(found) != (adata.n_obs,):
            raise ValueError(f"{argument}={chosen!r} gives no truth value for each cell.")
    elif isinstance(chosen, pd.Series) and set(chosen.index) == set(adata.obs_names):
        found = chosen.reindex(adata.obs_names)
    values = np.asarray(found)
    if values.dtype == bool:
        if values.shape != (adata.n_obs,):
            raise ValueError(
                f"`{argument}` is a mask of the shape {values.shape}, and there are {adata.n_obs} "
                f"cells; {expected}."
            )
        return values
    if values.ndim != 1 or values.dtype.kind not in "OUS" or isinstance(chosen, str):
        raise TypeError(f"`{argument}` holds values of the type {values.dtype}; {expected}.")
    names = pd.Index(values.astype(str))
    missing = names.difference(adata.obs_names)
    if len(missing):
        raise KeyError(
            f"{len(missing)} of {len(names)} names in `{argument}` are not in adata.obs_names, for "
            f"example {missing[:3].tolist()}."
        )
    return np.asarray(adata.obs_names.isin(names))


def values_in(adata: AnnData, text: Any) -> str:
    """Values of the columns that a query names."""
    named = [name for name in adata.obs.columns if isinstance(text, str) and str(name) in text]
    said = []
    for name in named:
        values = sorted(set(label_text(adata.obs[name])) - {""})
        said.append(f" obs[{name!r}] holds {values[:10]}{' ...' if len(values) > 10 else ''}.")
    return "".join(said)


def require_model(adata: AnnData, key: str, called: str, model: Stofm) -> None:
    """Raise an error if an entry is known to come from another model."""
    found, own = origin_of(adata, key), origin_by(model)[Obsm.X]
    if "model_fingerprint" in found and not same_origin(found, own):
        raise ValueError(
            f"{called} is by {describe_origin(found)}, and the edits would be embedded with "
            f"{describe_origin(own)}. Pass the model that made it as `model`, or embed again: "
            "st.tl.embed(adata, model)."
        )


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
