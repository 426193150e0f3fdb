"""Deblending galaxies with variational autoencoders: the library under the book.

Simulation and measurement are imported at once; what needs Keras (`load`, `networks`,
`training`, `weights`) is imported when first used, so that a script that only draws
galaxies starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .catalogues import Catalogue, catalogue
from .measurement import measure
from .normalisation import Normalisation, fit_normalisation
from .simulation import Scenes, simulate
from .surveys import Survey, survey

if TYPE_CHECKING:
    from .weights import load

__version__ = "0.1.0"
__all__ = [
    "Catalogue",
    "Normalisation",
    "Scenes",
    "Survey",
    "catalogue",
    "fit_normalisation",
    "load",
    "measure",
    "simulate",
    "survey",
]


def __getattr__(name: str):
    if name == "load":
        return import_module(".weights", __name__).load
    if name in ("networks", "plotting", "training", "weights"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
