"""Time and memory of stofm against the plain implementation, row by row of one table.

Every measurement runs in a process of its own, the two sides in turn (plain, stofm, plain, stofm), so
that neither profits from the other's caches or from a quieter machine. Memory is the highest
resident size during the work above that before it, with inputs and weights already there.

    python benchmarks/speed.py                       the table, also as JSON in benchmarks/results/
    python benchmarks/speed.py --rows tokenize       some rows
    python benchmarks/speed.py --large 100000 1000000   tl.embed from backed files of that many cells
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HERE = Path(__file__).parent
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a function of ours.py against one of baseline.py.

    Attributes
    ----------
    what
        The work, in words.
    plain, ours
        Function names; None where there is no plain side.
    repeats
        Timed calls in a process, after one that is not timed.
    first_call
        Time the first call of a process and no other.
    min_ratio, max_seconds, max_mb, min_rate
        What must be reached; rate is cells per second.
    n_cells
        Cells of the work, where a rate is asked for.
    """

    what: str
    ours: str
    plain: str | None = None
    repeats: int = 3
    first_call: bool = False
    min_ratio: float | None = None
    max_seconds: float | None = None
    max_mb: float | None = None
    min_rate: float | None = None
    n_cells: int | None = None


ROWS = {
    "se2_forward": Row(
        what="SE(2) Transformer, forward, 1,040 nodes",
        plain="se2_forward",
        ours="se2_forward",
        repeats=5,
        min_ratio=6,
        max_mb=1300,
    ),
    "se2_train_step": Row(
        what="the same, training step",
        plain="se2_train_step",
        ours="se2_train_step",
        min_ratio=4,
        max_mb=2000,
    ),
    "cell_encoder": Row(
        what="cell encoder, 32 cells of 100..2,048 tokens, float32",
        plain="cell_encoder",
        ours="cell_encoder",
        first_call=True,
        min_ratio=2,
    ),
    "cell_encoder_bf16": Row(
        what="the same, bfloat16 against float32",
        plain="cell_encoder",
        ours="cell_encoder_bf16",
        first_call=True,
        min_ratio=3,
    ),
    "extraction": Row(
        what="sub-slices and virtual cells, 10,000 x 256, published rules",
        plain="extraction",
        ours="extraction",
        min_ratio=4,
    ),
    "extraction_own_rules": Row(
        what="the same, rules of our own models",
        plain="extraction",
        ours="extraction_own_rules",
        min_ratio=4,
    ),
    "extraction_first_call": Row(
        what="the same, first call of a process",
        plain="extraction",
        ours="extraction_own_rules",
        first_call=True,
        min_ratio=4,
        max_seconds=4,
    ),
    "tokenize": Row(
        what="ranking, 3,000 cells x 20,000 genes",
        plain="tokenize",
        ours="tokenize",
        repeats=7,
        min_ratio=5,
        max_mb=100,
    ),
    "embed_mini": Row(
        what="tl.embed, stofm-mini, 20,000 cells x 300 genes",
        ours="embed_mini",
        repeats=2,
        min_rate=1500,
        n_cells=20_000,
    ),
}


def measure(options: argparse.Namespace) -> None:
    """Run one side in this process; write its result, print seconds and memory as JSON."""
    side, function = options.measure
    prepare = getattr(importlib.import_module(side), function)
    work = prepare() if options.argument is None else prepare(options.argument)
    before = _resident_bytes(peak=False)
    seconds = []
    for _ in range(1 if options.first_call else 1 + options.repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    peak = _resident_bytes(peak=True) - before
    if callable(result):
        result = result()
    if result is not None:
        np.save(options.output, result)
    timed = seconds if options.first_call else seconds[1:]
    print(json.dumps({"seconds": statistics.median(timed), "bytes": max(peak, 0)}))


def _resident_bytes(*, peak: bool) -> int:
    """Resident size; asking for the present one makes the peak start anew, where Linux lets us."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if not peak:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _run_here(*arguments: str) -> str:
    """Run this script in a fresh process and return what it printed."""
    command = [sys.executable, str(HERE / "speed.py"), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure_row(row: Row, *, rounds: int) -> dict[str, Any]:
    """Measure both sides of a row in turn; of each side the round counts that was disturbed least."""
    sides = {"plain": ("baseline", row.plain), "stofm": ("ours", row.ours)}
    found: dict[str, list[dict[str, float]]] = {"plain": [], "stofm": []}
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / f"{name}.npy" for name in sides}
        for _ in range(rounds):
            for name, (side, function) in sides.items():
                if function is None:
                    continue
                printed = _run_here(
                    *("--measure", side, function),
                    *("--output", str(outputs[name])),
                    *("--repeats", str(row.repeats)),
                    *(["--first-call"] if row.first_call else []),
                )
                found[name].append(json.loads(printed.splitlines()[-1]))
        agreement = _agreement(*(np.load(p) for p in outputs.values() if p.exists()))
    result: dict[str, Any] = {"what": row.what, "agreement": agreement}
    for name, runs in found.items():
        if runs:
            result[f"{name}_seconds"] = min(run["seconds"] for run in runs)
            result[f"{name}_mb"] = max(run["bytes"] for run in runs) / MB
    return result | _verdict(row, result)


def _agreement(*results: NDArray[Any]) -> str:
    """How near the two sides' results are, in words."""
    if len(results) < 2:
        return ""
    ours, theirs = results
    if ours.dtype.kind == "f":
        return f"largest difference {np.abs(ours - theirs).max():.1e}"
    if ours.shape == theirs.shape and (ours == theirs).all():
        return "same"
    from sklearn.metrics import adjusted_rand_score

    return f"adjusted Rand index {adjusted_rand_score(ours, theirs):.2f}"


def _verdict(row: Row, result: dict[str, Any]) -> dict[str, Any]:
    """Ratio and rate, and whether every target of the row is reached."""
    seconds, mb = result["stofm_seconds"], result["stofm_mb"]
    verdict: dict[str, Any] = {}
    checks = []
    if "plain_seconds" in result:
        verdict["ratio"] = result["plain_seconds"] / seconds
    if row.n_cells is not None:
        verdict["cells_per_second"] = row.n_cells / seconds
    if row.min_ratio is not None:
        checks.append((f">= {row.min_ratio:g}x", verdict["ratio"] >= row.min_ratio))
    if row.max_seconds is not None:
        checks.append((f"< {row.max_seconds:g} s", seconds < row.max_seconds))
    if row.max_mb is not None:
        checks.append((f"< {row.max_mb:,.0f} MB", mb < row.max_mb))
    if row.min_rate is not None:
        rate = verdict["cells_per_second"]
        checks.append((f">= {row.min_rate:,.0f} cells/s", rate >= row.min_rate))
    verdict["target"] = ", ".join(text for text, _ in checks)
    verdict["reached"] = all(reached for _, reached in checks)
    return verdict


def measure_large(n_cells: int) -> dict[str, Any]:
    """Embed one slice of `n_cells` cells from a backed file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.h5ad"
        _run_here("--write-large", str(n_cells), "--output", str(path))
        printed = _run_here(
            *("--measure", "ours", "embed_mini_backed"), "--first-call", "--argument", str(path)
        )
        measured = json.loads(printed.splitlines()[-1])
    row = Row(
        what=f"tl.embed, stofm-mini, {n_cells:,} cells x 300 genes, backed",
        ours="embed_mini_backed",
        min_rate=1500,
        max_mb=8000,
        n_cells=n_cells,
    )
    result: dict[str, Any] = {"what": row.what, "agreement": ""}
    result["stofm_seconds"] = measured["seconds"]
    result["stofm_mb"] = measured["bytes"] / MB
    return result | _verdict(row, result)


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Table of all rows."""
    lines = [
        "| work | plain | stofm | ratio | target | reached | results |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [result["what"]]
        for side in ("plain", "stofm"):
            seconds = result.get(f"{side}_seconds")
            memory = f"{result.get(f'{side}_mb', 0):,.0f} MB"
            cells.append("-" if seconds is None else f"{seconds:.3g} s, {memory}")
        if "cells_per_second" in result:
            cells.append(f"{result['cells_per_second']:,.0f} cells/s")
        else:
            cells.append(f"{result['ratio']:.1f}x")
        cells += [result["target"], "yes" if result["reached"] else "NO", result["agreement"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    import torch

    import stofm

    return {
        "stofm": stofm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Well above 0 before anything was measured: something else ran, and the times are too long.
        "load": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if "model name" in line).partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=2, help="processes per side [%(default)s]")
    parser.add_argument("--large", nargs="*", type=int, default=[], metavar="CELLS")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--argument", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write-large", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options)
    elif options.write_large:
        importlib.import_module("ours").write_large_slice(options.output, options.write_large)
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """Measure what was asked for; after each row write the JSON, at the end print the table."""
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    results: list[dict[str, Any]] = []
    work = {name: partial(measure_row, ROWS[name], rounds=options.rounds) for name in options.rows}
    work |= {f"large_{n:,}": partial(measure_large, n) for n in options.large}
    for name, measure_it in work.items():
        print(f"measuring {name} ...", file=sys.stderr)
        results.append({"row": name} | measure_it())
        entries = json.dumps({"machine": machine, "results": results}, indent=2)
        (options.out / "speed.json").write_text(entries + "\n")
    print(to_markdown(results))
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))


if __name__ == "__main__":
    main()
