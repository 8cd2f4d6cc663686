// What the page says to the server: JSON, and streams of server-sent events read by fetch, so that the key is a header.

import { settings } from "./settings.js";

/** The server refused, or could not be reached: `status` 0 is no answer at all. */
export class ApiError extends Error {
  constructor(status, message, retryAfterS) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

// what the error of a stream is called, which has no status of its own
const STATUSES = { authentication_error: 401, rate_limit_error: 429, unavailable_error: 503, invalid_request_error: 400 };

export const errorOf = ({ type, message }) => new ApiError(STATUSES[type] ?? 500, message || "the server gave up");

const where = (path) => new URL(path, document.baseURI);

async function refused(response) {
  let message = "";
  try {
    const body = JSON.parse((await response.text()).slice(0, 100_000));
    message = body.error?.message ?? (typeof body.error === "string" ? body.error : body.detail);
  } catch {
    // not JSON: the status says it
  }
  const after = Number.parseFloat(response.headers.get("retry-after"));
  return new ApiError(
    response.status,
    message || `the server answered ${response.status}`,
    Number.isFinite(after) ? after : undefined,
  );
}

/** A request whose answer is good; its body is still to be read. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (settings.key) headers.Authorization = `Bearer ${settings.key}`;
  let response;
  try {
    const text = body === undefined ? undefined : JSON.stringify(body);
    response = await fetch(where(path), {
      method: text === undefined ? "GET" : "POST",
      headers,
      body: text,
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server cannot be reached");
  }
  if (!response.ok) throw await refused(response);
  return response;
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/** The data of each server-sent event, as it comes. */
export async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the connection to the server broke");
  } finally {
    reader.cancel().catch(() => {});
  }
}
