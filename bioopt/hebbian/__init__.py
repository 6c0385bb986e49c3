"""The Hebbian family: a synapse strengthens when its two neurons are active together (Hebb, 1949).

==================== ============================================================================================
`competitive`        neurons compete for each event: `Hebbian`, `SoftHebb`, `KrotovHopfield`
`components`         neurons find the principal components of their input, or decorrelate: `Oja`, `Sanger`,
                     `AntiHebbian`
`threshold`          neurons compare their activity with a sliding threshold: `BCM`
`reward`             neurons learn from reward and their own noise: `RewardHebbian`
==================== ============================================================================================

A decay of Oja's kind needs no further pass over the activities: with ``u = W x + b``, the mean over events
``⟨s_k u_j⟩`` is ``⟨s_k x⟩ · w_j + ⟨s_k⟩ b_j``, which follows from the product alone.
"""

from .competitive import Hebbian, KrotovHopfield, SoftHebb
from .components import AntiHebbian, Oja, Sanger
from .homeostasis import Homeostasis
from .reward import RewardHebbian
from .threshold import BCM

__all__ = [
    "BCM",
    "AntiHebbian",
    "Hebbian",
    "Homeostasis",
    "KrotovHopfield",
    "Oja",
    "RewardHebbian",
    "Sanger",
    "SoftHebb",
]
