"""What every privacy rule promises; a new rule is one line in CASES."""

from __future__ import annotations

import json

import pytest

from fl_components.privacy import NoPrivacy, PrivacySpend

CASES = [NoPrivacy()]


@pytest.mark.parametrize("rule", CASES, ids=repr)
class TestPrivacyRule:
    def test_its_event_can_be_kept_and_says_what_it_is(self, rule: NoPrivacy) -> None:
        event = rule.event()
        assert json.loads(json.dumps(event)) == event
        assert isinstance(event["kind"], str)
        assert rule.event() == event

    def test_an_epsilon_never_stands_alone(self, rule: NoPrivacy) -> None:
        for rounds in (0, 1, 1000):
            spend = rule.spend(rounds)
            named = (spend.delta, spend.unit, spend.neighbouring, spend.accountant)
            assert (spend.epsilon is None) == (None in named)


def test_no_privacy_claims_nothing() -> None:
    assert NoPrivacy().spend(10) == PrivacySpend(None, None, None, None, None)
    assert NoPrivacy().event() == {"kind": "none"}
