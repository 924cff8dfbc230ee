"""The two variants of a run: with the defects of StarCoder's training mended, or as it was trained.

Each defect is a switch of its own in the config, mended by default; a variant sets them all.
"""

import dataclasses
from typing import Any, Literal

from jaxcoder.config.schema import RunConfig

Variant = Literal["as_trained", "mended"]

SWITCHES = (
    "fim_clean_up",
    "fim_sentinels_as_text",
    "fim_replace_incomplete",
    "fim_drop_empty_pieces",
    "fim_transform_empty_tail",
    "pad_in_loss",
)
"""Fields of DataConfig that bring a defect of the original back when they are true."""


def with_variant(config: RunConfig, variant: Variant) -> RunConfig:
    """`config` with every switch set as the variant has it."""
    switches: dict[str, Any] = dict.fromkeys(SWITCHES, variant == "as_trained")
    data = dataclasses.replace(config.data, **switches)
    return dataclasses.replace(config, data=data)
