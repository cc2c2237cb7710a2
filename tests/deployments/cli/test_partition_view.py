"""What `config check --data` shows of the clients, in the terminal and as a plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedrounds.deployments.cli import main
from fedrounds.deployments.cli.plots import draw_partition
from fedrounds.fl_components.data import FederatedData, NumberedIds, RowRanges
from fedrounds.fl_components.data.summary import summary
from fedrounds.fl_components.errors import ConfigError

DIGITS = """
name: skewed
rounds: 1
data: {kind: digits, partition: {kind: dirichlet, num_clients: 30, alpha: 1.0}, test_fraction: 0.1}
model: {kind: mlp, hidden: [8]}
training: {learning_rate: 0.1, epochs: 1}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "skewed.yaml"
    path.write_text(DIGITS)
    return str(path)


def pixels(file: Path) -> np.ndarray:
    from matplotlib import image

    found: np.ndarray = image.imread(file)
    return found


def test_sizes_and_classes_are_shown(config: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", config, "--data"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    header = ["class", "training", "rows", "clients"]
    sizes = lines[lines.index(["training", "examples", "clients"]) + 1 : lines.index(header) - 2]
    assert sum(int(line[line.index("to") + 2] if "to" in line else line[1]) for line in sizes) == 30
    classes = lines[lines.index(header) + 1 :][:10]
    assert [line[0] for line in classes] == [str(label) for label in range(10)]
    assert sum(int(line[1]) for line in classes) == pytest.approx(0.9 * 1797, abs=30)
    assert any(line[:4] == ["the", "majority", "label", "for"] for line in lines)


def test_a_plot_is_drawn(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "picture.png"
    assert main(["config", "check", config, "--data", "--plot", str(file)]) == 0
    shown = pixels(file)
    assert shown.shape[0] > 300 and shown.shape[1] > 800
    colours = np.unique((shown[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)
    assert len(colours) > 12  # ten labels, the bars of the sizes, and paper


def test_a_million_clients_are_drawn_as_well(tmp_path: Path) -> None:
    starts = np.arange(1_000_000) % 90
    data = FederatedData(
        client_ids=NumberedIds(1_000_000),
        x_train=np.zeros((100, 2), np.float32),
        y_train=np.arange(100) % 40,
        train_rows=RowRanges(starts, starts + 10),
        x_test=np.zeros((1, 2), np.float32),
        y_test=np.zeros(1, np.int64),
        test_rows=RowRanges(np.zeros_like(starts), np.zeros_like(starts)),
        num_classes=40,  # more than there are colours
        public=True,
    )
    draw_partition(summary(data), "many", tmp_path / "many.png")
    assert pixels(tmp_path / "many.png").std() > 0.05


@pytest.mark.parametrize(
    ("name", "hint"),
    [("no/such/folder/p.png", "in a folder that exists"), ("", "a file"), ("picture.nonsense", ".png")],
)
def test_a_plot_that_cannot_be_written(name: str, hint: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"the plot .* cannot be written: \w+") as caught:
        draw_partition(summary(FederatedData(**small())), "x", folder / name)
    assert hint in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == [folder] and not list(folder.iterdir())


def test_a_plot_without_an_ending_is_a_png_of_that_name(tmp_path: Path) -> None:
    draw_partition(summary(FederatedData(**small())), "x", tmp_path / "picture")
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_the_data(config: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", config, "--plot", "x.png"]) == 2
    assert "--plot is given without --data" in capfd.readouterr().err


def small() -> dict[str, object]:
    one = RowRanges(np.array([0]), np.array([2]))
    x, y = np.zeros((2, 1), np.float32), np.array([0, 1])
    return {
        "client_ids": ("a",),
        "x_train": x,
        "y_train": y,
        "train_rows": one,
        "x_test": x,
        "y_test": y,
        "test_rows": one,
        "num_classes": 2,
        "public": True,
    }
