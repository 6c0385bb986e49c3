"""How any rule meets a network: synapses and their recorder, what a rule can do there, the contract of all rules.

No learning rule lives here, and nothing here imports one: those are in the folders of their families.
"""
