"""The settings class of each service."""

from __future__ import annotations

from finery_common.settings import ServiceSettings
from finery_converter.settings import ConverterSettings
from finery_dataprep.settings import DataprepSettings
from finery_gateway.settings import GatewaySettings
from finery_serving.settings import ServingSettings
from finery_trainer.settings import TrainerSettings

SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "dataprep": DataprepSettings,
    "trainer": TrainerSettings,
    "converter": ConverterSettings,
    "serving": ServingSettings,
}
