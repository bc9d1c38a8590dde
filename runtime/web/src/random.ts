/**
 * NumPy's default generator: PCG64 (XSL RR 128/64, O'Neill 2014), seeded through SeedSequence.
 *
 * `new Generator(seed).random()` gives the numbers of `numpy.random.default_rng(seed).random()`.
 */

const MASK_128 = (1n << 128n) - 1n;
const MASK_64 = (1n << 64n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const POOL = 4;

/** A generator of doubles in [0, 1). */
export class Generator {
  private state: bigint;
  private readonly increment: bigint;

  /** `seed`: a whole number of 0 or more; undefined: 128 bits from the system. */
  constructor(seed?: number | bigint) {
    const [high, low, highStep, lowStep] = seedWords(entropyWords(seed ?? systemSeed()));
    const start = (high! << 64n) | low!;
    this.increment = ((((highStep! << 64n) | lowStep!) << 1n) | 1n) & MASK_128;
    this.state = (this.increment + start) & MASK_128;
    this.step();
  }

  /** The next number: 53 random bits. */
  random(): number {
    this.step();
    const word = ((this.state >> 64n) ^ this.state) & MASK_64;
    const turn = this.state >> 122n;
    const turned = ((word >> turn) | (word << (64n - turn))) & MASK_64;
    return Number(turned >> 11n) * 2 ** -53;
  }

  private step(): void {
    this.state = (this.state * MULTIPLIER + this.increment) & MASK_128;
  }
}

function systemSeed(): bigint {
  const words = crypto.getRandomValues(new BigUint64Array(2));
  return (words[0]! << 64n) | words[1]!;
}

/** A number as 32-bit words, the least significant first. */
function entropyWords(seed: number | bigint): number[] {
  const words: number[] = [];
  for (let rest = BigInt(seed); rest > 0n || !words.length; rest >>= 32n) {
    words.push(Number(rest & 0xffffffffn));
  }
  return words;
}

/** SeedSequence: entropy is hashed into a pool of four words, and that into four of 64 bits. */
function seedWords(entropy: number[]): bigint[] {
  let constant = 0x43b0d7e5;
  const hash = (value: number): number => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mix = (x: number, y: number): number => {
    const mixed = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) >>> 0;
    return (mixed ^ (mixed >>> 16)) >>> 0;
  };
  const pool = Array.from({ length: POOL }, (_, i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < POOL; from++) {
    for (let to = 0; to < POOL; to++) {
      if (from !== to) pool[to] = mix(pool[to]!, hash(pool[from]!));
    }
  }
  for (const word of entropy.slice(POOL)) {
    for (let to = 0; to < POOL; to++) pool[to] = mix(pool[to]!, hash(word));
  }
  let spread = 0x8b51f9dd;
  const words = Array.from({ length: 8 }, (_, i) => {
    let value = pool[i % POOL]! ^ spread;
    spread = Math.imul(spread, 0x58f38ded);
    value = Math.imul(value, spread);
    return BigInt((value ^ (value >>> 16)) >>> 0);
  });
  return [0, 2, 4, 6].map((i) => words[i]! | (words[i + 1]! << 32n));
}
