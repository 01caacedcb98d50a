// Text of a model as elements: paragraphs, headings, lists, code. Only text nodes are made of it, never markup: whatever
// a model says, it can run nothing, load nothing and link to nothing.

const LIST = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const FENCE = /^\s*(```+|~~~+)(.*)$/;
// Runs of backticks are taken whole: thousands of them, as a model that repeats itself writes, must not take the regular
// expression's time squared.
const INLINE = /(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)|\*\*(?=\S)(.+?)\*\*|(?<![\w*])\*(?=[^\s*])([^*]+?)\*(?![\w*])/g;

// Blocks of a text: {kind, source, ...}. The same source at the same place is the same element.
export function blocks(text) {
  const found = [];
  let fence = null;
  for (const line of text.split("\n")) {
    const last = found.at(-1);
    const mark = FENCE.exec(line);
    if (fence) {
      if (mark && mark[1].startsWith(fence) && !mark[2].trim()) fence = null;
      else last.source += (last.source || last.begun ? "\n" : "") + line;
      last.begun = true;
    } else if (mark) {
      fence = mark[1];
      found.push({ kind: "code", source: "", begun: false });
    } else if (!line.trim()) {
      if (last) last.closed = true;
    } else {
      const kind = HEADING.test(line) ? "heading" : LIST.test(line) ? "list" : "paragraph";
      const goesOn = last && last.kind !== "code" && last.kind !== "heading" && (kind === last.kind || isTail(last, line));
      const isLoose = last?.closed && kind === "list" && last.kind === "list";
      if (goesOn && (!last.closed || isLoose)) {
        last.source += `\n${line}`;
        last.closed = false;
      } else found.push({ kind, source: line });
    }
  }
  return found;
}

// A line that goes on with an item of a list.
function isTail(block, line) {
  return block.kind === "list" && !HEADING.test(line);
}

// Show `text` in `parent`, changing no more of it than differs from what is shown.
export function show(parent, text) {
  const wanted = blocks(text);
  wanted.forEach((block, i) => {
    const there = parent.children[i];
    if (there?.block === `${block.kind}\n${block.source}`) return;
    const element = MAKERS[block.kind](block.source);
    element.block = `${block.kind}\n${block.source}`;
    if (there) there.replaceWith(element);
    else parent.append(element);
  });
  while (parent.children.length > wanted.length) parent.lastElementChild.remove();
}

const MAKERS = { paragraph, heading, list, code };

function paragraph(source) {
  return make("p", source);
}

function heading(source) {
  const [, marks, words] = HEADING.exec(source);
  return make(marks.length < 3 ? "h3" : "h4", words);
}

function code(source) {
  const pre = document.createElement("pre");
  pre.tabIndex = 0; // to scroll it by keys
  pre.append(make("code", null));
  pre.firstChild.textContent = source;
  return pre;
}

function list(source) {
  const items = [];
  for (const line of source.split("\n")) {
    const item = LIST.exec(line);
    if (item) items.push({ indent: item[1].length, mark: item[2], words: item[3] });
    else items.at(-1).words += `\n${line.trim()}`;
  }
  const isOrdered = /\d/.test(items[0].mark);
  const element = document.createElement(isOrdered ? "ol" : "ul");
  for (const { indent, mark, words } of items) {
    const item = make("li", words);
    item.dataset.mark = /\d/.test(mark) ? mark : "•";
    item.dataset.depth = Math.min(2, Math.floor(indent / 2));
    element.append(item);
  }
  return element;
}

function make(tag, words) {
  const element = document.createElement(tag);
  if (words !== null) element.append(...inline(words));
  return element;
}

function inline(words) {
  const nodes = [];
  let end = 0;
  for (const found of words.matchAll(INLINE)) {
    nodes.push(words.slice(end, found.index));
    const [whole, , coded, strong, stressed] = found;
    const element = document.createElement(coded !== undefined ? "code" : strong !== undefined ? "strong" : "em");
    element.textContent = coded ?? strong ?? stressed;
    nodes.push(element);
    end = found.index + whole.length;
  }
  nodes.push(words.slice(end));
  return nodes.filter((node) => node !== "");
}
