"""A head without hidden layers: logistic regression, for few cells or many classes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

from stofm.heads.targets import head_loss
from stofm.nn.device import seeded
from stofm.nn.prediction_head import HeadConfig, PredictionHead

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stofm.heads.targets import Targets

#: Standard deviation of all columns together that inputs are scaled to. They are scaled as one:
#: principal components that hardly vary hardly count.
_SPREAD: Final = 10.0
#: The ``C`` of scikit-learn, which is the prior variance of each weight: with inputs of that spread
#: the scores of a class are expected to vary by about three, from unlikely to likely.
_STRENGTH: Final = 0.1
#: More cells than this are thinned out: so few numbers are known well enough from these.
_MOST_CELLS: Final = 50_000
_MOST_STEPS: Final = 100
#: Largest entry of the gradient at which fitting stops.
_TOLERANCE: Final = 1e-4


def fit_linear_head(
    features: NDArray[np.float32],
    targets: Targets,
    *,
    fitted: NDArray[np.int64],
) -> PredictionHead:
    """Fit logistic regression to classes, or the same to proportions.

    Parameters
    ----------
    features
        (n, d) representations.
    targets
        Classes or proportions of the same rows.
    fitted
        Rows to fit, in an order that does not depend on the file.

    Returns
    -------
    The head, in evaluation mode.
    """
    rows = fitted[:: -(-len(fitted) // _MOST_CELLS)]
    values = torch.from_numpy(features[rows]).double()
    config = HeadConfig(
        d_input=features.shape[1], d_output=targets.n_outputs, widths=(), dropout=0.0
    )
    with seeded(0):
        head = PredictionHead(config).double()
    mean = values.mean(dim=0)
    total = math.sqrt(float(values.var(dim=0, correction=0).sum()))
    head.input_mean.copy_(mean)
    head.input_scale.fill_(total / _SPREAD or 1.0)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    _minimise(head, values, targets, rows, penalty=0.5 / (_STRENGTH * len(rows)))
    return head.float().eval()


def _minimise(
    head: PredictionHead,
    values: torch.Tensor,
    targets: Targets,
    rows: NDArray[np.int64],
    *,
    penalty: float,
) -> None:
    wanted = targets.take(rows)
    wanted = wanted if targets.kind == "classes" else wanted.double()
    weights = targets.class_weights
    class_weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        head.last.parameters(),
        max_iter=_MOST_STEPS,
        tolerance_grad=_TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total, count = head_loss(head(values), wanted, targets.kind, class_weights)
        mean = total / count + penalty * head.last.weight.square().sum()
        mean.backward()
        return mean

    optimizer.step(loss)
