"""The spiking family: what a synapse learns depends on when the two neurons that it joins spike.

What turns inputs into spikes is in `bioopt.nn`; neurons are the user's own modules, or snntorch's.
"""

from .reward_stdp import RewardSTDP
from .stdp import STDP

__all__ = ["STDP", "RewardSTDP"]
