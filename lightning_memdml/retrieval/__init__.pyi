"""Exact retrieval scores, indexes, and pictures of what is retrieved."""

from lightning_memdml.retrieval.clustering import normalized_mutual_information as normalized_mutual_information
from lightning_memdml.retrieval.embedding_map import map_points as map_points
from lightning_memdml.retrieval.embedding_map import save_map as save_map
from lightning_memdml.retrieval.examples import Neighbour as Neighbour
from lightning_memdml.retrieval.examples import RetrievalExample as RetrievalExample
from lightning_memdml.retrieval.examples import retrieval_examples as retrieval_examples
from lightning_memdml.retrieval.gallery import gallery_figure as gallery_figure
from lightning_memdml.retrieval.gallery import save_gallery as save_gallery
from lightning_memdml.retrieval.index import EmbeddingIndex as EmbeddingIndex
from lightning_memdml.retrieval.index import IndexedImages as IndexedImages
from lightning_memdml.retrieval.index import build_index as build_index
from lightning_memdml.retrieval.index import load_index as load_index
from lightning_memdml.retrieval.index_kinds import HNSW as HNSW
from lightning_memdml.retrieval.index_kinds import IVF as IVF
from lightning_memdml.retrieval.index_kinds import PQ as PQ
from lightning_memdml.retrieval.index_kinds import Flat as Flat
from lightning_memdml.retrieval.index_kinds import IndexKind as IndexKind
from lightning_memdml.retrieval.metrics import RetrievalMetrics as RetrievalMetrics
from lightning_memdml.retrieval.neighbours import nearest_neighbours as nearest_neighbours
from lightning_memdml.retrieval.page import gallery_html as gallery_html
from lightning_memdml.retrieval.ranking import QueryRanks as QueryRanks
from lightning_memdml.retrieval.ranking import rank_queries as rank_queries
from lightning_memdml.retrieval.ranking import retrieval_scores as retrieval_scores
from lightning_memdml.retrieval.reranking import rank_reranked as rank_reranked
from lightning_memdml.retrieval.reranking import rerank as rerank
from lightning_memdml.whitening import Whitening as Whitening

__all__: list[str]
