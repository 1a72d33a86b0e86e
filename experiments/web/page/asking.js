// What a page asks the site for, and what it cannot do.

import { oneLine, PeerError } from "./connection.js";

/** This page cannot compute its part: a retry would fail too. */
export class TrainingError extends Error {}

async function get(fetcher, url) {
  const answer = await arrived(fetcher(url));
  if (answer.ok) return answer;
  const why = oneLine((await arrived(answer.text())).trim());
  throw answer.status >= 500 ? new PeerError(`the site cannot answer now: ${why}`, true) : new TrainingError(why);
}

/** Return what comes from the site; what does not come whole may come at the next try. */
function arrived(promise) {
  return promise.catch((error) => {
    throw new PeerError(`the site cannot be reached: ${error.message}`, true);
  });
}

/** Return the JSON at an address of the site. */
export async function getJson(fetcher, url) {
  return arrived((await get(fetcher, url)).json());
}

/** Return the bytes at an address of the site. */
export async function getBytes(fetcher, url) {
  return new Uint8Array(await arrived((await get(fetcher, url)).arrayBuffer()));
}
