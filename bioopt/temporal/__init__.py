"""The temporal family: rules for networks with a time, recurrent or spiking, that need no pass backward through time.

`base` has the feedback of one time step, `sequence` finds recurrent layers, `traces` and `eligibility` are the online
mode. Neurons are in `bioopt.nn`; rules by spike times are in `bioopt.spiking`.
"""

from .eprop import EProp

__all__ = ["EProp"]
