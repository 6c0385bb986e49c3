"""Image data sets as tensors: loaded once, kept on the device, indexed and augmented in batches.

A data set is a function that returns its tensors, registered by name (`register`), and a file
``conf/data/<name>.yaml``. Each module here holds one data set, or a few that are alike; all modules are imported, so
that a new one needs no line elsewhere. The tensors are ``train_images`` (uint8, N×C×H×W), ``train_labels`` (integers
from 0), ``test_images`` and ``test_labels``. They are kept in ``<root>/<name>.safetensors``; such a file is also
enough, without a loader.
"""

import importlib
import pkgutil

from .augmentation import Augment
from .checks import SPLITS
from .features import Features
from .images import EVALUATION_BATCH, Images
from .loading import from_config, load
from .registry import DATA_SETS, Loader, Tensors, register

__all__ = [
    "DATA_SETS",
    "EVALUATION_BATCH",
    "SPLITS",
    "Augment",
    "Features",
    "Images",
    "Loader",
    "Tensors",
    "from_config",
    "load",
    "register",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
