// Two conversations with the same questions, answered side by side. They are kept in this browser, and nowhere else.
// Texts of models are only ever put into the page as text.
"use strict";

const KEPT = "qlora_lab.chat"; // turns and settings
const TOKEN = "qlora_lab.token"; // until the tab is closed
const NOBODY = ""; // the second side may be left empty

const find = (selector) => document.querySelector(selector);
const sides = [...document.querySelectorAll(".side")];
let state = { turns: [], models: [], temperature: "0.7", maxTokens: "200" };
let running = null; // the AbortController of the answers under way

// What is kept: turns of {asked, answers: [{model, text, ended}, ...]}, one answer for each side, or null.

function restore() {
  try {
    state = { ...state, ...JSON.parse(localStorage.getItem(KEPT)) };
  } catch {
    localStorage.removeItem(KEPT);
  }
}

function keep() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(state));
  } catch {
    trouble("This browser keeps no more of the conversation; clear it.");
  }
}

function trouble(sentence) {
  find("#trouble").textContent = sentence.charAt(0).toUpperCase() + sentence.slice(1);
  find("#trouble").hidden = sentence === "";
}

async function request(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { "Content-Type": "application/json" };
  if (token !== null) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) find("#entry").hidden = false;
  let sentence = `The server answers ${response.status}.`;
  try {
    sentence = (await response.json()).error.message;
  } catch {
    // it was no answer of the protocol
  }
  throw new Error(sentence);
}

function bubble(kind, text) {
  const element = document.createElement("div");
  element.className = kind;
  element.dir = "auto";
  element.textContent = text;
  return element;
}

function show() {
  sides.forEach((side, place) => {
    const turns = side.querySelector(".turns");
    turns.replaceChildren(
      ...state.turns.flatMap(({ asked, answers }) => {
        const answer = answers[place];
        if (!answer) return [];
        const said = bubble(`answer ${answer.ended}`, answer.text);
        const who = bubble("who", { stopped: `${answer.model}, stopped`, length: `${answer.model}, cut at its length` }[answer.ended] ?? answer.model);
        return [bubble("asked", asked), who, said];
      }),
    );
    if (turns.childElementCount === 0) turns.append(bubble("empty", "Nothing said yet."));
    turns.scrollTop = turns.scrollHeight;
  });
}

// The events of a stream, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function messages(place) {
  const said = state.turns.flatMap(({ asked, answers }) => {
    const answer = answers[place];
    if (!answer) return [];
    return [
      { role: "user", content: asked },
      { role: "assistant", content: answer.text },
    ];
  });
  return said.slice(0, -1); // the last answer is the one to be written
}

async function write(place, answer, signal) {
  const side = sides[place];
  const count = side.querySelector(".count");
  count.textContent = "reading";
  const started = performance.now();
  try {
    const response = await request("/v1/chat/completions", {
      method: "POST",
      signal,
      body: JSON.stringify({
        model: answer.model,
        messages: messages(place),
        temperature: Number(state.temperature),
        max_tokens: Number(state.maxTokens),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    const shown = side.querySelector(".turns > .answer:last-child");
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (choice?.delta.content) {
        answer.text += choice.delta.content;
        shown.append(choice.delta.content);
        shown.parentElement.scrollTop = shown.parentElement.scrollHeight;
        count.textContent = "writing";
      }
      if (choice?.finish_reason) answer.ended = choice.finish_reason;
      if (event.usage) {
        const seconds = (performance.now() - started) / 1000;
        count.textContent = `${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`;
      }
    }
  } catch (error) {
    answer.ended = "stopped";
    count.textContent = "stopped";
    if (error.name !== "AbortError") throw error;
  }
}

async function ask(asked) {
  const models = sides.map((side) => side.querySelector("select").value);
  if (models.every((model) => model === NOBODY)) return trouble("Choose a model first.");
  trouble("");
  const answers = models.map((model) => (model === NOBODY ? null : { model, text: "", ended: "writing" }));
  state.turns.push({ asked, answers });
  show();
  running = new AbortController();
  busy(true);
  const outcomes = await Promise.allSettled(
    answers.map((answer, place) => (answer ? write(place, answer, running.signal) : null)),
  );
  const failed = outcomes.find(({ status }) => status === "rejected");
  if (failed) trouble(failed.reason.message);
  if (answers.every((answer) => !answer || (answer.ended === "stopped" && answer.text === ""))) {
    state.turns.pop(); // nothing came: the question can be asked again
    if (find("#text").value === "") find("#text").value = asked;
  }
  running = null;
  keep();
  show();
  busy(false);
}

function busy(now) {
  find("#send").hidden = now;
  find("#stop").hidden = !now;
  if (!now) find("#text").focus();
}

async function begin() {
  try {
    const { data } = await (await request("/v1/models")).json();
    find("#entry").hidden = true;
    trouble("");
    sides.forEach((side, place) => {
      const select = side.querySelector("select");
      const options = data.map(({ id, description }) => {
        const option = new Option(id, id);
        option.title = description;
        return option;
      });
      if (place > 0) options.push(new Option("nobody", NOBODY));
      select.replaceChildren(...options);
      const names = data.map(({ id }) => id);
      // At first the base beside its first adapter.
      const wanted = state.models[place] ?? names[place] ?? NOBODY;
      select.value = names.includes(wanted) || (place > 0 && wanted === NOBODY) ? wanted : names[0];
    });
    document.body.dataset.ready = "yes";
  } catch (error) {
    trouble(error instanceof TypeError ? "The server does not answer." : error.message);
  }
}

find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = find("#text").value.trim();
  if (running !== null || text === "") return;
  find("#text").value = "";
  ask(text);
});

find("#text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("#ask").requestSubmit();
  }
});

find("#stop").addEventListener("click", () => running?.abort());

find("#clear").addEventListener("click", () => {
  running?.abort();
  state.turns.length = 0;
  for (const side of sides) side.querySelector(".count").textContent = "";
  keep();
  show();
});

find("#entry").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, find("#token").value.trim());
  begin();
});

function settings() {
  find("#shown-temperature").textContent = Number(state.temperature).toFixed(1);
}

find("#temperature").addEventListener("input", (event) => {
  state.temperature = event.target.value;
  settings();
  keep();
});

find("#max-tokens").addEventListener("change", (event) => {
  if (event.target.checkValidity() && event.target.value !== "") state.maxTokens = event.target.value;
  event.target.value = state.maxTokens;
  keep();
});

sides.forEach((side, place) =>
  side.querySelector("select").addEventListener("change", (event) => {
    state.models[place] = event.target.value;
    keep();
  }),
);

restore();
find("#temperature").value = state.temperature;
find("#max-tokens").value = state.maxTokens;
settings();
show();
begin();
