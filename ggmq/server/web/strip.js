// A model's layers in their order, coloured by the device that holds them: the page's own figure.

import { h } from "./dom.js";
import { colourOf, placesOf } from "./feed.js";
import { layers } from "./words.js";

const MOST_CELLS = 96;

function sentence(places) {
  return places
    .map(({ first, last, worker, device }) =>
      device
        ? `${layers(first, last)} on ${worker.name} ${device.name}${worker.state === "ready" ? "" : `, ${worker.state}`}`
        : `${layers(first, last)} nowhere`,
    )
    .join("; ");
}

export function strip(snapshot, model, { labels = false } = {}) {
  const places = placesOf(snapshot, model);
  const parts = places.map(({ first, last, worker, device }) => {
    const n = last - first + 1;
    const state = device ? worker.state : "lost";
    return h(
      "div",
      {
        class: `part ${device ? `dev-${colourOf(worker, device)}` : "nowhere"} is-${state}`,
        vars: { "--n": n, "--cells": model.n_layers <= MOST_CELLS ? n : 1 },
        title: device ? `${layers(first, last)}: ${worker.name} ${device.name}` : `${layers(first, last)}: on no worker`,
      },
      h("div", { class: "cells" }),
      labels &&
        h(
          "span",
          { class: "part-label" },
          device ? worker.name : "nowhere",
          h("small", {}, first === last ? `${first}` : `${first}–${last}`),
        ),
    );
  });
  const busy = snapshot.slots.some((slot) => slot.state !== "idle" && (!slot.model || slot.model === model.name));
  return h(
    "div",
    {
      class: `strip${labels ? " has-labels" : ""}${busy ? " is-busy" : ""}`,
      role: "img",
      "aria-label": `Layers: ${sentence(places)}`,
    },
    parts,
  );
}

/** What a strip looks like, to see whether it must be drawn again. */
export function stripKey(snapshot, model) {
  const busy = snapshot.slots.some((slot) => slot.state !== "idle");
  return `${model.name} ${busy} ${sentence(placesOf(snapshot, model))}`;
}
