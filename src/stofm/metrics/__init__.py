"""Scores of labels, clusters, values and maps: numpy or pandas in, floats or Series out."""

from stofm.metrics.labels import accuracy, ami, ari, macro_f1, nmi, silhouette, weighted_f1
from stofm.metrics.maps import ssim
from stofm.metrics.values import cosine, jensen_shannon, mae, pearson, rmse, spearman

__all__ = [
    "accuracy",
    "ami",
    "ari",
    "cosine",
    "jensen_shannon",
    "macro_f1",
    "mae",
    "nmi",
    "pearson",
    "rmse",
    "silhouette",
    "spearman",
    "ssim",
    "weighted_f1",
]
