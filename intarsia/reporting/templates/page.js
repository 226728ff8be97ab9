"use strict";
// The puzzle picture reacts to pointer, keyboard and touch. Without this script it is a plain picture.
for (const board of document.querySelectorAll(".board")) {
  const data = JSON.parse(board.querySelector(".data").textContent);
  const panel = board.querySelector(".panel");
  const hint = [...panel.childNodes];
  const pictures = [...board.querySelectorAll(".picture")];
  const depth = board.querySelector(".depth");
  let held = null; // a layer that was tapped stays selected until another is

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const list = (pairs) => {
    const names = make("dl");
    for (const [name, value] of pairs) {
      const row = make("div");
      row.append(make("dt", "", name), make("dd", "", String(value)));
      names.append(row);
    }
    return names;
  };
  const influence = (layer) => (data.influence[layer] === undefined ? [] : [["block influence of " + layer, data.influence[layer]]]);
  const share = (part) => {
    if (part.kv === undefined) return part.weight === undefined ? "whole" : "times " + part.weight;
    return Math.round((part.kv.length / data.kv + part.channels / data.channels) * 500) / 10 + " %";
  };
  // A width as an attribute, because the page allows no inline styles.
  const bar = (part) => {
    const space = "http://www.w3.org/2000/svg";
    const drawing = document.createElementNS(space, "svg");
    drawing.setAttribute("viewBox", "0 0 100 10");
    drawing.setAttribute("preserveAspectRatio", "none");
    const filled = document.createElementNS(space, "rect");
    filled.setAttribute("width", String((100 * part.channels) / data.channels));
    filled.setAttribute("height", "10");
    filled.setAttribute("class", "w" + part.wood);
    drawing.append(filled);
    const frame = make("div", "bar");
    frame.append(drawing);
    return frame;
  };
  const pieces = (part) => {
    const box = make("div", "part");
    const title = make("p");
    title.append(make("span", "swatch w" + part.wood));
    title.append(make("b", "", (part.variant ? part.variant + ", " : "") + "layer " + part.layer), ", " + share(part));
    box.append(title);
    if (part.kv === undefined) return box;
    const heads = make("div", "heads");
    for (let group = 0; group < data.kv; group++) {
      const kept = part.kv.includes(group);
      heads.append(make("i", kept ? "kept w" + part.wood : "", String(group)));
    }
    const per = data.heads ? ", " + data.heads + " query heads each" : "";
    box.append(make("div", "small", part.kv.length + " of " + data.kv + " KV groups" + per), heads);
    box.append(make("div", "small", part.channels + " of " + data.channels + " " + data.mlp), bar(part));
    if (part.ranges) box.append(make("div", "small", data.mlp + " " + part.ranges));
    return box;
  };
  const showOutput = (layers, index) => {
    const found = data.depths[layers][index];
    const [first, stop] = found.span;
    const stands = stop - first === 1 ? "original layer " + first : "original layers " + first + " to " + (stop - 1);
    panel.replaceChildren(make("h4", "", "Output layer " + index), make("p", "stands", "stands for " + stands));
    panel.append(...found.parts.map(pieces));
    panel.append(list([...found.parts.flatMap((part) => influence(part.layer)), ...(found.notes || [])]));
  };
  const showOriginal = (layers, layer) => {
    const outputs = data.depths[layers].flatMap((output, index) => output.parts.filter((part) => part.layer === layer).map((part) => [index, part]));
    panel.replaceChildren(make("h4", "", "Original layer " + layer));
    panel.append(make("p", "stands", outputs.length ? "in output layer " + outputs.map(([index]) => index).join(", ") : "dropped"));
    panel.append(...outputs.map(([, part]) => pieces(part)));
    const span = data.spans[layer] === undefined ? [] : [["span influence of " + layer + " and " + (layer + 1), data.spans[layer]]];
    panel.append(list([...influence(layer), ...span]));
  };
  const current = () => pictures.find((picture) => !picture.hidden);
  const clear = () => {
    const drawing = current().querySelector("svg");
    drawing.classList.remove("dim");
    for (const element of drawing.querySelectorAll(".on")) element.classList.remove("on");
  };
  const show = (handle) => {
    clear();
    if (!handle) {
      panel.replaceChildren(...hint);
      return;
    }
    const drawing = current().querySelector("svg");
    const { side, layer } = handle.dataset;
    drawing.classList.add("dim");
    handle.classList.add("on");
    const other = side === "in" ? "out" : "in";
    for (const ribbon of drawing.querySelectorAll(`.ribbon[data-${side}="${layer}"]`)) {
      ribbon.classList.add("on");
      drawing.querySelector(`.layer[data-side="${other}"][data-layer="${ribbon.dataset[other]}"]`).classList.add("on");
    }
    (side === "in" ? showOriginal : showOutput)(current().dataset.layers, Number(layer));
  };
  const handleOf = (event) => {
    const ribbon = event.target.closest(".ribbon");
    if (ribbon) return current().querySelector(`.layer[data-side="out"][data-layer="${ribbon.dataset.out}"]`);
    return event.target.closest(".layer");
  };
  for (const picture of pictures) {
    picture.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse") show(handleOf(event) || held);
    });
    picture.addEventListener("pointerleave", () => show(held));
    picture.addEventListener("focusin", (event) => show(handleOf(event)));
    picture.addEventListener("click", (event) => {
      const handle = handleOf(event);
      held = handle === held ? null : handle;
      show(held);
    });
    picture.addEventListener("keydown", (event) => {
      if (event.key === "Escape") show((held = null));
      if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
      const handles = [...picture.querySelectorAll(".layer")];
      const next = handles[handles.indexOf(event.target.closest(".layer")) + (event.key === "ArrowDown" ? 1 : -1)];
      if (next) next.focus();
      event.preventDefault();
    });
  }
  if (depth) {
    depth.hidden = false;
    depth.querySelector("input").addEventListener("input", (event) => {
      held = null;
      show(null);
      pictures.forEach((picture, index) => (picture.hidden = index !== Number(event.target.value)));
      depth.querySelector("output").textContent = current().dataset.layers;
    });
  }
}
