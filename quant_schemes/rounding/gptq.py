"""gptq: codes column by column, each column's error made good by the columns that follow.

The error is that of the layer's output on calibration text, tr((T - W') H (T - W')^T) with H the
mean of x x^T. T = W C^T H^-1, where C is the mean of x y^T for the inputs y that the layer had in
the original model: what W' does to the inputs x that quantized layers make shall equal what W did
to y. Without C, T is W. In order:
1. the grid of each group from the search of mse.py, columns weighed by H's diagonal;
2. codes as in GPTQ (Frantar et al., 2022): columns by decreasing H[j, j] ("activation order", the
   groups stay contiguous), each error e = (t_j - w'_j) / U[j, j] carried on as e U[j, :], where U
   is the upper Cholesky factor of H^-1;
3. rounds in which each group's scale and bias, then each code, take their best value given all
   others (coordinate descent); no step raises the error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import BLOCK, WeightFormat
from qcc.quant_schemes.packing import Array, Grid, Quantized
from qcc.quant_schemes.rounding import grid, mse
from qcc.quant_schemes.rounding.method import Inputs, Method

DAMPING = 0.01  # of the mean of H's diagonal, added to it
SEGMENT = 128  # columns whose errors are carried on together
ROUNDS = 3  # of coordinate descent
Tensor = Any


def quantize(weights: Array, fmt: WeightFormat, inputs: Inputs | None = None) -> Quantized:
    """Codes and grid of f32[n, k] for the inputs of the layer; on a GPU where torch has one.

    Raises:
        SchemeError: torch is not installed.
    """
    assert inputs is not None, "gptq needs the inputs of the layer"
    torch = _torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        hessian = torch.from_numpy(inputs.hessian.astype(np.float64)).to(device)
        added = DAMPING * hessian.diagonal().mean()
        damped = hessian + torch.eye(
            len(hessian), dtype=torch.float64, device=device
        ) * added.clamp(min=1e-12)
        target = torch.from_numpy(np.ascontiguousarray(weights, np.float32)).to(device)
        if inputs.cross is not None:
            cross = torch.from_numpy(inputs.cross.astype(np.float64)).to(device)
            right = target.double() @ (cross + damped - hessian).T
            target = torch.linalg.solve(damped, right.T).T.float().contiguous()
        importance = damped.diagonal().float().cpu().numpy()
        found = mse.search_grid(target.cpu().numpy(), fmt, importance)
        state = _State(torch, target, found, fmt, damped)
        state.propagate()
        if fmt.group != "tensor":
            for _ in range(ROUNDS):
                state.descend()
        return state.result()


def _torch() -> Any:
    try:
        import torch
    except ImportError as err:
        raise SchemeError("--method gptq needs torch: pip install 'qcc[calibrate]'") from err
    return torch


class _State:
    """A weight under way: its target, its codes and its grid, as torch tensors [n, ...]."""

    def __init__(
        self, torch: Any, target: Tensor, found: Grid, fmt: WeightFormat, hessian: Tensor
    ) -> None:
        self.torch, self.target, self.fmt, self.found = torch, target, fmt, found
        self.hessian = hessian
        self.n, self.k = target.shape
        self.size = fmt.group_size(self.k)
        self.affine = fmt.grid == "asymmetric"
        self.codes = torch.zeros_like(target)
        self.scale, self.bias = (self._tensor(x).clone() for x in found.numbers(fmt))
        if fmt.two_level:
            assert isinstance(fmt.group, int)
            each = BLOCK // fmt.group

            def of_groups(blocks: Array | None) -> Tensor:
                wide = self._tensor(np.asarray(blocks, np.float32)).repeat_interleave(each, 1)
                return wide[:, : self.scale.shape[1]]

            self.unit = of_groups(found.block_scale)
            if self.affine:
                self.bias_unit = of_groups(found.block_bias)

    def _tensor(self, array: Array) -> Tensor:
        return self.torch.from_numpy(np.array(array, np.float32)).to(self.target.device)

    def _nearest(self, w: Tensor, group: Tensor | int) -> tuple[Tensor, Tensor]:
        """(codes, their weights), f32[n], of one column."""
        scale, bias = self.scale[:, group], self.bias[:, group]
        q = ((w - bias) / self.torch.where(scale == 0, 1, scale)).round_()
        q = self.torch.where(scale == 0, 0, q.clamp_(0, self.fmt.top_code))
        return q, q * scale + bias

    def propagate(self) -> None:
        """Choose the codes on the grid as it is, columns by decreasing importance."""
        torch = self.torch
        order = torch.argsort(self.hessian.diagonal(), descending=True, stable=True)
        factor = torch.linalg.cholesky(self.hessian[order][:, order])
        inverse = torch.cholesky_inverse(factor)
        upper = torch.linalg.cholesky(inverse, upper=True).float()  # U^T U = H^-1
        w = self.target[:, order].clone()
        groups = (order // self.size).tolist()
        for start in range(0, self.k, SEGMENT):
            stop = min(start + SEGMENT, self.k)
            errors = torch.empty((self.n, stop - start), device=w.device)
            for j in range(start, stop):
                q, w_q = self._nearest(w[:, j], groups[j])
                self.codes[:, order[j]] = q
                e = (w[:, j] - w_q) / upper[j, j]
                w[:, j:stop] -= e[:, None] * upper[j, j:stop]
                errors[:, j - start] = e
            w[:, stop:] -= errors @ upper[start:stop, stop:]

    def descend(self) -> None:
        """One pass over the columns; scale and bias of each group first."""
        h = self.hessian.float()
        w = self._weights()
        gradient = (self.target - w) @ h  # [n, k], (T - W') H
        for start, stop in self._segments():
            group = start // self.size
            before = w[:, start:].clone() if start % self.size == 0 else None
            if before is not None and self.fmt.grid != "zero_point":
                end = min(start + self.size, self.k)
                change = self._regrid(group, start, end, gradient[:, start:end], h)
                w[:, start:end] += change
                gradient[:, start:] -= change @ h[start:end, start:]
            changes = self.torch.zeros((self.n, stop - start), device=w.device)
            for j in range(start, stop):
                q, w_q = self._nearest(w[:, j] + gradient[:, j] / h[j, j], group)
                change = w_q - w[:, j]
                self.codes[:, j], w[:, j] = q, w_q
                changes[:, j - start] = change
                gradient[:, j:stop] -= change[:, None] * h[j, j:stop]
            gradient[:, stop:] -= changes @ h[start:stop, stop:]

    def _segments(self) -> list[tuple[int, int]]:
        """Runs of at most SEGMENT columns within one group."""
        step = min(self.size, SEGMENT)
        found = []
        for first in range(0, self.k, self.size):
            last = min(first + self.size, self.k)
            found += [(at, min(at + step, last)) for at in range(first, last, step)]
        return found

    def _weights(self) -> Tensor:
        scale = self.scale.repeat_interleave(self.size, 1)[:, : self.k]
        return self.codes * scale + self.bias.repeat_interleave(self.size, 1)[:, : self.k]

    def _regrid(self, group: int, start: int, end: int, gradient: Tensor, h: Tensor) -> Tensor:
        """Scale and bias of one group by least squares, as stored; the weights' change [n, size].

        A row for which rounding to what can be stored takes more than it gives stays as it is.
        """
        torch = self.torch
        zero = 0 if self.affine else self.fmt.zero_code
        own = h[start:end, start:end]
        q = self.codes[:, start:end] - zero
        hq = q @ own
        ss, gs = (q * hq).sum(1), (q * gradient).sum(1)
        scale, bias = self.scale[:, group], self.bias[:, group]
        tiny = torch.finfo(torch.float32).tiny
        if self.affine:
            sb, bb, gb = hq.sum(1), own.sum(), gradient.sum(1)
            free = ss * bb - sb * sb
            flat = free <= 1e-5 * ss * bb
            step = torch.where(flat, 0, (gs * bb - sb * gb) / torch.where(flat, 1, free))
            new_scale = self._held(scale + step, group, of_bias=False)
            shift = (gb - (new_scale - scale) * sb) / bb.clamp(min=tiny)
            new_bias = self._held(bias + shift, group, of_bias=True)
        else:
            new_scale = self._held(scale + gs / ss.clamp(min=tiny), group, of_bias=False)
            new_bias = -zero * new_scale
        change = (new_scale - scale)[:, None] * q
        if self.affine:
            change += (new_bias - bias)[:, None]
        gain = (change * (2 * gradient - change @ own)).sum(1)
        better = (gain > 0) & torch.isfinite(new_scale) & torch.isfinite(new_bias)
        self.scale[:, group] = torch.where(better, new_scale, scale)
        self.bias[:, group] = torch.where(better, new_bias, bias)
        return torch.where(better[:, None], change, 0)

    def _held(self, numbers: Tensor, group: int, of_bias: bool) -> Tensor:
        """Scales or biases of a group, f32[n], rounded to what the format can store."""
        torch, fmt = self.torch, self.fmt
        if fmt.scale_bits is None:
            return numbers.to(getattr(torch, fmt.dtype)).float()
        unit = self.bias_unit[:, group] if of_bias else self.unit[:, group]
        return self._code(numbers, unit) * unit

    def _code(self, numbers: Tensor, unit: Tensor) -> Tensor:
        """Codes of two-level scales or biases, less the code of 0."""
        assert self.fmt.scale_bits is not None
        zero, top = self.fmt.scale_zero, 2**self.fmt.scale_bits - 1
        safe = self.torch.where(unit == 0, 1, unit)
        return (numbers / safe).round().clamp(-zero, top - zero)

    def result(self) -> Quantized:
        """Codes and grid as numpy arrays."""
        fmt, found = self.fmt, self.found
        codes = self.codes.to(self.torch.uint8).cpu().numpy()

        def kept(numbers: Tensor) -> Array:
            return grid.as_dtype(numbers.cpu().numpy(), fmt.dtype)

        if fmt.group == "tensor" or fmt.grid == "zero_point":
            return Quantized(codes, found)
        if not fmt.two_level:
            return Quantized(
                codes, Grid(kept(self.scale), kept(self.bias) if self.affine else None)
            )

        def coded(numbers: Tensor, unit: Tensor) -> Array:
            found_codes = self._code(numbers, unit) + fmt.scale_zero
            return found_codes.to(self.torch.uint8).cpu().numpy()  # type: ignore[no-any-return]

        bias = coded(self.bias, self.bias_unit) if self.affine else None
        scale = coded(self.scale, self.unit)
        return Quantized(codes, Grid(scale, bias, None, found.block_scale, found.block_bias))


METHOD = Method(
    "GPTQ in activation order, then coordinate descent", quantize, needs_text=True, original=True
)
