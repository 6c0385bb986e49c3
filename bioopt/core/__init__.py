"""The base of all rules: synapses and their recorder, the acts of a rule, the base classes.

It has no learning rule, and imports none: those are in the folders of their families.
"""
