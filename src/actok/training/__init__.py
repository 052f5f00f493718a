"""Where data and tokenizers meet: fitting, the tolerance search, loading any artifact."""

from actok.training.fitting import fit, fit_parts, load, load_material
from actok.training.tolerance import Tolerance, ToleranceError

__all__ = ["Tolerance", "ToleranceError", "fit", "fit_parts", "load", "load_material"]
