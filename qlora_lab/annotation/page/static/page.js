// What the plain form lacks: keys, a vote that is sent again until it is saved, and the time the page was in view.
"use strict";

const UNREAD_MS = 300; // a key so soon after a page change was meant for the page before
const RETRY_MS = 1000;
const TIMEOUT_MS = 20000;

let openedAt = 0;
let seenMs = 0; // while the page was in view, up to `since`
let since = null;
let sending = false;

function opened() {
  openedAt = performance.now();
  seenMs = 0;
  since = document.hidden ? null : openedAt;
  document.querySelector("main").dataset.ready = "yes";
}

document.addEventListener("visibilitychange", () => {
  const now = performance.now();
  if (document.hidden && since !== null) {
    seenMs += now - since;
    since = null;
  } else if (!document.hidden && since === null) {
    since = now;
  }
});

function visibleMs() {
  return Math.round(seenMs + (since === null ? 0 : performance.now() - since));
}

function trouble(sentence) {
  const place = document.getElementById("trouble");
  place.textContent = sentence;
  place.hidden = sentence === "";
}

function show(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  document.title = page.title;
  const main = document.adoptNode(page.querySelector("main"));
  document.querySelector("main").replaceWith(main);
  window.scrollTo(0, 0);
  main.focus({ preventScroll: true });
  const count = document.getElementById("count");
  document.getElementById("said").textContent = count ? count.textContent : "";
  opened();
}

async function answerTo(form, fields) {
  for (;;) {
    try {
      const response = await fetch(form.action, {
        method: "POST",
        body: fields,
        signal: AbortSignal.timeout(TIMEOUT_MS),
      });
      if (response.status < 500) return await response.text();
      trouble("Not saved yet: the server cannot write (is its disk full?). Leave this page open; it keeps trying.");
    } catch {
      trouble("Not saved yet: the server does not answer. Leave this page open; it keeps trying.");
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

document.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (sending || performance.now() - openedAt < UNREAD_MS) return;
  sending = true;
  const fields = new URLSearchParams(new FormData(event.target, event.submitter));
  if (fields.has("milliseconds")) fields.set("milliseconds", visibleMs());
  event.submitter.classList.add("sending");
  const html = await answerTo(event.target, fields);
  trouble("");
  show(html);
  sending = false;
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
  if (button !== null) {
    event.preventDefault();
    button.click();
  }
});

// A vote on its way is lost if the page goes.
window.addEventListener("beforeunload", (event) => {
  if (sending) event.preventDefault();
});

opened();
