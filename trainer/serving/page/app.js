"use strict";
// What is shown: a history (of a known user, or clicked together here), an answer, and the item of it that is chosen.
const state = { history: [], items: [], task: "rec", chosen: null };
const byId = (id) => document.getElementById(id);

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function tell(text, isError = false) {
  byId("message").textContent = text;
  byId("message").classList.toggle("error", isError);
}

// ---- history

function setHistory(history, note) {
  state.history = history;
  state.chosen = null;
  byId("user-note").textContent = note;
  showHistory();
}

function showHistory() {
  // weights belong to the newest clicks, as many as the model reads: match them from the end
  const weights = state.chosen ? state.chosen.weights : [];
  const offset = state.history.length - weights.length;
  for (const task of ["rec", "src"]) {
    const rows = [];
    state.history.forEach((click, place) => {
      if (click.task !== task) return;
      const row = element("li");
      row.append(element("span", click.text || "(no text)"), " ", element("span", String(click.item_id), "id"));
      const weight = place >= offset ? weights[place - offset] : undefined;
      if (weight) {
        for (const view of ["cf", "semantic"]) {
          const bar = element("span", "", `bar ${view}`);
          bar.style.width = `${Math.max(1, 100 * weight[view])}%`;
          bar.title = `${view} ${weight[view].toFixed(3)}`;
          row.append(bar);
        }
      }
      rows.push(row);
    });
    byId(`history-${task}`).replaceChildren(...rows.reverse()); // newest first
  }
}

async function showUser(userId) {
  try {
    const { history } = await ask(`users/${encodeURIComponent(userId)}/history`);
    setHistory(history, `${history.length} clicks, newest first`);
    await recommend();
  } catch (error) {
    byId("user-note").textContent = error.message;
  }
}

// ---- answers

async function show(path, body) {
  tell("…");
  const history = state.history.map(({ item_id, task }) => ({ item_id, task }));
  const started = performance.now();
  try {
    const answer = await ask(path, { history, explain: true, with_text: true, k: 10, ...body });
    state.items = answer.items;
    state.task = path === "search" ? "src" : "rec";
    state.chosen = null;
    tell(`${answer.items.length} items in ${Math.round(performance.now() - started)} ms`);
  } catch (error) {
    state.items = [];
    tell(error.message, true);
  }
  showItems();
  showHistory();
}

function showItems() {
  byId("items").replaceChildren(...state.items.map((item, place) => {
    const row = element("li");
    const name = element("span", item.text || "(no text)");
    name.append(" ", element("span", String(item.item_id), "id"));
    const add = element("button", "click");
    add.title = "add to the history, as if it had been clicked";
    add.addEventListener("click", (event) => {
      event.stopPropagation();
      setHistory([...state.history, { item_id: item.item_id, task: state.task, text: item.text }], `${state.history.length + 1} clicks, newest first`);
      recommend();
    });
    const score = element("span", item.score.toFixed(3), "score");
    score.style.backgroundSize = `${100 * item.score}% 100%`;
    score.title = "P(Yes)";
    row.append(element("span", String(place + 1)), name, score, add);
    row.addEventListener("click", () => {
      state.chosen = item;
      document.querySelectorAll("#items li").forEach((other) => other.classList.toggle("chosen", other === row));
      showHistory();
    });
    return row;
  }));
}

const recommend = () => show("recommend", {});

// ---- start

byId("user-form").addEventListener("submit", (event) => { event.preventDefault(); showUser(byId("user").value.trim()); });
byId("clear").addEventListener("click", () => { setHistory([], "no history: search for something and click it"); state.items = []; tell(""); showItems(); });
byId("another").addEventListener("click", () => {
  const users = byId("users").options;
  if (!users.length) return;
  byId("user").value = users[Math.floor(Math.random() * users.length)].value;
  showUser(byId("user").value);
});
byId("recommend").addEventListener("click", recommend);
byId("search-form").addEventListener("submit", (event) => { event.preventDefault(); show("search", { query: byId("query").value.trim() }); });

async function start() {
  const { model, num_items, queries } = await ask("model");
  byId("model").textContent = `${model.name ? `${model.name} version ${model.version}` : model.run} · ${num_items.toLocaleString("en")} items`;
  byId("query").placeholder = queries === "words" ? "word numbers, separated by spaces" : "what are you looking for?";
  const users = await ask("users");
  byId("users").replaceChildren(...users.users.map((id) => { const option = element("option"); option.value = String(id); return option; }));
  if (users.users.length) {
    byId("user").value = String(users.users[0]);
    await showUser(byId("user").value);
  } else {
    byId("user-note").textContent = users.reason;
  }
}

start().catch((error) => tell(error.message, true));
