// What a page asks the site for, and what it cannot do.

import { oneLine, PeerError } from "./connection.js";

/** This page cannot compute its part: a retry would fail too. */
export class TrainingError extends Error {}

async function get(fetcher, url) {
  const answer = await fetcher(url).catch((error) => {
    throw new PeerError(`the site cannot be reached: ${error.message}`, true);
  });
  if (!answer.ok) throw new TrainingError(oneLine((await answer.text()).trim()));
  return answer;
}

/** Return the JSON at an address of the site. */
export async function getJson(fetcher, url) {
  return (await get(fetcher, url)).json();
}

/** Return the bytes at an address of the site. */
export async function getBytes(fetcher, url) {
  return new Uint8Array(await (await get(fetcher, url)).arrayBuffer());
}
