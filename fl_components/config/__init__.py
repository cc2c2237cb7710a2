"""The configuration: a whole experiment as one frozen tree of rules."""

from fedrounds.fl_components.config.files import (
    PATHS,
    is_moved,
    load_config,
    load_fields,
    parse_axis,
    parse_config,
    source_folder,
    with_absolute_paths,
    with_value,
)
from fedrounds.fl_components.config.messages import RENAMED
from fedrounds.fl_components.config.tree import (
    NAME,
    FederationConfig,
    check_claims,
    check_cohort,
    check_compression,
    config_digest,
    schema,
)

__all__ = [
    "NAME",
    "PATHS",
    "RENAMED",
    "FederationConfig",
    "check_claims",
    "check_cohort",
    "check_compression",
    "config_digest",
    "is_moved",
    "load_config",
    "load_fields",
    "parse_axis",
    "parse_config",
    "schema",
    "source_folder",
    "with_absolute_paths",
    "with_value",
]
