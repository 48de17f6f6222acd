// The history: clicks of a user of the data, or clicked together here; and what each weighs for a chosen item.
import { bar, byId, element, nameOf, tell } from "./elements.js";

const MAX_HISTORY = 2000; // clicks that the service takes; a model reads fewer
const NUM_HEAVIEST = 3; // shown below the chosen item where the history is further down
const VIEWS = [["cf", "collaborative"], ["semantic", "semantic"]];

// user: the id, while the clicks are just that user's. clicks: oldest first.
export const history = { clicks: [], user: null };

export function setHistory(clicks, user = null) {
  Object.assign(history, { clicks, user });
  const many = `${clicks.length} click${clicks.length > 1 ? "s" : ""}, newest first`;
  tell(byId("user-note"), clicks.length ? many : "No clicks yet: search for something and click it.");
  showWeights(null);
}

// As a request names it. A model may know more of a user than the clicks.
export function asked(system) {
  if (history.user !== null && system.knows_users) return { user_id: history.user };
  return { history: history.clicks.slice(-MAX_HISTORY).map(({ item_id, task, query }) => ({ item_id, task, query: query || null })) };
}

// Both columns, with the weights that an item of an answer gives them (null: none is chosen).
export function showWeights(item) {
  const clicks = weighed(item), scale = largest(clicks);
  for (const task of ["rec", "src"]) {
    const rows = clicks.filter((click) => click.task === task).reverse().map((click) => weightRow(click, scale));
    byId(`history-${task}`).replaceChildren(...(rows.length ? rows : [element("li", "none", "id")]));
  }
  byId("chosen").textContent = item ? ` for “${item.text || item.item_id}”` : ": choose an item to see what it weighs";
}

// The clicks that weigh most for an item, as a list; null where nothing has weights.
export function heaviest(item) {
  const most = ({ weight }) => Math.max(...VIEWS.map(([view]) => weight[view]));
  const clicks = weighed(item), scale = largest(clicks);
  const rows = clicks.filter(({ weight }) => weight).sort((a, b) => most(b) - most(a)).slice(0, NUM_HEAVIEST);
  if (!rows.length) return null;
  const list = element("ol", "", "weighs");
  list.setAttribute("aria-label", "Clicks of the history that weigh most");
  list.append(...rows.map((click) => weightRow(click, scale)));
  return list;
}

// Clicks with their weights; without for those that the model does not read.
function weighed(item) {
  // weights belong to the newest clicks, as many as the model reads: match them from the end
  const weights = item?.weights || [], offset = history.clicks.length - weights.length;
  return history.clicks.map((click, place) => ({ ...click, weight: weights[place - offset] }));
}

function largest(clicks) {
  return Math.max(1e-9, ...clicks.flatMap(({ weight }) => (weight ? VIEWS.map(([view]) => weight[view]) : [])));
}

// The longest bar is the largest weight: of many clicks each has a small one.
function weightRow(click, scale) {
  const row = element("li");
  row.append(nameOf(click));
  if (click.query) row.append(" ", element("span", `“${click.query}”`, "query"));
  if (click.weight) row.append(...VIEWS.map(([view, name]) => bar(click.weight[view] / scale, click.weight[view], view, name)));
  return row;
}
