"""Each data set from files of its original form, the registry of loaders, and a data set of a user."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file

from experiments import data
from experiments.options import check
from experiments.run import run

from ..commands import ROOT, config

RANDOM = np.random.default_rng(0)
DATA = sorted(path.stem for path in (ROOT / "conf/data").glob("*.yaml"))


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch, n: int = 200) -> dict[str, np.ndarray]:
    """Pickled dictionaries, an image in a row: all red pixels, then all green ones, then all blue ones."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    parts = {}
    for part, count in (("train", n), ("test", n // 2)):
        parts[part] = pixels(count, 3, 32, 32)
        fine = [i % 100 for i in range(count)]
        entry = {"data": parts[part].reshape(count, -1), "fine_labels": fine, "coarse_labels": [0] * count}
        (folder / part).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))

    class Unchecked(torchvision.datasets.CIFAR100):
        train_list = (("train", None),)
        test_list = (("test", None),)
        meta = {"filename": "meta", "key": "fine_label_names", "md5": None}  # noqa: RUF012

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Unchecked)
    return parts


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch, n: int = 60) -> dict[str, np.ndarray]:
    """Matlab's files: images as height × width × channels × number, and labels from 1 to 10, where 10 is digit 0."""
    root.mkdir(parents=True)
    parts = {}
    for part, count in (("train", n), ("test", n // 2)):
        parts[part] = pixels(count, 3, 32, 32)
        labels = np.array([[i % 10 or 10] for i in range(count)], dtype=np.uint8)
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": parts[part].transpose(2, 3, 1, 0), "y": labels})

    class Unchecked(torchvision.datasets.SVHN):
        split_list = {part: ("", f"{part}_32x32.mat", None) for part in ("train", "test")}  # noqa: RUF012

    monkeypatch.setattr(torchvision.datasets, "SVHN", Unchecked)
    return parts


def write_stl10(root: Path, monkeypatch: pytest.MonkeyPatch, n: int = 60) -> dict[str, np.ndarray]:
    """Raw bytes: images column by column, and labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    parts = {}
    for part, count in (("train", n), ("test", n // 2)):
        parts[part] = pixels(count, 3, 96, 96)
        (folder / f"{part}_X.bin").write_bytes(parts[part].transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(1 + i % 10 for i in range(count)))

    class Unchecked(torchvision.datasets.STL10):
        train_list = (("train_X.bin", None), ("train_y.bin", None))
        test_list = (("test_X.bin", None), ("test_y.bin", None))

    monkeypatch.setattr(torchvision.datasets, "STL10", Unchecked)
    return parts


WRITERS = {"cifar100": write_cifar100, "svhn": write_svhn, "stl10": write_stl10}


@pytest.mark.parametrize("name", WRITERS)
def test_original_files_are_read_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = WRITERS[name](tmp_path / "new", monkeypatch)
    images = data.load(name, tmp_path / "new")
    assert torch.equal(images.train_images, torch.from_numpy(parts["train"]))
    assert torch.equal(images.test_images, torch.from_numpy(parts["test"]))
    classes = 100 if name == "cifar100" else 10
    assert images.classes == classes
    assert images.train_labels.tolist() == [i % classes for i in range(len(parts["train"]))]
    assert images.test_labels.tolist() == [i % classes for i in range(len(parts["test"]))]
    stored = load_file(tmp_path / "new" / f"{name}.safetensors")
    assert all(stored[key].dtype == torch.uint8 and stored[key].is_contiguous() for key in data.SPLITS)
    for path in [*(tmp_path / "new").rglob("*.mat"), *(tmp_path / "new").rglob("*.bin")]:
        path.unlink()  # the cache is enough
    again = data.load(name, tmp_path / "new")
    assert torch.equal(again.train_images, images.train_images)


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_a_network_trains_on_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    WRITERS[name](tmp_path / "new", monkeypatch)
    options = [
        "model.width=2",
        "epochs=2",
        "batch_size=20",
        "readout.batch_size=20",
        "logger.mode=disabled",
        "diagnostics.every=2",
    ]
    summary = run(config(f"data={name}", f"data.root={tmp_path / 'new'}", *options, f"run_dir={tmp_path / 'run'}"))
    assert summary["epochs"] == 2
    assert (tmp_path / "run/confusion.png").exists()
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["plastic_epochs"] == 1


def test_images_of_stl10_are_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl10(tmp_path / "new", monkeypatch)
    root = f"data.root={tmp_path / 'new'}"
    assert data.from_config(config("data=stl10", root).data).shape == (3, 32, 32)
    assert data.from_config(config("data=stl10", root, "data.size=48").data).shape == (3, 48, 48)
    for size in ("96", "null"):
        assert data.from_config(config("data=stl10", root, f"data.size={size}").data).shape == (3, 96, 96)


@pytest.mark.parametrize(("name", "source"), [("cifar100", "CIFAR100"), ("svhn", "SVHN"), ("stl10", "STL10")])
def test_a_missing_download_is_named(name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *options: object) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(getattr(torchvision.datasets, source), "download", fail)
    with pytest.raises(
        FileNotFoundError, match=rf"data set '{name}' is not at .*{name}\.safetensors.*resolution.*data="
    ):
        data.load(name, tmp_path)


def write_shd(root: Path, n: int = 40) -> dict[str, torch.Tensor]:
    """A list of spike times, in half precision, and a list of channels for each recording, of any length."""
    h5py = pytest.importorskip("h5py")
    (root / "SHD").mkdir(parents=True)
    parts = {}
    for part, count in (("train", n), ("test", n // 2)):
        binned = torch.zeros(count, 1, 100, 700, dtype=torch.uint8)
        with h5py.File(root / "SHD" / f"shd_{part}.h5", "w") as file:
            spikes = file.create_group("spikes")
            times = spikes.create_dataset("times", (count,), h5py.vlen_dtype(np.float16))
            units = spikes.create_dataset("units", (count,), h5py.vlen_dtype(np.uint16))
            file["labels"] = np.arange(count, dtype=np.uint16) % 20
            for i in range(count):
                length = int(RANDOM.integers(0, 200))
                times[i] = np.sort(RANDOM.random(length) * 1.5).astype(np.float16)  # some beyond the last bin
                units[i] = RANDOM.integers(0, 700, length).astype(np.uint16)
                for time, unit in zip(times[i], units[i], strict=True):
                    binned[i, 0, min(int(float(time) / 1.4 * 100), 99), unit] += 1
        parts[part] = binned
    return parts


def test_spikes_are_binned_once(tmp_path: Path) -> None:
    parts = write_shd(tmp_path)
    images = data.load("shd", tmp_path)
    assert (images.shape, images.classes) == ((1, 100, 700), 20)
    assert torch.equal(images.train_images, parts["train"])
    assert torch.equal(images.test_images, parts["test"])
    assert images.train_labels.tolist() == [i % 20 for i in range(40)]
    for path in (tmp_path / "SHD").iterdir():
        path.unlink()  # the cache is enough
    assert torch.equal(data.load("shd", tmp_path).train_images, images.train_images)


def test_a_recurrent_network_trains_on_spikes(tmp_path: Path, undrawn: None) -> None:
    write_shd(tmp_path / "new")
    options = [f"data.root={tmp_path / 'new'}", "data=shd", "model=recurrent", "optimizer=eprop", "model.hidden=6"]
    options += ["epochs=1", "control=false", "batch_size=10", "logger.mode=disabled", f"run_dir={tmp_path / 'run'}"]
    assert run(config(*options))["trained_parameters"] > 6 * 700


def test_spikes_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"needs shd_train\.h5 and shd_test\.h5 in .*SHD: download .*zenkelab\.org.*data\.root="
    ):
        data.load("shd", tmp_path)
    write_shd(tmp_path)
    path = tmp_path / "SHD" / "shd_test.h5"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"needs shd_test\.h5 in"):
        data.load("shd", tmp_path)
    path.write_bytes(b"cut off")
    with pytest.raises(FileNotFoundError, match=r"shd_test\.h5 is not as published .*delete it"):
        data.load("shd", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"^data=shd needs the package h5py: pip install -e '\.\[h5py\]'"):
        data.load("shd", tmp_path)
    assert not (tmp_path / "shd.safetensors").exists()


def test_channels_that_are_not_there_are_named(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    write_shd(tmp_path, 4)
    with h5py.File(tmp_path / "SHD" / "shd_train.h5", "r+") as file:
        file["spikes/times"][0], file["spikes/units"][0] = np.zeros(1, np.float16), np.array([700], np.uint16)
    with pytest.raises(FileNotFoundError, match=r"shd_train\.h5 is not as published .*channels below 700"):
        data.load("shd", tmp_path)
    with h5py.File(tmp_path / "SHD" / "shd_train.h5", "r+") as file:
        del file["labels"]
        file["labels"] = np.zeros(3, np.uint16)
    with pytest.raises(FileNotFoundError, match=r"it has 4 lists of times, 4 of channels and 3 labels"):
        data.load("shd", tmp_path)


def test_the_original_mnist_files_are_enough(tmp_path: Path) -> None:
    """torchvision's own reader, on files in the original format: no network."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem, n in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        header = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(np.array([0x801, n], ">i4").tobytes() + labels.tobytes())
    mnist = data.load("mnist", tmp_path)
    assert mnist.test_images.shape == (10, 1, 28, 28)
    assert torch.equal(mnist.test_images[:, 0], torch.from_numpy(images))


def test_damaged_originals_are_named(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{stem}-ubyte").write_bytes(np.array([0x803, 5, 28, 28], ">i4").tobytes() + b"cut off")
    with pytest.raises(FileNotFoundError, match=r"could not be fetched .*\. If .*MNIST is damaged, delete it and run"):
        data.load("mnist", tmp_path)
    assert not (tmp_path / "mnist.safetensors").exists()


@pytest.fixture
def registry() -> Iterator[dict[str, data.registry.DataSet]]:
    """The registry, from which what a test adds is removed again."""
    before = dict(data.DATA_SETS)
    yield data.DATA_SETS
    data.DATA_SETS.clear()
    data.DATA_SETS.update(before)


def tiny() -> data.Tensors:
    images, labels = torch.from_numpy(pixels(12, 1, 4, 4)), torch.arange(12)
    return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}


def test_every_loader_has_a_file_of_options() -> None:
    assert sorted(data.DATA_SETS) == DATA
    for name in DATA:
        assert config(f"data={name}").data.name == name


def test_a_registered_loader_runs_once(registry: dict[str, object], tmp_path: Path) -> None:
    calls = []

    @data.register("tiny")
    def loader(root: Path) -> data.Tensors:
        calls.append(root)
        return tiny()

    first, again = (data.load("tiny", tmp_path) for _ in range(2))
    assert calls == [tmp_path]
    assert torch.equal(first.train_images, again.train_images)
    (tmp_path / "tiny.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tiny\.safetensors is damaged .*delete .*'tiny' anew"):
        data.load("tiny", tmp_path)

    @data.register("embedded", cached=False)
    def embedded(root: Path) -> data.Tensors:
        calls.append(root)
        return tiny()

    assert data.load("embedded", tmp_path / "new").shape == (1, 4, 4)
    assert calls == [tmp_path, tmp_path / "new"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("cached", [True, False])
def test_a_wrong_loader_is_named_and_nothing_is_written(
    cached: bool, registry: dict[str, object], tmp_path: Path
) -> None:
    wrong = {
        "is no dictionary, but NoneType": None,
        "no test_labels": {key: value for key, value in tiny().items() if key != "test_labels"},
        "train_images is torch.float32": {**tiny(), "train_images": torch.zeros(12, 1, 4, 4)},
        "train_labels has -1": {**tiny(), "train_labels": torch.arange(12) - 1},
    }
    for message, returned in wrong.items():
        registry.pop("tiny", None)
        data.register("tiny", cached=cached)(lambda root, returned=returned: returned)
        with pytest.raises(ValueError, match=f"the loader of data set 'tiny' has returned .*{message}"):
            data.load("tiny", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {".tiny.lock"}


def test_an_unusual_embedded_data_set_causes_a_warning(
    registry: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unusual = tiny()
    unusual["train_labels"] = unusual["test_labels"] = torch.tensor([0, 2]).repeat(6)
    data.register("tiny", cached=False)(lambda root: unusual)
    data.load("tiny", tmp_path)
    assert "data set 'tiny', its loader: labels go up to 2, but no training image has 1\n" in capsys.readouterr().out


def test_two_loaders_cannot_have_one_name(registry: dict[str, object]) -> None:
    def loader(root: Path) -> data.Tensors:
        return tiny()

    with pytest.raises(ValueError, match=r"'mnist' is already registered, by experiments\.data\.mnist\.mnist"):
        data.register("mnist")(loader)
    data.register("tiny")(loader)
    data.register("tiny")(loader)  # a module that is loaded again


def settings(*overrides: str) -> tuple[int, int, int | None]:
    chosen = config(*overrides)
    check(chosen)
    return chosen.epochs, chosen.batch_size, chosen.plastic_epochs


def test_data_sets_inherit_the_options_of_optimizers() -> None:
    assert settings("optimizer=hebbian", "data=cifar100") == (21, 128, 1)
    assert settings("optimizer=stdp", "data=fashion_mnist") == (15, 50, 3)
    assert (
        settings("optimizer=softhebb", "data=stl10") == settings("optimizer=softhebb", "data=cifar10") == (5, 128, None)
    )
    assert settings("optimizer=hill_climbing", "data=svhn") == (10, 128, None)  # which has none for cifar10
    assert settings("optimizer=hebbian", "data=cifar100", "+optimizer.per_data.cifar100.epochs=7") == (7, 128, 1)
    row = "+optimizer.per_data.cifar100={epochs: 7, plastic_epochs: null}"
    assert settings("optimizer=hebbian", "data=cifar100", row) == (7, 128, None)
    assert settings("optimizer=hebbian", "data=cifar100", "data.like=digits") == (40, 128, None)
    assert settings("optimizer=hebbian", "data=digits", "+data.like=cifar10") == (40, 128, 1)


def test_only_data_sets_without_like_have_a_row() -> None:
    """Otherwise two rows would have to be kept equal."""
    inheriting = {name for name in DATA if "like" in yaml.safe_load((ROOT / f"conf/data/{name}.yaml").read_text())}
    assert inheriting == {"cifar100", "fashion_mnist", "shd", "stl10", "svhn"}
    for path in (ROOT / "conf/optimizer").glob("*.yaml"):
        assert not inheriting & yaml.safe_load(path.read_text())["per_data"].keys(), path.name


def test_like_names_an_existing_data_set() -> None:
    with pytest.raises(ValueError, match=r"data\.like=cifar: it must be cifar10, digits or mnist"):
        settings("data=cifar100", "data.like=cifar")
    with pytest.raises(ValueError, match=r"data\.like=cifar100, which is itself like cifar10: it must be"):
        settings("data=svhn", "data.like=cifar100")
    assert settings("data=cifar100", "data.like=mine", "+optimizer.per_data.mine.epochs=3")[0] == 3


def documented() -> tuple[str, str]:
    """The loader and the YAML file of docs/experiments.md."""
    page = (ROOT / "docs/experiments.md").read_text().split("## A data set of your own\n")[1].split("\n## ")[0]
    code, options = re.search(r"```python\n(.*?)```.*?```yaml\n(.*?)```", page, re.DOTALL).groups()  # type: ignore[union-attr]
    return code, options


def with_conf(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [f"hydra.searchpath=[file://{folder}]", *overrides])


def test_the_data_set_of_the_documentation(registry: dict[str, object], tmp_path: Path, undrawn: None) -> None:
    code, options = documented()
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/leaves.yaml").write_text(options)
    for split, count in (("train", 12), ("test", 4)):
        for colour, species in enumerate(("birch", "oak", "rowan")):
            folder = tmp_path / "data/leaves" / split / species
            folder.mkdir(parents=True)
            for number in range(count):
                leaf = pixels(40, 50, 3) // 4
                leaf[:, :, colour] += 100
                Image.fromarray(leaf).save(folder / f"{number}.png")
    exec(code, {"__name__": "leaves"})
    chosen = with_conf(
        tmp_path / "conf", "data=leaves", "optimizer=sgd", "model=mlp", "model.hidden=[8]", "batch_size=6",
        f"data.root={tmp_path / 'data'}", "data.augment.crop=0", "logger.mode=disabled", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert (chosen.epochs, chosen.data.name) == (5, "leaves")
    check(chosen)
    summary = run(chosen)
    assert summary["data"] == "leaves"
    assert summary["test_accuracy"] > 0.9  # each species has a colour of its own
    assert (tmp_path / "data/leaves.safetensors").exists()
    assert len(code.splitlines()) + len(options.splitlines()) < 30
