// Parts of the page. Text is always set as text: a title is never read as HTML.

export const byId = (id) => document.getElementById(id);

export function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function button(text, className, onClick) {
  const made = element("button", text, className);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

// A note below a heading, or an error in its place.
export function tell(note, text, isError = false) {
  note.textContent = isError ? `⚠ ${text}` : text;
  note.classList.toggle("error", isError);
}

// share: of the track, 0 to 1. name: what a screen reader says before the number.
export function bar(share, number, className, name) {
  const made = element("span", "", `bar ${className}`), track = element("span", "", "track");
  const fill = element("span", "", "fill"), shown = element("span", number.toFixed(3), "number");
  fill.style.width = `${100 * share}%`;
  track.append(fill);
  shown.prepend(element("span", ` ${name} `, "unseen"));
  made.append(track, shown);
  return made;
}

// An item: its text and its id.
export function nameOf({ item_id, text }) {
  const name = element("span", text || "(no text)", "name");
  name.append(" ", element("span", String(item_id), "id"));
  return name;
}
