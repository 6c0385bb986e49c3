"""`experiment=first_run`: a rule that learns, a control that does not, and what is drawn of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from experiments import pictures, receptive_fields
from experiments.run import run
from experiments.tasks import first_run_plots
from experiments.tasks.first_run import FirstRun

from ..commands import config
from .test_tasks import interrupted, resumed

SMALL = ["experiment=first_run", "logger.mode=disabled", "task.repetitions=2", "task.epochs=3"]


def test_the_rules_are_apart_from_their_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config(*SMALL, f"run_dir={tmp_path / 'run'}"))["measured"]
    assert min(found["sgd"], found["hebbian"]) > found["random_trunk"] + 0.05
    assert found["hebbian_ahead_of_random_trunk"] == pytest.approx(found["hebbian"] - found["random_trunk"])
    shown = capsys.readouterr().out
    assert "(mean, least and most of 2 repetitions, 3 epochs each" in shown
    table = [line.split()[:3] for line in shown.splitlines() if " to " in line and line[0] != "("]
    names = [row[0] for row in table]
    assert sorted(names[:2]) == ["hebbian", "sgd"]
    assert table[2][:2] == ["random_trunk", "(control)"]
    assert table[names.index("hebbian")][1] == f"{100 * found['hebbian']:.2f}"
    assert 0 < (tmp_path / "run" / "first_run.png").stat().st_size < 300_000


@pytest.mark.long
def test_it_resumes_bit_for_bit_with_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[tuple[Any, ...]] = []
    monkeypatch.setattr(first_run_plots, "page", lambda *drawn: pages.append(drawn) or drawn[-1])
    options = [*SMALL, "task.epochs=1"]
    whole = run(config(*options, f"run_dir={tmp_path / 'whole'}"))["measured"]
    interrupted(monkeypatch, FirstRun, 2, *options, f"run_dir={tmp_path / 'part'}")
    assert resumed(monkeypatch, tmp_path / "part")["measured"] == whole
    (courses, drawn, *_), (courses_again, drawn_again, *_) = pages
    assert courses == courses_again
    assert list(drawn) == list(drawn_again) == ["sgd", "hebbian", "random_trunk"]
    for rule, of in drawn.items():
        assert all(torch.equal(of[name], drawn_again[rule][name]) for name in ("start", "end", "share"))


def test_all_start_alike_and_the_control_turns_no_weights() -> None:
    task = config(*SMALL, "task.epochs=1").task
    options = {key: value for key, value in task.items() if not key.startswith("_") and key != "name"}
    made = FirstRun(config(*SMALL), torch.device("cpu"), **options)
    made.epochs = 1
    made.round(1)
    start = made.drawn["sgd"]["start"]
    assert all(torch.equal(of["start"], start) for of in made.drawn.values())
    turned = {rule: 1 - torch.cosine_similarity(of["start"], of["end"]).min().item() for rule, of in made.drawn.items()}
    assert abs(turned["random_trunk"]) < 1e-5
    assert turned["hebbian"] > 0.01
    assert turned["sgd"] > 0.01


@pytest.mark.parametrize("wrong", ["task.control=oja", "task.batch_size=2000", "task.epochs=0"])
def test_mistakes_are_named(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"first_run: {wrong.split('=')[0]}={wrong.split('=')[1]}"):
        run(config(*SMALL, wrong, f"run_dir={tmp_path}/run"))


def test_fields_are_sorted_by_wins_and_the_dead_marked() -> None:
    weights = torch.stack([torch.full((4,), float(k)) for k in range(3)])
    figure, axes = plt.subplots()
    note = receptive_fields.draw_fields(
        axes, {"start": weights, "end": -weights}, torch.tensor([0.25, 0.0, 0.75]), (1, 2, 2), 3
    )
    assert "orange: the 1 that never is" in note
    columns = {text.get_text(): round(text.get_position()[0]) for text in axes.texts}
    assert (columns["75 %"], columns["25 %"], columns["never"]) == (0, 0, 2) or columns["75 %"] < columns["25 %"]
    red = [patch for patch in axes.patches if patch.get_edgecolor()[:3] == to_rgb(pictures.VERMILION)]
    assert {int(patch.get_x()) for patch in red} == {2}
    assert len(red) == 2
    signs = [float(image.get_array().mean()) for image in axes.images]  # of each neuron: start, then end
    assert signs == [1, -1, 0, 0, 1, -1]  # neurons 2, 0 and 1
    plt.close(figure)


def test_of_many_neurons_some_are_drawn_with_the_dead_among_them() -> None:
    count = 2 * receptive_fields.MOST_FIELDS
    share = torch.arange(count).float().sub(count // 2).clamp(min=0)
    share /= share.sum()
    figure, axes = plt.subplots()
    note = receptive_fields.draw_fields(axes, {"end": torch.randn(count, 4)}, share, (1, 2, 2), 16)
    assert note.startswith(f"{receptive_fields.MOST_FIELDS} of {count} neurons")
    assert len(axes.images) == receptive_fields.MOST_FIELDS
    dead = [text for text in axes.texts if text.get_text() == "never"]
    assert len(dead) == receptive_fields.MOST_FIELDS // 2
    plt.close(figure)


def test_a_resumed_run_draws_the_weights_it_started_with(tmp_path: Path) -> None:
    from experiments.classification import Classification
    from experiments.ranks import Ranks

    chosen = config("optimizer=sgd", "model=mlp", "model.hidden=[4]", "logger.mode=disabled")
    made = []
    for _ in range(2):  # as `run` builds it, at first and when it resumes
        torch.manual_seed(chosen.seed)
        made.append(Classification(chosen, torch.device("cpu"), Ranks()).start)
    assert torch.equal(made[0], made[1])
    assert made[0].shape == (4, 784)


def test_an_animation_has_a_picture_for_each_state(tmp_path: Path) -> None:
    states = [torch.full((3, 4), -1.0), torch.zeros(3, 4), torch.full((3, 4), 2.0)]
    path = receptive_fields.animation(states, (1, 2, 2), 2, tmp_path / "fields.gif", scale=1)
    with Image.open(path) as drawn:
        assert (drawn.n_frames, drawn.size) == (3, (6, 6))
        colours = []
        for frame in range(3):
            drawn.seek(frame)
            colours.append(drawn.convert("RGB").getpixel((0, 0)))
            assert drawn.convert("RGB").getpixel((4, 4)) == drawn.convert("RGB").getpixel((2, 2))  # no fourth neuron
    blue, white, red = colours
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    assert max(white) - min(white) < 5
    with pytest.raises(ValueError, match=r"weights of shape \(3, 5\) do not see images of \(1, 2, 2\)"):
        receptive_fields.animation([torch.zeros(3, 5)], (1, 2, 2), 2, tmp_path / "none.gif")
