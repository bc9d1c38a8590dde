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
Codes of mxfp4 are no multiples of a scale: they are those of step 1.
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
        damped = hessian.clone()
        damped.diagonal().add_(added.clamp(min=1e-12))
        order = torch.argsort(damped.diagonal(), descending=True, stable=True)
        upper = inverse_factor(torch, damped[order][:, order])
        target = torch.from_numpy(np.ascontiguousarray(weights, np.float32)).to(device)
        if inputs.cross is not None:
            cross = torch.from_numpy(inputs.cross.astype(np.float64)).to(device)
            right = (cross + damped - hessian)[order] @ target.double().T  # [k, n], in order
            target = torch.empty_like(target)  # the caller's numbers stay
            target[:, order] = (upper.T @ (upper @ right)).T.float()
        importance = damped.diagonal().float().cpu().numpy()
        if fmt.grid == "mxfp4":
            return mse.search(target.cpu().numpy(), fmt, importance)
        found = mse.search_grid(target.cpu().numpy(), fmt, importance)
        state = _State(torch, target, found, fmt, damped)
        state.propagate(order, upper.float())
        if fmt.group != "tensor":
            for _ in range(ROUNDS):
                state.descend()
        return state.result()


def inverse_factor(torch: Any, hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, f64[k, k].

    H = R R^T with R upper triangular, a Cholesky factor from the last column on; U is R^-1.
    """
    flipped = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(flipped, identity, upper=True)


def _torch() -> Any:
    try:
        import torch
    except ImportError as err:
        raise SchemeError("--method gptq needs torch: pip install 'qcc[calibrate]'") from err
    return torch


class _State:
    """A weight under way: its target and codes f32[k, n], its grid f32[groups, n], in torch.

    Columns first, so that what one step touches lies together.
    """

    def __init__(
        self, torch: Any, target: Tensor, found: Grid, fmt: WeightFormat, hessian: Tensor
    ) -> None:
        self.torch, self.fmt, self.found, self.hessian = torch, fmt, found, hessian
        self.target = target.T.contiguous()
        self.k, self.n = self.target.shape
        self.size = fmt.group_size(self.k)
        self.affine = fmt.grid == "asymmetric"
        self.codes = torch.zeros_like(self.target)
        self.scale, self.bias = (
            self._tensor(x).expand(-1, self.n).clone() for x in found.numbers(fmt)
        )
        if fmt.two_level:
            assert isinstance(fmt.group, int)
            each = BLOCK // fmt.group

            def of_groups(blocks: Array | None) -> Tensor:
                assert blocks is not None
                return self._tensor(blocks).repeat_interleave(each, 0)[: len(self.scale)]

            self.unit = of_groups(found.block_scale)
            if self.affine:
                self.bias_unit = of_groups(found.block_bias)

    def _tensor(self, array: Array) -> Tensor:
        """f32 of an array, its axes exchanged."""
        columns = np.ascontiguousarray(array.astype(np.float32).T)
        return self.torch.from_numpy(columns).to(self.target.device)

    def _nearest(self, w: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """(codes, their weights), f32[n], of one column."""
        scale, bias = self.scale[group], self.bias[group]
        q = ((w - bias) / self.torch.where(scale == 0, 1, scale)).round_()
        q = self.torch.where(scale == 0, 0, q.clamp_(0, self.fmt.top_code))
        return q, self.torch.addcmul(bias, q, scale)

    def propagate(self, order: Tensor, upper: Tensor) -> None:
        """Choose the codes on the grid as it is, columns in `order`; `upper` is U of that order."""
        torch = self.torch
        w = self.target[order]
        places = order.tolist()
        for start in range(0, self.k, SEGMENT):
            stop = min(start + SEGMENT, self.k)
            errors = torch.empty((stop - start, self.n), device=w.device)
            for j in range(start, stop):
                q, w_q = self._nearest(w[j], places[j] // self.size)
                self.codes[places[j]] = q
                e = errors[j - start]
                torch.sub(w[j], w_q, out=e).div_(upper[j, j])
                w[j + 1 : stop].addr_(upper[j, j + 1 : stop], e, alpha=-1)
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)

    def descend(self) -> None:
        """One pass over the columns; scale and bias of each group first."""
        torch, h = self.torch, self.hessian.float()
        diagonal = h.diagonal().tolist()
        w = self._weights()
        gradient = h @ (self.target - w)  # [k, n], H (T - W')^T
        for start, stop in self._segments():
            group = start // self.size
            if start % self.size == 0 and self.fmt.grid != "zero_point":
                end = min(start + self.size, self.k)
                change = self._regrid(group, start, end, gradient[start:end], h)
                w[start:end] += change
                gradient[start:].addmm_(h[start:, start:end], change, alpha=-1)
            changes = torch.empty((stop - start, self.n), device=w.device)
            for j in range(start, stop):
                q, w_q = self._nearest(torch.add(w[j], gradient[j], alpha=1 / diagonal[j]), group)
                change = changes[j - start]
                torch.sub(w_q, w[j], out=change)
                self.codes[j], w[j] = q, w_q
                gradient[j + 1 : stop].addr_(h[j, j + 1 : stop], change, alpha=-1)
            gradient[stop:].addmm_(h[stop:, start:stop], changes, alpha=-1)

    def _segments(self) -> list[tuple[int, int]]:
        """Runs of at most SEGMENT columns within one group."""
        step = min(self.size, SEGMENT)
        found = []
        for first in range(0, self.k, self.size):
            last = min(first + self.size, self.k)
            found += [(at, min(at + step, last)) for at in range(first, last, step)]
        return found

    def _weights(self) -> Tensor:
        scale = self.scale.repeat_interleave(self.size, 0)[: self.k]
        return self.codes * scale + self.bias.repeat_interleave(self.size, 0)[: self.k]

    def _regrid(self, group: int, start: int, end: int, gradient: Tensor, h: Tensor) -> Tensor:
        """Scale and bias of one group by least squares, as stored; the weights' change [size, n].

        A row for which rounding to what can be stored takes more than it gives stays as it is.
        """
        torch = self.torch
        zero = 0 if self.affine else self.fmt.zero_code
        own = h[start:end, start:end]
        q = self.codes[start:end] - zero
        hq = own @ q
        ss, gs = (q * hq).sum(0), (q * gradient).sum(0)
        scale, bias = self.scale[group], self.bias[group]
        tiny = torch.finfo(torch.float32).tiny
        if self.affine:
            sb, bb, gb = hq.sum(0), own.sum(), gradient.sum(0)
            free = ss * bb - sb * sb
            flat = free <= 1e-5 * ss * bb
            step = torch.where(flat, 0, (gs * bb - sb * gb) / torch.where(flat, 1, free))
            new_scale = self._held(scale + step, group, of_bias=False)
            shift = (gb - (new_scale - scale) * sb) / bb.clamp(min=tiny)
            new_bias = self._held(bias + shift, group, of_bias=True)
        else:
            new_scale = self._held(scale + gs / ss.clamp(min=tiny), group, of_bias=False)
            new_bias = -zero * new_scale
        change = (new_scale - scale) * q
        if self.affine:
            change += new_bias - bias
        gain = (change * (2 * gradient - own @ change)).sum(0)
        better = (gain > 0) & torch.isfinite(new_scale) & torch.isfinite(new_bias)
        self.scale[group] = torch.where(better, new_scale, scale)
        self.bias[group] = torch.where(better, new_bias, bias)
        return torch.where(better, change, 0)

    def _held(self, numbers: Tensor, group: int, of_bias: bool) -> Tensor:
        """Scales or biases of a group, f32[n], rounded to what the format can store."""
        torch, fmt = self.torch, self.fmt
        if fmt.scale_bits is None:
            return numbers.to(getattr(torch, fmt.dtype)).float()
        unit = self.bias_unit[group] if of_bias else self.unit[group]
        return self._code(numbers, unit) * unit

    def _code(self, numbers: Tensor, unit: Tensor) -> Tensor:
        """Codes of two-level scales or biases, less the code of 0."""
        assert self.fmt.scale_bits is not None
        zero, top = self.fmt.scale_zero, 2**self.fmt.scale_bits - 1
        safe = self.torch.where(unit == 0, 1, unit)
        return (numbers / safe).round().clamp(-zero, top - zero)

    def _rows(self, columns: Tensor) -> Array:
        """A tensor [x, n] as an array [n, x]."""
        return np.ascontiguousarray(columns.cpu().numpy().T)

    def result(self) -> Quantized:
        """Codes and grid as numpy arrays."""
        fmt, found = self.fmt, self.found
        codes = self._rows(self.codes.to(self.torch.uint8))

        def kept(numbers: Tensor) -> Array:
            return grid.as_dtype(self._rows(numbers), fmt.dtype)

        if fmt.group == "tensor" or fmt.grid == "zero_point":
            return Quantized(codes, found)
        if not fmt.two_level:
            return Quantized(
                codes, Grid(kept(self.scale), kept(self.bias) if self.affine else None)
            )

        def coded(numbers: Tensor, unit: Tensor) -> Array:
            return self._rows((self._code(numbers, unit) + fmt.scale_zero).to(self.torch.uint8))

        bias = coded(self.bias, self.bias_unit) if self.affine else None
        scale = coded(self.scale, self.unit)
        return Quantized(codes, Grid(scale, bias, None, found.block_scale, found.block_bias))


METHOD = Method(
    "GPTQ in activation order, then coordinate descent", quantize, needs_text=True, original=True
)
