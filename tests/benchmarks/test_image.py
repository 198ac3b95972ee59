from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
image = importlib.import_module("image")


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def jobs(_: Any, seeds: range) -> Any:
        for seed in seeds:

            def measure(seed: int = seed) -> list[dict[str, Any]]:
                if seed == 1 and not done:
                    raise KeyboardInterrupt
                row = {"ablation": "as it is", "seed": seed, "k-means ARI": 0.5 + seed / 4}
                return [row]

            yield f"as it is, seed {seed}", measure

    monkeypatch.setattr(image, "run_ablations", jobs)
    call = ["image.py", str(tmp_path), "--parts", "ablations", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", [*call, "--out", str(tmp_path / "found")])
    with pytest.raises(KeyboardInterrupt):
        image.main()
    stored = json.loads((tmp_path / "found.json").read_text())
    assert list(stored["ablations"]) == ["as it is, seed 0"]
    done.append(True)
    # What was measured is not measured again.
    stored["ablations"]["as it is, seed 0"][0]["k-means ARI"] = 0.25
    (tmp_path / "found.json").write_text(json.dumps(stored))
    image.main()
    # The mean of 0.25 and 0.75, and their spread.
    assert "| as it is | 0.500 ± 0.354 |" in (tmp_path / "found.md").read_text()


def test_what_is_not_measured_has_no_number() -> None:
    rows = [{"method": "a", "seed": 0, "r": 0.5}, {"method": "b", "seed": 0, "MSE": 1.0}]
    table = ["| method | r | MSE |", "| --- | --- | --- |", "| a | 0.500 |  |", "| b |  | 1.000 |"]
    assert image.to_table(rows, "method", ["r", "MSE"]) == table
