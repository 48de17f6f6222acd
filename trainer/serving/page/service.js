// Questions to the service, and its errors in words for people.

export async function ask(path, body, signal) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, body === undefined ? { signal } : { ...post, signal });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw Object.assign(new Error(answer.error || `status ${response.status}`), { status: response.status });
  }
  return answer;
}

// A sentence: what went wrong, and what to do.
export function human(error) {
  if (error.status === undefined) return "The service does not answer. Is it still running?";
  if (error.status === 503) return "Too many requests are waiting. Try again in a moment.";
  if (error.status === 504) return "That took too long. Ask for fewer items, or try again.";
  const text = error.message.replace(/^(the request|user): /, "");
  return `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;
}
