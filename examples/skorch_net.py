"""skorch, and by it scikit-learn: a rule is the `optimizer` of a net, its options are `optimizer__...`.

skorch gives an optimizer parameters, but rules watch a model: `RuleNet` gives them the module. skorch's closures run a
backward pass in any case, which rules that compare losses do not need: `RuleNet` leaves it out, and returns each
sample's own loss. The callback `GradientNormClipping` works inside the closure, before the rule has made `.grad`, and
is refused; `ClippedNet` clips what the rule has made. Clones, grid searches, `LRScheduler` and `save_params` work as
ever; a net that has been fitted cannot be pickled.
"""

from collections.abc import Callable
from typing import Any

from digits import images, labels, network, test, train
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.dataset import unpack_data
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import bioopt


class RuleNet(NeuralNetClassifier):
    """For every rule."""

    def get_params_for_optimizer(self, prefix: str, named_parameters: Any) -> tuple[tuple[nn.Module], dict[str, Any]]:
        """The module in place of its parameters."""
        _, options = super().get_params_for_optimizer(prefix, named_parameters)
        return (self.module_,), options

    def get_loss(self, y_pred: Tensor, y_true: Tensor, X: Any = None, training: bool = False) -> Tensor:
        """Each sample's own loss in training, else their mean."""
        losses = super().get_loss(y_pred, y_true, X, training)
        return losses if training else losses.mean()

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Tensor]:
        """The closure: no backward pass where none is needed."""
        self._set_training(True)
        x, y = unpack_data(batch)
        prediction = self.infer(x, **fit_params)
        losses = self.get_loss(prediction, y, X=x, training=True)
        if losses.requires_grad:
            losses.mean().backward()
        return {"loss": losses, "y_pred": prediction}

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Tensor]:
        """For skorch's history, the mean loss."""
        step = super().train_step(batch, **fit_params)
        return step | {"loss": step["loss"].mean()}


class ClippedNet(RuleNet):
    """The same, each update clipped."""

    def _step_optimizer(self, step_fn: Callable[[], Tensor]) -> None:
        """Between the two halves of a step."""
        self.optimizer_.estimate(step_fn)
        clip_grad_norm_(self.module_.parameters(), 2.0)
        self.optimizer_.descend()


def net(kind: type[RuleNet], rule: type[bioopt.LearningRule], **options: Any) -> RuleNet:
    """On digits."""
    return kind(
        network, optimizer=rule, criterion=nn.CrossEntropyLoss, criterion__reduction="none",
        iterator_train__shuffle=True, batch_size=32, train_split=None, verbose=0, **options,
    )  # fmt: skip


def score(fitted: Any) -> float:
    """In per cent of the unseen digits."""
    return 100 * fitted.score(images[test].numpy(), labels[test].numpy())


if __name__ == "__main__":
    x, y = images[train].numpy(), labels[train].numpy()
    readout = {"optimizer__readout_lr": 0.05, "optimizer__readout_options": {"momentum": 0.9}}
    hebbian = net(RuleNet, bioopt.Hebbian, **readout).initialize()
    print(f"before training: {score(hebbian):.1f} % of the unseen digits")

    search = GridSearchCV(net(RuleNet, bioopt.Hebbian, max_epochs=5, **readout), {"lr": [0.1, 1.0]}, cv=2).fit(x, y)
    print(f"Hebbian, of two rates the better, lr={search.best_params_['lr']}: {score(search):.1f} %")

    perturbation = {"optimizer__sigma": 0.01, "optimizer__samples": 4, "optimizer__momentum": 0.9}
    perturbed = net(ClippedNet, bioopt.NodePerturbation, lr=0.02, max_epochs=10, **perturbation).fit(x, y)
    print(f"node perturbation, clipped: {score(perturbed):.1f} %, loss {perturbed.history[-1, 'train_loss']:.2f}")
