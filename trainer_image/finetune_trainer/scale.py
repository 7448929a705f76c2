"""What is split between the ranks, and how many tokens one computes at once: footprints and room → a choice. Pure.

Called by `assembly` before the model is loaded, and by `finetune plan --model`. A choice changes speed and memory,
never the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from finetune_api.run import RunConfig
from finetune_trainer.footprint import Footprint, Offload, Setting, Strategy, Way, footprint, gib
from finetune_trainer.model_size import ModelSize

# Beyond some hundred tokens a CPU's matrix products hardly get faster while memory grows; GPUs are filled by thousands.
_ENOUGH_TOKENS = {"cpu": 768, "cuda": 16384}
_COMFORT_TOKENS = {"cpu": 256, "cuda": 4096}  # with less, something is worth splitting or recomputing
_USABLE = 0.85  # of what is free: fragments, libraries, and what the estimate doesn't know
_MOST_RANKS = 1024
_SPEED: tuple[tuple[Strategy, Offload], ...] = (
    ("ddp", "none"),
    ("zero2", "none"),
    ("fsdp", "none"),
    ("zero2", "optimizer"),
    ("zero3", "optimizer"),
    ("zero3", "parameters"),
)


@dataclass(frozen=True)
class Room:
    """Free bytes of one rank: of its device, and of the host beside a GPU."""

    device: Literal["cpu", "cuda"]
    free: int
    host: int

    @property
    def usable(self) -> int:
        return int(self.free * _USABLE)


@dataclass(frozen=True)
class Asked:
    """What the user says; `longest` row in tokens. `tokens`: computed at once, where microBatchSize says so.
    `before`: the strategy is that of the checkpoint."""

    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"]
    offload: Offload
    recompute: Literal["auto", "always", "never"]
    longest: int
    tokens: int | None = None
    before: bool = False

    @property
    def least(self) -> int:
        return self.tokens or self.longest


@dataclass(frozen=True)
class Choice:
    """`table` is for the decision log; `reason` says why it isn't the fastest way."""

    way: Way
    reason: str
    tokens: int
    tokens_reason: str
    footprint: Footprint
    table: str


def asked(run: RunConfig, longest: int) -> Asked:
    micro = run.training.micro_batch_size
    return Asked(
        run.world.strategy,
        run.world.offload,
        run.training.activation_checkpointing,
        longest,
        micro * run.data.max_sequence_length if isinstance(micro, int) else None,
    )


def setting(run: RunConfig, *, half: bool) -> Setting:
    """`half`: products are in bfloat16, and so is a frozen base."""
    full = run.method == "full"
    stored = 2 if half and not full else 4
    lora = run.lora
    whole = lora is not None and (lora.dora or lora.init != "default" or bool(lora.added_tokens))
    return Setting(run.world.size, run.training.optimizer, stored, half, full, run.model.quantization, whole)


class TooLittleMemory(ValueError):
    """Nothing that may be chosen fits; the message has figures and a remedy."""


def choose(asked: Asked, size: ModelSize, setting: Setting, room: Room) -> Choice:
    """The fastest way that fits with a comfortable micro-batch, else with the longest row alone.

    Raises TooLittleMemory where auto finds none. What a user names is tried, unless its weights, gradients and
    moments alone are too much.
    """
    ways = candidates(asked, setting, room)
    comfortable = asked.tokens or max(asked.longest, _COMFORT_TOKENS[room.device])
    tried: list[str] = []
    for tokens, way in _in_order(ways, comfortable, asked.least):
        needs = footprint(size, setting, way)
        if fits(needs, tokens, room):
            return _choice(asked, way, needs, room, tried)
        tried.append(f"{way} needs {gib(needs.total(tokens))}")
    last = ways[-1]
    needs = footprint(size, setting, last)
    if asked.strategy != "auto" and needs.fixed <= room.free:
        return _choice(asked, last, needs, room, tried)
    raise TooLittleMemory(_too_little(asked, size, setting, room, last, needs))


def candidates(asked: Asked, setting: Setting, room: Room) -> list[Way]:
    """Fastest first. On the CPU offloading gains nothing: it is the same memory."""
    recompute = {"auto": (False, True), "always": (True,), "never": (False,)}[asked.recompute]
    if asked.strategy != "auto":
        return [Way(asked.strategy, asked.offload, again) for again in recompute]
    pairs = [pair for pair in _SPEED if setting.carries(pair[0])]
    if asked.offload != "none":
        pairs = [pair for pair in pairs if pair[1] in (asked.offload, "parameters")]
    elif room.device == "cpu":
        pairs = [pair for pair in pairs if pair[1] == "none"]
    if setting.ranks == 1:
        pairs = [pair for pair in pairs if pair[0] == "ddp" or pair[1] != "none"]
    plain = [Way(strategy, away, again) for again in recompute for strategy, away in pairs if away == "none"]
    offloaded = recompute if asked.offload != "none" else recompute[-1:]
    return plain + [Way(strategy, away, again) for again in offloaded for strategy, away in pairs if away != "none"]


def fits(needs: Footprint, tokens: int, room: Room) -> bool:
    return needs.total(tokens) <= room.usable and (room.device == "cpu" or needs.host <= room.host)


def tokens_at_once(needs: Footprint, room: Room, longest: int) -> int:
    """What helps, if it fits, and at least the longest row."""
    fitting = (room.usable - needs.fixed) // max(1, needs.token)
    return max(longest, min(_ENOUGH_TOKENS[room.device], fitting))


def _in_order(ways: list[Way], comfortable: int, least: int) -> list[tuple[int, Way]]:
    return [(comfortable, way) for way in ways] + ([(least, way) for way in ways] if least < comfortable else [])


def _choice(asked: Asked, way: Way, needs: Footprint, room: Room, tried: list[str]) -> Choice:
    tokens = asked.tokens or tokens_at_once(needs, room, asked.longest)
    room_text = f"{gib(room.usable)} of {gib(room.free)} free"
    if asked.strategy != "auto":
        reason = "the checkpoint was computed with it" if asked.before else "distribution.strategy says so"
    elif not tried:
        reason = f"it fits: {gib(needs.total(tokens))} of {gib(room.usable)}, and nothing is faster"
    else:
        reason = f"{tried[-1]}, and {room_text} may be used"
    return Choice(
        way=way,
        reason=reason,
        tokens=tokens,
        tokens_reason="training.microBatchSize says so"
        if asked.tokens
        else f"a token keeps about {needs.token / 2**20:.2f} MiB, {room_text} may be used, and the longest "
        f"row has {asked.longest} tokens",
        footprint=needs,
        table=f"{needs.table(tokens)}: {gib(needs.total(tokens))} in all, room {room_text}",
    )


def _too_little(asked: Asked, size: ModelSize, setting: Setting, room: Room, way: Way, needs: Footprint) -> str:
    more = 2 * setting.ranks
    while more <= _MOST_RANKS:
        if fits(footprint(size, replace(setting, ranks=more), Way("fsdp", recompute=True)), asked.least, room):
            break
        more *= 2
    enough = f"{more} processes of this size with strategy fsdp would do. " if more <= _MOST_RANKS else ""
    return (
        f"the model doesn't fit: even {way} needs {needs.table(asked.least)}, "
        f"{gib(needs.total(asked.least))} in all for each of {setting.ranks} processes, but {gib(room.usable)} of "
        f"{gib(room.free)} free may be used. {enough}Take "
        f"{'method lora, ' if setting.full else ''}more processes, more memory for each, or a smaller "
        f"dataset.maxSequenceLength (the longest row has {asked.longest} tokens)"
    )
