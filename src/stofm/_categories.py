"""Labels of cells as text, wherever classes or categories are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


def label_text(column: pd.Series) -> NDArray[np.object_]:
    """Text of the labels in a column, (n,), empty for none.

    Whole numbers are the same however they are stored: pandas turns them into 0.0, 1.0 where one is
    missing, and they are "0", "1" all the same.
    """
    import pandas as pd

    codes, labels = pd.factorize(column)
    names = np.array([*map(_text, labels), ""], dtype=object)
    found: NDArray[np.object_] = names[codes]
    return found


def _text(label: Any) -> str:
    is_whole = isinstance(label, float | np.floating) and float(label).is_integer()
    return str(int(label)) if is_whole else str(label)


def value_codes(column: pd.Series) -> tuple[NDArray[np.int64], list[str]]:
    """Number the values of a column, those that are missing as one more."""
    import pandas as pd

    codes, values = pd.factorize(column)
    codes = np.where(codes < 0, len(values), codes)
    used = int(codes.max(initial=-1)) + 1
    return codes, [*map(str, values), "(none)"][:used]
