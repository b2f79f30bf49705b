"""How good retrieval is, and looking at it."""

from lightning_memdml.retrieval.clustering import normalized_mutual_information
from lightning_memdml.retrieval.examples import Neighbour, RetrievalExample, retrieval_examples
from lightning_memdml.retrieval.gallery import gallery_figure, save_gallery
from lightning_memdml.retrieval.metrics import RetrievalMetrics
from lightning_memdml.retrieval.neighbours import nearest_neighbours
from lightning_memdml.retrieval.page import gallery_html
from lightning_memdml.retrieval.ranking import QueryRanks, rank_queries, retrieval_scores

__all__ = [
    "Neighbour",
    "QueryRanks",
    "RetrievalExample",
    "RetrievalMetrics",
    "gallery_figure",
    "gallery_html",
    "nearest_neighbours",
    "normalized_mutual_information",
    "rank_queries",
    "retrieval_examples",
    "retrieval_scores",
    "save_gallery",
]
