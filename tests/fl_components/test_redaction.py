from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedrounds.fl_components.errors import ConfigError, FedroundsError, StoreError, one_line
from fedrounds.fl_components.redaction import redact, redact_url
from fedrounds.fl_components.store.blobs import Blobs
from fedrounds.fl_components.store.database import Database
from tests.support import cases

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
    except FedroundsError as error:
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


ANY_PASSWORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), min_size=6, max_size=20
).map(lambda text: "hunter2" + text + "Z")
URLS = [
    "http://admin:{}@127.0.0.1:9/api",
    "http://{}@127.0.0.1:9/api",
    "http:admin:{}@127.0.0.1:9/api",
    "http//admin:{}@127.0.0.1:9/api",
    "//admin:{}@127.0.0.1:9/api",
    "admin:{}@db/fed",
    "nope://KEY:{}@bucket/x",
    "postgresql+psycopg://admin:{}@db/fed?sslmode=require",
    "'http://admin:{}@127.0.0.1:9/api'",
]
ENCODED_URLS = [
    *URLS,
    "http://admin%3A{}%40127.0.0.1:9/api",
    "postgresql://admin%3a{}%40db/fed",
    "postgresql://admin%3A{}@db/fed",
    "admin%3A{}%40db/fed",
    "az://c/x?sv=2020&sig={}",
    "http://host/api?x=1&api_key={}&y=2",
    "http://host/api?key={}",
    "http://host/api?auth={}",
    "postgresql://db/fed?options=-c%20x%3D{}",
    "https://host/x?X-Amz-Signature={}",
    "wasbs://c@a.blob.core.windows.net/x?AccountKey={}",
]


def assert_hidden(url: str, password: str) -> None:
    """No form of `password` is in a message that shows the URL in each form, as the value of a variable."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PREFECT_API_URL", url)
        written = f"{url} {url!r} {url!a} {password} {password!r} {quote(password)} {quote(password, safe='')}"
        messages = [redact_url(url), str(ConfigError(written, hint=written).hint), one_line(OSError(written))]
    for message in (*messages, redact_url(url)):
        for secret in (password, repr(password)[1:-1], quote(password), quote(password, safe=""), "hunter2"):
            assert secret not in message


@settings(max_examples=cases(40))
@given(password=ANY_PASSWORDS)
@example(password="hunter2\nZ secret")
@example(password="hunter2 'a' \"b\" \\ \tZ")
@example(password="hunter2:/@//x:y@zZ")
def test_no_form_of_a_password_in_a_variable_is_in_a_message(password: str) -> None:
    for form in URLS:
        assert_hidden(form.format(password), password)
    for form in ENCODED_URLS:
        assert_hidden(form.format(quote(password, safe="")), password)
    token = password.replace(":", "")  # else what is before it is a user name, which is shown
    assert_hidden(f"{token}@db/fed", token)


@pytest.mark.parametrize(
    "text",
    [
        *(form.format("hunter2") for form in ENCODED_URLS),
        "admin:/hunter2@db/fed",
        "password='a\\'hunter2'",
        "password='hunter2",
        'password: "a hunter2',
        "PREFECT_API_KEY: hunter2",
        "password: hunter2",
        "access_token: hunter2",
        "password%3Dhunter2",
        "odbc_connect=DRIVER%3Dx%3BUID%3Dsa%3BPWD%3Dhunter2",
        "Authorization: token hunter2",
        "Authorization: hunter2",
        "{'Authorization': 'Digest hunter2'}",
        "AccountName=x;AccountKey=hunter2;EndpointSuffix=core.windows.net",
        "SharedAccessSignature=hunter2",
        "the proxy does not accept Bearer hunter2hunter2",
        "sent: Basic hunter2hunter2==",
        "sslkey=hunter2",
        "X" * 3000 + "password=hunter2",
    ],
)
def test_a_password_is_hidden_where_no_variable_holds_it(text: str) -> None:
    assert "hunter2" not in redact(text)


def test_a_password_of_several_words_in_a_query_is_hidden_where_the_text_is_one_url() -> None:
    url = "postgresql://db.example/fed?user=a&password=my 'hunter2' words&sslmode=require"
    assert redact_url(url) == "postgresql://db.example/fed?user=a&password=***&sslmode=require"


def test_a_password_that_is_taken_for_a_hosts_name_is_hidden_in_small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:Hunter2@mlflow.example")
    assert redact("no address of hunter2 is known") == "no address of *** is known"


def test_a_user_name_without_a_password_is_not_hidden_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://fedrounds@mlflow.example")
    assert redact("fedrounds: the run stopped") == "fedrounds: the run stopped"


@pytest.mark.parametrize("part", ["A", "secret", "a:/", "password='", "password ", "authorization:", "%40", "@", "?a="])
def test_a_long_text_is_redacted(part: str) -> None:
    assert redact(part * (200_000 // len(part)))


def test_long_words_of_other_errors_are_shortened() -> None:
    assert (
        one_line(ValueError("bad " + "A" * 200_000 + " end"))
        == f"ValueError: bad {'A' * 100}... (200000 characters) end"
    )


@pytest.mark.parametrize(
    ("variable", "value", "secret"),
    [
        ("PREFECT_API_AUTH_STRING", "admin:hunter2 x", "hunter2 x"),
        ("MLFLOW_TRACKING_PASSWORD", "hunter2 'x'", "hunter2 'x'"),
        ("FEDROUNDS_DATABASE_URL", "postgresql://admin:hunter%202@db/fed", "hunter 2"),
        ("FEDROUNDS_DATABASE_URL", "postgresql://db/fed?user=a&password=hunter2", "hunter2"),
        ("https_proxy", "http://me:hunter2@proxy:3128", "hunter2"),
        ("https_proxy", "me:hunter2@proxy:3128", "hunter2"),
        ("https_proxy", "me%3ahunter2%40proxy", "hunter2"),
        ("FEDROUNDS_DATABASE_URL", "postgresql://admin:hunt@hunter2@db/fed", "hunter2"),
        ("MLFLOW_TRACKING_URI", "http://admin:hunter2/x@mlflow.example", "hunter2"),
        ("FEDROUNDS_BLOBS_URL", "az://c/x?sv=1&sig=hunter2", "hunter2"),
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
        "MLflow has no models:/heart@champion and no s3://bucket/a@b/blobs",
        "write to help@example.org: the key=3, sig=4 and model.key: 'x' stay, as `pass` does",
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
