"""Rules by name: found from their classes, with the options of their YAML files; the lists of rules are up to date."""

from __future__ import annotations

import importlib
import json
import shutil
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

import bioopt
from bioopt.registry import family_of, rules, summary_of
from experiments.building import build_model, build_optimizer

from .commands import ROOT
from .rules import RULES, mlp, per_sample

SMALL = {"cnn": ["model.width=2"], "mlp": ["model.hidden=[8]"], "softhebb": ["model.width=0.03"]}
OWN_NETWORKS = {  # rules that are not made for `model=cnn`
    "contrastive_divergence": ["model=rbm", "model.hidden=[8]"],
    "eprop": ["model=recurrent", "model.hidden=8"],
    "reward_stdp": ["model=spiking", "model.neurons=21", "model.steps=3", "model.readout=groups"],
    "stdp": ["model=spiking", "model.neurons=20", "model.steps=3"],
}


@pytest.fixture
def generate() -> types.ModuleType:
    return importlib.import_module("scripts.generate")


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


# -- names --------------------------------------------------------------------------------------------------------


def test_every_rule_has_the_name_of_its_yaml_file() -> None:
    named = rules()
    assert sorted(map(str, named.values())) == sorted(map(str, RULES))
    files = {path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml")}
    assert files == {*named, "adam", "random_trunk", "sgd"}
    assert bioopt.list_optimizers() == [*named] == sorted(named)


def test_rules_are_listed_by_family_and_pattern() -> None:
    assert bioopt.list_optimizers("spiking") == ["reward_stdp", "stdp"]
    assert bioopt.list_optimizers(filter="*reward*") == ["reward_hebbian", "reward_stdp"]
    assert bioopt.list_optimizers("hebbian", filter="*reward*") == ["reward_hebbian"]
    assert bioopt.list_optimizers(filter="nothing") == []
    with pytest.raises(ValueError, match=r"family='hebian' must be one of .*'perturbation'.*did you mean 'hebbian'\?"):
        bioopt.list_optimizers("hebian")


def test_family_and_summary_are_those_of_the_class() -> None:
    assert family_of(bioopt.RewardSTDP) == "spiking"
    assert summary_of(bioopt.Oja) == "Every neuron converges to the first principal component of its input."
    for rule in RULES:
        assert summary_of(rule).endswith("."), f"the first line of the docstring of {rule.__name__} is no sentence"


def test_a_class_gets_a_name_before_it_has_a_yaml_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class WeightMirrorDFA(bioopt.Oja):
        """New."""

    assert "weight_mirror_dfa" not in rules()  # not of bioopt
    monkeypatch.setattr(WeightMirrorDFA, "__module__", "bioopt.feedback.mirror")
    assert bioopt.list_optimizers("feedback", filter="*dfa") == ["weight_mirror_dfa"]
    assert bioopt.presets("weight_mirror_dfa") == {}
    with pytest.raises(ValueError, match=r"weight_mirror_dfa: preset='default' does not exist: it has none"):
        bioopt.create_optimizer("weight_mirror_dfa", mlp(), preset="default")
    monkeypatch.setattr(WeightMirrorDFA, "__module__", __name__)  # of no concern to other tests


@pytest.mark.parametrize("name", ["softhebb", "soft_hebb", "SoftHebb"])
def test_a_rule_by_its_name(name: str) -> None:
    optimizer = bioopt.create_optimizer(name, mlp(), lr=0.5, inverse_temperature=2.0)
    assert type(optimizer) is bioopt.SoftHebb
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["inverse_temperature"] == 2.0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("hebian", "hebbian"), ("node-perturbation", "node_perturbation"), ("NodePerturbations", "node_perturbation")],
)
def test_a_misspelt_name_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"no optimizer '{name}'; did you mean '{nearest}'\?.*list_optimizers"):
        bioopt.create_optimizer(name, mlp(), lr=0.1)
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        bioopt.presets(name)


def test_what_is_no_name_at_all() -> None:
    with pytest.raises(ValueError, match=r"no optimizer 'xyz'; there are .*'hebbian', .*'weight_perturbation'$"):
        bioopt.create_optimizer("xyz", mlp())
    with pytest.raises(TypeError, match="must be a string such as 'hebbian', not a Sequential"):
        bioopt.create_optimizer(mlp(), "hebbian")  # type: ignore[arg-type]


def test_errors_of_options_are_those_of_the_class() -> None:
    with pytest.raises(TypeError) as of_class:
        bioopt.NodePerturbation(mlp(), sigmas=0.1)
    with pytest.raises(TypeError) as by_name:
        bioopt.create_optimizer("node_perturbation", mlp(), sigmas=0.1)
    assert str(by_name.value) == str(of_class.value)
    assert "sigma" in str(by_name.value)


# -- presets ------------------------------------------------------------------------------------------------------


def cases() -> list[tuple[str, str]]:
    """Each rule on a network that it can train, and on all for which it has options of their own."""
    tuned = json.loads((ROOT / "bioopt" / "presets.json").read_text())["rules"]
    found = []
    for name, rows in tuned.items():
        usual = OWN_NETWORKS.get(name, ["model=cnn"])[0].removeprefix("model=")
        found += [(name, network) for network in {usual: None, **rows} if network != "default"]
    return found


@pytest.mark.parametrize(("name", "network"), cases())
def test_a_preset_is_what_train_py_builds(name: str, network: str) -> None:
    if network == "spiking":
        pytest.importorskip("snntorch")
    run = config(f"optimizer={name}", f"model={network}", *OWN_NETWORKS.get(name, SMALL.get(network, [])))
    images = types.SimpleNamespace(shape=(1, 8, 8), classes=3)
    x, y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    results, built = [], []
    for by_name in (False, True):
        torch.manual_seed(0)
        model = build_model(run, images)  # type: ignore[arg-type]
        few = {"coordinates": 2} if "coordinates" in run.optimizer else {}
        if by_name:
            optimizer: Any = bioopt.create_optimizer(name, model, preset=network, **few)
        else:
            run.optimizer.update(few)
            optimizer = build_optimizer(run, model)
        names = {p: name for name, p in model.named_parameters()}
        groups = optimizer.param_groups
        built.append([{**group, "params": [names.get(p) for p in group["params"]]} for group in groups])
        for step in range(2):
            torch.manual_seed(step)
            optimizer.step(per_sample(optimizer, model, x, y))
        results.append(model.state_dict())
        optimizer.close()
    assert built[0] == built[1]
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_presets_are_keywords_for_the_class_and_no_ones_to_change() -> None:
    shown = bioopt.presets("rank_one_perturbation")["default"]
    assert shown["descent"] is torch.optim.Adam
    bioopt.RankOnePerturbation(mlp(), **shown).close()
    shown["lr"] = -1
    shown.clear()
    assert bioopt.presets("RankOnePerturbation")["default"]["lr"] > 0
    bioopt.presets("softhebb")["softhebb"]["groups"].clear()
    assert bioopt.presets("softhebb")["softhebb"]["groups"]


def test_a_network_without_a_row_has_the_default() -> None:
    model = softhebb_like()
    default, of_cnn, of_softhebb = (
        [group["lr"] for group in bioopt.create_optimizer("softhebb", model, preset=preset).param_groups]
        for preset in ("default", "cnn", "softhebb")
    )
    assert default == of_cnn != of_softhebb


@pytest.mark.parametrize(("preset", "hint"), [("cmn", r"; did you mean 'cnn'\?"), ("zzz", "$")])
def test_a_misspelt_preset_names_those_there_are(preset: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"hebbian: preset='{preset}' must be one of 'default', .*'wide'{hint}"):
        bioopt.create_optimizer("hebbian", mlp(), preset=preset)


def test_explicit_options_win() -> None:
    model = softhebb_like()
    optimizer = bioopt.create_optimizer("softhebb", model, preset="softhebb", lr=0.3)
    *trunk, readout = optimizer.param_groups
    assert [group["lr"] for group in trunk] == [0.3, 0.3]
    assert [group["inverse_temperature"] for group in trunk] == [1.0, 0.65]
    assert readout["lr"] == 1e-4
    optimizer.close()
    optimizer = bioopt.create_optimizer("softhebb", model, preset="softhebb", readout_lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.08, 0.005, 0.2]


def test_explicit_options_by_an_earlier_name_win() -> None:
    with pytest.warns(FutureWarning, match="loser_strength"):
        optimizer = bioopt.create_optimizer("hebbian", mlp(), preset="default", losers=0.25)
    assert optimizer.defaults["loser_strength"] == 0.25


def test_what_an_explicit_option_makes_meaningless_is_left_out() -> None:
    optimizer = bioopt.create_optimizer("hebbian", mlp(), preset="default", readout=None)
    assert len(optimizer.param_groups) == 1
    optimizer = bioopt.create_optimizer("weight_perturbation", mlp(), preset="default", descent=torch.optim.Adam)
    assert "momentum" not in optimizer.defaults
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    optimizer = bioopt.create_optimizer("weight_perturbation", mlp(), preset="default", momentum=0.5)
    assert optimizer.defaults["momentum"] == 0.5


def test_a_rule_without_layers_takes_parameters() -> None:
    optimizer = bioopt.create_optimizer("weight_perturbation", mlp().parameters(), preset="default", readout=None)
    assert len(optimizer.param_groups[0]["params"]) == 4


# -- groups -------------------------------------------------------------------------------------------------------


def softhebb_like() -> nn.Module:
    model = nn.Module()
    model.trunk = nn.ModuleDict({f"block{i}": nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for i in (1, 2)})
    model.trunk["block3"] = nn.Identity()
    model.readout = nn.Linear(4, 3)
    return model


def test_each_layer_takes_the_options_of_the_parts_that_it_is_in() -> None:
    groups = {"trunk": {"lr": 0.1}, "trunk.block2": {"inverse_temperature": 3.0}}
    published = {"homeostasis": False, "inverse_temperature": 1.0, "readout_lr": 0.5}
    optimizer = bioopt.create_optimizer("softhebb", softhebb_like(), groups=groups, lr=0.5, **published)
    found = [(group["param_names"], group["lr"], group["inverse_temperature"]) for group in optimizer.param_groups]
    assert found == [
        (["trunk.block1.0.weight"], 0.1, 1.0),
        (["trunk.block2.0.weight"], 0.1, 3.0),
        (["readout.weight", "readout.bias"], 0.5, 1.0),
    ]


def test_explicit_groups_replace_those_of_the_preset() -> None:
    groups = {"trunk.block2": {"lr": 0.7}}
    optimizer = bioopt.create_optimizer("softhebb", softhebb_like(), preset="softhebb", groups=groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.1, 1e-4]
    of_preset = bioopt.presets("softhebb")["softhebb"]
    same = bioopt.create_optimizer("softhebb", softhebb_like(), **of_preset)
    assert [group["lr"] for group in same.param_groups] == [0.08, 0.005, 1e-4]


def test_groups_need_the_parts_of_a_model() -> None:
    with pytest.raises(ValueError, match=r"options for 'trunk', which is not a part of the model.*preset='default'"):
        bioopt.create_optimizer("softhebb", mlp(), preset="softhebb")
    with pytest.raises(ValueError, match=r"'readuot', which is not a part of the model; did you mean 'readout'\?"):
        bioopt.create_optimizer("softhebb", softhebb_like(), lr=1.0, groups={"readuot": {"lr": 0.1}})
    with pytest.raises(TypeError, match=r"options for parts \('trunk'\) need the model itself"):
        bioopt.create_optimizer("oja", mlp().parameters(), lr=1.0, groups={"trunk": {"lr": 0.1}})


def test_the_readout_stays_the_last_layer_and_a_layer_with_layers_inside_stays_whole() -> None:
    class Scaled(nn.Sequential):
        """A network with a parameter of its own."""

        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 3))
            self.scale = nn.Parameter(torch.ones(()))

    model = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(3, 4), nn.Linear(4, 2))
    published = {"lr": 0.5, "homeostasis": False, "readout_lr": 0.5}
    optimizer = bioopt.create_optimizer("oja", model, **published, groups={"2": {"lr": 0.2}, "1": {"lr": 0.1}})
    assert [(group["param_names"], group["lr"]) for group in optimizer.param_groups] == [
        (["1.0.weight", "1.1.weight"], 0.1),
        (["2.weight"], 0.2),
        (["0.weight"], 0.5),
        (["3.weight", "3.bias"], 0.5),
    ]
    assert bioopt.create_optimizer("oja", Scaled(), **published).coverage() == {
        "0.weight": "Oja", "1.weight": "Oja readout (delta)", "1.bias": "Oja readout (delta)",
        "scale": "frozen", "0.bias": "frozen",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'1' of type Scaled has parameters besides .* cannot be split"):
        bioopt.create_optimizer("oja", model, lr=0.5, groups={"1.0": {"lr": 0.1}})


# -- what is generated --------------------------------------------------------------------------------------------


def test_presets_and_lists_of_rules_are_up_to_date(generate: types.ModuleType) -> None:
    stale = [str(path.relative_to(ROOT)) for path in generate.out_of_date()]
    assert not stale, f"{', '.join(stale)}: run `python scripts/generate.py`"


def test_every_rule_is_in_the_api_pages() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst"))
    for rule in RULES:
        assert f".. autoclass:: {rule.__name__}\n" in pages, f"docs/api: there is no {rule.__name__}"
    for function in ("create_optimizer", "list_optimizers", "presets"):
        assert f".. autofunction:: {function}\n" in pages


def test_presets_are_installed_with_the_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "presets.json" in project["tool"]["setuptools"]["package-data"]["bioopt"]


RECORDS = ("experiments/records/plausibility", "experiments/records/benchmark")  # that pages are made of


@pytest.fixture
def project(generate: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is read, to be changed."""
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    for folder in ("conf/optimizer", "conf/model", "docs", *RECORDS):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("_*"))
    (tmp_path / "bioopt").mkdir()
    shutil.copy(ROOT / "bioopt" / "presets.json", tmp_path / "bioopt")
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_a_change_makes_what_follows_from_it_stale(generate: types.ModuleType, project: Path) -> None:
    assert generate.out_of_date() == {}
    edit(project / "conf/optimizer/hebbian.yaml", "\nlr: 0.1 ", "\nlr: 4.0 ")
    edit(project / "conf/optimizer/oja.yaml", "principal", "secondary")
    edit(project / "docs/rules/index.md", "| `oja` |", "| `oia` |")
    edit(project / "docs/experiments.md", "`oja` ", "")
    stale = generate.out_of_date()
    assert {str(path.relative_to(project)) for path in stale} == {
        *("bioopt/presets.json", "conf/optimizer/oja.yaml", "docs/experiments.md", "docs/rules/index.md")
    }
    for path, text in stale.items():
        path.write_text(text)
    assert generate.out_of_date() == {}
    assert json.loads((project / "bioopt/presets.json").read_text())["rules"]["hebbian"]["default"]["lr"] == 4.0
    assert (project / "docs/experiments.md").read_text() == (ROOT / "docs/experiments.md").read_text()
    assert (project / "conf/optimizer/oja.yaml").read_text() == (ROOT / "conf/optimizer/oja.yaml").read_text()


def test_a_rule_without_a_file_or_a_page_or_a_source_is_named(
    generate: types.ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(project / "docs/rules/hebbian.md", "(#bioopt.BCM)", "")
    with pytest.raises(ValueError, match=r"BCM needs a page: docs/rules/bcm.md, or a link \[`BCM`\]\(#bioopt.BCM\)"):
        generate.out_of_date()
    (project / "docs/rules/bcm.md").write_text("# BCM\n")
    first_page = generate.generated()[project / "docs/index.md"]
    assert "[`BCM`](rules/bcm.md)" in first_page
    assert "\nrules/bcm\n" in first_page
    monkeypatch.setattr(bioopt.BCM, "__doc__", "A rule.\n\nSource: hearsay.")
    with pytest.raises(ValueError, match=r"the docstring of BCM needs 'Source: A\. Author"):
        generate.out_of_date()
    (project / "conf/optimizer/bcm.yaml").unlink()
    with pytest.raises(ValueError, match=r"BCM needs a file in conf/optimizer with _target_: bioopt.BCM"):
        generate.out_of_date()


def test_options_that_presets_cannot_hold_are_refused(generate: types.ModuleType, project: Path) -> None:
    edit(project / "conf/optimizer/softhebb.yaml", "readout: {lr: 1.0e-4}", "readout: {lr: 1.0e-4, momentum: 0}")
    with pytest.raises(ValueError, match=r"softhebb: of the readout, per_model.softhebb can set lr alone"):
        generate.out_of_date()
    edit(project / "conf/optimizer/softhebb.yaml", "momentum: 0}", "}")
    edit(project / "conf/optimizer/oja.yaml", "\nlr: 0.01", "\nlr: {_target_: builtins.float}")
    with pytest.raises(ValueError, match=r"oja.lr: of things that _target_ makes, presets can hold classes alone"):
        generate.out_of_date()


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("Source: E. Oja (1982), *Simplified neuron*, J. Math. Biology 15.", [("Oja", 1982)]),
        ("Sources: D.-H. Lee & B. Á. Two (1998), *A; b*; traces: C. Three (2008), *C*.", [("Lee & Two", 1998)]),
        (
            "Sources: A. One, B. Two & C. Three\n(1990), *A*; D. Four et al. (2000).",
            [("One et al.", 1990), ("Four et al.", 2000)],
        ),
        ("Source: in detail: A. One (1990), *A*.", [("One", 1990)]),
    ],
)
def test_sources_are_read_off_the_docstring(generate: types.ModuleType, text: str, sources: list[Any]) -> None:
    assert generate.sources_of(type("Rule", (), {"__doc__": f"A rule.\n\n{text}"})) == sources
