"""What is promised about the clients' data, and what it costs."""

from typing import TYPE_CHECKING

from fedrounds.fl_components.privacy.central import AdaptiveClipping, AnyClipping, CentralPrivacy, FixedClipping
from fedrounds.fl_components.privacy.claim import Claim, ClaimContext, NoPrivacy, PrivacyRule, neighbouring_of
from fedrounds.fl_components.privacy.example_level import ExampleLevel, ExamplePrivacy
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Privacy = PrivacyRule
else:
    Privacy = union("privacy", NoPrivacy, CentralPrivacy)

__all__ = [
    "AdaptiveClipping",
    "AnyClipping",
    "CentralPrivacy",
    "Claim",
    "ClaimContext",
    "ExampleLevel",
    "ExamplePrivacy",
    "FixedClipping",
    "NoPrivacy",
    "Privacy",
    "PrivacyRule",
    "neighbouring_of",
]
