"""Training on real images: data sets, augmentation, a compiled training step and the record of a run."""

from fixup_init.training.augment import AUGMENT, NO_AUGMENT, Augment
from fixup_init.training.data import DataFileError, Dataset, load
from fixup_init.training.loop import evaluate, fit
from fixup_init.training.optimizers import learning_rate, sgd
from fixup_init.training.progress import progress_bar
from fixup_init.training.record import DivergenceError, Epoch, History, Progress

__all__ = [
    "load",
    "Dataset",
    "DataFileError",
    "Augment",
    "AUGMENT",
    "NO_AUGMENT",
    "fit",
    "evaluate",
    "History",
    "Epoch",
    "Progress",
    "progress_bar",
    "DivergenceError",
    "learning_rate",
    "sgd",
]
