"""Settings of dataprep: those that every service has."""

from __future__ import annotations

from finery_common.settings import ServiceSettings


class DataprepSettings(ServiceSettings):
    """Nothing of its own so far."""
