// Start of the page: what its parts share (the key, the state), and what is theirs together (head, views, keyboard).

import { Chat } from "./chat.js";
import { Live } from "./live.js";

const byId = (id) => document.getElementById(id);
const SCHEMES = ["", "light", "dark"]; // "": as the system
const IN_WORDS = { "": "as the system", light: "light", dark: "dark" };

// The key is nowhere but in its field: no storage, no cookie.
const headers = () => {
  const key = byId("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
};

const chat = new Chat(headers);
const live = new Live(headers, show);

function show(state, notes) {
  byId("state").dataset.state = state.state;
  if (byId("state-word").textContent !== state.state) byId("state-word").textContent = state.state;
  if (state.model) {
    byId("model").textContent = state.model;
    byId("facts").textContent = facts(state);
    document.title = `${state.model} · cierzo`;
    chat.knows(state);
  }
  byId("notes").textContent = notes.join("\n");
  byId("notes").hidden = !notes.length;
}

function facts(state) {
  if (!state.version) return "";
  const room = `${state.max_model_len.toLocaleString("en")} tokens of context`;
  return [state.dtype, `on ${state.device}`, room, `cierzo ${state.version}`].join(" · ");
}

// --- colours: kept for the next visit, where the browser allows it -------------------------------------------

function paint(scheme) {
  if (scheme) document.documentElement.dataset.theme = scheme;
  else delete document.documentElement.dataset.theme;
  const label = `Colours: ${IN_WORDS[scheme]}`;
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
}

function kept() {
  try {
    return localStorage.getItem("cierzo-colours") ?? "";
  } catch {
    return "";
  }
}

let scheme = SCHEMES.includes(kept()) ? kept() : "";
paint(scheme);
byId("theme").addEventListener("click", () => {
  scheme = SCHEMES[(SCHEMES.indexOf(scheme) + 1) % SCHEMES.length];
  paint(scheme);
  try {
    localStorage.setItem("cierzo-colours", scheme);
  } catch {
    // then it is forgotten
  }
});

// --- views of a narrow page, boxes that open, keys -----------------------------------------------------------

function view(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === name));
  }
}
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => view(button.dataset.view));
}

const boxes = [...document.querySelectorAll("details.pop")];
function closeBoxes(but) {
  const open = boxes.filter((box) => box.open && box !== but);
  for (const box of open) box.open = false;
  return open;
}
document.addEventListener("pointerdown", (event) => closeBoxes(event.target.closest("details.pop")));
byId("key").addEventListener("change", () => live.hurry());
byId("key-box").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("key-box").open = false;
  byId("question").focus(); // which also makes the key a change
});
byId("key-box").addEventListener("toggle", () => byId("key-box").open && byId("key").focus());

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    const [box] = closeBoxes();
    if (box) box.querySelector("summary").focus();
    else chat.stop();
  } else if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.target.matches("input, textarea, select")) {
    event.preventDefault();
    view("chat");
    byId("question").focus();
  }
});

live.start();
