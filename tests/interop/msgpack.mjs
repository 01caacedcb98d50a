// As much of MessagePack as the RPC needs. Maps are objects (or Map, for keys that are no strings), bytes Buffers;
// integers that a double cannot hold are BigInts, both ways. A field that is undefined is left out.

export function encode(value) {
  const parts = [];
  write(value, parts);
  return Buffer.concat(parts);
}

export function decode(data) {
  return new Reader(data).value();
}

function write(value, out) {
  if (value === null) out.push(Buffer.of(0xc0));
  else if (typeof value === "boolean") out.push(Buffer.of(value ? 0xc3 : 0xc2));
  else if (typeof value === "bigint" || Number.isSafeInteger(value)) writeInteger(value, out);
  else if (typeof value === "number") {
    const bytes = Buffer.alloc(9, 0xcb);
    bytes.writeDoubleBE(value, 1);
    out.push(bytes);
  } else if (typeof value === "string") {
    const bytes = Buffer.from(value, "utf8");
    out.push(header(bytes.length, [0xa0, 31], 0xd9, 0xda, 0xdb), bytes);
  } else if (Buffer.isBuffer(value)) out.push(header(value.length, null, 0xc4, 0xc5, 0xc6), value);
  else if (Array.isArray(value)) {
    out.push(header(value.length, [0x90, 15], null, 0xdc, 0xdd));
    for (const item of value) write(item, out);
  } else {
    const all = value instanceof Map ? [...value] : Object.entries(value);
    const entries = all.filter(([, item]) => item !== undefined);
    out.push(header(entries.length, [0x80, 15], null, 0xde, 0xdf));
    for (const [key, item] of entries) (write(key, out), write(item, out));
  }
}

function header(size, fixed, code8, code16, code32) {
  if (fixed && size <= fixed[1]) return Buffer.of(fixed[0] | size);
  if (code8 !== null && size < 1 << 8) return Buffer.of(code8, size);
  if (size < 1 << 16) return Buffer.of(code16, size >> 8, size & 255);
  const bytes = Buffer.alloc(5, code32);
  bytes.writeUInt32BE(size, 1);
  return bytes;
}

function writeInteger(value, out) {
  if (value >= 0 && value < 128) return out.push(Buffer.of(Number(value)));
  if (value >= 0 && value < 1 << 16) return out.push(Buffer.of(0xcd, Number(value) >> 8, Number(value) & 255));
  const bytes = Buffer.alloc(9, value < 0 ? 0xd3 : 0xcf);
  bytes.writeBigUInt64BE(BigInt.asUintN(64, BigInt(value)), 1);
  out.push(bytes);
}

class Reader {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }

  take(size) {
    if (this.at + size > this.data.length) throw new Error("a MessagePack value is cut off");
    this.at += size;
    return this.data.subarray(this.at - size, this.at);
  }

  value() {
    const code = this.take(1)[0];
    if (code < 0x80) return code;
    if (code < 0x90) return this.map(code & 15);
    if (code < 0xa0) return this.list(code & 15);
    if (code < 0xc0) return this.take(code & 31).toString("utf8");
    if (code >= 0xe0) return code - 256;
    switch (code) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return this.take(this.size(1 << (code - 0xc4)));
      case 0xca: return this.take(4).readFloatBE();
      case 0xcb: return this.take(8).readDoubleBE();
      case 0xcc: case 0xcd: case 0xce: return this.size(1 << (code - 0xcc));
      case 0xcf: return narrow(this.take(8).readBigUInt64BE());
      case 0xd0: case 0xd1: case 0xd2: return this.take(1 << (code - 0xd0)).readIntBE(0, 1 << (code - 0xd0));
      case 0xd3: return narrow(this.take(8).readBigInt64BE());
      case 0xd9: case 0xda: case 0xdb: return this.take(this.size(1 << (code - 0xd9))).toString("utf8");
      case 0xdc: case 0xdd: return this.list(this.size(code === 0xdc ? 2 : 4));
      case 0xde: case 0xdf: return this.map(this.size(code === 0xde ? 2 : 4));
      default: throw new Error(`MessagePack's type ${code.toString(16)} is not used here`);
    }
  }

  size(bytes) {
    return this.take(bytes).readUIntBE(0, bytes);
  }

  list(size) {
    return Array.from({ length: size }, () => this.value());
  }

  map(size) {
    return Object.fromEntries(Array.from({ length: size }, () => [this.value(), this.value()]));
  }
}

function narrow(value) {
  return value >= Number.MIN_SAFE_INTEGER && value <= Number.MAX_SAFE_INTEGER ? Number(value) : value;
}
