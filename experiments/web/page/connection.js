// A WebSocket with an SFL server: messages out and in, heartbeats, silence, refusals in words.

import { Decoder, encode, NOWHERE, ProtocolError } from "./frames.js";

export const HEARTBEAT_S = 1; // how often the server shall be heard, where it has nothing to say
const MOST_IN_MESSAGE = 64 * 1024; // bytes of one WebSocket message
const FIRST_PAUSE_S = 0.1;
export const LONGEST_PAUSE_S = 5;

// Messages that end a conversation: the verb, and whether connecting again may help.
const LAST_WORDS = new Map([
  ["ABORT", ["stopped", true]],
  ["END_RUN", ["ended the run", false]],
  ["INVALID_MESSAGE", ["refused this page", false]],
  ["FAILED", ["failed", false]],
  ["TRY_AGAIN", ["closed this connection", true]],
]);
// Codes with which a WebSocket is closed where this page did wrong (RFC 6455, section 7.4.1). Others
// pass: 1013 is "try again later", 1001 "going away", 1006 a connection that broke.
const REFUSALS = new Set([1002, 1003, 1007, 1008, 1009, 1010]);

/** The conversation is over: the server said so, or cannot be reached. */
export class PeerError extends Error {
  /**
   * @param {string} message
   * @param {boolean} again whether connecting again may help
   */
  constructor(message, again) {
    super(message);
    this.again = again;
  }
}

function saidLast({ type, content }) {
  const [verb, again] = LAST_WORDS.get(type);
  return new PeerError(`the server ${verb}: ${oneLine(content)}`, again);
}

/** Return text from a server as one line of bounded length. */
export function oneLine(text, most = 500) {
  const plain = typeof text === "string" ? text : JSON.stringify(text) ?? "";
  return plain.slice(0, most).replace(/[\p{C}\p{Z}]/gu, " ");
}

/** Wait for some seconds, or until the signal aborts. */
export function pause(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** One connection; use `Connection.open`. */
export class Connection {
  /**
   * Open a connection.
   * @param {string | URL} url ws: or wss:
   * @param {{limits?: Record<string, number>, timeoutS?: number, signal?: AbortSignal,
   *   onNotice?: (text: string) => void, onClosed?: (error: PeerError) => void}} options
   *   `limits`: the most bytes of a file by message type; `timeoutS`: a server that is silent for
   *   so long is lost; `signal`: ends it
   * @returns {Promise<Connection>}
   */
  static open(url, options = {}) {
    return new Promise((resolve, reject) => {
      let socket;
      try {
        socket = new WebSocket(url);
      } catch (error) {
        reject(new PeerError(`${url} is no address of a WebSocket: ${error.message}`, false));
        return;
      }
      const connection = new Connection(socket, url, options);
      socket.onopen = () => {
        connection.isOpen = true;
        resolve(connection);
      };
      connection.ended.then(reject);
    });
  }

  constructor(socket, url, { limits = {}, timeoutS = 30, signal, onNotice, onClosed }) {
    this.socket = socket;
    this.url = url;
    this.timeoutS = timeoutS;
    this.onNotice = onNotice ?? (() => {});
    this.name = "";
    this.at = NOWHERE; // for heartbeats
    this.heartbeatS = Infinity; // what the server asks for
    this.bytesSent = this.bytesReceived = 0;
    this.isOpen = false;
    this.error = null;
    this.ended = new Promise((resolve) => (this.tellEnded = resolve));
    if (onClosed) this.ended.then(onClosed);
    this.decoder = new Decoder(limits);
    this.messages = [];
    this.waiting = null;
    this.spokeAt = this.heardAt = Date.now();
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => this.receiveBytes(data);
    socket.onclose = (event) => this.end(this.lastWords() ?? this.closedBy(event));
    socket.onerror = () => this.isOpen || socket.onclose({}); // some give no close after it
    this.farewell = ""; // the type of message with which a stopped page leaves
    const stop = () => this.end(new PeerError("stopped in the page", false), this.farewell);
    signal?.addEventListener("abort", stop);
    // A page in the background has rare timers: heartbeats are sent on those of the server, too.
    this.timer = setInterval(() => this.beat(), 250);
    this.timer.unref?.();
  }

  set limits(limits) {
    this.decoder.limits = limits;
  }

  /** Return the error for a message that ended the conversation and was not read yet. */
  lastWords() {
    const message = this.messages.find(({ type }) => LAST_WORDS.has(type));
    return message && saidLast(message);
  }

  /** Return the error for a closed WebSocket, in the words of who closed it, if there are any. */
  closedBy({ code = 0, reason = "" }) {
    const lost = this.isOpen ? "the connection to the server is lost" : `the server at ${this.url} cannot be reached`;
    return new PeerError(oneLine(reason) || lost, !REFUSALS.has(code));
  }

  /**
   * Send a message.
   * @param {string} type
   * @param {any} content any JSON value
   * @param {{at?: import("./frames.js").Position, payload?: Uint8Array}} more
   */
  send(type, content = "", { at = NOWHERE, payload } = {}) {
    if (this.error) throw this.error;
    this.bytesSent += this.sendBytes(encode({ type, sender: this.name, receiver: "server", at, content, payload }));
  }

  sendBytes(bytes) {
    this.spokeAt = Date.now();
    for (let start = 0; start < bytes.length; start += MOST_IN_MESSAGE) {
      this.socket.send(bytes.subarray(start, start + MOST_IN_MESSAGE));
    }
    return bytes.length;
  }

  /**
   * Return the next message, of one of these types and, if given, of this position.
   * @param {string[]} types
   * @param {import("./frames.js").Position} [at]
   * @returns {Promise<import("./frames.js").Message>}
   */
  async receive(types, at) {
    const message = await this.next();
    if (LAST_WORDS.has(message.type)) throw this.end(saidLast(message));
    const wanted = types.join(" or ");
    if (!types.includes(message.type)) {
      throw this.refuse(`the server sent ${oneLine(message.type, 40)}, expected was ${wanted}`);
    }
    const differs = at && ["run", "round", "step", "client", "link"].some((n) => message.at[n] !== at[n]);
    if (differs) {
      const [theirs, ours] = [message.at, at].map((place) => JSON.stringify(place));
      throw this.refuse(`the server sent ${message.type} for ${theirs}, expected was ${ours}`);
    }
    return message;
  }

  next() {
    if (this.messages.length) return Promise.resolve(this.messages.shift());
    if (this.error) return Promise.reject(this.error);
    return new Promise((resolve, reject) => (this.waiting = { resolve, reject }));
  }

  receiveBytes(data) {
    if (this.error) return;
    this.heardAt = Date.now();
    try {
      if (typeof data === "string") throw new ProtocolError("the server sent text");
      this.decoder.feed(new Uint8Array(data));
      for (let found = this.decoder.next(); found; found = this.decoder.next()) this.take(found);
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      this.refuse(error.message);
    }
    this.beat();
  }

  take(message) {
    if (message.type === "HEARTBEAT") return;
    this.bytesReceived += message.bytes;
    if (message.type === "MESSAGE") {
      this.onNotice(oneLine(message.content));
    } else if (this.waiting) {
      const { resolve } = this.waiting;
      this.waiting = null;
      resolve(message);
    } else if (this.messages.push(message) > 16) {
      throw new ProtocolError("the server sends what nobody asked for");
    }
  }

  /** Send a heartbeat if it is due; notice a silent server. */
  beat() {
    if (this.error || !this.isOpen) return;
    const now = Date.now();
    if (now - this.heardAt > this.timeoutS * 1000) {
      this.end(new PeerError(`the server sent nothing for ${this.timeoutS} seconds`, true));
    } else if (now - this.spokeAt >= this.heartbeatS * 500) {
      this.sendBytes(encode({ type: "HEARTBEAT", sender: this.name, receiver: "server", at: this.at }));
    }
  }

  /** Tell the server that it broke the protocol, and end. */
  refuse(why) {
    return this.end(new PeerError(why, false), "INVALID_MESSAGE");
  }

  /** End the conversation with an error, and tell the server the reason if a type is given. */
  end(error, type = "") {
    if (this.error) return this.error;
    if (type && this.isOpen) this.send(type, oneLine(error.message));
    this.error = error;
    clearInterval(this.timer);
    this.socket.close();
    this.waiting?.reject(error);
    this.waiting = null;
    this.tellEnded(error);
    return error;
  }

  /** Leave: nothing more is sent or received. */
  close() {
    this.end(new PeerError("closed here", false));
  }
}

/**
 * Open a connection, trying again with growing pauses for so long as the server is not there.
 * @param {string | URL} url
 * @param {ConstructorParameters<typeof Connection>[2] & {patienceS?: number,
 *   onPause?: (error: PeerError) => void}} options `onPause`: told why it is tried again
 */
export async function openWithin(url, { patienceS = 60, onPause = () => {}, ...options }) {
  const until = Date.now() + patienceS * 1000;
  for (let pauseS = FIRST_PAUSE_S; ; pauseS = Math.min(pauseS * 2, LONGEST_PAUSE_S)) {
    if (options.signal?.aborted) throw new PeerError("stopped in the page", false);
    try {
      return await Connection.open(url, options);
    } catch (error) {
      if (!error.again || options.signal?.aborted || Date.now() > until) throw error;
      onPause(error);
      await pause(pauseS, options.signal);
    }
  }
}
