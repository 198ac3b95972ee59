"""Scores of labels, clusters, values and maps: numpy or pandas in, floats or Series out."""

from stofm.metrics.labels import accuracy, ari, macro_f1, nmi, weighted_f1
from stofm.metrics.maps import ssim
from stofm.metrics.values import jensen_shannon, mae, pearson, rmse

__all__ = [
    "accuracy",
    "ari",
    "jensen_shannon",
    "macro_f1",
    "mae",
    "nmi",
    "pearson",
    "rmse",
    "ssim",
    "weighted_f1",
]
