"""Who competes in tasks.py: ways to solve each family of tasks, and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from probe_tasks import LIBRARY_KEY
from scipy import sparse
from sklearn.cluster import KMeans
from task_baselines import (
    least_squares_proportions,
    logistic_regression,
    mean_values,
    nearest_neighbor_values,
    reference_composition,
)
from task_sets import LABEL_KEY

import stofm as st
from stofm._edge.tables import frame_names
from stofm.heads.blocks import N_NEIGHBORS
from stofm.heads.request import resolve_slices
from stofm.spatial.plane import neighbor_means
from stofm.tl._probe_scores import (
    NO_CLASS,
    PCS,
    PCS_AND_NEIGHBORS,
    log_counts,
    most_variable,
    principal_components,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from task_sets import Annotation, Deconvolution, Domains, Imputation, Proportions

    from stofm.nn import Stofm

Scores = dict[str, float]

STRATEGIES = ("frozen", "lora", "full")
#: What they read; heads scale each entry by itself.
_COMPONENTS = {PCS: ("X_pca",), PCS_AND_NEIGHBORS: ("X_pca", "X_pca_around")}
_JOINED_KEY = "X_joined"
_KMEANS_STARTS = 10


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What heads are fitted with.

    Attributes
    ----------
    model
        Whose embeddings heads read.
    device
        Where to compute.
    """

    model: Stofm
    device: str = "auto"

    def embed(self, slices: Sequence[AnnData]) -> None:
        """Embed slices in place, each once."""
        for adata in slices:
            if "X_stofm" not in adata.obsm:
                st.tl.embed(
                    adata,
                    self.model,
                    library_key=_library_key([adata]),
                    device=self.device,
                    show_progress_bar=False,
                )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to solve the tasks of a family.

    Attributes
    ----------
    name
        In tables.
    score
        From a task, a setting and a seed to scores on the tested cells.
    strategy
        How the model takes part; None for a baseline.
    draws
        Whether the seed changes anything.
    """

    name: str
    score: Callable[[Any, Setting, int], Scores]
    strategy: str | None = None
    draws: bool = True


def _library_key(slices: Sequence[AnnData]) -> str | None:
    return LIBRARY_KEY if all(LIBRARY_KEY in one.obs for one in slices) else None


def add_components(slices: Sequence[AnnData]) -> None:
    """Write 50 PCs of shared genes to each slice, and their mean over the neighbours beside them."""
    sections = resolve_slices(list(slices), _library_key(slices))
    components = principal_components(most_variable(log_counts(sections)))
    means = neighbor_means(components, sections.coordinates("spatial"), sections.rows, N_NEIGHBORS)
    for adata, place in zip(slices, sections.places, strict=True):
        adata.obsm["X_pca"], adata.obsm["X_pca_around"] = components[place], means[place]


def _with_classes(adata: AnnData, labels: NDArray[np.str_]) -> AnnData:
    """A copy that has nothing but these classes to learn."""
    copy = adata.copy()
    copy.obs[LABEL_KEY] = pd.Categorical(np.where(labels == NO_CLASS, None, labels))
    return copy


def _read(adata: AnnData, key: str) -> pd.DataFrame:
    """What was predicted, under the true names: columns have names that a file can hold."""
    return adata.obsm[key].set_axis(frame_names(adata, key), axis=1)


def _score_classes(task: Annotation, found: Sequence[Any]) -> Scores:
    truth = np.where(task.truth == NO_CLASS, None, task.truth)
    return {
        "macro_f1": st.metrics.macro_f1(truth, found),
        "accuracy": st.metrics.accuracy(truth, found),
    }


def _annotate(task: Annotation, seed: int, **options: Any) -> Scores:
    fit = [_with_classes(task.slices[name], labels) for name, labels in task.fitted.items()]
    test = _with_classes(task.slices[task.test], np.full_like(task.truth, NO_CLASS))
    common = {"library_key": _library_key([*fit, test]), "show_progress_bar": False}
    head = st.tl.annotate(fit, label_key=LABEL_KEY, seed=seed, **common, **options)
    st.tl.annotate(test, head=head, device=options["device"], **common)
    # The likeliest class counts, of cells that are called unknown too: baselines have none.
    return _score_classes(task, _read(test, "stofm_annotation_proba").idxmax(axis=1).to_numpy())


def annotate_with_model(task: Annotation, setting: Setting, seed: int, *, strategy: str) -> Scores:
    """A head on the model's embeddings, or the model tuned with it."""
    setting.embed(list(task.slices.values()))
    return _annotate(
        task,
        seed,
        model=setting.model,
        options=st.tl.HeadOptions(strategy=strategy),
        device=setting.device,
    )


def annotate_with_components(task: Annotation, setting: Setting, seed: int, *, name: str) -> Scores:
    """The same head on principal components."""
    add_components(list(task.slices.values()))
    return _annotate(task, seed, use_rep=_COMPONENTS[name], device=setting.device)


def annotate_with_regression(task: Annotation, _setting: Setting, _seed: int) -> Scores:
    """Logistic regression on the log-normalised counts of the genes in common."""
    sections = resolve_slices(dict(task.slices), _library_key(list(task.slices.values())))
    values = log_counts(sections)
    counts = {name: values[place] for name, place in zip(task.slices, sections.places, strict=True)}
    rows = {name: np.flatnonzero(own != NO_CLASS) for name, own in task.fitted.items()}
    fitted = [counts[name][own] for name, own in rows.items()]
    labels = [task.fitted[name][own] for name, own in rows.items()]
    found = logistic_regression(
        sparse.vstack(fitted).tocsr(), np.concatenate(labels), counts[task.test]
    )
    return _score_classes(task, found)


def _score_domains(task: Domains, features_key: str, adata: AnnData, seed: int) -> Scores:
    """Agreement of the same two clusterings with the regions, whatever is clustered."""
    truth = np.where(task.truth == NO_CLASS, None, task.truth)
    st.tl.domains(
        adata,
        n_domains=task.n_domains,
        library_key=_library_key([adata]),
        use_rep=features_key,
        seed=seed,
    )
    mixture = adata.obs["stofm_domain"]
    means = KMeans(task.n_domains, n_init=_KMEANS_STARTS, random_state=seed).fit_predict(
        adata.obsm[features_key]
    )
    return {
        "ari": st.metrics.ari(truth, mixture.to_numpy()),
        "nmi": st.metrics.nmi(truth, mixture.to_numpy()),
        "ari_kmeans": st.metrics.ari(truth, means),
        "nmi_kmeans": st.metrics.nmi(truth, means),
    }


def domains_of_model(task: Domains, setting: Setting, seed: int) -> Scores:
    """Clusters of the embedding."""
    setting.embed([task.adata])
    return _score_domains(task, "X_stofm", task.adata.copy(), seed)


def domains_of_components(task: Domains, _setting: Setting, seed: int, *, name: str) -> Scores:
    """Clusters of principal components of the slice."""
    add_components([task.adata])
    adata = task.adata.copy()
    adata.obsm[_JOINED_KEY] = np.hstack([adata.obsm[key] for key in _COMPONENTS[name]])
    return _score_domains(task, _JOINED_KEY, adata, seed)


def _score_proportions(task: Deconvolution | Proportions, found: pd.DataFrame) -> Scores:
    found = found.loc[task.truth.index].reindex(columns=task.truth.columns, fill_value=0.0)
    return {
        "pearson": float(st.metrics.pearson(task.truth, found).mean()),
        "rmse": float(st.metrics.rmse(task.truth, found).mean()),
        "mae": float(st.metrics.mae(task.truth, found).mean()),
        "jensen_shannon": float(st.metrics.jensen_shannon(task.truth, found).mean()),
    }


def deconvolve_with_model(task: Deconvolution | Proportions, setting: Setting, seed: int) -> Scores:
    """Heads on the model's embeddings of spots that are simulated from the reference."""
    query = task.query.copy()
    st.tl.deconvolve(
        query,
        reference=task.reference,
        label_key=LABEL_KEY,
        model=setting.model,
        library_key=_library_key([query]),
        device=setting.device,
        seed=seed,
        show_progress_bar=False,
    )
    return _score_proportions(task, _read(query, "stofm_deconvolution"))


def _learn_proportions(task: Proportions, seed: int, **options: Any) -> Scores:
    spots = task.query.copy()
    common = {"library_key": _library_key([spots]), "show_progress_bar": False}
    head = st.tl.deconvolve(spots, proportions_key="known", seed=seed, **common, **options)
    st.tl.deconvolve(spots, head=head, device=options["device"], **common)
    return _score_proportions(task, _read(spots, "stofm_deconvolution"))


def proportions_with_model(
    task: Proportions, setting: Setting, seed: int, *, strategy: str
) -> Scores:
    """A head on the model's embeddings of spots, or the model tuned with it."""
    setting.embed([task.query])
    return _learn_proportions(
        task,
        seed,
        model=setting.model,
        options=st.tl.HeadOptions(strategy=strategy),
        device=setting.device,
    )


def proportions_with_components(
    task: Proportions, setting: Setting, seed: int, *, name: str
) -> Scores:
    """The same head on principal components."""
    add_components([task.query])
    return _learn_proportions(task, seed, use_rep=_COMPONENTS[name], device=setting.device)


def deconvolve_with_least_squares(
    task: Deconvolution | Proportions, _setting: Setting, _seed: int, *, weighted: bool
) -> Scores:
    """Non-negative least squares on the types' profiles."""
    found = least_squares_proportions(task.query, task.reference, LABEL_KEY, weighted=weighted)
    return _score_proportions(task, found)


def deconvolve_with_composition(
    task: Deconvolution | Proportions, _setting: Setting, _seed: int
) -> Scores:
    """The same for every spot."""
    found = reference_composition(task.query, task.reference, LABEL_KEY)
    return _score_proportions(task, found)


def _score_values(task: Imputation, found: Any) -> Scores:
    frame = pd.DataFrame(found, index=task.query.obs_names, columns=task.genes)
    return {
        "pearson": float(st.metrics.pearson(task.truth, frame).mean()),
        "rmse": float(st.metrics.rmse(task.truth, frame).mean()),
        "mae": float(st.metrics.mae(task.truth, frame).mean()),
    }


def _impute(task: Imputation, slices: Sequence[AnnData], seed: int, **options: Any) -> Scores:
    *reference, query = slices
    st.tl.impute(
        query,
        reference=reference,
        genes=task.genes,
        library_key=_library_key(slices),
        seed=seed,
        show_progress_bar=False,
        **options,
    )
    return _score_values(task, _read(query, "stofm_imputed"))


def impute_with_model(task: Imputation, setting: Setting, seed: int, *, strategy: str) -> Scores:
    """A head on the model's embeddings without these genes, or the model tuned with it."""
    slices = [one.copy() for one in (*task.fit, task.query)]
    return _impute(
        task,
        slices,
        seed,
        model=setting.model,
        options=st.tl.HeadOptions(strategy=strategy),
        device=setting.device,
    )


def impute_with_components(task: Imputation, setting: Setting, seed: int, *, name: str) -> Scores:
    """The same head on principal components of the other genes."""
    slices = [one.copy() for one in (*task.fit, task.query)]
    add_components(task.known_genes)
    for adata, known in zip(slices, task.known_genes, strict=True):
        for key in _COMPONENTS[name]:
            adata.obsm[key] = known.obsm[key]
    return _impute(task, slices, seed, use_rep=_COMPONENTS[name], device=setting.device)


def impute_with_neighbors(task: Imputation, _setting: Setting, _seed: int) -> Scores:
    """Mean of the cells that are nearest in the principal components of the other genes."""
    sections = resolve_slices(task.known_genes, _library_key(task.known_genes))
    components = principal_components(most_variable(log_counts(sections)))
    *fit, query = (components[place] for place in sections.places)
    found = nearest_neighbor_values(np.concatenate(fit), task.values, query)
    return _score_values(task, found)


def impute_with_mean(task: Imputation, _setting: Setting, _seed: int) -> Scores:
    """The gene's mean."""
    return _score_values(task, mean_values(task.values, task.query.n_obs))


def _strategies(score: Callable[..., Scores]) -> list[Contender]:
    return [
        Contender(name=f"stofm {one}", score=partial(score, strategy=one), strategy=one)
        for one in STRATEGIES
    ]


def _components(score: Callable[..., Scores]) -> list[Contender]:
    return [Contender(name=one, score=partial(score, name=one)) for one in _COMPONENTS]


#: Who reads nothing of spots but their counts.
_PROFILES = (
    Contender(
        name="least squares",
        score=partial(deconvolve_with_least_squares, weighted=False),
        draws=False,
    ),
    Contender(
        name="weighted least squares",
        score=partial(deconvolve_with_least_squares, weighted=True),
        draws=False,
    ),
    Contender(name="reference's composition", score=deconvolve_with_composition, draws=False),
)
#: Who takes part, by family.
CONTENDERS: Mapping[str, Sequence[Contender]] = {
    "annotation": (
        *_strategies(annotate_with_model),
        *_components(annotate_with_components),
        Contender(name="logistic regression", score=annotate_with_regression, draws=False),
    ),
    "domains": (
        Contender(name="stofm frozen", score=domains_of_model, strategy="frozen"),
        *_components(domains_of_components),
    ),
    "deconvolution": (
        Contender(name="stofm frozen", score=deconvolve_with_model, strategy="frozen"),
        *_PROFILES,
    ),
    "proportions": (
        *_strategies(proportions_with_model),
        # What least squares read too.
        Contender(name="stofm, reference", score=deconvolve_with_model, strategy="frozen"),
        *_components(proportions_with_components),
        *_PROFILES,
    ),
    "imputation": (
        *_strategies(impute_with_model),
        *_components(impute_with_components),
        Contender(name="nearest neighbours", score=impute_with_neighbors, draws=False),
        Contender(name="gene's mean", score=impute_with_mean, draws=False),
    ),
}
