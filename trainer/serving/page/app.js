"use strict";
// What is shown: a history (of a known user, or clicked together here), an answer, and the item of it that is chosen.
const state = { history: [], items: [], chosen: null, question: { path: "recommend", body: {} }, running: null };
const NUM_EXAMPLES = 8, NUM_WEIGHS = 3;
const VIEWS = [["cf", "collaborative"], ["semantic", "semantic"]];
const byId = (id) => document.getElementById(id);

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function ask(path, body, signal) {
  const options = body === undefined ? { signal } : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(answer.error || `status ${response.status}`), { status: response.status });
  return answer;
}

// A sentence for people: what went wrong, and what to do.
function human(error) {
  if (error.status === undefined) return "The service does not answer. Is it still running?";
  if (error.status === 503) return "Too many requests are waiting. Try again in a moment.";
  if (error.status === 504) return "That took too long. Ask for fewer items, or try again.";
  const text = error.message.replace(/^(the request|user): /, "");
  return `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;
}

function tell(id, text, isError = false) {
  byId(id).textContent = isError ? `⚠ ${text}` : text;
  byId(id).classList.toggle("error", isError);
}

function bar(share, number, className, name) {
  const made = element("div", "", `bar ${className}`);
  const track = element("span", "", "track"), fill = element("span", "", "fill");
  fill.style.width = `${100 * share}%`;
  track.append(fill);
  made.append(track, element("span", number.toFixed(3), "number"));
  made.lastChild.prepend(element("span", `${name} `, "unseen"));
  return made;
}

// The name of an item: its text and its id.
function nameOf({ item_id, text }) {
  const name = element("span", text || "(no text)");
  name.append(" ", element("span", String(item_id), "id"));
  return name;
}

// ---- history

function setHistory(history) {
  state.history = history;
  state.chosen = null;
  tell("user-note", history.length ? `${history.length} click${history.length > 1 ? "s" : ""}, newest first` : "No clicks yet: search for something and click it.");
  showHistory();
}

// Clicks with the weights that the chosen item gives them; undefined for those that the model does not read.
function weighed() {
  // weights belong to the newest clicks, as many as the model reads: match them from the end
  const weights = state.chosen ? state.chosen.weights : [];
  const offset = state.history.length - weights.length;
  return state.history.map((click, place) => ({ ...click, weight: weights[place - offset] }));
}

// The longest bar is the largest weight: of many items each has a small one.
function weightRow(click, largest) {
  const row = element("li");
  row.append(nameOf(click));
  if (click.weight) row.append(...VIEWS.map(([view, name]) => bar(click.weight[view] / largest, click.weight[view], view, name)));
  return row;
}

function showHistory() {
  const clicks = weighed();
  const largest = Math.max(1e-9, ...clicks.flatMap(({ weight }) => (weight ? [weight.cf, weight.semantic] : [])));
  for (const task of ["rec", "src"]) {
    const rows = clicks.filter((click) => click.task === task).reverse().map((click) => weightRow(click, largest));
    byId(`history-${task}`).replaceChildren(...(rows.length ? rows : [element("li", "none", "id")]));
  }
  byId("chosen").textContent = state.chosen ? `for “${state.chosen.text || state.chosen.item_id}”` : "choose an item to see what it weighs";
  document.querySelectorAll(".weighs").forEach((list) => list.remove());
  if (!state.chosen) return;
  const list = element("ol", "", "weighs");
  list.setAttribute("aria-label", "History items that weigh most");
  const heaviest = clicks.filter(({ weight }) => weight).sort((a, b) => Math.max(b.weight.cf, b.weight.semantic) - Math.max(a.weight.cf, a.weight.semantic));
  list.append(...heaviest.slice(0, NUM_WEIGHS).map((click) => weightRow(click, largest)));
  document.querySelector(".item[aria-pressed=true]").parentElement.append(list);
}

async function showUser(userId) {
  try {
    const { history } = await ask(`users/${encodeURIComponent(userId)}/history`);
    setHistory(history);
    await recommend();
  } catch (error) {
    setHistory([]);
    showItems([]);
    tell("message", error.status === 400 ? `No user “${userId}” is known here. Take one from the list, or search.` : human(error), true);
  }
}

// ---- answers

async function show(path, body) {
  if (state.running) state.running.abort(); // the service drops what nobody waits for
  const running = state.running = new AbortController();
  state.question = { path, body };
  tell("message", "…");
  const history = state.history.map(({ item_id, task }) => ({ item_id, task }));
  const started = performance.now();
  try {
    const k = Number(byId("how-many").value);
    const { items } = await ask(path, { history, explain: true, with_text: true, k, ...body }, running.signal);
    showItems(items);
    if (items.length) tell("message", `${items.length} items in ${Math.round(performance.now() - started)} ms. Choose one to see what it weighs.`);
    else tell("message", "Nothing was found that is not in the history already. Try another query.", true);
  } catch (error) {
    if (running.signal.aborted) return;
    showItems([]);
    tell("message", human(error), true);
  }
}

function showItems(items) {
  state.items = items;
  state.chosen = null;
  byId("items").replaceChildren(...items.map(itemRow));
  showHistory();
}

function itemRow(item, place) {
  const row = element("li"), choose = element("button", "", "item"), add = element("button", "Click");
  choose.type = add.type = "button";
  choose.setAttribute("aria-pressed", "false");
  choose.append(element("span", String(place + 1)), nameOf(item), bar(item.score, item.score, "score", "probability"));
  choose.addEventListener("click", () => {
    document.querySelectorAll(".item").forEach((other) => other.setAttribute("aria-pressed", String(other === choose)));
    state.chosen = item;
    showHistory();
  });
  add.title = "Add to the history, as if it had been clicked";
  add.setAttribute("aria-label", `Click ${item.text || item.item_id}: add it to the history`);
  add.addEventListener("click", () => {
    const task = state.question.path === "search" ? "src" : "rec";
    setHistory([...state.history, { item_id: item.item_id, task, text: item.text }]);
    recommend();
  });
  row.append(choose, add);
  return row;
}

const recommend = () => show("recommend", {});

function search() {
  const query = byId("query").value.trim();
  if (query) return show("search", { query });
  showItems([]);
  tell("message", "Write what you are looking for, or take one of the examples.", true);
}

// ---- start

byId("user-form").addEventListener("submit", (event) => { event.preventDefault(); showUser(byId("user").value.trim()); });
byId("search-form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
byId("recommend").addEventListener("click", recommend);
byId("how-many").addEventListener("change", () => { if (state.items.length) show(state.question.path, state.question.body); });
byId("clear").addEventListener("click", () => { setHistory([]); showItems([]); tell("message", ""); });
byId("another").addEventListener("click", () => {
  const users = byId("users").options;
  byId("user").value = users[Math.floor(Math.random() * users.length)].value;
  showUser(byId("user").value);
});

function showExamples(queries) {
  byId("examples").hidden = !queries.length;
  byId("examples").replaceChildren(...queries.slice(0, NUM_EXAMPLES).map((query) => {
    const button = element("button", query);
    button.type = "button";
    button.addEventListener("click", () => { byId("query").value = query; search(); });
    return button;
  }));
}

async function start() {
  const { model, num_items, queries } = await ask("model");
  byId("model").textContent = `${model.name ? `${model.name} version ${model.version}` : model.run} · ${num_items.toLocaleString("en")} items`;
  byId("query").placeholder = queries === "words" ? "word numbers, separated by spaces" : "what are you looking for?";
  const [{ users, reason }, examples] = await Promise.all([ask("users"), ask("queries")]);
  showExamples(examples.queries);
  byId("user-form").hidden = !users.length;
  byId("users").replaceChildren(...users.map((id) => { const option = element("option"); option.value = String(id); return option; }));
  setHistory([]);
  if (!users.length) return tell("user-note", reason);
  byId("user").value = String(users[0]);
  await showUser(byId("user").value);
}

start().catch((error) => tell("message", human(error), true));
