"""An account has one string form, and the order of the database."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.account import Account

NAMES = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=8)
ACCOUNTS = st.builds(Account, NAMES, st.none() | NAMES)


@given(ACCOUNTS)
def test_its_string_form_is_read_back(account: Account) -> None:
    assert Account.parse(str(account)) == account


@given(st.lists(ACCOUNTS, unique=True))
def test_accounts_are_ordered_by_their_code_points(accounts: list[Account]) -> None:
    assert [str(each) for each in sorted(accounts)] == sorted(map(str, accounts))


def test_a_template_comes_after_its_population_and_before_its_clients() -> None:
    population = Account("p")
    assert sorted([Account("p", "A"), population.template, population, Account("p", "0")]) == [
        population,
        population.template,
        Account("p", "0"),
        Account("p", "A"),
    ]
    assert population.template.is_template and not population.is_template and not Account("p", "A").is_template
