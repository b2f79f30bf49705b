"""The same configuration on one machine with two processes and on two machines with one each, as torchrun starts it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from support.children import run_python, run_ranks
from torch import Tensor

from lightning_memdml.cli import main

COMMAND = """
-m lightning_memdml fit --trainer.accelerator=cpu --trainer.strategy=ddp --trainer.max_steps=4
--trainer.limit_val_batches=0 --trainer.enable_progress_bar=false --model.backbone=SmallConvNet
--model.backbone.width=4 --model.loss=ContrastiveLoss --model.embedding_dim=8 --data.num_classes=20
--data.batch_size=8 --data.images_per_class=2 --data.num_workers=0 --trainer.callbacks+=MemoryCallback
--trainer.callbacks.size=40 --trainer.callbacks.encoder_momentum=0.9 --seed_everything=1
"""


def two_nodes(folder: Path, cache: str) -> Path:
    """Let torchrun start one process on each of two nodes; return the checkpoint.

    Each node has a folder of its own. They meet in a file: a port could be taken before they listen.
    """
    launch = "-m torch.distributed.run --nnodes=2 --nproc-per-node=1 --rdzv-id=tests --rdzv-backend=c10d"
    launch += f" --rdzv-endpoint={folder}/rendezvous --rdzv-conf=store_type=file --local-addr=127.0.0.1"
    variables = {"LIGHTNING_MEMDML_CACHE": cache, "GLOO_SOCKET_IFNAME": "lo"}
    with ThreadPoolExecutor(2) as nodes:
        started = []
        for node in ("0", "1"):
            (folder / node).mkdir(parents=True)
            arguments = [*launch.split(), *COMMAND.split(), "--trainer.num_nodes=2", "--trainer.devices=1"]
            started.append(nodes.submit(run_python, *arguments, cwd=folder / node, env=variables))
        for node in started:
            node.result()
    (checkpoint,) = folder.rglob("last.ckpt")
    return checkpoint


def one_of_two_processes(folder: Path) -> None:
    os.chdir(folder)
    main([*COMMAND.split()[2:], "--trainer.num_nodes=1", "--trainer.devices=2"])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_two_machines_train_as_two_processes_of_one(tmp_path: Path, glyph_cache: str) -> None:
    """Weights, memory and momentum encoder bit for bit; only node 0 writes the checkpoint, which both resume from."""
    (tmp_path / "one").mkdir()
    run_ranks(2, one_of_two_processes, tmp_path / "one", env={"LIGHTNING_MEMDML_CACHE": glyph_cache})
    (checkpoint,) = (tmp_path / "one").rglob("last.ckpt")
    one = torch.load(checkpoint, weights_only=True)
    two = torch.load(two_nodes(tmp_path / "two", glyph_cache), weights_only=True)
    assert two["global_step"] == 4
    assert len(two["callbacks"]["MemoryCallback"]["memory"]["labels"]) == 40
    assert same(dict(two["state_dict"]), dict(one["state_dict"]))
    assert same(two["callbacks"]["MemoryCallback"], one["callbacks"]["MemoryCallback"])
