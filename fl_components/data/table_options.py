"""Table options: the validated types of the settings of `Tables`."""

from __future__ import annotations

import codecs
import datetime as dt
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator

from fedrounds.fl_components.data.cells import TRUTH, composed, text


def _plain_values(values: Any) -> Any:
    for value in values if isinstance(values, list) else ():
        if isinstance(value, dt.date):
            raise ValueError(f"write dates in quotes: {str(value)!r}")
        if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError("list text, finite numbers, true and false")
    return values


def known_rules(missing: Any) -> Any:
    known = ", ".join(get_args(Missing))
    for column, rule in missing.items() if isinstance(missing, Mapping) else ():
        if rule not in get_args(Missing):
            raise ValueError(f"missing.{column} is {rule!r}; known are {known}")
    if not isinstance(missing, Mapping) and missing not in get_args(Missing):
        raise ValueError(f"known are {known}, for all columns or for each: {{age: drop_row}}")
    return missing


def _two_or_more(values: list[bool | int | float | str]) -> list[bool | int | float | str]:
    words = [text(value) for value in values]
    if len(values) < 2 or len({TRUTH.get(word, word) for word in words}) < len(values):
        raise ValueError("list two or more values, none of them twice (1, 1.0, 1e0 and true are the same value)")
    return values


def _above_zero(constants: tuple[float, float]) -> tuple[float, float]:
    if constants[1] <= 0:
        raise ValueError("give [centre, scale] with a scale above 0")
    return constants


def check_separator(separator: str) -> str:
    if len(separator) != 1 or not separator.isascii() or separator.isalnum() or separator in "\"'\0\r\n.+-_":
        raise ValueError(
            'give one ASCII character that stands in no number: "," or ";" or "|" or, for tabs, "\\t" in quotes'
        )
    return separator


def _parse_day_zero(date: Any) -> Any:
    if isinstance(date, dt.date) or (isinstance(date, str) and re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", date.strip())):
        return date
    raise ValueError("give the date that the days are counted from, as YYYY-MM-DD")


def text_encoding(encoding: str) -> str:
    try:
        codecs.lookup(encoding)
        "a,1\n".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise ValueError(f"{encoding!r} is not a text encoding; give utf-8, cp1252, latin-1 or utf-16") from error
    return encoding


def whole_dates(form: str | None) -> str | None:
    if form is None:
        return None
    probe = dt.datetime(2013, 12, 31)
    try:
        right = dt.datetime.strptime(probe.strftime(form), form) == probe
    except ValueError:
        right = False
    if not right:
        raise ValueError('give year, month and day in the notation of strptime, for instance "%d.%m.%Y"')
    return form


Name = Annotated[str, AfterValidator(composed)]


Values = Annotated[list[bool | int | float | str], BeforeValidator(_plain_values), AfterValidator(_two_or_more)]


Constants = Annotated[tuple[float, float], AfterValidator(_above_zero)]


DayZero = Annotated[dt.date, BeforeValidator(_parse_day_zero)]


Missing = Literal["refuse", "drop_row", "indicator"]
