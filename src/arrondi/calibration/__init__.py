"""What calibration data says about a tensor: ranges, second moments, a sample of its rows."""

from arrondi.calibration.energy import Energy, Moved, half_of
from arrondi.calibration.halfvectors import unvech, vech
from arrondi.calibration.histogram_filter import histogram_filter
from arrondi.calibration.moments import SPANS, SecondMoment, span_of
from arrondi.calibration.observers import NEEDS_GRID, OBSERVERS, Observer, get_observer
from arrondi.calibration.outputs import OutputMoment
from arrondi.calibration.reservoir import Reservoir

__all__ = [
    "NEEDS_GRID",
    "OBSERVERS",
    "SPANS",
    "Energy",
    "Moved",
    "Observer",
    "OutputMoment",
    "Reservoir",
    "SecondMoment",
    "get_observer",
    "half_of",
    "histogram_filter",
    "span_of",
    "unvech",
    "vech",
]
