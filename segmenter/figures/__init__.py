"""The poster's six figures, of any image: a picture for print (PDF and PNG) and the numbers in it (JSON).

Each function takes models and images and gives a `Figure`; `segmenter figures` makes all that its inputs allow.
"""

from segmenter.figures.attended_distance import distance_by_depth
from segmenter.figures.attention_panels import Scene, attention_by_layer, class_embeddings, field_of_view, scene
from segmenter.figures.label_panels import patch_size, qualitative
from segmenter.figures.page import Figure, FigureError, MissingInput

__all__ = [
    "Figure",
    "FigureError",
    "MissingInput",
    "Scene",
    "attention_by_layer",
    "class_embeddings",
    "distance_by_depth",
    "field_of_view",
    "patch_size",
    "qualitative",
    "scene",
]
