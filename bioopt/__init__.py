"""bioopt: biologically plausible optimizers for PyTorch.

Each is a `torch.optim.Optimizer` that trains an unmodified `torch.nn.Module` by a learning rule of the brain::

    optimizer = bioopt.Hebbian(model, lr=0.05)

    def closure():
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        if losses.requires_grad:
            losses.mean().backward()
        return losses

    loss = optimizer.step(closure)
"""

from . import costs, nn
from .contrastive import ContrastiveDivergence
from .diagnosis import diagnose
from .errors import Diverged
from .hebbian import BCM, AntiHebbian, Hebbian, KrotovHopfield, Oja, RewardHebbian, Sanger, SoftHebb
from .mixed import Mixed
from .optimizer import LearningRule
from .perturbation import (
    ForwardGradient,
    HillClimbing,
    NodePerturbation,
    RankOnePerturbation,
    SerialPerturbation,
    WeightPerturbation,
)
from .recorder import Recorder, Synapse, register_synapse
from .spiking import STDP, RewardSTDP
from .synaptic import SynapticRule

__version__ = "0.1.0"

__all__ = [
    "BCM",
    "STDP",
    "AntiHebbian",
    "ContrastiveDivergence",
    "Diverged",
    "ForwardGradient",
    "Hebbian",
    "HillClimbing",
    "KrotovHopfield",
    "LearningRule",
    "Mixed",
    "NodePerturbation",
    "Oja",
    "RankOnePerturbation",
    "Recorder",
    "RewardHebbian",
    "RewardSTDP",
    "Sanger",
    "SerialPerturbation",
    "SoftHebb",
    "Synapse",
    "SynapticRule",
    "WeightPerturbation",
    "costs",
    "diagnose",
    "nn",
    "register_synapse",
]
