"""What is remembered: plain objects over tensors that know no loss and no Trainer."""

from lightning_memdml.memory.embedding_memory import EmbeddingMemory
from lightning_memdml.memory.instance_memory import InstanceMemory
from lightning_memdml.memory.momentum_encoder import MomentumEncoder
from lightning_memdml.memory.sharded import ShardedMemory

__all__ = ["EmbeddingMemory", "InstanceMemory", "MomentumEncoder", "ShardedMemory"]
