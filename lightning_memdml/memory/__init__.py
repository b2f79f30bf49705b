"""What is remembered: plain objects over tensors that know no loss and no Trainer."""

from lightning_memdml.memory.embedding_memory import EmbeddingMemory

__all__ = ["EmbeddingMemory"]
