"""Where data and tokenizers meet: fitting, training, the tolerance search, loading any artifact."""

from actok.training.config import TrainConfig
from actok.training.fitting import fit, fit_parts, load, load_material
from actok.training.sources import TrainingError
from actok.training.stopping import TrainingStopped
from actok.training.tolerance import Tolerance, ToleranceError

__all__ = [
    "Tolerance",
    "ToleranceError",
    "TrainConfig",
    "TrainingError",
    "TrainingStopped",
    "fit",
    "fit_parts",
    "load",
    "load_material",
]
