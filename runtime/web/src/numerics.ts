/**
 * float32 and float64 arithmetic that rounds where NumPy rounds, so that both choose one token.
 *
 * NumPy's exp of float32 is another function on each kind of processor; this is the one of x86-64
 * with AVX2 or AVX-512. Elsewhere it differs by an ulp, which moves a choice once in millions.
 */

const double = new Float64Array(1);
const halves = new Uint32Array(double.buffer);
const LOG2_E = Math.fround(1.44269504088896340736);
const LN2_HIGH = Math.fround(-6.93145752e-1);
const LN2_LOW = Math.fround(-1.42860677e-6);
// exp(r) = (P0 + P1 r + ... + P5 r^5) / (1 + Q1 r + Q2 r^2) for |r| <= ln(2) / 2.
const P0 = Math.fround(9.999999999980870924916e-1);
const P1 = Math.fround(7.257664613233124478488e-1);
const P2 = Math.fround(2.473615434895520810817e-1);
const P3 = Math.fround(5.114512081637298353406e-2);
const P4 = Math.fround(6.757896990527504603057e-3);
const P5 = Math.fround(5.082762527590693718096e-4);
const Q1 = Math.fround(-2.742335390411667452936e-1);
const Q2 = Math.fround(2.159509375685829852307e-2);
const HALVES = Float64Array.from({ length: 152 }, (_, i) => 2 ** -i);
const ROUND_HALF_EVEN = 1.5 * 2 ** 52;
const BUFFER = 8192; // elements that NumPy converts at a time
const BLOCK = 128; // elements that its pairwise sum adds in one go

/** float32(a * b + c) with one rounding, of float32 numbers. */
export function fma(a: number, b: number, c: number): number {
  const product = a * b; // exact: 48 bits
  const sum = product + c;
  double[0] = sum;
  // Rounding twice errs only where the first rounding lands in the middle of two float32.
  if ((halves[0]! & 0x1fffffff) !== 0x10000000) return Math.fround(sum);
  const back = sum - product;
  const lost = product - (sum - back) + (c - back);
  if (lost === 0) return Math.fround(sum);
  halves[0]! += lost > 0 === sum > 0 ? 1 : -1;
  return Math.fround(double[0]!);
}

/** exp of a float32 of 0 or less, as NumPy's: float32. */
export function exp(x: number): number {
  if (x < -104) return 0; // below half of the smallest float32
  const power = Math.fround(x * LOG2_E) + ROUND_HALF_EVEN - ROUND_HALF_EVEN;
  const rest = fma(power, LN2_LOW, fma(power, LN2_HIGH, x));
  let above = fma(fma(P5, rest, P4), rest, P3);
  above = fma(fma(fma(above, rest, P2), rest, P1), rest, P0);
  const below = fma(fma(Q2, rest, Q1), rest, 1);
  return Math.fround(Math.fround(above / below) * HALVES[-power]!);
}

/** Sum of values[start, end) in float64, pairwise: `numpy.add.reduce` of float64 numbers. */
export function pairwiseSum(values: ArrayLike<number>, start: number, end: number): number {
  const count = end - start;
  if (count < 8) {
    let sum = 0;
    for (let i = start; i < end; i++) sum += values[i]!;
    return sum;
  }
  if (count > BLOCK) {
    const half = Math.floor(count / 2);
    const middle = start + half - (half % 8);
    return pairwiseSum(values, start, middle) + pairwiseSum(values, middle, end);
  }
  let a = values[start]!;
  let b = values[start + 1]!;
  let c = values[start + 2]!;
  let d = values[start + 3]!;
  let e = values[start + 4]!;
  let f = values[start + 5]!;
  let g = values[start + 6]!;
  let h = values[start + 7]!;
  let at = start + 8;
  for (; at + 8 <= end; at += 8) {
    a += values[at]!;
    b += values[at + 1]!;
    c += values[at + 2]!;
    d += values[at + 3]!;
    e += values[at + 4]!;
    f += values[at + 5]!;
    g += values[at + 6]!;
    h += values[at + 7]!;
  }
  let sum = a + b + (c + d) + (e + f + (g + h));
  for (; at < end; at++) sum += values[at]!;
  return sum;
}

/** Sum of float32 numbers in float64: `values.sum(dtype=numpy.float64)`. */
export function sum(values: Float32Array): number {
  let total = 0;
  for (let start = 0; start < values.length; start += BUFFER) {
    total += pairwiseSum(values, start, Math.min(start + BUFFER, values.length));
  }
  return total;
}

/** The largest number; NaN where there is one. */
export function maximum(values: Float32Array): number {
  let best = -Infinity;
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    if (value > best) best = value;
    else if (value !== value) return NaN;
  }
  return best;
}

/** The first index i of ascending values with values[i] >= goal, or > goal: searchsorted. */
export function searchSorted(
  values: ArrayLike<number>, goal: number, side: "left" | "right",
): number {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const before = side === "left" ? values[middle]! < goal : values[middle]! <= goal;
    if (before) low = middle + 1;
    else high = middle;
  }
  return low;
}
