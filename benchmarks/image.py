"""Images and expression aligned, on slides that were left out: domains, genes, retrieval, ablations.

    python benchmarks/image.py FOLDER                          all parts, three seeds
    python benchmarks/image.py FOLDER --parts genes --seeds 1 --out /tmp/image

FOLDER holds the sections of the development data with H&E images. Domains: DLPFC (its images are of
low resolution), each slide left out of the alignment in turn. Genes: HER2-positive breast, from one
patient to the other; olfactory bulb, from one section to the other; and, for comparison, from two
sections of a patient to two others. Speed: an image on disk, in one thread. The tables go to OUT.md, all numbers to OUT.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import anndata as ad
import numpy as np
import torch
from sklearn.cluster import KMeans

import stofm as st
from stofm._edge.expression import log_normalised
from stofm.align.expression import read_expression
from stofm.align.inputs import Spots
from stofm.align.losses import retrieval_ranks
from stofm.align.prediction import Views, fit_predictor, predict_all
from stofm.heads.genes import read_columns
from stofm.heads.request import resolve_slices
from stofm.train.run import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]
    #: Names of what is to be measured, and what measures it.
    Jobs = Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]

DLPFC: Final = ("dlpfc_151510", "dlpfc_151674", "dlpfc_151675", "dlpfc_151676")
B4: Final = ("her2st_B4",)
C: Final = ("her2st_C2", "her2st_C3", "her2st_C4", "her2st_C5")
BULB: Final = ("st_mob_he_MOB1", "st_mob_he_MOB2")
#: From which slides to which, and whether these are of another patient.
FOLDS: Final = {
    "HER2+ B to C": (B4, C),
    "HER2+ C to B": (C, B4),
    "bulb 1 to 2": (BULB[:1], BULB[1:]),
    "HER2+ within C (same patient)": (C[:2], C[2:]),
}
#: Sides of the patches in micrometres: wide enough that a niche has spots beside its own.
CROPS: Final = {"dlpfc": (100, 400), "her2st": (150, 600), "st_mob": (150, 600)}
#: Most variable training genes that means are over, beside all.
TOP: Final = 50
PARTS: Final = ("domains", "genes", "ablations", "speed")
#: Spots whose image is embedded, and micrometres of a pixel: patches of a spot are not resampled.
N_SPOTS, PIXEL = (1_000, 20_000), 100 / 64
ABLATIONS: Final[dict[str, dict[str, Any]]] = {
    "as it is": {},
    "without the spots' loss": {"spot": 0.0},
    "without the niches' loss": {"niche": 0.0},
    "without the loss across scales": {"scales": 0.0},
    "niche without the spot itself": {"self_in_niche": False},
    "mask off": {"negatives": "all"},
    "genes: MLP": {"genes": "mlp"},
    "genes: X_stofm": {"genes": "stofm"},
    "preset st-align": {"preset": "st-align"},
}


@dataclass(frozen=True)
class Slides:
    """Sections with features of their images, by name; each is read when it is first asked for."""

    folder: Path

    def __getitem__(self, name: str) -> AnnData:
        return load(self.folder, name)

    def some(self, names: Sequence[str]) -> dict[str, AnnData]:
        """Those of some names."""
        return {name: self[name] for name in names}


@cache
def load(folder: Path, name: str) -> AnnData:
    """Read a section and embed its image with both encoders."""
    table = ad.read_h5ad(folder / f"{name}.h5ad")
    options: dict[str, Any] = {"crops": CROPS[name[:6].rstrip("_")]}
    encoders = {"X_image": "cnn", "X_colour": "statistics"}
    if name in DLPFC:
        # Low resolution, which is all that there is.
        st.tl.embed(table, show_progress_bar=False)
        del encoders["X_colour"]
    elif name in BULB:
        options |= {"image": str(folder / f"{name}.jpg"), "pitch": 200, "n_views": 8}
    else:
        scale = float(table.uns["he_image"]["scale_from_fullres"])
        image = str(folder / f"{name}_he.jpg")
        options |= {"image": image, "scale": scale, "pitch": 200, "n_views": 8}
    for key, encoder in encoders.items():
        st.im.embed(table, encoder, key_added=key, show_progress_bar=False, **options)
    return table


def fit(slides: Slides, names: Sequence[str], seed: int, **changes: Any) -> st.tl.Aligner:
    """Align slides."""
    genes, preset = changes.pop("genes", "pca"), changes.pop("preset", "stofm")
    options = replace(st.tl.AlignOptions.of(preset), **changes)
    return st.tl.align(
        slides.some(names), genes=genes, options=options, seed=seed, show_progress_bar=False
    )


def side_by_side(table: AnnData, key: str) -> Matrix:
    """Standardised features of the image of spot and niche."""
    values = np.concatenate([table.obsm[f"{key}_{level}"] for level in ("spot", "niche")], axis=1)
    return (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-6)


def components(values: Matrix, n: int = 50) -> Matrix:
    """Principal components of a slide by itself."""
    centred = (values - values.mean(axis=0)).astype(np.float64)
    _, _, axes = np.linalg.svd(np.cov(centred, rowvar=False))
    return (centred @ axes[:n].T).astype(np.float32)


# Domains and retrieval


def others(table: AnnData) -> dict[str, Matrix]:
    """What the aligned representation is compared with, each of the slide alone."""
    spots = Spots.read(resolve_slices(table), CROPS["dlpfc"][1], "spatial", key="X_image")
    values = log_normalised(table.X)
    variance = np.asarray(values.multiply(values).mean(axis=0)).ravel()
    variance -= np.asarray(values.mean(axis=0)).ravel() ** 2
    pcs = components(values[:, np.argsort(-variance)[:2000]].toarray(), 30)
    return {
        "image only": components(side_by_side(table, "X_image"), 30),
        "PCs": pcs,
        "PCs with neighbours": spots.to_tables(spots.niche_means(pcs[spots.rows])),
        "X_stofm": table.obsm["X_stofm"],
    }


ALIGNED: Final = {
    "aligned": "X_aligned",
    "aligned, image alone": "X_aligned_image",
    "aligned, genes alone": "X_aligned_genes",
}


def score_domains(table: AnnData, values: Matrix, seed: int) -> dict[str, float]:
    """ARI and NMI of k-means and of tl.domains with the number of layers."""
    is_known = table.obs["layer"].notna().to_numpy()
    truth, n = table.obs["layer"][is_known], table.obs["layer"].nunique()
    plain = KMeans(n, n_init=5, random_state=seed).fit_predict(values)
    other = ad.AnnData(obs=table.obs[[]], obsm={"X": values, "spatial": table.obsm["spatial"]})
    st.tl.domains(other, use_rep="X", n_domains=n, seed=seed)
    found = {"k-means": plain, "domains": other.obs["stofm_domain"].astype(str).to_numpy()}
    scores = {"ARI": st.metrics.ari, "NMI": st.metrics.nmi}
    return {
        f"{how} {name}": float(score(truth, labels[is_known]))
        for how, labels in found.items()
        for name, score in scores.items()
    }


def score_retrieval(table: AnnData) -> dict[str, float]:
    """How well genes are found by the image within the slide, at both levels."""
    d, found = table.obsm["X_aligned"].shape[1] // 2, {}
    for k, level in enumerate(("spot", "niche")):
        own = slice(k * d, (k + 1) * d)
        image, genes = (table.obsm[f"X_aligned_{one}"][:, own] for one in ("image", "genes"))
        ranks = retrieval_ranks(image, genes)
        found[f"{level} among 10"] = float((ranks <= 10).mean())
        found[f"{level} rank"] = float(np.median(ranks)) / len(ranks)
    return found | {"chance among 10": 10 / table.n_obs}


def run_domains(slides: Slides, seeds: Sequence[int]) -> Jobs:
    """Domains and retrieval on each slide, with the others aligned."""
    for seed in seeds:
        for left_out in DLPFC:
            yield f"{left_out}, seed {seed}", partial(_measure_domains, slides, left_out, seed)


def _measure_domains(slides: Slides, left_out: str, seed: int) -> list[dict[str, Any]]:
    table, known = slides[left_out], _known(slides, left_out)
    start = time.process_time()
    aligner = st.tl.align(known, seed=seed, show_progress_bar=False)
    seconds = time.process_time() - start
    aligner.transform(table)
    own = {"slide": left_out, "seed": seed}
    rows = [{**own, "what": "retrieval", "seconds": seconds} | score_retrieval(table)]
    # Nothing is trained of the others, so once is enough.
    compared = others(table) if seed == 0 else {}
    for name, values in (compared | {k: table.obsm[key] for k, key in ALIGNED.items()}).items():
        scores = score_domains(table, values, seed)
        rows.append({**own, "what": "domains", "representation": name} | scores)
    return rows


def _known(slides: Slides, left_out: str) -> dict[str, AnnData]:
    """Slides to align; of 151510, with 500 genes, all that share them, else those with thousands."""
    if left_out != DLPFC[0]:
        return slides.some([name for name in DLPFC[1:] if name != left_out])
    genes = slides[left_out].var_names
    found = slides.some(DLPFC[1:])
    return {name: one[:, one.var_names.isin(genes)].copy() for name, one in found.items()}


# Genes


def run_genes(slides: Slides, seeds: Sequence[int]) -> Jobs:
    """Genes of left-out slides by their images, with each method."""
    for seed in seeds:
        for fold in FOLDS:
            yield f"{fold}, seed {seed}", partial(_measure_genes, slides, fold, seed)


def _measure_genes(slides: Slides, fold: str, seed: int) -> list[dict[str, Any]]:
    training, testing = FOLDS[fold]
    aligner = fit(slides, training, seed)
    plain = aligner.reference
    columns = np.arange(len(aligner.genes.panel))
    colours = np.concatenate([_in_order(slides[name], "X_colour") for name in training])
    ways: dict[str, Any] = {
        "ridge, colour and texture": (replace(plain, image=colours), "ridge"),
        "ridge, random CNN (image only)": (plain, "ridge"),
        "ridge, aligned image": (replace(plain, image=plain.aligned_image), "ridge"),
        "aligned: mean of these two": (plain, "aligned"),
        "retrieval, aligned": (plain, "retrieval"),
        "MLP, random CNN": (plain, "mlp"),
    }
    rows = []
    for name in testing:
        rows += _score_genes(aligner, slides[name], name, fold, seed, ways, columns)
    return rows


def _in_order(table: AnnData, key: str) -> Matrix:
    """Features of a slide in the order in which an aligner keeps its spots."""
    slices = resolve_slices(table)
    spots = Spots.read(slices, 600, "spatial", key="X_image")
    return side_by_side(table, key)[spots.rows].astype(np.float32)


def _score_genes(
    aligner: st.tl.Aligner,
    table: AnnData,
    name: str,
    fold: str,
    seed: int,
    ways: Mapping[str, Any],
    columns: NDArray[np.int64],
) -> list[dict[str, Any]]:
    slices = resolve_slices(table)
    spots, _ = aligner.read(slices, "image", "X_image", "spatial")
    columns_of = read_columns(slices)
    values = read_expression(aligner.genes.panel, slices, columns_of, spots, None).toarray()
    aligner.transform(table)
    image = side_by_side(table, "X_image")[spots.rows].astype(np.float32)
    colours = side_by_side(table, "X_colour")[spots.rows].astype(np.float32)
    aligned = table.obsm["X_aligned_image"][spots.rows]
    of_way = {"ridge, colour and texture": colours, "ridge, aligned image": aligned}
    expression = aligner.reference.expression
    mean = np.asarray(expression.mean(axis=0)).ravel()
    squares = np.asarray(expression.multiply(expression).mean(axis=0)).ravel()
    top = np.argsort(-(squares - mean**2))[:TOP]
    found = {"the gene's mean": np.broadcast_to(mean, values.shape)}
    for way, (reference, method) in ways.items():
        query = Views(of_way.get(way, image), aligned)
        # A network for all genes takes hours.
        own = top if method == "mlp" else columns
        predictor = fit_predictor(reference, method, seed)
        found[way] = np.full(values.shape, np.nan, dtype=np.float32)
        found[way][:, own] = predict_all(predictor, query, own)
    rows = []
    for way, predicted in found.items():
        is_there = np.isfinite(predicted).all(axis=0)
        mse = ((values - predicted) ** 2).mean(axis=0)
        ssim = st.metrics.ssim(values[:, top], predicted[:, top], spots.places)
        row = {"fold": fold, "slide": name, "seed": seed, "method": way}
        for word, genes in ((f"top {TOP}", top), ("all", columns)):
            if is_there[genes].all():
                row[f"MSE, {word}"] = float(mse[genes].mean())
                if way in ways:
                    # 0 where a gene, or what is predicted of it, does not vary.
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        r = st.metrics.pearson(values[:, genes], predicted[:, genes])
                    row[f"r, {word}"] = float(np.nan_to_num(r).mean())
        rows.append(row | {"SSIM, top 50": float(np.nanmean(ssim))})
    return rows


def run_ablations(slides: Slides, seeds: Sequence[int]) -> Jobs:
    """Domains and retrieval of one slide, and genes of the bulb, with one thing changed."""
    for seed in seeds:
        for name in ABLATIONS:
            yield f"{name}, seed {seed}", partial(_measure_ablation, slides, name, seed)


def _measure_ablation(slides: Slides, name: str, seed: int) -> list[dict[str, Any]]:
    table, bulb, changes = slides[DLPFC[-1]], slides[BULB[1]], ABLATIONS[name]
    fit(slides, DLPFC[1:3], seed, **changes).transform(table)
    row = {"ablation": name, "seed": seed} | score_retrieval(table)
    row |= score_domains(table, table.obsm["X_aligned"], seed)
    # The bulb's sections have too few genes for the model.
    if changes.get("genes") != "stofm":
        aligner = fit(slides, BULB[:1], seed, **changes)
        columns = np.arange(len(aligner.genes.panel))
        own = replace(aligner.reference, image=aligner.reference.aligned_image)
        ways = {"ridge, aligned image": (own, "ridge")}
        scored = _score_genes(aligner, bulb, BULB[1], "", seed, ways, columns)
        row["bulb r, top 50"] = scored[-1]["r, top 50"]
    return [row]


# Speed


def run_speed(_: Slides, seeds: Sequence[int]) -> Jobs:
    """Time and memory of st.im.embed."""
    for n in N_SPOTS:
        yield f"{n} spots", partial(_in_new_process, n, seeds[0])


def _in_new_process(n: int, seed: int) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return [pool.submit(_measure_speed, n, seed).result()]


def _measure_speed(n: int, seed: int) -> dict[str, Any]:
    import tifffile

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The weights of the encoder 'cnn'")
    side, tile = int(np.ceil(np.sqrt(n))), 512
    rng, n_tiles = np.random.default_rng(seed), -(-64 * side // tile)
    tiles = (rng.integers(0, 255, (tile, tile, 3), np.uint8) for _ in range(n_tiles**2))
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)[:n]
    table = ad.AnnData(obsm={"spatial": 64.0 * places + 32})
    with TemporaryDirectory() as folder:
        path = f"{folder}/image.tif"
        shape = (n_tiles * tile, n_tiles * tile, 3)
        tifffile.imwrite(path, tiles, shape=shape, dtype=np.uint8, tile=(tile, tile))
        # The first call loads what is needed.
        options: dict[str, Any] = {
            "microns_per_unit": PIXEL,
            "crops": (100, 200),
            "show_progress_bar": False,
        }
        st.im.embed(table[(places < 3).all(axis=1)].copy(), image=path, **options)
        before, start = peak_memory(torch.device("cpu")), time.process_time()
        st.im.embed(table, image=path, **options)
        seconds = time.process_time() - start
        more = (peak_memory(torch.device("cpu")) - before) / 2**20
    rate = {"spots per CPU second": n / seconds, "patches per CPU second": 2 * n / seconds}
    own = sum(table.obsm[f"X_image_{level}"].nbytes for level in ("spot", "niche")) / 2**20
    return {"spots": n, "seed": seed} | rate | {"MB more": more, "MB of features": own}


# Tables


def to_table(rows: Sequence[Mapping[str, Any]], by: str, columns: Sequence[str]) -> list[str]:
    """Markdown: a line for each value of `by`, means over slides with the spread over seeds."""
    lines = [f"| {by} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for name in dict.fromkeys(row[by] for row in rows):
        cells = [_describe([row for row in rows if row[by] == name], column) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _describe(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    seeds = sorted({row["seed"] for row in rows if column in row})
    means = [
        np.mean([row[column] for row in rows if row["seed"] == seed and column in row])
        for seed in seeds
    ]
    if not means:
        return ""
    spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
    return f"{np.mean(means):.3f}{spread}"


def report(found: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> str:
    """All parts as Markdown."""
    results = {part: list(chain(*done.values())) for part, done in found.items()}
    n = {part: len({row["seed"] for row in rows}) for part, rows in results.items()}
    counts = ", ".join(f"{count} of {part}" for part, count in n.items())
    lines = [
        f"Means over slides, and their spread over seeds ({counts}); what is not trained is measured once."
    ]
    if rows := results.get("domains"):
        domains = [row for row in rows if row["what"] == "domains"]
        measures = [f"{how} {name}" for how in ("k-means", "domains") for name in ("ARI", "NMI")]
        lines += ["", "### Domains of DLPFC slides that were left out", ""]
        lines += to_table(domains, "representation", measures)
        for name in DLPFC:
            own = [row for row in domains if row["slide"] == name]
            lines += ["", f"{name}:", "", *to_table(own, "representation", measures)]
        found = [row for row in rows if row["what"] == "retrieval"]
        columns = [f"{level} {one}" for level in ("spot", "niche") for one in ("among 10", "rank")]
        lines += ["", "### Retrieval of genes by the image, within slides that were left out", ""]
        lines += to_table(found, "slide", [*columns, "chance among 10", "seconds"])
    if rows := results.get("genes"):
        columns = ["r, top 50", "r, all", "MSE, top 50", "MSE, all", "SSIM, top 50"]
        lines += ["", "### Genes predicted from the image"]
        for fold in FOLDS:
            own = [row for row in rows if row["fold"] == fold]
            lines += ["", f"{fold}:", "", *to_table(own, "method", columns)]
        patients = [row for row in rows if "same patient" not in row["fold"]]
        lines += ["", "The first three together:", "", *to_table(patients, "method", columns)]
    if rows := results.get("ablations"):
        columns = ["k-means ARI", "domains ARI", "spot rank", "niche rank", "bulb r, top 50"]
        lines += ["", f"### Ablations: {DLPFC[-1]}, with two slides aligned, and the bulb", ""]
        lines += to_table(rows, "ablation", columns)
    if rows := results.get("speed"):
        columns = [name for name in rows[0] if name not in ("spots", "seed")]
        lines += ["", "### Speed of st.im.embed with the default encoder, one thread", ""]
        lines += to_table(rows, "spots", columns)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read arguments, run, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/measured/image"))
    given = parser.parse_args()
    logging.getLogger("stofm").setLevel("WARNING")
    warnings.filterwarnings("ignore", "The weights of the encoder 'cnn'")
    warnings.filterwarnings("ignore", ".*are enlarged")
    jobs: dict[str, Callable[..., Jobs]] = {
        "domains": run_domains,
        "genes": run_genes,
        "ablations": run_ablations,
        "speed": run_speed,
    }
    stored = given.out.with_suffix(".json")
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    if stored.is_file():
        found = json.loads(stored.read_text(encoding="utf-8"))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for part in given.parts:
        done = found.setdefault(part, {})
        for what, measure in jobs[part](Slides(given.folder), range(given.seeds)):
            if what in done:
                continue
            done[what] = measure()
            stored.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(what, flush=True)
    given.out.with_suffix(".md").write_text(report(found), encoding="utf-8")


if __name__ == "__main__":
    main()
