"""The sizes of layers that keep a state of fixed size instead of keys and values of every token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StateTensor:
    """What a sequence keeps of its past in one place of the model: f32[*shape], zeros at first."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DeltaConfig:
    """Layers with a matrix for each head as their state: those that `layers` marks.

    A key head serves value_heads / key_heads value heads with neighbouring numbers. A short
    convolution over the last `conv_kernel` tokens goes through q, k and v before; with `conv_bias`
    it adds numbers. What a token writes is its value less what the state knows of its key, where
    `corrects` (gated delta networks), else its value (Mamba 2). It stands in the place of
    attention, or `beside` it.
    """

    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    layers: tuple[bool, ...]
    corrects: bool = True
    beside: bool = False
    conv_bias: bool = False

    @property
    def keys(self) -> int:
        """Numbers of all heads' keys of a token."""
        return self.key_heads * self.key_head_dim

    @property
    def values(self) -> int:
        """Numbers of all heads' values of a token."""
        return self.value_heads * self.value_head_dim

    @property
    def channels(self) -> int:
        """What goes through the convolution: q, k, v."""
        return 2 * self.keys + self.values

    @property
    def states(self) -> tuple[StateTensor, ...]:
        """Two for each of its layers, in their order.

        The last inputs of the convolution, oldest first, and each value head's matrix from keys to
        values.
        """
        head = self.value_heads, self.key_head_dim, self.value_head_dim
        return tuple(
            StateTensor(f"layers.{layer}.{name}", shape)
            for layer, marked in enumerate(self.layers)
            if marked
            for name, shape in (("conv", (self.conv_kernel - 1, self.channels)), ("delta", head))
        )


@dataclass(frozen=True)
class MambaConfig:
    """What Mamba's layers have besides the sizes of their states.

    `multipliers` are those of what is projected to z, x, B, C and dt. `norm` is that of the output,
    "before" or "after" its gate, over each group of heads; "" for none. `scales` multiply, in this
    order, Mamba's output, attention's input and output, an MLP's gate and output.
    """

    multipliers: tuple[float, ...] = (1.0,) * 5
    least_step: float = 0.0
    largest_step: float | None = None
    norm: str = ""
    out_bias: bool = False
    scales: tuple[float, ...] = (1.0,) * 5
