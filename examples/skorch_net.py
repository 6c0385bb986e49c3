"""skorch and scikit-learn: a rule is the `optimizer` of a net, and its options are `optimizer__...`.

skorch gives an optimizer parameters, but rules watch a model: `RuleNet` gives them the module. skorch's closures always
run a backward pass, which rules that compare losses do not need: `RuleNet` leaves it out, and returns the loss of each
sample. The callback `GradientNormClipping` works inside the closure, before the rule writes `.grad`, and is refused;
`ClippedNet` clips the rule's own update. Clones, grid searches, `LRScheduler` and `save_params` work as usual; a fitted
net cannot be pickled.
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
    """A net for every rule."""

    def get_params_for_optimizer(self, prefix: str, named_parameters: Any) -> tuple[tuple[nn.Module], dict[str, Any]]:
        """The module in place of its parameters."""
        (groups,), options = super().get_params_for_optimizer(prefix, named_parameters)
        if len(groups) > 1:
            raise ValueError(f"{prefix}__param_groups gives groups of parameters, and rules need modules")
        return (self.module_,), options

    def get_loss(self, y_pred: Tensor, y_true: Tensor, X: Any = None, training: bool = False) -> Tensor:
        """The loss of each sample in training, otherwise their mean."""
        losses = super().get_loss(y_pred, y_true, X, training)
        return losses if training else losses.mean()

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Tensor]:
        """The closure, with a backward pass only where gradients are enabled."""
        self._set_training(True)
        x, y = unpack_data(batch)
        prediction = self.infer(x, **fit_params)
        losses = self.get_loss(prediction, y, X=x, training=True)
        if losses.requires_grad:
            losses.mean().backward()
        return {"loss": losses, "y_pred": prediction}

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Tensor]:
        """A step whose loss in skorch's history is the mean."""
        step = super().train_step(batch, **fit_params)
        return step | {"loss": step["loss"].mean()}


class ClippedNet(RuleNet):
    """The same, with each update clipped."""

    def _step_optimizer(self, step_fn: Callable[[], Tensor]) -> None:
        """Clip between the two halves of a step."""
        self.optimizer_.estimate(step_fn)
        clip_grad_norm_(self.module_.parameters(), 2.0)
        self.optimizer_.descend()


def net(kind: type[RuleNet], rule: type[bioopt.LearningRule], **options: Any) -> RuleNet:
    """A net for the digits."""
    return kind(
        network, optimizer=rule, criterion=nn.CrossEntropyLoss, criterion__reduction="none",
        iterator_train__shuffle=True, batch_size=32, train_split=None, verbose=0, **options,
    )  # fmt: skip


def score(fitted: Any) -> float:
    """Accuracy in per cent on the unseen digits."""
    return 100 * fitted.score(images[test].numpy(), labels[test].numpy())


if __name__ == "__main__":
    x, y = images[train].numpy(), labels[train].numpy()
    hebbian = net(RuleNet, bioopt.Hebbian).initialize()
    print(f"before training: {score(hebbian):.1f} % of the unseen digits")

    search = GridSearchCV(net(RuleNet, bioopt.Hebbian, max_epochs=5), {"lr": [0.01, 0.05]}, cv=2).fit(x, y)
    print(f"Hebbian, the better of two rates, lr={search.best_params_['lr']}: {score(search):.1f} %")

    perturbation = {
        "optimizer__sigma": 0.01,
        "optimizer__relative": False,
        "optimizer__samples": 4,
        "optimizer__momentum": 0.9,
    }
    perturbed = net(ClippedNet, bioopt.NodePerturbation, lr=0.02, max_epochs=10, **perturbation).fit(x, y)
    print(f"node perturbation, clipped: {score(perturbed):.1f} %, loss {perturbed.history[-1, 'train_loss']:.2f}")
