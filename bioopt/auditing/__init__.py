"""`audit`: how plausible a rule is, measured layer by layer by interventions, never asserted.

`entry` describes what is measured, `interventions` what is done to a network; `measures` concludes, `card` is the
result. Rules declare nothing.
"""

from .card import Audit, LayerAudit
from .entry import audit
from .interventions import backward_passes_of

__all__ = ["Audit", "LayerAudit", "audit", "backward_passes_of"]
