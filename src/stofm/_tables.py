"""Tables in text files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


def read_table(path: Path, **options: Any) -> pd.DataFrame:
    """Read a table as :func:`pandas.read_csv` does; numbers are as written, to the last bit."""
    import pandas as pd

    # pandas 3.1 always reads so, and deprecates the option.
    if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1):
        options["float_precision"] = "round_trip"
    return pd.read_csv(path, **options)
