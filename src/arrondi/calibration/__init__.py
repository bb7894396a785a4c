"""What calibration data says about a tensor: ranges, second moments, a sample of its rows."""

from arrondi.calibration.histogram_filter import histogram_filter
from arrondi.calibration.moments import Reservoir, SecondMoment, unvech, vech
from arrondi.calibration.observers import NEEDS_GRID, OBSERVERS, Observer, get_observer

__all__ = [
    "NEEDS_GRID",
    "OBSERVERS",
    "Observer",
    "Reservoir",
    "SecondMoment",
    "get_observer",
    "histogram_filter",
    "unvech",
    "vech",
]
