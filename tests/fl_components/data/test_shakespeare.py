from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.data import FederatedData, Shakespeare
from fedrounds.fl_components.errors import DataError
from tests.support import public_data

PLAY = "ROMEO:\nShall I hear more?\nOr speak?\n\nNurse:\n\n\nJULIET, &c:\nAy me!\n\nNURSE:\nMadam!\n"


def load(folder: Path, text: str | bytes = PLAY, **fields: Any) -> FederatedData:
    (folder / "input.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Shakespeare.model_validate({"folder": str(folder)} | fields).load(seed=0)


def spelt(text: str, tokens: np.ndarray) -> str:
    vocabulary = sorted(set(text))
    return "".join("#" if token == IGNORED else vocabulary[token] for token in tokens)


def test_speakers_are_clients_whatever_the_case_of_their_names(tmp_path: Path) -> None:
    data = load(tmp_path, test_fraction=0.0)
    assert data.client_ids == ("ROMEO", "Nurse", "JULIET c")
    assert data.num_classes == len(set(PLAY)) and not data.public  # a file of one's own
    (x,), (y,) = data.train(1)
    said = "Nurse:\n\nNURSE:\nMadam!\n\n"
    assert spelt(PLAY, x[: len(said) - 1]) == said[:-1] and not x[len(said) - 1 :].any()
    assert spelt(PLAY, y) == said[1:].ljust(80, "#")


def test_the_last_speech_is_ended_as_all_are(tmp_path: Path) -> None:
    data = load(tmp_path, "A:", test_fraction=0.0)
    assert spelt("A:\n", data.x_train[0, :3]) == "A:\n" and spelt("A:\n", data.y_train[0, :4]) == ":\n\n#"


def test_rows_by_hand(tmp_path: Path) -> None:
    text = "A:\nbcdefghijklm"  # 17 characters with the two after the speech: the last 6 are there to test on
    data = load(tmp_path, text, sequence_length=4, test_fraction=0.4)
    shown = [[spelt(text, row) for row in part] for part in (data.x_train, data.y_train, data.x_test, data.y_test)]
    padding = sorted(text)[0]
    assert shown == [
        ["A:\nb", "cdef", "gh" + padding * 2],
        [":\nbc", "defg", "hi##"],
        ["ghij", "ijkl", "klm\n"],
        ["##jk", "##lm", "##\n\n"],
    ]


@pytest.mark.parametrize("length", [2, 3, 7, 80])
@pytest.mark.parametrize("test_fraction", [0.1, 0.5, 0.95])
def test_each_test_character_is_predicted_once_after_its_context(
    tmp_path: Path, length: int, test_fraction: float
) -> None:
    rng = np.random.default_rng(length)
    said = "A:\n" + "".join(rng.choice(list("abc "), 300)).strip() + "\n\n"
    data = load(tmp_path, said, sequence_length=length, test_fraction=test_fraction)
    num_test = int(test_fraction * len(said))
    first = len(said) - num_test
    train = "".join(spelt(said, y[y != IGNORED]) for y in data.y_train)
    assert train == said[1:first]
    assert "".join(spelt(said, y[y != IGNORED]) for y in data.y_test) == said[first:]
    place = first - 1
    for x, y in zip(data.x_test, data.y_test, strict=True):
        (counted,) = np.nonzero(y != IGNORED)
        assert counted[0] == min(place, length // 2)
        assert spelt(said, x[: counted[-1] + 1]) == said[place - counted[0] : place + counted.size]
        place += counted.size


def test_short_speakers_are_left_out(tmp_path: Path) -> None:
    assert load(tmp_path, min_characters=21).client_ids == ("ROMEO", "Nurse")
    with pytest.raises(DataError, match="no speaker has enough text"):
        load(tmp_path, min_characters=1000)


def test_baselines_are_those_of_a_plain_count(tmp_path: Path) -> None:
    text = "A:\n" + "the cat sat on the mat and the rat ran. " * 9 + "\n\nB:\n" + "so so the so. " * 8 + "\n"
    data = load(tmp_path, text, sequence_length=10)
    said = [speech + "\n\n" for speech in text[:-1].split("\n\n")]
    cuts = [len(each) - int(0.1 * len(each)) for each in said]
    follow = [list(itertools.pairwise(each)) for each in said]
    pairs = Counter(pair for each, cut in zip(follow, cuts, strict=True) for pair in each[: cut - 1])
    asked = [pair for each, cut in zip(follow, cuts, strict=True) for pair in each[cut - 1 :]]
    characters = Counter(character for _, character in pairs.elements())
    likely = min(characters, key=lambda c: (-characters[c], c))
    follows = {a: min(set(text), key=lambda b: (-pairs[a, b], b)) for a in set(text)}
    assert data.baselines() == pytest.approx(
        {
            "unigram": np.mean([following == likely for _, following in asked]),
            "bigram": np.mean([following == follows[before] for before, following in asked]),
        }
    )


def test_the_published_file() -> None:
    with public_data():
        data = Shakespeare().load(seed=0)
    assert (data.num_clients, data.num_classes) == (303, 65)
    # By a plain count over the file, apart from this rule: 111,408 characters to test on.
    assert np.count_nonzero(data.y_test != IGNORED) == 111_408
    assert data.baselines() == pytest.approx({"unigram": 0.1530, "bigram": 0.2735}, abs=5e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "input.txt is empty"),
        ("\n\n", "no speaker has enough text"),
        ("ROMEO:\nAy.\n\nshe speaks\nyet\n", "input.txt, line 4: 'she speaks' is not a speaker's name and a colon"),
        ("ROMEO: Ay.\n", "input.txt, line 1: 'ROMEO: Ay.' is not a speaker's name"),
        (":\nAy.\n", "input.txt, line 1: ':' is not"),
        (b"ROMEO:\nAy.\n\nNURSE:\nn\xe9e\n", "input.txt, line 5: the byte 0xe9 is not UTF-8"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as refused:
        load(tmp_path, text)
    assert refused.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shakespeare") as refused:
        Shakespeare(folder=str(tmp_path)).load(seed=0)
    assert "input.txt" in str(refused.value.hint)


@pytest.mark.parametrize("field", [{"sequence_length": 1}, {"test_fraction": 1.0}, {"min_characters": 1}])
def test_what_makes_no_sense_is_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Shakespeare.model_validate(field)
