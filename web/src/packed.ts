/** Reads what pellucid.glass.packed writes: JSON with arrays in it. See docs/bundle.md. */

export interface Tensor {
  shape: number[];
  data: Float32Array | Int32Array | Uint8Array;
}

interface Entry {
  dtype: string;
  shape: number[];
  offset: number;
}

const VERSION = 1;
const PREFIX = 16;

export function unpack(bytes: Uint8Array): unknown {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const magic = new TextDecoder("latin1").decode(bytes.subarray(0, 8));
  if (bytes.length < PREFIX || magic !== "pellucid") throw new Error("this is no bundle of pellucid");
  const version = view.getUint32(8, true);
  if (version !== VERSION) throw new Error(`a bundle of version ${version}; this page reads version ${VERSION}`);
  const start = PREFIX + view.getUint32(12, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(PREFIX, start))) as {
    arrays: Entry[];
    content: unknown;
  };
  const arrays = header.arrays.map((entry) => read(bytes, start, entry));
  return fill(header.content, arrays);
}

function read(bytes: Uint8Array, start: number, { dtype, shape, offset }: Entry): Tensor {
  const count = shape.reduce((product, side) => product * side, 1);
  const size = { float32: 4, float16: 2, int32: 4, uint8: 1 }[dtype];
  if (size === undefined) throw new Error(`an array of ${dtype}`);
  const from = start + offset;
  if (from + count * size > bytes.length) throw new Error("the bundle ends early");
  const piece = bytes.slice(from, from + count * size).buffer; // copied: a typed array must begin at a multiple
  if (dtype === "uint8") return { shape, data: new Uint8Array(piece) };
  if (dtype === "int32") return { shape, data: new Int32Array(piece) };
  if (dtype === "float16") return { shape, data: Float32Array.from(new Uint16Array(piece), half) };
  return { shape, data: new Float32Array(piece) };
}

/** The number that 16 bits stand for (IEEE 754 binary16). */
export function half(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

function fill(value: unknown, arrays: Tensor[]): unknown {
  if (Array.isArray(value)) return value.map((item) => fill(item, arrays));
  if (value !== null && typeof value === "object") {
    const keys = Object.keys(value);
    if (keys.length === 1 && keys[0] === "array") return arrays[(value as { array: number }).array];
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, fill(item, arrays)]));
  }
  return value;
}
