"""The networks: ordinary modules that do not depend on the rule that trains them, and the controls.

A network is a function of the images' shape, the number of classes and its own options, with a file
``conf/model/<name>.yaml`` that names it as ``_target_``. Each module here holds one network and its layers. As in
torchvision, a network hides the module of its name: ``experiments.models.cnn`` is the function.
"""

from .attention import Patches, PositionalEncoding, Residual, attention
from .cnn import cnn
from .controls import random_trunk
from .deep import Skip, deep
from .gated import InContext, gated
from .layers import Power, QuickDropout, Triangle
from .lenet5 import lenet5
from .mlp import mlp
from .rbm import Binarize, ToUnitInterval, rbm
from .recurrent import RecurrentLayer, recurrent
from .resnet import BasicBlock, resnet
from .shapes import Shape
from .softhebb import OnOff, WideBlock, softhebb
from .spiking import spiking
from .vgg import vgg
from .whitening import WhitenedPatches
from .wide import CompetingLayer, wide

__all__ = [
    "BasicBlock",
    "Binarize",
    "CompetingLayer",
    "InContext",
    "OnOff",
    "Patches",
    "PositionalEncoding",
    "Power",
    "QuickDropout",
    "RecurrentLayer",
    "Residual",
    "Shape",
    "Skip",
    "ToUnitInterval",
    "Triangle",
    "WhitenedPatches",
    "WideBlock",
    "attention",
    "cnn",
    "deep",
    "gated",
    "lenet5",
    "mlp",
    "random_trunk",
    "rbm",
    "recurrent",
    "resnet",
    "softhebb",
    "spiking",
    "vgg",
    "wide",
]
