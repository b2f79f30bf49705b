"""Memories of embeddings: plain objects over tensors, without losses and without a Trainer."""

from lightning_memdml.memory.embedding_memory import EmbeddingMemory, TableMemory
from lightning_memdml.memory.instance_memory import InstanceMemory
from lightning_memdml.memory.moment_matching import MomentMatchedMemory
from lightning_memdml.memory.momentum_encoder import MomentumEncoder
from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory.ring_memory import RingMemory
from lightning_memdml.memory.rows import MemoryRows, RowTable
from lightning_memdml.memory.sharded import ShardedMemory

__all__ = [
    "EmbeddingMemory",
    "InstanceMemory",
    "Memory",
    "MemoryRows",
    "MomentMatchedMemory",
    "MomentumEncoder",
    "RingMemory",
    "RowTable",
    "ShardedMemory",
    "TableMemory",
]
