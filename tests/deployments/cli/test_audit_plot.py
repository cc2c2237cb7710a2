"""The plot of an audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fedrounds.deployments.cli.plots import draw_audit
from fedrounds.fl_components.privacy.audit import AuditReport

REPORT = AuditReport(
    claimed_epsilon=1.0,
    delta=1e-5,
    noise_multiplier=3.73,
    num_canaries=1000,
    num_releases=1,
    num_joined=500,
    num_parameters=20_000,
    num_guesses=20,
    num_right=12,
    p_value=0.4,
    confidence=0.999,
    mean_cosine=0.002,
    mean_cosine_interval=(0.001, 0.003),
    epsilon_interval=(0.4, 1.6),
    epsilon_lower_bound=0.3,
    verdict="consistent with the claim",
)
RED, BLUE = (0xC0, 0x39, 0x2B), (0x1F, 0x5F, 0x8B)


def pixels_of(reports: list[AuditReport], file: Path, colour: tuple[int, int, int]) -> int:
    from matplotlib import image

    draw_audit(reports, file)
    shown = (image.imread(file)[..., :3] * 255).round().astype(int)
    return int((shown == colour).all(-1).sum())


def test_what_is_accused_is_red(tmp_path: Path) -> None:
    accused = replace(REPORT, epsilon_interval=(1.5, 2.8))
    only_honest, both = ([REPORT], [REPORT, accused])
    red, more_red = (pixels_of(each, tmp_path / "audit.png", RED) for each in (only_honest, both))
    assert more_red > red + 200  # the legend is red as well
    assert pixels_of(both, tmp_path / "audit.png", BLUE) > 200


def test_what_is_beyond_the_plot_is_at_its_edge(tmp_path: Path) -> None:
    """No noise at all, and nothing found: zero, on a logarithmic axis."""
    without = replace(REPORT, epsilon_interval=(5e11, 6e11), epsilon_lower_bound=0.0)
    nothing = replace(REPORT, claimed_epsilon=8.0, epsilon_interval=(0.0, 0.0), epsilon_lower_bound=0.0)
    assert np.diff([pixels_of(each, tmp_path / "audit", RED) for each in ([REPORT], [REPORT, without])])[0] > 100
    assert pixels_of([nothing], tmp_path / "audit", BLUE) > 0
