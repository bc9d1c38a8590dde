"""The sizes that a library is built for, from the config's limits and the user's flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qcc.compiler.config import ModelConfig
from qcc.compiler.maxima import INT32_MAX
from qcc.runtime.errors import QccError

DEFAULT_CONTEXT = 8192
DEFAULT_BATCH = 4
# The memory plan and the kernels grow with both: what is beyond is built and never loads.
MAX_BATCH = 256
MAX_CHUNK = 65536
# A rope of these types reaches the original positions times its factor.
SCALED_ROPES = ("dynamic", "linear", "yarn")


@dataclass(frozen=True)
class Sizes:
    """Exactly one of context_window_size and sliding_window_size is positive, the other -1.

    All in tokens, but for max_batch_size (sequences). They bound the memory plan.
    """

    context_window_size: int
    sliding_window_size: int
    attention_sink_size: int
    prefill_chunk_size: int
    max_batch_size: int

    @property
    def max_positions(self) -> int:
        """The most tokens that a sequence holds in the cache."""
        return max(self.context_window_size, self.sliding_window_size)

    def as_dict(self) -> dict[str, int]:
        """The fields by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class SizeFlags:
    """What the user asked for; None: not said."""

    context_window: int | None = None
    sliding_window: int | None = None
    attention_sink: int | None = None
    prefill_chunk: int | None = None
    max_batch: int | None = None


def positions_limit(config: ModelConfig) -> int:
    """The greatest context window: the trained positions, or what a scaled rope reaches."""
    trained, rope = config.max_position_embeddings, config.rope
    if rope.rope_type not in SCALED_ROPES:
        return trained
    # Checkpoints write max_position_embeddings before the scaling (Qwen2.5's recipe) or after it.
    reach = int(rope.original_max_position_embeddings * rope.factor)
    return min(max(trained, reach), INT32_MAX)


def context_note(flags: SizeFlags, sizes: Sizes) -> str | None:
    """What to tell a user whose --context-window has no effect; None: it has, or was not given."""
    if flags.context_window is None or sizes.sliding_window_size < 0:
        return None
    return (
        f"--context-window {flags.context_window} is not needed: with the sliding window of "
        f"{sizes.sliding_window_size} tokens a text may have any length"
    )


def check_flags(flags: SizeFlags) -> None:
    """Refuse sizes that no model can have.

    Raises:
        QccError: names the flag.
    """
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        minimum = 0 if field.name == "attention_sink" else 1
        if value is not None and value < minimum:
            raise QccError(f"--{field.name.replace('_', '-')} {value}: must be {minimum} or more")
    for flag, value, maximum in (
        ("--max-batch", flags.max_batch, MAX_BATCH),
        ("--prefill-chunk", flags.prefill_chunk, MAX_CHUNK),
    ):
        if value is not None and value > maximum:
            raise QccError(f"{flag} {value}: must be {maximum} or less")


def choose_sizes(config: ModelConfig, flags: SizeFlags, default_chunk: int) -> Sizes:
    """Resolve flags against the model's limits and each other.

    Raises:
        QccError: a size that is not positive, beyond the model's limit, or in conflict.
    """
    check_flags(flags)
    trained = config.max_position_embeddings
    limit = positions_limit(config)
    if flags.context_window is not None and flags.context_window > limit:
        raise QccError(
            f"--context-window {flags.context_window} exceeds the {limit} positions that the model "
            f"has (max_position_embeddings {trained}); use {limit} or less"
        )
    context = flags.context_window or min(trained, DEFAULT_CONTEXT)
    window = flags.sliding_window or config.sliding_window
    if (
        flags.sliding_window
        and config.sliding_window
        and flags.sliding_window > config.sliding_window
    ):
        raise QccError(
            f"--sliding-window {flags.sliding_window} exceeds the window of "
            f"{config.sliding_window} that the model was trained with"
        )
    # A window that the context never fills is full attention.
    sliding = window is not None and window < (flags.context_window or limit)
    sink = flags.attention_sink or 0
    if sink and not sliding:
        raise QccError("--attention-sink needs a sliding window (--sliding-window N)")
    positions = window if sliding and window is not None else context
    if sink >= positions:
        raise QccError(f"--attention-sink {sink} must be below the sliding window {positions}")
    chunk = flags.prefill_chunk or min(positions, default_chunk)
    if chunk > context and not sliding:
        raise QccError(f"--prefill-chunk {chunk} exceeds the context window {context}")
    return Sizes(
        context_window_size=-1 if sliding else context,
        sliding_window_size=positions if sliding else -1,
        attention_sink_size=sink if sliding else -1,
        prefill_chunk_size=chunk,
        max_batch_size=flags.max_batch or DEFAULT_BATCH,
    )
