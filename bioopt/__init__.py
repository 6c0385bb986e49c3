"""bioopt: biologically plausible optimizers for PyTorch.

Each is a `torch.optim.Optimizer` that trains an unmodified `torch.nn.Module` by a learning rule of the brain::

    optimizer = bioopt.Hebbian(model)

    def closure():
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        if losses.requires_grad:
            losses.mean().backward()
        return losses

    loss = optimizer.step(closure)
"""

from . import costs, nn
from .auditing import Audit, audit
from .contrastive import ContrastiveDivergence
from .core.errors import Diverged
from .core.kernels import compile_kernels
from .core.local_product import LocalProductRule, LocalRule, SynapticRule
from .core.one_pass import OnePass
from .core.probe import Probe
from .core.recorder import Firing, Recorder
from .core.rows import on_rows
from .core.rule import LearningRule
from .core.synapse import Synapse, find_synapses, register_synapse
from .diagnosis import diagnose
from .energy import DualPropagation, EnergyRule, EquilibriumPropagation, PredictiveCoding
from .feedback import (
    DRTP,
    DirectFeedbackAlignment,
    DirectKolenPollack,
    FeedbackAlignment,
    FeedbackRule,
    KolenPollack,
    SignSymmetry,
    WeightMirror,
)
from .hebbian import BCM, AntiHebbian, Hebbian, Homeostasis, KrotovHopfield, Oja, RewardHebbian, Sanger, SoftHebb
from .local import ForwardForward, LocalContrastive, LocalLoss, LocalLossRule, LocalPerturbation, MonoForward
from .mixed import Mixed
from .perturbation import (
    ForwardGradient,
    HillClimbing,
    NodePerturbation,
    RankOnePerturbation,
    SerialPerturbation,
    WeightPerturbation,
)
from .registry import create_optimizer, list_optimizers, presets
from .spiking import STDP, RewardSTDP
from .target import DifferenceTargetPropagation
from .temporal import EProp

__version__ = "0.1.0"

__all__ = [
    "BCM",
    "DRTP",
    "STDP",
    "AntiHebbian",
    "Audit",
    "ContrastiveDivergence",
    "DifferenceTargetPropagation",
    "DirectFeedbackAlignment",
    "DirectKolenPollack",
    "Diverged",
    "DualPropagation",
    "EProp",
    "EnergyRule",
    "EquilibriumPropagation",
    "FeedbackAlignment",
    "FeedbackRule",
    "Firing",
    "ForwardForward",
    "ForwardGradient",
    "Hebbian",
    "HillClimbing",
    "Homeostasis",
    "KolenPollack",
    "KrotovHopfield",
    "LearningRule",
    "LocalContrastive",
    "LocalLoss",
    "LocalLossRule",
    "LocalPerturbation",
    "LocalProductRule",
    "LocalRule",
    "Mixed",
    "MonoForward",
    "NodePerturbation",
    "Oja",
    "OnePass",
    "PredictiveCoding",
    "Probe",
    "RankOnePerturbation",
    "Recorder",
    "RewardHebbian",
    "RewardSTDP",
    "Sanger",
    "SerialPerturbation",
    "SignSymmetry",
    "SoftHebb",
    "Synapse",
    "SynapticRule",
    "WeightMirror",
    "WeightPerturbation",
    "audit",
    "compile_kernels",
    "costs",
    "create_optimizer",
    "diagnose",
    "find_synapses",
    "list_optimizers",
    "nn",
    "on_rows",
    "presets",
    "register_synapse",
]
