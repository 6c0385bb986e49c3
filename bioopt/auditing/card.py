"""`Audit`: a card of plausibility, a row for each layer and a line of summary."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Audit", "LayerAudit"]

#: the relative changes of a layer's update -> the head of their column
MEASURES = {
    "transport": "transport",
    "other_layers": "layers",
    "other_neurons": "neurons",
    "other_samples": "samples",
    "labels": "labels",
    "error": "error",
    "loss": "loss",
    "layers_above": "above",
    "feedback_reads": "reads W",
}
LOCALITY = ("other_layers", "other_neurons", "other_samples")
SIGNALS = ("labels", "error", "loss")
COLUMNS = {**MEASURES, "feedback_angle": "angle", "runs": "runs"}


@dataclass(frozen=True)
class LayerAudit:
    r"""What the update of one layer depends on.

    The measures are relative changes of the update, :math:`\lVert \Delta w' - \Delta w \rVert / \lVert \Delta w
    \rVert`, of weights and bias, under an intervention that leaves the layer's own activity and learning signal alone;
    0: the update does not depend on it; NaN: it could not be measured, or there is nothing to measure.

    Attributes:
        name: of the layer.
        transport: other weights of a layer above, with the same outputs, activities and errors: **weight transport**.
        other_layers: other weights or another learning signal of a layer below, or another activity of a neuron of any
            other layer.
        other_neurons: of the update of all other neurons of the layer, when one has other weights and another activity.
        other_samples: how far the changes of two samples' inputs are from adding up.
        labels: each sample with the label of another.
        error: another error at the output of the network, with the same value of the loss.
        loss: another value of the loss, with the same error.
        layers_above: all layers above compute something else. If 0, the update can be made before they run: no
            **update locking**.
        feedback_reads: how far feedback weights, now or after the step, and updates of other parameters of the rule's
            own, follow a change of the forward weights that changes no activity.
        feedback_angle: between feedback and forward weights, in degrees.
        runs: of the layer in one step.
    """

    name: str
    transport: float
    other_layers: float
    other_neurons: float
    other_samples: float
    labels: float
    error: float
    loss: float
    layers_above: float
    feedback_reads: float
    feedback_angle: float
    runs: int


@dataclass(frozen=True)
class Audit:
    """A card of plausibility; ``str`` gives a table, `as_dict` plain values.

    Attributes:
        rule: the name of the optimizer's class.
        layers: in the order in which they first ran; the last is the readout, the others are the trunk.
        forward_passes: evaluations of the closure in one step.
        backward_passes: backward passes in one step that bring an error to two layers at least. Derivatives inside one
            layer, as of a local product, do not count.
        loss_numbers: numbers that the step broadcasts to the trunk from the value of the loss: for each evaluation one,
            or one for each sample.
        feedback_changes: whether feedback weights change in the step; ``None`` without feedback weights.
        tolerance: relative changes up to this are rounding.
    """

    rule: str
    layers: tuple[LayerAudit, ...]
    forward_passes: int
    backward_passes: int
    loss_numbers: int
    feedback_changes: bool | None
    tolerance: float

    @property
    def trunk(self) -> tuple[LayerAudit, ...]:
        """All layers but the last; the only one if there is one."""
        return self.layers[:-1] or self.layers

    def largest(self, measure: str) -> float:
        """The largest value of a measure in the trunk; NaN if it was measured in no layer.

        Of feedback weights, which carry an error from a layer to those below: in all layers but the first.
        """
        layers = self.layers[1:] if measure.startswith("feedback") else self.trunk
        found = [value for layer in layers if not math.isnan(value := getattr(layer, measure))]
        return max(found, default=math.nan)

    def depends(self, measure: str) -> bool | None:
        """Whether a measure of the trunk is more than rounding; ``None`` if it was measured in no layer."""
        value = self.largest(measure)
        return None if math.isnan(value) else value > self.tolerance

    @property
    def summary(self) -> str:
        """One line."""
        found = {measure: self.depends(measure) for measure in MEASURES}
        passes = f"{self.forward_passes} forward, {self.backward_passes} backward passes"
        if found["labels"] is found["loss"] is None:
            return f"{self.rule}: the trunk has no update; {passes}."
        parts = [
            {
                None: "weight transport not measured",
                False: "no weight transport",
                True: f"weight transport ({shown(self.largest('transport'), self.tolerance)})",
            }[found["transport"]]
        ]
        for verb, answer in (("reads", True), ("not measured:", None)):
            if named := [m.replace("_", " ") for m in LOCALITY if found[m] is answer]:
                parts.append(f"{verb} {' and '.join(named)}")
        if all(found[measure] is False for measure in LOCALITY):
            parts.append("local" if found["transport"] is False else "otherwise local")
        signals = " and ".join(name for name in SIGNALS if found[name])
        parts.append(f"the trunk depends on {signals}" if signals else "neither labels nor loss reach the trunk")
        if self.loss_numbers:
            parts.append(f"{self.loss_numbers} number{'s' * (self.loss_numbers > 1)} of the loss broadcast a step")
        if found["layers_above"] is not None:
            parts.append("update locking" if found["layers_above"] else "no update locking")
        parts.append(passes)
        if self.feedback_changes is not None:
            read = {None: "", False: " that read no forward weights", True: " that read the forward weights"}
            changes = "changing" if self.feedback_changes else "fixed"
            parts.append(f"{changes} feedback weights{read[found['feedback_reads']]}")
        return f"{self.rule}: {'; '.join(parts)}."

    def as_dict(self) -> dict[str, Any]:
        """All that was measured, as plain values."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        rows = [["layer", *COLUMNS.values()]]
        for layer in self.layers:
            cells = [shown(getattr(layer, measure), self.tolerance, measure) for measure in COLUMNS]
            rows.append([layer.name, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.summary])


def shown(value: float, tolerance: float, measure: str = "") -> str:
    """A measure as a table shows it."""
    if measure == "runs":
        return str(value)
    if math.isnan(value):
        return "–"
    if measure == "feedback_angle":
        return f"{value:.0f}°"
    if value <= tolerance:
        return "0"
    if value >= 10:
        return f"{value:.0f}×"
    return f"{100 * value:.0f} %" if value >= 0.005 else f"{100 * value:.1g} %"
