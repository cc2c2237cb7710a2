"""What is promised about the clients' data, and what it costs."""

from fl_components.privacy.none import NoPrivacy, PrivacySpend

Privacy = NoPrivacy

__all__ = ["NoPrivacy", "Privacy", "PrivacySpend"]
