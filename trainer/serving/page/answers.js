// Answers of the model, and of a system beside it: one pane each, with the places of common items marked.
import { bar, button, byId, element, nameOf, tell } from "./elements.js";
import { asked, heaviest, history, setHistory, showWeights } from "./history.js";
import { ask, human } from "./service.js";

const WORDS = { rec: "recommends", src: "answers searches" };
// what was asked last: "recommend" or "search", and the query; path null: nothing that is still shown
const question = { path: null, query: null };

class Pane {
  constructor(root) {
    this.title = root.querySelector("h3");
    this.note = root.querySelector(".note");
    this.list = root.querySelector("ol");
    this.root = root;
    this.items = [];
    this.system = null; // as /model describes it; null: nothing to compare with
  }

  show(system, isNamed) {
    this.system = system;
    this.root.hidden = !system;
    this.title.textContent = system ? system.title : "";
    this.title.hidden = !isNamed;
  }

  clear(text = "", isError = false) {
    this.running?.abort(); // the service drops what nobody waits for
    this.items = [];
    this.list.replaceChildren();
    tell(this.note, text, isError);
  }

  async ask() {
    const { path, query } = question, task = path === "search" ? "src" : "rec";
    this.clear("One moment …");
    if (!this.system.tasks.includes(task)) return this.clear(`${this.system.title} ${WORDS[this.system.tasks[0]]} only.`);
    const running = this.running = new AbortController(), started = performance.now();
    const body = { system: this.system.name, explain: this.system.explains, with_text: true, k: Number(byId("how-many").value) };
    if (query) body.query = query;
    try {
      const { items } = await ask(path, { ...asked(this.system), ...body }, running.signal);
      if (!items.length) return this.clear("Nothing was found that is not in the history already. Try another query.", true);
      this.fill(items, Math.round(performance.now() - started));
    } catch (error) {
      if (!running.signal.aborted) this.clear(human(error), true);
    }
  }

  fill(items, milliseconds) {
    this.items = items;
    this.list.replaceChildren(...items.map((item, place) => this.row(item, place)));
    const sentences = [`${items.length} items in ${milliseconds} ms.`];
    if (!question.query && !history.clicks.length) sentences.push("Without a history these are the most clicked ones.");
    else if (this.system.explains) sentences.push("Choose one to see what it weighs.");
    tell(this.note, sentences.join(" "));
    markCommon();
  }

  row(item, place) {
    const row = element("li"), choose = button("", "item", () => this.choose(item, row));
    choose.setAttribute("aria-pressed", "false");
    choose.dataset.item = item.item_id;
    const name = nameOf(item);
    name.append(element("span", "", "common"));
    choose.append(element("span", String(place + 1), "place"), name, bar(Math.min(1, item.score), item.score, "score", "score"));
    const add = button("Click", "", () => addClick(item));
    add.title = "Add to the history, as if it had been clicked";
    add.setAttribute("aria-label", `Click ${item.text || item.item_id}: add it to the history`);
    row.append(choose, add);
    return row;
  }

  choose(item, row) {
    forgetChosen();
    document.querySelectorAll(".item").forEach((one) => one.classList.toggle("same", one.dataset.item === String(item.item_id)));
    row.querySelector(".item").setAttribute("aria-pressed", "true");
    showWeights(item);
    const list = heaviest(item);
    if (list) row.append(list);
  }
}

const [model, other] = [...document.querySelectorAll(".pane")].map((root) => new Pane(root));

export function showSystems(first, second) {
  model.show(first, Boolean(second));
  other.show(second, true);
  document.body.classList.toggle("compares", Boolean(second));
  if (!second) other.clear();
}

// Asks both; with a query it is a search.
export function askFor(query = null) {
  Object.assign(question, { path: query ? "search" : "recommend", query });
  return askAgain();
}

export function askAgain() {
  showWeights(null);
  return Promise.all([model, other].filter((pane) => pane.system).map((pane) => pane.ask()));
}

export const hasAsked = () => question.path !== null;

// Takes away what was shown, and says why.
export function clearAnswers(text = "", isError = false) {
  question.path = null;
  showWeights(null);
  other.clear();
  model.clear(text, isError);
}

function addClick(item) {
  const click = { item_id: item.item_id, text: item.text, task: question.query ? "src" : "rec", query: question.query || "" };
  setHistory([...history.clicks, click]);
  askFor(model.system.tasks.includes("rec") ? null : question.query);
}

function forgetChosen() {
  document.querySelectorAll(".item[aria-pressed=true]").forEach((one) => one.setAttribute("aria-pressed", "false"));
  document.querySelectorAll(".weighs").forEach((list) => list.remove());
}

// Says of an item of both answers where the other has it.
function markCommon() {
  for (const [mine, its] of [[model, other], [other, model]]) {
    const places = new Map(its.items.map((item, place) => [String(item.item_id), place + 1]));
    for (const choose of mine.list.querySelectorAll(".item")) {
      const place = places.get(choose.dataset.item), mark = choose.querySelector(".common");
      mark.textContent = place ? `${its.system.title}: ${place}` : "";
    }
  }
}
