"""A page in the browser that searches an index by image.

Install Gradio, make an index, and start the page:

    pip install gradio
    memdml index --ckpt_path runs/latest/checkpoints/last.ckpt --output runs/index
    python examples/search_by_image.py runs/index
"""

import sys
from typing import Any

from PIL import Image

from lightning_memdml import MetricLearner
from lightning_memdml.deploy.index_command import indexed_images
from lightning_memdml.retrieval import load_index


class Search:
    """Finds the images of an index that are nearest to a picture, with their class and similarity."""

    def __init__(self, folder: str) -> None:
        self.index = load_index(folder)
        self.learner = MetricLearner.load(self.index.about["ckpt_path"])
        self.images = indexed_images(self.index.about).images

    def __call__(self, picture: Image.Image | None, count: int = 12) -> list[tuple[Image.Image, str]]:
        """Return pictures and captions, the most similar one first."""
        if picture is None:  # the user has removed it
            return []
        similarity, position = self.learner.search(picture, self.index, int(count))
        found = zip(position[0].tolist(), similarity[0].tolist(), strict=True)
        return [(self.images.picture(row), f"{self.index.images.classes[row]}, {score:.3f}") for row, score in found]


def make_page(search: Search) -> Any:
    """Return the page: `gradio.Blocks`, to be launched."""
    import gradio

    with gradio.Blocks(title="Search by image", analytics_enabled=False) as page:
        picture, count = gradio.Image(type="pil", height=300), gradio.Slider(1, 50, 12, step=1, label="Images")
        found = gradio.Gallery(label="Nearest images", columns=4, height="auto")
        gradio.on([picture.change, count.release], search, [picture, count], found)
    return page


if __name__ == "__main__":
    make_page(Search(sys.argv[1])).launch()
