// A client of cierzo's RPC, written from docs/rpc.md alone. Node 20, no packages.
//
//   const connection = await Connection.open("127.0.0.1:7071");
//   const generation = connection.generate({ text: "Hi", sampling: { max_tokens: 32 } });
//   for await (const delta of generation) process.stdout.write(delta.text ?? "");
//   console.log(generation.final.usage);
//   connection.close();

import net from "node:net";
import { decode, encode } from "./msgpack.mjs";

export const FEATURES = ["accounting", "attach", "batches", "credit", "grammars", "images", "keepalive", "masks", "parts", "probes", "prompt_logprobs", "resume", "tokenize", "trace"];

export class RpcError extends Error {
  constructor({ code, message, field = null, limit = null, value = null, retry = false, retry_after_s = null }) {
    super(message);
    Object.assign(this, { code, field, limit, value, retry, retry_after_s });
  }
}

export function costOf(delta) {
  const entries = [...(delta.logprobs ?? []), ...(delta.prompt_logprobs ?? [])];
  const own = 64 + 8 * (delta.token_ids?.length ?? 0) + Buffer.byteLength(delta.text ?? "", "utf8");
  const bytesOf = ({ text = "", name = "", id = "" }) => Buffer.byteLength(text + name + id, "utf8");
  const parts = (delta.parts ?? []).reduce((sum, part) => sum + 64 + bytesOf(part), 0);
  return entries.reduce((sum, [, , top]) => sum + 32 + 16 * top.length, own + parts);
}

// Add what a delta, or the record of a sample's end, has to the parts of the sample.
export function addParts(joined, { parts = [], text = "", token_ids = [] }) {
  const pieces = parts.length ? parts : [{ kind: "text", text, num_tokens: token_ids.length }];
  for (const { kind, call = 0, text = "", name = "", id = "", num_tokens = 0 } of pieces) {
    const last = joined.at(-1);
    if (!text && !name && !id && !num_tokens) continue;
    if (last?.kind !== kind || last.call !== call) joined.push({ kind, call, text, name, id, num_tokens });
    else Object.assign(last, { text: last.text + text, id: last.id || id, num_tokens: last.num_tokens + num_tokens });
  }
}

// Iterate over its deltas; then `final` is there. `accepted()` waits for the server's word that it has the request.
export class Generation {
  constructor(connection, stream) {
    Object.assign(this, { connection, stream, waiting: [], final: null, error: null, news: null });
    this.acceptance = null;
    this.uncredited = 0;
  }

  async accepted() {
    while (!this.acceptance) {
      if (this.error) throw this.error;
      if (this.final) throw new Error("it has ended, and was never accepted");
      await this.change();
    }
    return this.acceptance;
  }

  async *[Symbol.asyncIterator]() {
    for (;;) {
      if (this.waiting.length) {
        const delta = this.waiting.shift();
        yield delta;
        this.connection.consumed(this, costOf(delta));
      } else if (this.error) throw this.error;
      else if (this.final) return;
      else await this.change();
    }
  }

  cancel() {
    this.connection.send({ type: "cancel", stream: this.stream });
  }

  change() {
    this.news ??= resolvers();
    return this.news.promise;
  }

  take(message) {
    if (message.type === "delta") this.waiting.push(message);
    else if (message.type === "accepted") this.acceptance = message;
    else if (message.type === "final") this.final = message;
    else this.error = message instanceof Error ? message : new RpcError(message);
    this.news?.resolve();
    this.news = null;
  }
}

export class Connection {
  static async open(address, { version = 3, features = FEATURES } = {}) {
    const connection = new Connection(address);
    connection.send({ type: "hello", magic: "cierzo", version, client: "interop", features });
    connection.welcome = await connection.welcomed.promise;
    return connection;
  }

  constructor(address) {
    const [, path, host, port] = /^(?:unix:(.*)|(.*):(\d+))$/.exec(address);
    this.socket = net.connect(path ? { path } : { host, port: Number(port), noDelay: true });
    Object.assign(this, { open: new Map(), nextStream: 0, rest: [], restBytes: 0, neededBytes: 4 });
    this.welcomed = resolvers();
    this.socket.on("data", (data) => this.receive(data));
    this.socket.on("error", (error) => this.lost(error));
    this.socket.on("close", () => this.lost(new Error("the connection is closed")));
  }

  has(feature) {
    return this.welcome.features?.includes(feature) ?? false;
  }

  begin() {
    const generation = new Generation(this, ++this.nextStream);
    this.open.set(generation.stream, generation);
    return generation;
  }

  generate(fields) {
    const generation = this.begin();
    const { stream } = generation;
    const frame = encode({ type: "generate", stream, ...fields });
    const { max_frame_bytes: most, max_attached_bytes: mostAttached } = this.welcome.limits;
    if (frame.length <= most) this.write(frame);
    else if (!this.has("attach")) throw new Error("the request is longer than max_frame_bytes");
    else {
      const attached = ["text", "messages", "token_ids"].find((name) => fields[name] !== undefined);
      const data = encode(fields[attached]);
      if (data.length > mostAttached) throw new Error("the prompt is longer than max_attached_bytes");
      const step = most - 64;
      for (let at = 0; at < data.length; at += step)
        this.send({ type: "attach", stream, data: data.subarray(at, at + step) });
      this.send({ type: "generate", stream, ...fields, [attached]: undefined, attached });
    }
    return generation;
  }

  resume(request_id, received, prompt_received = 0) {
    const generation = this.begin();
    const behind = prompt_received ? { received, prompt_received } : { received };
    this.send({ type: "resume", stream: generation.stream, request_id, ...behind });
    return generation;
  }

  // The answer to a message that has one: ping, health, stats, model, drain, cancel_request.
  async call(type, fields = {}) {
    const call = resolvers();
    this.open.set(++this.nextStream, { take: call.resolve });
    this.send({ type, stream: this.nextStream, ...fields });
    const answer = await call.promise;
    if (answer instanceof Error) throw answer;
    if (answer.type === "error") throw new RpcError(answer);
    return answer;
  }

  consumed(generation, cost) {
    generation.uncredited += cost;
    const part = this.welcome.limits.stream_credit_bytes / 4;
    if (!this.has("credit") || generation.uncredited < part || generation.final) return;
    this.send({ type: "credit", stream: generation.stream, bytes: generation.uncredited });
    generation.uncredited = 0;
  }

  close() {
    for (const [stream, one] of this.open) if (one instanceof Generation) this.send({ type: "cancel", stream });
    this.socket.end();
  }

  drop() {
    this.socket.destroy();
  }

  send(message) {
    this.write(encode(message));
  }

  write(body) {
    const length = Buffer.alloc(4);
    length.writeUInt32BE(body.length);
    this.socket.write(Buffer.concat([length, body]));
  }

  receive(data) {
    this.rest.push(data);
    this.restBytes += data.length;
    if (this.restBytes < this.neededBytes) return;
    let bytes = Buffer.concat(this.rest);
    for (this.neededBytes = 4; bytes.length >= this.neededBytes; ) {
      const end = 4 + bytes.readUInt32BE();
      if (bytes.length < end) this.neededBytes = end;
      else (this.handle(decode(bytes.subarray(4, end))), (bytes = bytes.subarray(end)), (this.neededBytes = 4));
    }
    this.rest = [bytes];
    this.restBytes = bytes.length;
  }

  handle(message) {
    if (message.type === "welcome") return this.welcomed.resolve(message);
    if (message.type === "ping") return this.send({ type: "pong", stream: message.stream });
    if (message.stream === -1) return this.lost(new RpcError(message));
    if (message.type === "deltas") return message.deltas.forEach((delta) => this.handle(delta));
    const one = this.open.get(message.stream);
    if (message.type !== "delta" && message.type !== "accepted") this.open.delete(message.stream);
    one?.take(message);
  }

  lost(error) {
    this.welcomed.reject(error);
    for (const one of this.open.values()) one.take(error);
    this.open.clear();
  }
}

function resolvers() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  made.promise.catch(() => {}); // whoever waits hears of it
  return made;
}
