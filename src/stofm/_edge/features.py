"""What the columns of an AnnData are: genes or something else, and what they are called."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._keys import Var
from stofm._logging import logger
from stofm.genes.gene_ids import ENSEMBL_TYPES, SYMBOL_TYPES, clean_names, id_type

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

VAR_NAMES: Final = "var_names"
#: A column with more different values does not say of what kind a feature is.
_MOST_KINDS: Final = 32
#: Beside these words, whatever does not speak of genes is something else.
_EXPRESSION: Final = re.compile(r"gene expression|rna expression|gex|rna")
_GENES: Final = re.compile(r"genes?|m ?rna|transcripts?|endogenous")
_SPEAKS_OF_GENES: Final = re.compile(
    r"genes?\b|rna\b|\bgex\b|coding|transcript|housekeeping|endogenous"
)
#: Features of another kind of which more than this share are called as genes are no genes.
_MOST_NAMESAKES: Final = 0.5
#: What is measured beside genes.
_MEASURED: Final = r"antibod\w*|\badt\b|\bhto\b|hashtag\w*|\bprot(eins?)?\b(?! coding)|\batac\b|peaks?\b|\w* ?capture"
_CONTROL: Final = (
    r"controls?\b|codeword|\bblank|\bneg(ative|prb| ?probe)?\b|false ?code|spike|\bercc"
)
_NO_GENES: Final = re.compile(_MEASURED)
_OTHER: Final = re.compile(f"{_MEASURED}|{_CONTROL}|positive|crispr|guide")
#: Names of columns whose True says that a feature is no gene.
_MARK: Final = re.compile(
    r"(is )?((negative|neg|positive) )?(controls?|blank|antibody|protein|adt|hashtag)"
    r"( (probe|codeword|feature|gene))?s?"
)


@dataclass(frozen=True, eq=False)
class Features:
    """Which columns are genes, (n_vars,), or nothing is said of, by the AnnData's own word.

    `others` counts the other columns of each kind, by the column of ``var`` that says so.
    """

    is_gene: NDArray[np.bool_]
    others: dict[str, dict[str, int]]

    @property
    def kinds(self) -> str:
        """Numbers and kinds of the columns that are no genes."""
        return "; ".join(
            f"var[{column!r}]: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items())
            for column, kinds in self.others.items()
        )

    def report(self) -> None:
        """Log which columns are no genes, if there are any."""
        if self.others:
            logger.info(
                "%d of %d columns are no genes and are left out (%s).",
                (~self.is_gene).sum(),
                len(self.is_gene),
                self.kinds,
            )


def read_features(adata: AnnData) -> Features:
    """Find out which columns are no genes: antibodies, controls, peaks and the like.

    Any column of ``adata.var`` with few values may say so, whatever it is called: one of its
    values is gene expression, and others are something else. So are features of another value, or
    of none, that are called as features with gene expression are.
    """
    is_gene = np.ones(adata.n_vars, dtype=bool)
    others: dict[str, dict[str, int]] = {}
    names = adata.var_names
    for name in adata.var.columns:
        kinds = _other_kinds(adata.var[name], str(name), names)
        is_other = np.array([bool(kind) for kind in kinds], dtype=bool)
        if is_other.any():
            found = Counter(
                kind for kind, gene in zip(kinds, is_gene, strict=True) if kind and gene
            )
            others |= {str(name): dict(found.most_common())} if found else {}
            is_gene &= ~is_other
    features = Features(is_gene, others)
    if adata.n_vars and not is_gene.any():
        msg = (
            f"adata has no genes, by its own word ({features.kinds}). Pass the AnnData with gene "
            "expression."
        )
        raise ValueError(msg)
    return features


def _other_kinds(column: pd.Series, name: str, names: pd.Index) -> list[str]:
    """What each feature is if it is no gene, else ``""``; empty if the column does not say."""
    if column.dtype == bool:
        words = _words(name)
        marks = (
            ~column
            if re.fullmatch("(is )?genes?", words)
            else column & bool(_MARK.fullmatch(words))
        )
        return [str(value) if mark else "" for value, mark in zip(column, marks, strict=True)]
    codes, values = _text_codes(column)
    if not 0 < len(values) <= _MOST_KINDS:
        return []
    # The last is that of features without a value, whose code is -1.
    texts = [*clean_names(values), ""]
    in_words = [_words(text) for text in texts]
    is_other = np.array(_are_other(in_words), dtype=bool)
    if not names.is_unique:
        is_gene = ~is_other & [_speaks_of_genes(words) for words in in_words]
        is_other |= ~is_gene & _are_namesakes(codes, is_gene, names)
    kinds = [
        (text or "(none)") if other else "" for text, other in zip(texts, is_other, strict=True)
    ]
    return [kinds[code] for code in codes] if any(kinds) else []


def _speaks_of_genes(words: str) -> bool:
    return words == "expression" or bool(_SPEAKS_OF_GENES.search(words))


def _are_namesakes(
    codes: NDArray[np.int64], is_gene: NDArray[np.bool_], names: pd.Index
) -> NDArray[np.bool_]:
    """Of which values most features have names of features whose value speaks of genes."""
    is_namesake = names.isin(names[is_gene[codes]])
    codes = codes % len(is_gene)
    n_features, n_namesakes = (
        np.bincount(codes, weights, len(is_gene)) for weights in (None, is_namesake)
    )
    found: NDArray[np.bool_] = n_namesakes > _MOST_NAMESAKES * n_features
    return found


def _are_other(words: list[str]) -> list[bool]:
    known = [word for word in words if word]
    if any(_EXPRESSION.fullmatch(word) for word in known):
        return [
            bool(word) and (bool(_OTHER.search(word)) or not _SPEAKS_OF_GENES.search(word))
            for word in words
        ]
    if any(_GENES.fullmatch(word) for word in known):
        return [bool(_OTHER.search(word)) for word in words]
    only_others = all(_NO_GENES.fullmatch(word) for word in known)
    return [bool(word) and only_others for word in words]


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().lower()


def _text_codes(column: pd.Series) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Number each different text of a column, -1 where there is none; no text, no numbers."""
    import pandas as pd

    if column.dtype.kind in "OSTU":  # also that of categories
        with contextlib.suppress(TypeError):  # lists and the like
            codes, values = pd.factorize(column)
            return codes.astype(np.int64), np.asarray(values)
    return np.empty(0, dtype=np.int64), np.empty(0, dtype=object)


def text_columns(adata: AnnData) -> list[str]:
    """Return the columns of ``adata.var`` that hold text, but for the one that stofm writes."""
    columns = (name for name in adata.var.columns if name != Var.GENE)
    return [name for name in columns if len(_text_codes(adata.var[name])[1])]


def gene_name_sources(adata: AnnData) -> dict[str, list[str]]:
    """Return all names that the genes may have, clean; ``""`` where there is none or no gene.

    Columns of ``adata.var`` with Ensembl ids, or with words of which most occur once, those with
    most Ensembl ids first, and ``var_names`` last.
    """
    sources = {str(name): names_of_genes(adata, name) for name in text_columns(adata)}
    kept = [source for source, names in sources.items() if _may_be_names(names)]
    kept.sort(key=lambda source: -_count(sources[source], ENSEMBL_TYPES))
    return {
        **{source: sources[source] for source in kept},
        VAR_NAMES: names_of_genes(adata, VAR_NAMES),
    }


def names_of_genes(adata: AnnData, source: str) -> list[str]:
    """Return a column of ``adata.var`` or ``var_names``, clean; ``""`` where there is no gene."""
    names = adata.var_names if source == VAR_NAMES else np.asarray(adata.var[source])
    is_gene = read_features(adata).is_gene
    return [name if gene else "" for name, gene in zip(clean_names(names), is_gene, strict=True)]


def _may_be_names(names: list[str]) -> bool:
    known = [name for name in names if name]
    if 2 * _count(known, ENSEMBL_TYPES) > len(known):
        return True
    n_words = sum(not name.isdigit() and " " not in name for name in known)
    return 2 * n_words > len(known) and 2 * len(set(known)) >= len(known)


def _count(names: Iterable[str], kinds: frozenset[Any]) -> int:
    return sum(id_type(name) in kinds for name in names)


def gene_names(adata: AnnData) -> tuple[list[str], list[str]]:
    """Return the names with most Ensembl ids, and the others with most symbols."""
    read_features(adata).report()
    sources = gene_name_sources(adata)
    best = max(sources, key=lambda s: (_count(sources[s], ENSEMBL_TYPES), s == VAR_NAMES))
    others = [source for source in sources if source != best]
    if not others:
        return sources[best], [""] * adata.n_vars
    second = max(others, key=lambda s: (_count(sources[s], SYMBOL_TYPES), s == VAR_NAMES))
    return sources[best], sources[second]
