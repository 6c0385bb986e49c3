"""The spiking family: the change of a synapse depends on the spike times of its two neurons.

Encodings of inputs as spikes are in `bioopt.nn`; neurons are the user's own modules, or snntorch's.
"""

from .reward_stdp import RewardSTDP
from .stdp import STDP

__all__ = ["STDP", "RewardSTDP"]
