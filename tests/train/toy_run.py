"""A stage without a model, for tests of the loop; as a script, runs in several processes, some of which fail."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stofm.tl import train
from stofm.train.checkpoint import Progress, load_optimizer_tensors, optimizer_tensors
from stofm.train.config import MaskedGeneConfig, OptimizerConfig, RunConfig, StageConfig
from stofm.train.loop import TrainingLoop
from stofm.train.objectives import LossPart, contrastive_loss
from stofm.train.processes import Processes

N_SAMPLES, N_HELD_OUT = 37, 11


class ToyInputs:
    def __init__(self, numbers: np.ndarray, x: torch.Tensor, y: torch.Tensor) -> None:
        self.numbers, self.x, self.y = numbers, x, y
        self.n_cells, self.n_tokens = len(x), 6 * len(x)

    def to(self, device: torch.device) -> ToyInputs:
        return ToyInputs(self.numbers, self.x.to(device), self.y.to(device))


class ToyObjective(nn.Module):
    """Regression, and contrastive learning of two halves of the input; one weight is unused."""

    def __init__(self, *, dropout: float = 0.0, contrastive: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 2)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(dropout)
        self.weights = {"squares": 1.0} | ({"contrast": contrastive} if contrastive else {})

    def forward(self, inputs: ToyInputs, gather: Any = None) -> dict[str, LossPart]:
        hidden = self.dropout(self.norm(self.first(inputs.x)).relu())
        error = (self.last(hidden) - inputs.y).square().mean(dim=-1).sum()
        parts = {"squares": LossPart(error, len(inputs.x))}
        if "contrast" in self.weights:
            turned = self.norm(self.first(inputs.x.flip(1)))
            parts["contrast"] = contrastive_loss(hidden, turned, temperature=0.5, gather=gather)
        return parts


class ToySamples:
    def __init__(self, n_samples: int, batch_size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(n_samples, 6)).astype(np.float32)
        self.y = np.stack([self.x[:, 0] * self.x[:, 1], self.x[:, 2]], axis=1)
        self.batch_size = batch_size

    def epoch(self, number: int) -> list[np.ndarray]:
        order = np.random.default_rng([3, number]).permutation(len(self.x))
        return np.split(order, range(self.batch_size, len(order), self.batch_size))

    def load(self, samples: np.ndarray, epoch: int) -> ToyInputs:
        noise = [np.random.default_rng([epoch, 9, k]).normal(size=6) for k in samples]
        x = self.x[samples] + 0.1 * np.stack(noise).astype(np.float32)
        return ToyInputs(samples, torch.from_numpy(x), torch.from_numpy(self.y[samples]))

    def describe(self, samples: np.ndarray) -> str:
        return f"slices {sorted(samples.tolist())}"


class ToyStage(ToySamples):
    name = "toy"
    number = 1

    def __init__(
        self, objective: ToyObjective, *, batch_size: int = 4, held_out: bool = False
    ) -> None:
        super().__init__(N_SAMPLES, batch_size, seed=1)
        self.objective = objective
        self.samples = self
        self.validation = ToySamples(N_HELD_OUT, 4, seed=2) if held_out else None
        self.refresh_every: int | None = None
        self.loaded: list[int] = []
        self.refreshed_at: list[int] = []

    def load(self, samples: np.ndarray, epoch: int) -> ToyInputs:
        self.loaded += samples.tolist()
        return super().load(samples, epoch)

    def refresh(self) -> None:
        self.refreshed_at.append(len(self.loaded))


class StoppedError(Exception):
    """A run was stopped after a checkpoint."""


class ToyRecorder:
    """Keeps rows and the steps of checkpoints; can stop the run after one of these."""

    def __init__(self, loop: TrainingLoop, *, stop_at: int | None = None) -> None:
        self.loop, self.stop_at = loop, stop_at
        self.rows: list[dict[str, Any]] = []
        self.saved: list[int] = []
        self.kept: list[int] = []
        self.n_steps = 0

    def record(self, row: Any) -> None:
        self.rows.append(dict(row))

    def advance(self) -> None:
        self.n_steps += 1

    def keep(self) -> None:
        self.kept.append(self.loop.progress.step)

    def save(self) -> None:
        self.saved.append(self.loop.progress.step)
        if self.loop.progress.step == self.stop_at:
            raise StoppedError


def toy_loop(
    stage: ToyStage,
    *,
    optimizer: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    n_epochs: int = 2,
    max_steps: int | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> TrainingLoop:
    run_config = RunConfig(**{"log_every": 1, "n_threads": 1, **(run or {})})
    optimizer_config = OptimizerConfig(
        **{
            "learning_rate": 0.02,
            "warmup_steps": 2,
            "batch_size": stage.batch_size,
            "accumulation": 2,
            **(optimizer or {}),
        }
    )
    return TrainingLoop(
        stage,
        StageConfig(
            name="spatial", epochs=n_epochs, max_steps=max_steps, optimizer=optimizer_config
        ),
        run=run_config,
        processes=processes or Processes.start("cpu", run_config.precision),
        progress=progress or Progress(),
    )


def main(out: Path, options: dict[str, Any]) -> None:
    """Train from a stored state, if there is one, to a checkpoint or the end; store the state."""
    torch.set_num_threads(1)
    _train_toy(out, options, Processes.start("cpu"))


def _train_toy(out: Path, options: dict[str, Any], processes: Processes) -> None:
    stage = ToyStage(ToyObjective(), held_out=True, batch_size=options["batch_size"])
    begin = options["begin"]
    progress = Progress(**json.loads(Path(begin, "progress.json").read_text())) if begin else None
    run = {"checkpoint_every": 1, "n_threads": 0}
    loop = toy_loop(stage, processes=processes, progress=progress, run=run)
    if begin:
        stage.objective.load_state_dict(load_file(Path(begin, "weights.safetensors")))
        tensors = load_file(Path(begin, "optimizer.safetensors"))
        load_optimizer_tensors(loop.optimizer, stage.objective, tensors)
    recorder = ToyRecorder(loop, stop_at=options["stop"])
    with contextlib.suppress(StoppedError):
        loop.train(recorder)
    place = out / str(processes.rank)
    place.mkdir(parents=True)
    save_file(stage.objective.state_dict(), place / "weights.safetensors")
    save_file(optimizer_tensors(loop.optimizer, stage.objective), place / "optimizer.safetensors")
    (place / "progress.json").write_text(json.dumps(vars(loop.progress)))
    (place / "rows.json").write_text(json.dumps(recorder.rows))
    (place / "seen.json").write_text(json.dumps(stage.loaded))
    processes.wait()


def pretrain(out: Path, options: dict[str, Any]) -> None:
    """Run all stages on two slices; the model has no dropout."""
    torch.set_num_threads(1)
    optimizer = OptimizerConfig(
        # So large an epsilon that gradients which are mere rounding don't become steps.
        learning_rate=1e-3,
        epsilon=1e-3,
        warmup_steps=1,
        batch_size=3,
        accumulation=2,
        max_norm=0.5,
    )
    on_subslices: dict[str, Any] = {
        "epochs": 2,
        "optimizer": optimizer,
        "subslice_cells": 17,
        "vary_subslices": True,
        "sampled_cells": 3,
    }
    result = train(
        anndata.read_h5ad(options["data"]),
        options["model"],
        stage=[
            StageConfig(name="spatial", **on_subslices),
            StageConfig(name="joint", **on_subslices),
            StageConfig(
                name="cell_encoder",
                max_steps=4,
                optimizer=optimizer,
                masked_genes=MaskedGeneConfig(candidates="batch"),
            ),
            StageConfig(name="joint", refresh_every=1, **on_subslices),
        ],
        validation=anndata.read_h5ad(options["held_out"]),
        library_key="library",
        out_dir=out,
        log_every=1,
        device="cpu",
        show_progress_bar=False,
    )
    assert result.run["n_processes"] == options["n_processes"]


def prepare(processes: Processes) -> None:
    """The first process prepares, and the others wait for it."""
    if processes.is_first:
        time.sleep(0.5)
        msg = "the table is no table"
        raise ValueError(msg)
    processes.agree(None)


def step(processes: Processes) -> None:
    """The second fails in a step, and the first waits for its share."""
    processes.agree("a")
    if not processes.is_first:
        msg = "the loss is not finite"
        raise FloatingPointError(msg)
    processes.sum(torch.ones(3))


def killed(processes: Processes) -> None:
    """The second is killed while the first waits for it."""
    if not processes.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.wait()


def end(processes: Processes) -> None:
    """Nothing fails."""
    processes.wait()


def fail(out: Path, options: dict[str, Any]) -> None:
    """Run a case in which a process may fail; what it says last goes to a file."""
    with Path(f"{out}{os.environ['RANK']}.txt").open("w") as file:
        try:
            globals()[options["case"]](Processes.start("cpu"))
        except Exception as error:
            file.write(f"{type(error).__name__}: {error}\n".splitlines()[-1])
            raise


def in_processes(job: dict[str, Any]) -> list[int]:
    """Fork the processes of a job, as torchrun would start them, and return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["n_processes"]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["n_processes"]),
            "LOCAL_WORLD_SIZE": str(job["n_processes"]),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
        status = 1
        try:
            run = pretrain if "model" in job else fail if "case" in job else main
            run(Path(job["out"]), job)
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    # Once, before the processes are forked.
    importlib.import_module("lightning_fabric")
    importlib.import_module("transformers.models.bert.modeling_bert")
    # Nobody pulls the plug.
    os.fsync = lambda _: None
    for one in json.loads(sys.argv[1]):
        started = time.monotonic()
        codes = in_processes(one)
        if "case" in one:
            found = {"codes": codes, "seconds": time.monotonic() - started}
            Path(f"{one['out']}.json").write_text(json.dumps(found))
        elif any(codes):
            sys.exit(f"{one}: exit codes {codes}")
