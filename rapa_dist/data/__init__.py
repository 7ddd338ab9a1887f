"""Images: where they come from, and the mini-batches made of them.

Importing this imports neither torch nor torchvision.
"""

from rapa_dist.data.batches import Batches, evaluation_batches
from rapa_dist.data.load import FoundDataSet, find_datasets, load_dataset
from rapa_dist.data.sets import DataSet, ImageSet

__all__ = [
    "Batches",
    "DataSet",
    "FoundDataSet",
    "ImageSet",
    "evaluation_batches",
    "find_datasets",
    "load_dataset",
]
