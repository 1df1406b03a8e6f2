// Keeps the page as its daemon is: takes the sections that have changed and sets them in place.
//
// The server sends elements as [tag, {attribute: value}, child, ...] and text as text (ztna/pages/markup.py). They are
// built one by one from the lists below, never from markup, so that a name that a peer chose is never more than text.
"use strict";

const TAGS = new Set(["a", "caption", "code", "dd", "details", "div", "dl", "dt", "g", "h1", "h2", "header", "li",
  "meter", "nav", "p", "path", "pre", "rect", "section", "span", "strong", "summary", "svg", "circle", "table",
  "tbody", "td", "text", "th", "thead", "title", "tr", "ul"]);
const ATTRIBUTES = new Set(["aria-hidden", "aria-label", "aria-labelledby", "class", "cx", "cy", "d", "data-label",
  "height", "high", "href", "id", "low", "max", "min", "optimum", "r", "role", "rx", "scope", "tabindex", "value",
  "viewBox", "width", "x", "y"]);
const LINK = /^http:\/\/127\.0\.0\.1:\d+\/$/;
const SVG = "http://www.w3.org/2000/svg";
const HTML = "http://www.w3.org/1999/xhtml";

function isAllowed(name, value) {
  return ATTRIBUTES.has(name) && (name !== "href" || LINK.test(value));
}

function built(node, parent) {
  if (typeof node === "string") return document.createTextNode(node);
  const [tag] = node;
  if (!TAGS.has(tag)) return document.createTextNode("");
  const inSvg = tag === "svg" || (parent !== null && parent.namespaceURI === SVG);
  const element = document.createElementNS(inSvg ? SVG : HTML, tag);
  return filled(element, node);
}

function filled(element, node) {
  const [, attributes, ...children] = node;
  for (const { name } of [...element.attributes]) {
    if (!(name in attributes)) element.removeAttribute(name);
  }
  for (const [name, value] of Object.entries(attributes)) {
    if (isAllowed(name, value) && element.getAttribute(name) !== value) element.setAttribute(name, value);
  }
  while (element.childNodes.length > children.length) element.lastChild.remove();
  children.forEach((child, at) => placed(element, element.childNodes[at], child));
  return element;
}

// Set `node` where `old` is, changing as little as can be: what is focused, selected or scrolled stays so.
function placed(parent, old, node) {
  if (old === undefined) {
    parent.append(built(node, parent));
  } else if (typeof node === "string") {
    if (old.nodeType !== Node.TEXT_NODE) old.replaceWith(node);
    else if (old.data !== node) old.data = node;
  } else if (old.nodeType === Node.ELEMENT_NODE && old.localName === node[0] && TAGS.has(node[0])) {
    filled(old, node);
  } else {
    old.replaceWith(built(node, parent));
  }
}

const live = document.getElementById("live");
const raw = document.querySelector("#raw pre");
let ended = null;

const REFUSALS = {
  403: "its daemon no longer lets this browser ask (status 403). The page is for 127.0.0.1 of its own host.",
  404: "what answers here now has no such page (status 404).",
  503: "too many pages are open. Close one and load this one again.",
};

function say(state, text) {
  if (live.dataset.state === state) return;
  live.dataset.state = state;
  live.textContent = text;
}

async function readRaw() {
  try {
    const answer = await fetch("/status", { cache: "no-store" });
    raw.textContent = await answer.text();
  } catch {
    // The stream says that nobody answers; what was read last stays.
  }
}

function set(event) {
  say("live", "Live");
  ended = null;
  for (const [id, section] of Object.entries(JSON.parse(event.data))) {
    const old = document.getElementById(id);
    if (old !== null) placed(old.parentNode, old, section);
  }
  if (raw.parentNode.open) readRaw();
}

function miss() {
  ended = ended ?? new Date();
  say("away", `No answer since ${ended.toLocaleTimeString()}: this is how it was. Trying again.`);
  // A refusal ends an EventSource for good; any other end it mends itself.
  if (stream.readyState === EventSource.CLOSED) tellRefusal(stream);
}

function unknown(status) {
  return `something else answers here now (status ${status}).`;
}

// An EventSource keeps to itself what it was answered, so that is asked for once more.
async function tellRefusal(refused) {
  const cancel = new AbortController();
  try {
    const answer = await fetch("/events", { cache: "no-store", signal: cancel.signal });
    if (stream !== refused) return;
    const isStream = answer.headers.get("Content-Type")?.startsWith("text/event-stream");
    if (answer.status === 200 && isStream) follow();
    else say("closed", `Not live: ${REFUSALS[answer.status] ?? unknown(answer.status)}`);
  } catch {
    if (stream === refused) follow();
  } finally {
    cancel.abort();
  }
}

// A page that nobody sees gives its connection back: a browser has six for one host, and the daemon so many for all.
let stream = null;
function follow() {
  stream?.close();
  stream = document.hidden ? null : new EventSource("/events");
  stream?.addEventListener("sections", set);
  stream?.addEventListener("error", miss);
}

document.addEventListener("visibilitychange", follow);
follow();
raw.parentNode.addEventListener("toggle", () => {
  if (raw.parentNode.open) readRaw();
});
