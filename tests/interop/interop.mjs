// The cases of the interop list. `node interop.mjs ADDRESS CASE REQUEST` writes what happened, as JSON, for
// tests/interop/test_interop.py to compare. REQUEST: fields of `generate`, as JSON; "int:..." is a large integer.

import { addParts, Connection, costOf, FEATURES } from "./client.mjs";

const [address, name] = [process.argv[2], process.argv[3]];
const request = JSON.parse(process.argv[4], (_, value) => (/^int:/.test(value) ? BigInt(value.slice(4)) : value));
const MANY = { sampling: { max_tokens: 200_000, ignore_eos: true, seed: 1 } };

// What is left of a generation: tokens and text by sample, and how it ended.
async function rest(generation, answer = { tokens: [], text: [] }) {
  try {
    for await (const delta of generation) add(answer, delta);
    answer.final = generation.final;
  } catch (error) {
    answer.error = error.code ? error : String(error);
  }
  return answer;
}

function add(answer, delta) {
  const { sample = 0, token_ids = [], text = "" } = delta;
  (answer.tokens[sample] ??= []).push(...token_ids);
  answer.text[sample] = (answer.text[sample] ?? "") + text;
  addParts(((answer.parts ??= [])[sample] ??= []), delta);
  if (delta.prompt_logprobs) (answer.prompt_logprobs ??= []).push(...delta.prompt_logprobs);
}

async function first(generation, answer = { tokens: [], text: [] }) {
  for await (const delta of { [Symbol.asyncIterator]: () => hold(generation) }) {
    add(answer, delta);
    return answer;
  }
  throw generation.error ?? new Error("it has ended before");
}

// An iterator that can be left without the generation's own being ended.
function hold(generation) {
  const iterator = generation[Symbol.asyncIterator]();
  return { next: () => iterator.next() };
}

const cases = {
  async plain(connection) {
    const generation = connection.generate(request);
    const accepted = connection.has("resume") ? await generation.accepted().catch(() => null) : null;
    return { ...(await rest(generation)), accepted };
  },

  async cancel_at_once(connection) {
    const generation = connection.generate({ ...request, ...MANY });
    generation.cancel();
    return rest(generation);
  },

  async cancel_after_begin(connection) {
    const generation = connection.generate({ ...request, ...MANY });
    await generation.accepted();
    generation.cancel();
    return rest(generation);
  },

  async cancel_after_first_response(connection) {
    const generation = connection.generate({ ...request, ...MANY });
    const answer = await first(generation);
    generation.cancel();
    return rest(generation, answer);
  },

  async cancel_by_id(connection) {
    const generation = connection.generate({ ...request, ...MANY });
    const { request_id } = await generation.accepted();
    const other = await Connection.open(address);
    const done = await other.call("cancel_request", { request_id });
    const unknown = await other.call("cancel_request", { request_id: "00".repeat(16) }).catch((error) => error.code);
    other.close();
    return { ...(await rest(generation)), done: done.type, unknown };
  },

  // A generation that nobody reads, until another one on the same connection has ended.
  async slow_consumer(connection) {
    const slow = connection.generate(request);
    const quick = await rest(connection.generate({ token_ids: [5], sampling: { max_tokens: 50, seed: 2 } }));
    const held = slow.waiting.reduce((sum, delta) => sum + costOf(delta), 0);
    return { ...(await rest(slow)), quick, held, credit: connection.welcome.limits.stream_credit_bytes };
  },

  // A generation that nobody reads until the server has had enough of it.
  async no_consumer(connection) {
    const slow = connection.generate({ ...request, ...MANY });
    while (!slow.error && !slow.final) await slow.change();
    const quick = await rest(connection.generate({ token_ids: [5], sampling: { max_tokens: 50, seed: 2 } }));
    return { ...(await rest(slow)), quick };
  },

  async resume(connection) {
    const generation = connection.generate(request);
    const accepted = await generation.accepted();
    const answer = await first(generation);
    await first(generation, answer);
    connection.drop();
    const again = await Connection.open(address);
    const received = Array.from({ length: request.sampling.n ?? 1 }, (_, sample) => answer.tokens[sample]?.length ?? 0);
    const resumed = again.resume(accepted.request_id, received, answer.prompt_logprobs?.length);
    const { request_id, seed } = await resumed.accepted();
    await rest(resumed, answer);
    again.close();
    return { ...answer, received, same: request_id === accepted.request_id && seed === accepted.seed };
  },

  async idempotency(connection) {
    const keyed = { ...request, idempotency_key: `key of ${process.pid}` };
    const answers = [await cases.plain.call(null, { has: () => true, generate: () => connection.generate(keyed) })];
    const other = await Connection.open(address);
    const joined = other.generate(keyed);
    answers.push({ accepted: await joined.accepted(), ...(await rest(joined)) });
    const reused = await rest(other.generate({ ...keyed, token_ids: [1, 2, 3, 4] }));
    other.close();
    return { answers, reused };
  },

  async keepalive(connection) {
    await new Promise((resolve) => setTimeout(resolve, 3000 * connection.welcome.limits.keepalive_s));
    return rest(connection.generate(request));
  },

  async words(connection) {
    const { text } = request;
    const { token_ids } = await connection.call("tokenize", { text });
    const told = await connection.call("detokenize", { token_ids, pieces: true });
    const pieces = told.pieces.map((piece) => piece.toString("latin1"));
    return { token_ids, text: told.text, pieces, kind: (await connection.call("tokenizer")).kind };
  },

  async control(connection) {
    const types = [];
    for (const type of ["ping", "health", "stats", "model"]) types.push((await connection.call(type)).type);
    return { types, health: (await connection.call("health")).state };
  },
};

const version2 = name === "version_2" || name === "feature_not_granted";
const connection = await Connection.open(address, version2 ? { version: 2, features: [] } : { features: FEATURES });
const body = cases[name] ?? cases.plain;
const told = await body(connection);
connection.close();
const shown = (_, value) => (typeof value === "bigint" ? String(value) : value);
console.log(JSON.stringify({ welcome: connection.welcome, ...told }, shown));
