"""The same configuration on one machine with two processes and on two machines with one each, as torchrun starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMMAND = """
-m lightning_memdml fit --trainer.accelerator=cpu --trainer.strategy=ddp --trainer.max_steps=4
--trainer.limit_val_batches=0 --trainer.enable_progress_bar=false --model.backbone=SmallConvNet
--model.backbone.width=4 --model.loss=ContrastiveLoss --model.embedding_dim=8 --data.num_classes=20
--data.batch_size=8 --data.images_per_class=2 --data.num_workers=0 --trainer.callbacks+=MemoryCallback
--trainer.callbacks.size=40 --trainer.callbacks.encoder_momentum=0.9 --seed_everything=1
"""


def start(folder: Path, cache: str, nodes: int, processes: int) -> Path:
    """Run the configuration on `nodes` x `processes` ranks, each node in a folder of its own; return its checkpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = f"-m torch.distributed.run --nnodes={nodes} --nproc-per-node={processes} --master-addr=127.0.0.1"
    cluster = [f"--trainer.num_nodes={nodes}", f"--trainer.devices={processes}"]
    machines = []
    for node in range(nodes):
        (folder / str(node)).mkdir(parents=True)
        arguments = [*launch.split(), f"--master-port={port}", f"--node-rank={node}", *COMMAND.split(), *cluster]
        path = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)
        machines.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder / str(node),
                env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_MEMDML_CACHE": cache, "PYTHONPATH": path,
                     "GLOO_SOCKET_IFNAME": "lo"},
                stdout=(folder / f"{node}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    try:
        codes = [machine.wait(timeout=300) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
    logs = "\n".join(log.read_text()[-3000:] for log in folder.glob("*.log"))
    assert codes == [0] * nodes, logs
    (checkpoint,) = folder.rglob("last.ckpt")
    return checkpoint


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_two_machines_train_as_two_processes_of_one(tmp_path: Path, glyph_cache: str) -> None:
    """Weights, memory and momentum encoder bit for bit; only node 0 writes the checkpoint, which both resume from."""
    two = torch.load(start(tmp_path / "two", glyph_cache, nodes=2, processes=1), weights_only=True)
    one = torch.load(start(tmp_path / "one", glyph_cache, nodes=1, processes=2), weights_only=True)
    assert two["global_step"] == 4
    assert len(two["callbacks"]["MemoryCallback"]["memory"]["labels"]) == 40
    assert same(dict(two["state_dict"]), dict(one["state_dict"]))
    assert same(two["callbacks"]["MemoryCallback"], one["callbacks"]["MemoryCallback"])
