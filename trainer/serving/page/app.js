// The page: which user and query are asked about, and which systems answer.
import { askAgain, askFor, clearAnswers, hasAsked, showSystems } from "./answers.js";
import { button, byId, element, tell } from "./elements.js";
import { setHistory } from "./history.js";
import { ask, human } from "./service.js";

const NUM_EXAMPLES = 8;
let systems = []; // the model first

async function showUser(userId) {
  if (!userId) return clearAnswers("Write the id of a user, or take one from the list.", true);
  try {
    const { history } = await ask(`users/${encodeURIComponent(userId)}/history`);
    setHistory(history, userId);
  } catch (error) {
    setHistory([]);
    const unknown = `No user “${userId}” is known here. Take one from the list, or search.`;
    return clearAnswers(error.status === 400 ? unknown : human(error), true);
  }
  if (systems[0].tasks.includes("rec")) return askFor();
  clearAnswers(`${systems[0].title} answers searches: write a query, or take one of the examples.`);
}

function search() {
  const query = byId("query").value.trim();
  if (query) return askFor(query);
  clearAnswers("Write what you are looking for, or take one of the examples.", true);
}

function onSubmit(id, action) {
  byId(id).addEventListener("submit", (event) => { event.preventDefault(); action(); });
}

onSubmit("user-form", () => showUser(byId("user").value.trim()));
onSubmit("search-form", search);
byId("recommend").addEventListener("click", () => askFor());
byId("how-many").addEventListener("change", () => { if (hasAsked()) askAgain(); });
byId("clear").addEventListener("click", () => { setHistory([]); clearAnswers(); });
byId("another").addEventListener("click", () => {
  const users = byId("users").options;
  byId("user").value = users[Math.floor(Math.random() * users.length)].value;
  showUser(byId("user").value);
});
byId("compare").addEventListener("change", () => {
  const place = byId("compare").selectedIndex; // the first is "nothing", as the first system is the model
  showSystems(systems[0], place > 0 ? systems[place] : null);
  if (hasAsked()) askAgain();
});

function option(value, text = value) {
  const made = element("option", text);
  made.value = value;
  return made;
}

function showModel({ model, num_items, queries, systems: found }) {
  systems = found;
  const [{ title, tasks, explains }, ...others] = systems;
  const name = model.name ? `${model.name} version ${model.version}` : model.run;
  byId("model").textContent = `${title} · ${name} · ${num_items.toLocaleString("en")} items`;
  byId("query").placeholder = queries === "words" ? "word numbers, separated by spaces" : "what are you looking for?";
  byId("search-form").classList.toggle("recommends-only", !tasks.includes("src"));
  byId("recommend").hidden = !tasks.includes("rec");
  document.querySelector(".legend").hidden = !explains;
  byId("compares").hidden = !others.length;
  byId("compare").replaceChildren(option("", "nothing"), ...others.map((system) => option(system.name, system.title)));
  showSystems(systems[0], null);
}

function showExamples(queries) {
  byId("examples").hidden = !queries.length || !systems[0].tasks.includes("src");
  byId("examples").replaceChildren(...queries.slice(0, NUM_EXAMPLES).map((query) =>
    button(query, "", () => { byId("query").value = query; search(); })));
}

async function start() {
  const [facts, { users, reason }, examples] = await Promise.all([ask("model"), ask("users"), ask("queries")]);
  showModel(facts);
  showExamples(examples.queries);
  byId("user-form").hidden = !users.length;
  byId("users").replaceChildren(...users.map((id) => option(String(id))));
  setHistory([]);
  if (!users.length) return tell(byId("user-note"), reason);
  byId("user").value = String(users[0]);
  await showUser(byId("user").value);
}

start().catch((error) => clearAnswers(human(error), true));
