"""`audit`: how plausible a rule is, measured layer by layer by interventions, never asserted.

`card` is what is found, `interventions` what is done to a network, `measures` what is concluded. Rules declare nothing.
"""

from .card import Audit, LayerAudit
from .measures import audit

__all__ = ["Audit", "LayerAudit", "audit"]
