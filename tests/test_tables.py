from __future__ import annotations

import numpy as np
import pandas as pd

from stofm._tables import read_table


def test_numbers_come_back_to_the_last_bit(tmp_path, rng):
    numbers = 10.0 ** rng.uniform(-300, 300, 1000)
    written = pd.DataFrame({"step": np.arange(1000), "loss": numbers, "split": "train"})
    written.to_csv(tmp_path / "history.csv", index=False)
    pd.testing.assert_frame_equal(
        read_table(tmp_path / "history.csv"), written, check_exact=True, check_dtype=False
    )
