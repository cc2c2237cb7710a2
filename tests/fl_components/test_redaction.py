from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fl_components.errors import ConfigError, StoreError, one_line
from fl_components.redaction import redact, redact_url
from fl_components.store.blobs import Blobs
from fl_components.store.database import Database

PASSWORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=6, max_size=20).map(
    lambda text: "hunter2" + text
)
FORMS = [
    "postgresql:/admin:{}@db.example/fed",
    "postgresql://admin:{}@db.example:port/fed",
    "postgresql://admin:{}@db.example:5432:1/fed",
    "postgresql+asyncpg://admin:{}@db.example/fed",
    "postgresql//admin:{}@db.example/fed",
    "mysql:admin:{}@db.example/fed",
    "://:{}@db.example",
]


@pytest.mark.parametrize("form", FORMS)
@given(password=PASSWORDS)
@example(password="hunter2")
@example(password="hunter2/p@ss:w #?'\"%41")
def test_no_password_is_in_what_a_database_url_raises(form: str, password: str) -> None:
    url = form.format(password)
    try:
        Database(url).close()
    except StoreError as error:
        assert password not in f"{error.message} {error.hint} {error}"
        assert "hunter2" not in f"{error.message} {error.hint} {error}"


@given(password=st.from_regex(r"hunter2[A-Za-z0-9_.!$%*+/:@~-]*", fullmatch=True))
def test_no_password_is_in_the_label_of_a_database_or_in_errors_of_blobs(password: str) -> None:
    database = Database(f"postgresql://admin@127.0.0.1/fed?password={password.replace('%', '')}")
    assert "hunter2" not in database.label and "admin" in database.label
    database.close()
    blobs = Blobs(f"no-such-place://KEY:{password}@bucket/x")
    with pytest.raises(StoreError) as caught:
        blobs.read("run/000001/ab")
    assert "hunter2" not in str(caught.value) and "bucket/x" in str(caught.value)


@given(password=st.from_regex(r"hunter2[A-Za-z0-9_.!$%*+/:@~-]*", fullmatch=True), before=st.text(max_size=10))
def test_no_password_is_in_any_error(password: str, before: str) -> None:
    for url in (f"https://me:{password}@mlflow.example/x", f"tls://:{password}@scheduler:8786"):
        error = ConfigError(f"{before} {url} does not answer", hint=f"correct {url}")
        for text in (str(error), error.message, str(error.hint), one_line(OSError(url)), redact_url(url)):
            assert "hunter2" not in text


@pytest.mark.parametrize(
    ("variable", "value", "secret"),
    [
        ("PREFECT_API_AUTH_STRING", "admin:hunter2 x", "hunter2 x"),
        ("MLFLOW_TRACKING_PASSWORD", "hunter2 'x'", "hunter2 'x'"),
        ("FEDROUNDS_DATABASE_URL", "postgresql://admin:hunter%202@db/fed", "hunter 2"),
        ("FEDROUNDS_DATABASE_URL", "postgresql://db/fed?user=a&password=hunter2", "hunter2"),
        ("https_proxy", "http://me:hunter2@proxy:3128", "hunter2"),
    ],
)
def test_what_a_variable_holds_is_hidden_wherever_it_occurs(
    variable: str, value: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert redact(f"the server said: {secret!s}, really") == "the server said: ***, really"


@pytest.mark.parametrize(
    "text",
    [
        "the database postgresql+psycopg://admin@127.0.0.1/fed does not answer",
        "model.num_tokens=20 is 7: begin the model with an embedding of at least 20 tokens",
        "examples/heart_disease.yaml, line 2: 'a@b' is not a number",
        "sqlite:////srv/a@b/fedrounds.db cannot be opened",
        "sweep training.learning_rate=0.1 and privacy.delta=1e-5",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


@given(text=st.text(max_size=60) | st.from_regex(r"[a-z]{1,3}:/{1,2}[a:@/]{0,9} password=[a*]{0,5}", fullmatch=True))
def test_text_that_is_redacted_stays_the_same(text: str) -> None:
    assert redact(redact(text)) == redact(text)
