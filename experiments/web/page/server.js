/** The prediction service: connected, or tried again with growing pauses. */

import { pause, PeerError } from "./connection.js";
import { Inference } from "./inference.js";
import { Templates } from "./torchfile.js";

const PAUSES_S = [1, 2, 3, 5, 10]; // before each further try; then always the last
const SILENT_S = 10; // a server that was asked for a heartbeat each second is lost after so long

export class Server {
  /**
   * @param {object} model  what /model.json gives
   * @param {(state: "off" | "connecting" | "connected" | "waiting" | "refused", words: string) => void} onState
   */
  constructor(model, onState) {
    this.model = model;
    this.onState = onState;
    this.templates = new Templates(new URL("/", location.href));
    this.inference = null; // while connected
    this.stop = null; // ends the present tries
  }

  get isConnected() {
    return this.inference !== null;
  }

  /** Connect to an address, and stay connected, until another is given. */
  async connect(url) {
    this.#end();
    const stop = (this.stop = new AbortController());
    for (let tries = 0; !stop.signal.aborted; tries++) {
      const connectedFor = await this.#once(url, stop.signal);
      if (stop.signal.aborted || connectedFor === null) return;
      if (connectedFor > 0) tries = 0;
      await this.#wait(PAUSES_S[Math.min(tries, PAUSES_S.length - 1)], stop.signal);
    }
  }

  /** End the connection, and open no other until `connect`. */
  leave() {
    this.#end();
    this.onState("off", "not connected");
  }

  #end() {
    const { inference } = this;
    this.inference = null;
    inference?.close();
    this.stop?.abort();
  }

  /**
   * @returns ms for which the service was there, 0 if it was not; null: trying again is of no use
   */
  async #once(url, signal) {
    this.onState("connecting", "connecting …");
    try {
      let tellEnded;
      const ended = new Promise((resolve) => (tellEnded = resolve));
      const options = { timeoutS: SILENT_S, signal, onClosed: tellEnded };
      const inference = await Inference.open(url, this.model, this.templates, options);
      const { run, round } = inference.offer;
      const start = performance.now();
      this.inference = inference;
      this.onState("connected", `connected to run ${run}, as after round ${round + 1}`);
      const error = await ended;
      if (this.inference === inference) this.inference = null;
      if (!error.again && !signal.aborted) throw error;
      this.lost = error;
      return performance.now() - start;
    } catch (error) {
      if (signal.aborted) return null;
      const again = error instanceof PeerError ? error.again : false;
      this.lost = error;
      if (again) return 0;
      this.onState("refused", error.message);
      return null;
    }
  }

  async #wait(seconds, signal) {
    for (let left = seconds; left > 0 && !signal.aborted; left--) {
      const answered = /^the server (closed|stopped)/.test(this.lost.message);
      const why = answered ? "not now" : "no answer";
      this.onState("waiting", `${why}, trying again in ${left} s (${this.lost.message})`);
      await pause(1, signal);
    }
  }
}
