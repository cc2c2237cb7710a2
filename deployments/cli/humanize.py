"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

UNKNOWN = "-"


def counted(count: int, noun: str) -> str:
    """
    >>> counted(1, "step"), counted(2000, "round")
    ('1 step', '2,000 rounds')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def event(fields: Mapping[str, Any]) -> str:
    """An event of the ledger (fedrounds.fl_components.privacy.events).

    >>> gaussian = {"kind": "gaussian", "noise_multiplier": 1.5}
    >>> event({"kind": "self_composed", "event": gaussian, "count": 3})
    '3 times noise 1.5'
    >>> event({"kind": "poisson_sampled", "sampling_rate": 0.25, "event": gaussian})
    'noise 1.5 at rate 0.25'
    """
    match fields["kind"]:
        case "gaussian":
            return f"noise {fields['noise_multiplier']:.4g}"
        case "poisson_sampled":
            return f"{event(fields['event'])} at rate {fields['sampling_rate']:.4g}"
        case "sampled_without_replacement":
            return f"{event(fields['event'])}, {fields['sample_size']:,} of {fields['population_size']:,}"
        case "truncated_poisson_sampled":
            cut = f"cut to {fields['truncated_batch_size']:,} of {fields['dataset_size']:,}"
            return f"noise {fields['noise_multiplier']:.4g} at rate {fields['sampling_rate']:.4g}, {cut}"
        case "self_composed" if fields["count"] > 1:
            return f"{fields['count']:,} times {event(fields['event'])}"
        case "self_composed":
            return event(fields["event"])
        case kind:
            return str(kind)


def shown_class(name: str) -> str:
    """A class's name on one line, with quotes where blanks would be lost, and cut where it is long.

    >>> shown_class("ill"), shown_class("\\n"), shown_class("two words"), shown_class("x" * 50)
    ('ill', "'\\\\n'", 'two words', 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxx...')
    """
    shown = name if name.isprintable() and name == name.strip() and name else repr(name)
    return shown if len(shown) <= 32 else f"{shown[:29]}..."


def number(value: float | None) -> str:
    """Three decimals, or four significant digits where those would say too little.

    >>> number(0.79512), number(12.5), number(0.00004), number(None)
    ('0.795', '12.500', '4e-05', '-')
    """
    if value is None:
        return UNKNOWN
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3f}"
    return f"{value:.4g}"


def size(num_bytes: float | None) -> str:
    """
    >>> size(812), size(84_320), size(2_500_000), size(None)
    ('812 B', '84.3 kB', '2.5 MB', '-')
    """
    if num_bytes is None:
        return UNKNOWN
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 999.95:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} TB"


def duration(seconds: float | None) -> str:
    """
    >>> duration(1.306), duration(48.2), duration(125), duration(None)
    ('1.31 s', '48 s', '2 min 05 s', '-')
    """
    if seconds is None:
        return UNKNOWN
    return f"{seconds:.2f} s" if seconds < 10 else whole_duration(seconds)


def whole_duration(seconds: float) -> str:
    """
    >>> whole_duration(8.3), whole_duration(125), whole_duration(7380)
    ('8 s', '2 min 05 s', '2 h 03 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ago(seconds: float) -> str:
    """
    >>> ago(3), ago(125), ago(7300), ago(200_000)
    ('just now', '2 min ago', '2 h ago', '2 days ago')
    """
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 86_400:
        return f"{seconds // 3600:.0f} h ago"
    days = seconds // 86_400
    return f"{days:.0f} day{'s' if days > 1 else ''} ago"
