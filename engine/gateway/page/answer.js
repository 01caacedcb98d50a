// Answer of a model as it comes: thoughts folded away, text, calls of tools, and what it took.

import { show } from "./text.js";
import { duration, rate, whole } from "./units.js";

export class Answer {
  // resume(messages): goes on with the results of its calls, once somebody has typed them. keepEnd(change): changes the
  // page, without losing its end from sight.
  constructor({ resume, keepEnd }) {
    this.resume = resume;
    this.keepEnd = keepEnd;
    this.began = performance.now();
    this.first = null; // milliseconds to the first thing that came
    this.parts = []; // {kind: "text" or "thinking", text, ...}, in order
    this.calls = new Map(); // by index
    this.fields = []; // [call, field of its result]
    this.reason = null;
    this.usage = null;
    this.drawing = 0;
    this.element = document.createElement("li");
    this.element.className = "told";
    this.waits = this.add("p", "waits");
  }

  // Whether there is something that a conversation can go on with.
  get hasCome() {
    return this.parts.length > 0 || this.fields.length > 0;
  }

  add(tag, classes, text = "") {
    const element = document.createElement(tag);
    element.className = classes;
    element.textContent = text;
    this.element.append(element);
    return element;
  }

  // Take a chunk of the stream.
  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const [choice] = chunk.choices ?? [];
    if (!choice) return;
    this.reason = choice.finish_reason ?? this.reason;
    const delta = choice.delta ?? {};
    this.say("thinking", delta.reasoning_content ?? delta.reasoning);
    if (typeof delta.content === "string") this.say("text", delta.content);
    else for (const piece of delta.content ?? []) this.piece(piece);
    for (const call of delta.tool_calls ?? []) this.call(call);
  }

  // A chunk of a content that is a list, as Mistral's interface has it.
  piece(piece) {
    if (piece.type === "text") this.say("text", piece.text);
    else for (const thought of [piece.thinking ?? []].flat()) this.say("thinking", thought.text ?? thought);
  }

  say(kind, text) {
    if (!text) return;
    this.begun();
    let part = this.parts.at(-1);
    if (part?.kind !== kind) {
      this.thought(part);
      part = kind === "text" ? { kind, text: "", body: this.add("div", "text") } : { kind, text: "", ...this.folded() };
      this.parts.push(part);
    }
    part.text += text;
    this.drawing ||= requestAnimationFrame(() => this.draw()); // a frame at a time, however fast text comes
  }

  folded() {
    const box = this.add("details", "thoughts");
    const summary = box.appendChild(document.createElement("summary"));
    summary.textContent = "Thinking";
    const body = box.appendChild(document.createElement("div"));
    body.className = "text";
    return { body, summary, since: performance.now() };
  }

  // Thoughts are over: say how long they took.
  thought(part) {
    if (part?.kind !== "thinking" || part.isOver) return;
    part.isOver = true;
    part.summary.textContent = `Thought for ${duration((performance.now() - part.since) / 1000)}`;
  }

  begun() {
    this.first ??= performance.now() - this.began;
    this.waits.remove();
  }

  draw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    this.keepEnd(() => {
      for (const part of this.parts) {
        if (part.drawn === part.text.length) continue;
        part.drawn = part.text.length;
        show(part.body, part.text);
      }
      for (const call of this.calls.values()) call.shown.textContent = call.arguments;
    });
  }

  call({ index = 0, id, function: called = {} }) {
    this.begun();
    this.thought(this.parts.at(-1));
    let call = this.calls.get(index);
    if (!call) {
      const box = this.add("section", "call");
      const head = box.appendChild(document.createElement("h3"));
      head.append("calls ", document.createElement("b"));
      const shown = box.appendChild(document.createElement("pre"));
      call = { id: "", name: "", arguments: "", box, shown, head: head.lastChild };
      this.calls.set(index, call);
    }
    call.id ||= id ?? "";
    call.name += called.name ?? "";
    call.arguments += called.arguments ?? "";
    call.head.textContent = call.name;
    this.drawing ||= requestAnimationFrame(() => this.draw());
  }

  // It has come to its end, or somebody stopped it: that is `why`.
  end(why = "") {
    this.keepEnd(() => {
      this.finish(why || this.reason || "ended");
      if (this.reason === "tool_calls" && this.calls.size) this.askResults();
    });
  }

  fail(message) {
    this.wrong = message;
    this.keepEnd(() => {
      this.waits.remove();
      this.draw();
      this.add("p", "wrong", message);
      this.finish("failed");
    });
  }

  finish(why) {
    this.waits.remove();
    this.thought(this.parts.at(-1));
    this.draw();
    for (const call of this.calls.values()) call.shown.textContent = indented(call.arguments);
    this.reason = why;
    const foot = (this.foot = this.add("div", "tools"));
    const text = this.text();
    if (text) foot.append(copier(text));
    for (const word of this.facts(why)) {
      const fact = document.createElement("span");
      fact.textContent = word;
      foot.append(fact);
    }
  }

  facts(why) {
    const said = { stop: "", failed: "", tool_calls: "waits for results", length: "cut off at its length", stopped: "stopped" };
    const facts = [said[why] ?? why];
    const tokens = this.usage?.completion_tokens;
    const seconds = (performance.now() - this.began - this.first) / 1000;
    if (tokens) facts.push(`${whole(tokens)} tokens`);
    if (tokens > 1 && seconds > 0) facts.push(`${rate((tokens - 1) / seconds)} per second`);
    if (this.first !== null) facts.push(`first after ${duration(this.first / 1000)}`);
    return facts.filter(Boolean);
  }

  text() {
    return this.parts.filter((part) => part.kind === "text").map((part) => part.text).join("");
  }

  // A field for the result of each call; their button goes on with the conversation.
  askResults() {
    this.fields = [...this.calls.values()].map((call) => {
      const label = call.box.appendChild(document.createElement("label"));
      const field = document.createElement("textarea");
      label.textContent = "Its result";
      field.rows = 1;
      label.append(field);
      return [call, field];
    });
    this.offer(this.fields.length > 1 ? "Send results" : "Send result", () => this.resume(this.results()));
  }

  get firstField() {
    return this.fields[0]?.[1];
  }

  // A button below the answer.
  offer(text, act) {
    this.offered = document.createElement("button");
    this.offered.type = "button";
    this.offered.textContent = text;
    this.offered.addEventListener("click", act);
    this.foot.prepend(this.offered);
  }

  // Let nothing be offered or typed, as the conversation goes on; or again, as it did not.
  lock(isLocked) {
    if (this.offered) this.offered.hidden = isLocked;
    for (const [, field] of this.fields) field.readOnly = isLocked;
  }

  // The turns that its calls are owed, with what was typed.
  results() {
    return this.fields.map(([call, field]) => ({ role: "tool", tool_call_id: call.id, content: field.value }));
  }

  // The assistant's turn for the next request, thoughts included.
  message() {
    const thinks = this.parts.some((part) => part.kind === "thinking");
    const chunk = ({ kind, text }) =>
      kind === "text" ? { type: "text", text } : { type: "thinking", thinking: [{ type: "text", text }] };
    const calls = [...this.calls.values()].map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
    return {
      role: "assistant",
      content: thinks ? this.parts.map(chunk) : this.text(),
      tool_calls: this.fields.length ? calls : undefined,
    };
  }

  // What a screen reader is told at the end.
  spoken() {
    return this.wrong ?? `Answer: ${this.text() || "no text"}`;
  }
}

function copier(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copying is not allowed here"; // as over plain HTTP from another machine
    }
  });
  return button;
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
