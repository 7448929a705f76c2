"""Defines the events about how ranks work together: their speed and the network between them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.base import LenientModel


class NetworkEvent(LenientModel):
    """Reports the bandwidth between nodes, as measured at the start."""

    type: Literal["network"] = "network"
    time: float
    bytes_per_second: float
    backend: str
    warning: str = Field(default="", description="Set if the strategy needs a faster network.")


class StragglerEvent(LenientModel):
    """Reports that a rank stays slower than the others, or no longer does."""

    type: Literal["straggler"] = "straggler"
    time: float
    step: int
    rank: int
    node: int
    ratio: float = Field(description="Its time per token divided by the median of the other ranks.")
    ended: bool = Field(default=False, description="Whether the rank is no longer slower than the others.")


class RankSeconds(LenientModel):
    """Compares the time that each rank needed for its own part of a step, before they met."""

    fastest: float
    slowest: float
    slowest_rank: int
