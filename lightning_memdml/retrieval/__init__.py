"""How good retrieval is, and looking at it."""

from lightning_memdml.retrieval.clustering import normalized_mutual_information
from lightning_memdml.retrieval.embedding_map import map_points, save_map
from lightning_memdml.retrieval.examples import Neighbour, RetrievalExample, retrieval_examples
from lightning_memdml.retrieval.gallery import gallery_figure, save_gallery
from lightning_memdml.retrieval.index import EmbeddingIndex, IndexedImages, IndexOptions, build_index, load_index
from lightning_memdml.retrieval.metrics import RetrievalMetrics
from lightning_memdml.retrieval.neighbours import nearest_neighbours
from lightning_memdml.retrieval.page import gallery_html
from lightning_memdml.retrieval.ranking import QueryRanks, rank_queries, retrieval_scores

__all__ = [
    "EmbeddingIndex",
    "IndexOptions",
    "IndexedImages",
    "Neighbour",
    "QueryRanks",
    "RetrievalExample",
    "RetrievalMetrics",
    "build_index",
    "gallery_figure",
    "gallery_html",
    "load_index",
    "map_points",
    "nearest_neighbours",
    "normalized_mutual_information",
    "rank_queries",
    "retrieval_examples",
    "retrieval_scores",
    "save_gallery",
    "save_map",
]
