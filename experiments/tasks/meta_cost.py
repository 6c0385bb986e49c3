"""Is one cost good enough for all tasks? Outer loops choose, for each, the mixture of costs of a learner."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import bioopt
from bioopt import Diverged
from bioopt.costs import UNLABELLED, Cost, Mixture

from .. import building, data
from ..data import problems
from ..data.problems import PROBLEMS
from ..files import write_whole
from ..learner import Learner
from ..phases import assemble, fit_cost, split
from ..statistics import with_interval
from . import Task, meta_cost_plots
from .meta_cost_plots import LOOPS, STRATEGIES, Result

LEAST = 0.02  # smaller shares are set to 0: they would take time and have hardly any effect


@dataclass(frozen=True)
class Choice:
    """What an outer loop decides.

    Attributes:
        shares: of each cost in the gradient at the trunk's activity at the start; they sum to 1.
        rate: a factor of the learning rate.
    """

    shares: tuple[float, ...]
    rate: float

    @classmethod
    def of(cls, logits: Sequence[float], rate: float) -> Choice:
        """Shares in proportion to ``exp(logits)``, those below `LEAST` left out."""
        shares = torch.tensor(logits, dtype=torch.float64).softmax(0)
        shares = torch.where(shares < LEAST, 0, shares)
        return cls(tuple((shares / shares.sum()).tolist()), rate)


class Tried:
    """The points that an outer loop has tried, each once, with the learner's accuracy on the validation images."""

    def __init__(self, accuracy: Callable[[Choice], float]) -> None:
        self.accuracy = accuracy
        self.found: dict[Choice, float] = {}

    def __call__(self, choice: Choice) -> float:
        """The validation accuracy of this point, a fraction."""
        if choice not in self.found:
            self.found[choice] = self.accuracy(choice)
        return self.found[choice]

    @property
    def best(self) -> Choice:
        """The best of them; the first of several that are equal."""
        return max(self.found, key=lambda choice: self.found[choice])


@dataclass(eq=False)
class MetaCost(Task):
    """For each task and learner: every single cost, and mixtures that two outer loops choose by the true outcome.

    The trunk of a learner learns from a mixture of costs, through local readouts: the head for all costs of class
    scores, one of its own for each other cost that needs any. Where no cost is of class scores, the head is a block of
    its own, which learns from cross-entropy and passes no error to the trunk. Each cost is divided by the norm of its
    gradient at the activity of the untrained trunk, so that a share is a share of the gradient at the start, and one
    rate suits all costs about equally well.

    Each single cost is tried at every rate of a grid, and the best rate is kept. `optuna` (J. Bergstra et al., 2011,
    *Algorithms for hyper-parameter optimization*: TPE) and `perturb`, `bioopt.WeightPerturbation`, search the logits of
    the shares and the logarithm of the rate, with as many inner learnings each. Both maximise a learner's accuracy on
    validation images, whose labels are true. Accuracy can be compared between costs; a cross-entropy cannot, of scores
    that were trained to be 0 and 1. All learnings of a search start from the same weights and see the same batches, so
    that they differ by the choice alone. The best choice of each search learns again, from other weights and batches,
    and is tested. A round is one task, one learner and one repetition.

    Where labels are missing, half of each batch has some.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    problems: dict[str, dict[str, Any]]  # functions of `experiments.data.problems` by name, each with its options
    costs: list[str]  # names in ``conf/cost``, two or more
    rates: list[float]  # factors of a learner's rate, the grid for single costs; mixtures are searched between its ends
    learnings: int  # inner learnings of each outer loop
    population: int  # directions of a step of the perturbation, each tried both ways
    sigma: float  # of the perturbation, in nats of logits and of the rate
    lr: float  # of the perturbation, in these units; its losses are standardised (``shaping="zscore"``)
    train: int  # training images, drawn anew for each repetition
    validation: int  # validation images, other ones of the training set
    steps: int  # of an inner learning
    batch_size: int  # of a step
    tested: int  # how many learnings, each from weights of its own, a test accuracy is the mean of
    repetitions: int  # how often, each with its own images, weights and batches

    def __post_init__(self) -> None:
        try:
            import optuna
        except ImportError:
            raise ValueError("it needs Optuna: pip install -e '.[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.require_counts("learnings", "train", "validation", "steps", "batch_size", "tested", "repetitions")
        self.require_counts("population", least=2)  # whose losses are standardised
        if len(set(self.costs)) < 2:
            raise ValueError(f"task.costs={self.costs} must be two costs or more: there is nothing to choose")
        for name in self.costs:
            if building.build_cost(name, "task.costs").sequences:
                raise ValueError(f"task.costs has '{name}', which needs sequences, and these tasks are single images")
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise ValueError(f"task.rates={self.rates} must be one factor of the learning rate or more, each > 0")
        if self.learnings < 1 + 2 * self.population:
            raise ValueError(
                f"task.learnings={self.learnings} must be >= {1 + 2 * self.population}: the start, and each direction "
                f"of task.population={self.population} both ways"
            )
        for name in self.problems:
            if name not in PROBLEMS:
                raise ValueError(f"task.problems has '{name}', which is not one; there are {', '.join(PROBLEMS)}")
        self.rules = list(self.config.rules)
        self.turns = len(self.problems) * len(self.rules)
        self.rounds = self.turns * self.repetitions
        self.images = data.from_config(self.config.data, self.device)
        for name in self.problems:  # raises now where their options do not fit
            self.posed(name, 0, self.validation)

    def posed(self, problem: str, seed: int, validation: int | None) -> data.Images:
        """A task, with a test set of this number of validation images, or (``None``) the real test set."""
        generator = torch.Generator().manual_seed(seed)
        images = problems.subset(self.images, generator, self.train, validation)
        return PROBLEMS[problem](images, generator, **self.problems[problem])

    def round(self, number: int) -> dict[str, Any]:
        """One task, one learner, one repetition: each cost alone, both searches, and the test of what was chosen."""
        repetition, rest = divmod(number - 1, len(self.problems) * len(self.rules))
        problem, rule = list(self.problems)[rest // len(self.rules)], self.rules[rest % len(self.rules)]
        seed = self.config.seed * 1_000_003 + repetition  # of all learners: a round needs nothing of the rounds before
        search, *fresh = torch.randint(
            2**31, (1 + self.tested,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        images = self.posed(problem, seed, self.validation)
        lengths = self.lengths(images, search)

        def accuracy(choice: Choice) -> float:
            return self.accuracy(rule, choice, images, search, lengths)

        alone = [Tried(accuracy) for _ in self.costs]
        for i, tried in enumerate(alone):
            for rate in self.rates:
                tried(Choice(tuple(float(i == j) for j in range(len(self.costs))), rate))
        searches = {loop: Tried(accuracy) for loop in LOOPS}
        path = self.perturb(searches["perturbation"], search)
        self.optuna(searches["optuna"], search)

        real = self.posed(problem, seed, None)  # only now the test set

        def tested(tried: Tried) -> dict[str, Any]:
            best = tried.best
            right = statistics.fmean(self.accuracy(rule, best, real, s, lengths) for s in fresh)
            shares = [round(share, 4) for share in best.shares]
            return {"rate": best.rate, "validation": tried.found[best], "test": right, "shares": shares}

        chosen = {name: tested(tried) for name, tried in zip(self.costs, alone, strict=True)}
        chosen |= {loop: tested(tried) for loop, tried in searches.items()}
        fixed = max(self.costs, key=lambda name: chosen[name]["validation"])
        return {
            "problem": problem,
            "rule": rule,
            "repetition": repetition,
            "best_cost": fixed,
            "test_of_best_cost": chosen[fixed]["test"],
            **{f"test_of_{loop}": chosen[loop]["test"] for loop in LOOPS},
            "chosen": chosen,
            "tried": {loop: [round(a, 5) for a in tried.found.values()] for loop, tried in searches.items()},
            "path": [[round(share, 4) for share in shares] for shares in path],
        }

    def perturb(self, tried: Tried, seed: int) -> list[tuple[float, ...]]:
        """Search by perturbation of the logits and of the rate; the shares at which each of its steps stood."""
        place = nn.Parameter(torch.zeros(len(self.costs) + 1, dtype=torch.float64))
        rule = bioopt.WeightPerturbation(
            [place],
            lr=self.lr,
            sigma=self.sigma,
            relative=False,  # the width is in nats
            population=self.population,
            shaping="zscore",
            seed=seed,
        )
        low, high = math.log(min(self.rates)), math.log(max(self.rates))

        def here() -> Choice:
            *logits, rate = place.tolist()
            return Choice.of(logits, math.exp(min(max((low + high) / 2 + rate, low), high)))

        def closure() -> Tensor:
            with torch.enable_grad():  # the learner inside may need gradients, which the rule outside disables
                return torch.tensor(1 - tried(here()), dtype=torch.float64)

        path = [here().shares]
        for _ in range((self.learnings - 1) // (2 * self.population)):
            rule.step(closure)
            path.append(here().shares)
        rule.close()
        return path

    def optuna(self, tried: Tried, seed: int) -> None:
        """Search by Optuna's TPE, from the same start."""
        import optuna

        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**31))
        start = dict.fromkeys(self.costs, 0.0) | {"rate": math.sqrt(min(self.rates) * max(self.rates))}
        study.enqueue_trial(start)
        for _ in range(self.learnings):
            trial = study.ask()
            logits = [trial.suggest_float(name, -3, 3) for name in self.costs]
            rate = trial.suggest_float("rate", min(self.rates), max(self.rates), log=True)
            study.tell(trial, tried(Choice.of(logits, rate)))

    def accuracy(self, rule: str, choice: Choice, images: data.Images, seed: int, lengths: dict[str, float]) -> float:
        """The accuracy of a learner, after its learning, on the images' test set; chance where a rule diverged."""
        torch.manual_seed(seed)
        model = building.build_model(self.config, images).to(self.device)
        learner = self.learner(rule, choice, model, images, seed, lengths)
        shown = images.prepare(images.train_images)
        chosen = self.batches(images, torch.Generator().manual_seed(seed))
        try:
            learner.fit((shown[index], images.train_labels[index]) for index in chosen)
        except Diverged:
            return 1 / images.classes
        finally:
            learner.close()
        scores, labels = learner.predict(images.test_batches(data.Augment(), 2000))
        return float(((scores.argmax(1) == labels) & scores.isfinite().all(1)).double().mean())

    def learner(
        self, rule: str, choice: Choice, model: nn.Module, images: data.Images, seed: int, lengths: dict[str, float]
    ) -> Learner:
        """A learner in one block or, with trunk and head apart, in two, each with its mixture of costs."""
        shares = {name: share for name, share in zip(self.costs, choice.shares, strict=True) if share}
        costs: dict[str, Cost] = {name: building.build_cost(name) for name in shares}
        weights = {name: share / lengths[name] for name, share in shares.items()}
        trunk, head = split(model)
        of_scores = [name for name in costs if costs[name].scores]
        if of_scores:  # the head is their readout of the trunk
            parts = {name: costs.pop(name) for name in of_scores}
            costs["scores"] = Mixture(parts, {name: weights.pop(name) for name in of_scores}, readout=head)
            weights["scores"] = 1.0
        blocks: dict[str, tuple[nn.Module, Cost]] = {"trunk": (trunk, Mixture(costs, weights))}
        if not of_scores:
            alone = {"cross_entropy": building.build_cost("cross_entropy")}
            blocks["head"] = (head, Mixture(alone, {"cross_entropy": 1 / lengths["cross_entropy"]}))
        rate = self.config.rules[rule].lr * choice.rate
        run = building.with_rule(self.config, rule, seed=seed, lr=rate)
        built = assemble(run, model, blocks, images)
        for block in built:
            if isinstance(block.optimizer, bioopt.LocalRule):
                raise ValueError(f"rules.{rule} learns from no cost, so none can be chosen: '~rules.{rule}'")
            block.scheduler = building.build_schedule("cosine", block.optimizer, self.steps)
        # Losses are not checked: gradient descent that diverges is tested as it is.
        return Learner(model, built, name=rule, rate=f"rules.{rule}.lr={rate}", check=False)

    def lengths(self, images: data.Images, seed: int) -> dict[str, float]:
        """The root mean square norm of each cost's gradient at a sample's activity in an untrained trunk."""
        torch.manual_seed(seed)
        trunk, _ = split(building.build_model(self.config, images).to(self.device))
        index = self.draw(images, 256, torch.Generator().manual_seed(seed))
        inputs, labels = images.prepare(images.train_images[index]), images.train_labels[index]
        found = {}
        for name in dict.fromkeys([*self.costs, "cross_entropy"]):
            cost = building.build_cost(name)
            fit_cost(cost, "trunk", trunk, inputs[:2], images.classes, 1, last=False)
            activity = trunk(cost.to(self.device).corrupt(inputs)).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(cost(activity, labels, inputs=inputs).sum(), activity)
            found[name] = float(gradient.flatten(1).square().sum(1).mean().sqrt().clamp(min=1e-12))
        return found

    def batches(self, images: data.Images, generator: torch.Generator) -> list[Tensor]:
        """The indices of the training images of each step."""
        return [self.draw(images, self.batch_size, generator) for _ in range(self.steps)]

    def draw(self, images: data.Images, count: int, generator: torch.Generator) -> Tensor:
        """Indices of training images drawn at random; where some have no label, half of them are of those that have."""
        known = (images.train_labels != UNLABELLED).cpu()
        pools = [pool for pool in (known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)) if len(pool)]
        sizes = [count] if len(pools) == 1 else [count - count // 2, count // 2]
        drawn = [
            pool[torch.randint(len(pool), (size,), generator=generator)]
            for pool, size in zip(pools, sizes, strict=True)
        ]
        return torch.cat(drawn).to(images.train_labels.device)

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """For each learner, the gain of a choice for each task over one size for all, and the accuracy at each task."""
        found: dict[str, float] = {}
        results = {
            rule: Result([line for line in history if line["rule"] == rule], self.problems, self.costs)
            for rule in self.rules
        }
        for rule, result in results.items():
            for strategy in STRATEGIES[1:]:
                gains = result.gains(strategy)
                found |= with_interval(f"{rule}_{strategy}_over_one_size", gains)
        for rule, result in results.items():
            for problem in self.problems:
                found |= {
                    f"{rule}_{problem}_{strategy}": statistics.fmean(result.tests(problem, strategy))
                    for strategy in STRATEGIES
                }
        text = "\n".join(part for rule, result in results.items() for part in result.table(rule))
        write_whole(folder / "table.md", text + "\n")
        print(f"\n{text}")
        return found, [
            meta_cost_plots.heat(self, results, title, folder / "costs.png"),
            meta_cost_plots.paths(self, results, title, folder / "path.png"),
        ]
