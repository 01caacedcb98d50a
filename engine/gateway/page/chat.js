// Chat box: a conversation through /v1/chat/completions, as anybody's client has it.

import { Answer } from "./answer.js";
import { events, refusal, served } from "./door.js";
import { Pictures, picture } from "./pictures.js";

const byId = (id) => document.getElementById(id);
const AT_END = 60; // pixels from the end of the conversation within which new text keeps the end in sight

export class Chat {
  // headers: a function that gives those of a request.
  constructor(headers) {
    this.headers = headers;
    this.model = "";
    this.efforts = "";
    this.turns = []; // messages as they are sent
    this.latest = null; // the Answer to them
    this.failed = null; // the Answer that did not come, and may be tried again until something else is sent
    this.running = null; // an AbortController
    this.question = byId("question");
    this.pictures = new Pictures();
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("ask").requestSubmit();
    });
    byId("stop").addEventListener("click", () => {
      this.stop();
      this.question.focus();
    });
    byId("new").addEventListener("click", () => this.clear());
    byId("tools").addEventListener("input", () => this.tools());
    // What is wrong in a closed box is not told: of capture, as it does not bubble.
    byId("settings").addEventListener("invalid", () => (byId("settings").open = true), { capture: true });
    for (const idea of document.querySelectorAll(".idea")) {
      idea.addEventListener("click", () => this.ask(idea.textContent));
    }
  }

  // What the server says of its model: its name, the efforts that it knows, whether it sees.
  knows({ model_id, efforts, max_model_len, sees }) {
    this.model = model_id;
    this.pictures.allow(sees);
    const tokens = byId("max-tokens");
    if (max_model_len && tokens.value === tokens.defaultValue && 2 * tokens.value > max_model_len) {
      tokens.value = tokens.defaultValue = Math.floor(max_model_len / 2);
    }
    if (!efforts || this.efforts === String(efforts)) return;
    this.efforts = String(efforts);
    const select = byId("effort");
    select.hidden = !efforts.length;
    select.replaceChildren(new Option("Effort", ""), ...efforts.map((effort) => new Option(effort, effort)));
  }

  submit() {
    const text = this.question.value;
    if (!text.trim() || this.running || !byId("ask").reportValidity()) return;
    if (this.tools() === null) {
      byId("settings").open = true;
      byId("tools").focus();
      return;
    }
    this.question.value = "";
    this.question.focus(); // the button that was pressed is gone
    this.ask(text, this.pictures.take());
  }

  ask(text, pictures = []) {
    if (this.running) return;
    const turn = document.createElement("li");
    turn.className = "asked";
    turn.append(...pictures.map(picture), text);
    byId("turns").append(turn);
    const parts = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    const content = parts.length ? [...parts, { type: "text", text }] : text;
    this.answer([...(this.latest?.results() ?? []), { role: "user", content }]);
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.running = null;
    this.turns = [];
    this.latest = null;
    byId("turns").replaceChildren();
    this.pictures.take();
    this.mark();
    this.question.focus();
  }

  // Send new messages behind those before, and show what comes. What got no answer at all stays out of the next request.
  async answer(messages) {
    const sent = [...this.turns, ...messages];
    const running = (this.running = new AbortController());
    const answer = new Answer({
      resume: (results) => this.answer(results),
      keepEnd: (change) => this.keepEnd(change),
    });
    byId("turns").append(answer.element);
    this.latest?.lock(true);
    this.failed?.lock(true);
    this.failed = null;
    this.mark();
    byId("talk").scrollTop = byId("talk").scrollHeight;
    this.say("Answering");
    try {
      await this.stream(sent, answer, running.signal);
      answer.end();
    } catch (error) {
      if (running.signal.aborted) answer.end("stopped");
      else answer.fail(error instanceof TypeError ? "The connection to the server was lost." : error.message);
    }
    if (running !== this.running) return; // another chat has begun
    this.running = null;
    if (answer.hasCome) {
      this.turns = [...sent, answer.message()];
      this.latest = answer;
    } else {
      this.latest?.lock(false);
      this.failed = answer;
      answer.offer("Try again", () => {
        answer.element.remove();
        this.answer(messages);
      });
    }
    if (!this.question.value) answer.firstField?.focus();
    this.mark();
    this.say(answer.spoken());
  }

  async stream(messages, answer, signal) {
    this.model ||= await served(this.headers());
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...this.headers() },
      body: JSON.stringify(this.body(messages)),
      signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message ?? "The answer failed.");
      answer.take(chunk);
    }
    throw new Error("The answer broke off: its stream ended before it was complete.");
  }

  body(messages) {
    const system = byId("system").value.trim();
    const tools = this.tools();
    const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value)); // left out, if undefined
    return {
      model: this.model,
      messages: system ? [{ role: "system", content: system }, ...messages] : messages,
      stream: true,
      stream_options: { include_usage: true },
      temperature: number("temperature"),
      max_tokens: number("max-tokens"),
      reasoning_effort: byId("effort").value || undefined,
      tools: tools.length ? tools : undefined,
    };
  }

  // The tools that are given; null, with a word about it in the page, if they are no JSON list.
  tools() {
    const wrong = byId("tools-wrong");
    wrong.hidden = true;
    const text = byId("tools").value.trim();
    if (!text) return [];
    try {
      const tools = JSON.parse(text);
      if (Array.isArray(tools)) return tools;
      wrong.textContent = "These tools are JSON, but no list.";
    } catch (error) {
      wrong.textContent = `These tools are no JSON: ${error.message}`;
    }
    wrong.hidden = false;
    return null;
  }

  mark() {
    const isEmpty = !byId("turns").children.length;
    byId("welcome").hidden = !isEmpty;
    byId("new").hidden = isEmpty;
    byId("stop").hidden = !this.running;
    byId("send").hidden = Boolean(this.running);
  }

  // Change the page; the end of the conversation stays in sight if it was.
  keepEnd(change) {
    const talk = byId("talk");
    const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < AT_END;
    change();
    if (follows) talk.scrollTop = talk.scrollHeight;
  }

  say(text) {
    byId("spoken").textContent = text;
  }
}
