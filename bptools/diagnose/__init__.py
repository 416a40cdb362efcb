"""What goes wrong while a model trains, and where: the first NaN; gradients that vanish or explode; dead units."""

from ._flow import Finding, GradientFlow, Row, gradient_flow
from ._nonfinite import Detector, NonFiniteError, Origin, detect_nonfinite

__all__ = [
    "Detector",
    "Finding",
    "GradientFlow",
    "NonFiniteError",
    "Origin",
    "Row",
    "detect_nonfinite",
    "gradient_flow",
]
