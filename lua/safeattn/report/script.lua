-- what the page of a report does: computes the rows that are looked at from the inputs, by the definition, and draws

return [==[
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { look: 0, b: 0, h: 0, i: 0, j: 0, show: "weights", sort: "to o" };

// Inputs

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let n = 0; n < raw.length; n++) bytes[n] = raw.charCodeAt(n);
  return bytes;
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

// f32: three low bytes of each number, then the highest bytes, as nibbles into a table of common ones; 15: from a list.
function unpackSingles(bytes, count) {
  const words = new Uint32Array(count), table = bytes.subarray(0, 15), low = 15, high = low + 3 * count;
  let rare = high + (count + 1 >> 1);
  for (let n = 0; n < count; n++) {
    const code = bytes[high + (n >> 1)] >> 4 * (n & 1) & 15, top = code === 15 ? bytes[rare++] : table[code];
    const at = low + 3 * n;
    words[n] = bytes[at] | bytes[at + 1] << 8 | bytes[at + 2] << 16 | top << 24;
  }
  return new Float32Array(words.buffer);
}

function numbers(packed) {
  if (!packed) return null;
  const bytes = bytesOf(packed.data), count = packed.count;
  if (packed.dtype === "f32") return unpackSingles(bytes, count);
  const view = new DataView(bytes.buffer), list = new Float64Array(count), word = new DataView(new ArrayBuffer(4));
  for (let n = 0; n < count; n++) {
    if (packed.dtype === "f64") list[n] = view.getFloat64(8 * n, true);
    else if (packed.dtype === "f16") list[n] = half(view.getUint16(2 * n, true));
    else { word.setUint32(0, view.getUint16(2 * n, true) << 16); list[n] = word.getFloat32(0); }
  }
  return list;
}

function opened(look) {
  if (look.q.dtype) {
    for (const name of ["q", "k", "v", "dout", "sinks", "alibi"]) look[name] = numbers(look[name]);
    if (look.bias) look.bias = { shape: look.bias.shape, list: numbers(look.bias) };
    look.visible = bytesOf(look.visible);
    look.keep = look.keep ? bytesOf(look.keep) : null;
  }
  return look;
}

const bit = (bytes, n) => bytes[Math.floor(n / 8)] >> n % 8 & 1;
const current = () => opened(data.looks[state.look]);

// One query, by the definition; the lists run over the keys that it sees

function dot(x, xAt, y, yAt, width) {
  let s0 = 0, s1 = 0, s2 = 0, s3 = 0, d = 0;
  for (; d + 3 < width; d += 4) {
    s0 += x[xAt + d] * y[yAt + d]; s1 += x[xAt + d + 1] * y[yAt + d + 1];
    s2 += x[xAt + d + 2] * y[yAt + d + 2]; s3 += x[xAt + d + 3] * y[yAt + d + 3];
  }
  for (; d < width; d++) s0 += x[xAt + d] * y[yAt + d];
  return s0 + s2 + (s1 + s3);
}

function biasAt(bias, b, h, i, j) {
  if (!bias) return 0;
  let at = 0;
  [b, h, i, j].forEach((index, d) => { at = at * bias.shape[d] + (bias.shape[d] === 1 ? 0 : index); });
  return bias.list[at];
}

function visibleKeys(look, b, h, i) {
  const plane = (look.maskB === 1 ? 0 : b) * look.maskH + (look.maskH === 1 ? 0 : h);
  const first = (plane * look.L + i) * look.S, keys = [];
  for (let j = 0; j < look.S; j++) if (bit(look.visible, first + j)) keys.push(j);
  return keys;
}

function score(look, b, h, i, j) {
  const plane = b * look.H + h, keyPlane = b * look.Hkv + Math.floor(h / (look.H / look.Hkv));
  let s = look.scale * dot(look.q, (plane * look.L + i) * look.E, look.k, (keyPlane * look.S + j) * look.E, look.E);
  if (look.softcap > 0) s = look.softcap * Math.tanh(s / look.softcap);
  s += biasAt(look.bias, b, h, i, j);
  return look.alibi ? s - look.alibi[h] * Math.abs(j - i - look.diagonal) : s;
}

function softmax(scores, sink) {
  let max = sink === null ? -Infinity : sink, sum = 0;
  for (const s of scores) if (s > max) max = s;
  const weights = scores.map((s) => Math.exp(s - max));
  for (const p of weights) sum += p;
  if (sink !== null) sum += Math.exp(sink - max);
  return { weights: weights.map((p) => p / sum), lse: max + Math.log(sum) };
}

function row(look, b, h, i) {
  const keys = visibleKeys(look, b, h, i), sink = look.sinks ? look.sinks[h] : null;
  const scores = Float64Array.from(keys, (j) => score(look, b, h, i, j));
  if (!keys.length) {
    return { keys, scores, weights: [], keep: [], dP: [], dS: [], lse: sink === null ? -Infinity : sink };
  }
  const { weights, lse } = softmax(scores, sink), plane = b * look.H + h;
  const values = (b * look.Hkv + Math.floor(h / (look.H / look.Hkv))) * look.S, Ev = look.Ev;
  const keep = Float64Array.from(keys, (j) =>
    look.keep && !bit(look.keep, (plane * look.L + i) * look.S + j) ? 0 : 1 / (1 - look.dropout));
  const result = { keys, scores, weights, keep, lse };
  if (!look.dout) return result;
  const at = (plane * look.L + i) * Ev, out = new Float64Array(Ev);
  keys.forEach((j, n) => {
    const w = keep[n] * weights[n];
    if (keep[n]) for (let d = 0; d < Ev; d++) out[d] += w * look.v[(values + j) * Ev + d];
  });
  const delta = dot(look.dout, at, out, 0, Ev);
  result.dP = Float64Array.from(keys, (j, n) =>
    keep[n] ? keep[n] * dot(look.dout, at, look.v, (values + j) * Ev, Ev) : 0);
  result.dS = result.dP.map((dp, n) => weights[n] * (dp - delta));
  return result;
}

function contribution(look, b, h, found, n) {
  const at = ((b * look.Hkv + Math.floor(h / (look.H / look.Hkv))) * look.S + found.keys[n]) * look.Ev;
  return found.keep[n] ? found.keep[n] * found.weights[n] * Math.sqrt(dot(look.v, at, look.v, at, look.Ev)) : 0;
}

// Pictures: as in the terminal, a cell has the highest kind of its tile, and of numbers the one of largest magnitude

const MASKED = 0, ZERO = 1, NUMBER = 2, NEGINF = 3, POSINF = 4, NAN = 5;
const kinds = ["masked", "zero", "number", "neginf", "posinf", "nan"];
const kindOf = (x) => x !== x ? NAN : x === 0 ? ZERO : x === Infinity ? POSINF : x === -Infinity ? NEGINF : NUMBER;
const listOf = { mask: "weights", weights: "weights", scores: "scores", dS: "dS" };

function picture(look, b, h, show, most) {
  const rows = Math.min(look.L, most), columns = Math.min(look.S, most);
  const kind = new Uint8Array(rows * columns), value = new Float64Array(rows * columns), dead = [];
  const cellOf = Int32Array.from({ length: look.S }, (_, j) => Math.floor(((j + 1) * columns - 1) / look.S));
  for (let i = 0; i < look.L; i++) {
    const first = Math.floor(((i + 1) * rows - 1) / look.L) * columns;
    const found = show === "mask" ? { keys: visibleKeys(look, b, h, i) } : row(look, b, h, i);
    const list = show === "mask" ? null : found[listOf[show]] || [];
    if (!found.keys.length) dead.push(i);
    found.keys.forEach((j, n) => {
      const cell = first + cellOf[j], x = list ? list[n] : 1, k = kindOf(x);
      if (k > kind[cell]) { kind[cell] = k; value[cell] = x; }
      else if (k === NUMBER && kind[cell] === NUMBER && Math.abs(x) > Math.abs(value[cell])) value[cell] = x;
    });
  }
  let low = Infinity, high = -Infinity;
  kind.forEach((k, cell) => {
    if (k === NUMBER) { low = Math.min(low, value[cell]); high = Math.max(high, value[cell]); }
  });
  if (low > high) low = high = 0;
  const signed = low < 0;
  if (signed) { high = Math.max(high, -low); low = -high; }
  if (show === "mask") { low = 0; high = 1; }
  return { rows, columns, kind, value, low, high, signed, dead, present: new Set(kind) };
}

const mapOf = (p) => data.maps[p.signed ? "diverging" : "sequential"];
const hex = (text, at) => parseInt(text.substr(at, 2), 16);

// How far up its map a value stands, 0 to 1. By square roots: a few large weights would leave the rest one colour.
function position(p, x) {
  if (p.high === p.low) return p.signed ? 0.5 : 1;
  if (p.signed) return 0.5 + Math.sign(x) * Math.sqrt(Math.abs(x) / p.high) / 2;
  return Math.sqrt((x - p.low) / (p.high - p.low));
}

function paint(canvas, p) {
  canvas.width = p.columns; canvas.height = p.rows;
  const context = canvas.getContext("2d"), map = mapOf(p);
  const image = context.createImageData(p.columns || 1, p.rows || 1);
  for (let cell = 0; cell < p.kind.length; cell++) {
    const k = p.kind[cell];
    let text = data.special[kinds[k]], at = 0;
    if (k === NUMBER) {
      text = map; at = 6 * Math.round(255 * position(p, p.value[cell]));
    }
    for (let c = 0; c < 3; c++) image.data[4 * cell + c] = hex(text, at + 2 * c);
    image.data[4 * cell + 3] = 255;
  }
  if (p.rows * p.columns) context.putImageData(image, 0, 0);
}

// The page

const DIGITS = 5;
function shown(x) {
  if (x === undefined) return "";
  if (x !== x) return "NaN";
  if (Math.abs(x) === Infinity) return x > 0 ? "+Inf" : "-Inf";
  return String(Number(x.toPrecision(DIGITS)));
}

function element(tag, attributes, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) e.addEventListener(name.slice(2), value); else e.setAttribute(name, value);
  }
  e.append(...children);
  return e;
}

function ticks(look) {
  const list = [];
  for (const [name, size, side] of [["key", look.S, "left"], ["query", look.L, "top"]]) {
    let step = 1;
    while (size / step > 8) step *= String(step)[0] === "2" ? 2.5 : 2; // 1, 2, 5, 10, ...
    for (let n = 1; n <= size; n = n === 1 && step > 1 ? step : n + step) {
      list.push(element("span", { class: name, style: `${side}:${100 * (n - 0.5) / size}%` }, String(n)));
    }
  }
  $("ticks").replaceChildren(...list);
}

function swatch(name, meaning) {
  return element("span", {}, element("i", { style: "background:#" + data.special[name] }), meaning);
}

function legend(p) {
  const parts = [];
  if (p.present.has(NUMBER) && state.show !== "mask") {
    const canvas = element("canvas"), steps = Array.from({ length: 256 }, (_, n) => n / 255);
    const value = steps.map((x) => p.signed ? Math.sign(x - 0.5) * (2 * x - 1) ** 2 * p.high
      : p.low + x ** 2 * (p.high - p.low));
    paint(canvas, { ...p, rows: 1, columns: 256, value, kind: new Uint8Array(256).fill(NUMBER) });
    parts.push(shown(p.low), canvas, shown(p.high) + " (square roots)");
  }
  kinds.forEach((name, k) => {
    if (k !== NUMBER && p.present.has(k)) {
      parts.push(swatch(name, data.names[name]));
    }
  });
  if (p.dead.length) parts.push(swatch("dead", "dead row"));
  $("legend").replaceChildren(...parts);
}

function deadMarks(look, p) {
  return p.dead.map((i) => element("div", { class: "dead",
    style: `right:-8px;width:5px;min-height:2px;top:${100 * i / look.L}%;height:${100 / look.L}%` }));
}

function drawHead() {
  const look = current(), p = picture(look, state.b, state.h, state.show, 1024);
  paint($("picture"), p);
  $("frame").style.aspectRatio = `${Math.max(1, look.S)} / ${Math.min(Math.max(look.L, look.S / 6), 3 * look.S || 1)}`;
  $("marks").replaceChildren(...deadMarks(look, p));
  ticks(look);
  legend(p);
  document.querySelectorAll("#heads button").forEach((button, n) => {
    button.setAttribute("aria-pressed", n === state.b * look.H + state.h);
  });
  document.querySelectorAll("#shows button").forEach((button) => {
    button.setAttribute("aria-pressed", button.value === state.show);
  });
}

// Thumbnails are made when there is time, one head after the other; a newer wish ends the older one.
let wish = 0;
function drawHeads() {
  const look = current(), mine = ++wish, buttons = [];
  for (let b = 0; b < look.B; b++) {
    for (let h = 0; h < look.H; h++) {
      buttons.push(element("button", { onclick: () => go({ b, h }) }, element("canvas"),
        look.B > 1 ? `batch ${b + 1} head ${h + 1}` : `head ${h + 1}`));
    }
  }
  $("heads").replaceChildren(...buttons);
  const next = (n) => setTimeout(() => {
    if (mine !== wish || n === buttons.length) return;
    paint(buttons[n].firstChild, picture(look, Math.floor(n / look.H), n % look.H, state.show, 72));
    next(n + 1);
  });
  next(0);
}

function placeCursor(look) {
  $("across").style.top = 100 * state.i / look.L + "%"; $("across").style.height = 100 / look.L + "%";
  $("down").style.left = 100 * state.j / look.S + "%"; $("down").style.width = 100 / look.S + "%";
}

function readout(found) {
  const n = found.keys.indexOf(state.j), place = `query ${state.i + 1}, key ${state.j + 1}: `;
  if (n < 0) return place + "masked";
  const parts = [`score ${shown(found.scores[n])}`, `weight ${shown(found.weights[n])}`];
  if (found.dP) parts.push(`dP ${shown(found.dP[n])}`, `dS ${shown(found.dS[n])}`);
  if (!found.keep[n]) parts.push("dropped");
  return place + parts.join(", ");
}

function strip(look, found) {
  const canvas = $("strip"), context = canvas.getContext("2d"), width = canvas.width = 2 * canvas.clientWidth || 600;
  const height = canvas.height = 112, most = Math.max(...Array.from(found.weights, (p) => p || 0), 1e-300);
  context.fillStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  found.keys.forEach((j, n) => {
    const tall = Math.max(2, height * found.weights[n] / most);
    context.fillRect(width * j / look.S, height - tall, Math.max(1, width / look.S - 1), tall);
  });
}

const MOST_LISTED = 256;
function explore(look, found) {
  $("query").value = state.i + 1; $("query").max = look.L;
  const reason = look.deadRows.find((d) => d.i === state.i + 1 && (!d.b || d.b === state.b + 1)
    && (!d.h || d.h === state.h + 1));
  let entropy = 0;
  for (const p of found.weights) if (p) entropy -= p * Math.log(p);
  const count = found.keys.length;
  $("summary").textContent = count ? `sees ${count} of ${look.S} keys; LSE ${shown(found.lse)}, `
    + `entropy of its weights ${shown(entropy)} nats`
    : `dead: it sees none of ${look.S} keys` + (reason ? "; " + reason.reason : "");
  strip(look, found);
  const columns = { key: (n) => found.keys[n] + 1, score: (n) => found.scores[n], weight: (n) => found.weights[n],
    "to o": (n) => contribution(look, state.b, state.h, found, n) };
  if (found.dP) { columns.dP = (n) => found.dP[n]; columns.dS = (n) => found.dS[n]; }
  if (!columns[state.sort]) state.sort = "to o";
  const by = columns[state.sort];
  const size = (n) => state.sort === "key" ? -by(n) : by(n) === by(n) ? Math.abs(by(n)) : Infinity;
  const order = found.keys.map((_, n) => [size(n), n]).sort((x, y) => y[0] - x[0] || x[1] - y[1]).slice(0, MOST_LISTED);
  const cells = (n) => Object.values(columns).map((of) => element("td", {}, shown(of(n))));
  $("keys").replaceChildren(element("thead", {}, element("tr", {}, ...Object.keys(columns).map((name) =>
    element("th", { "aria-sort": name === state.sort ? "descending" : "none" },
      element("button", { onclick: () => go({ sort: name }) }, name + (name === state.sort ? " ▾" : "")))))),
  element("tbody", {}, ...order.map(([, n]) =>
    element("tr", { "data-key": found.keys[n], onclick: () => go({ j: found.keys[n] }) }, ...cells(n)))));
  const rest = found.keys.length - order.length;
  $("rest").textContent = rest > 0 ? `and ${rest} more keys` : "";
}

function markKey() {
  for (const line of $("keys").querySelectorAll("[data-key]")) {
    line.setAttribute("aria-selected", Number(line.dataset.key) === state.j);
  }
}

function texts(look) {
  for (const name of ["summaryText", "deadRowsText", "deadKeysText", "nonfiniteText", "note"]) {
    $(name).textContent = look[name];
  }
  const names = ["", "min", "max", "mean", "norm", "NaN", "+Inf", "-Inf", "zero", "of"];
  $("stats").replaceChildren(element("thead", {}, element("tr", {}, ...names.map((n) => element("th", {}, n)))),
    element("tbody", {}, ...look.stats.map((line) => element("tr", {}, ...line.map((x) =>
      element("td", {}, typeof x === "number" ? shown(x) : String(x)))))));
}

function clamp(x, size) { return Math.max(0, Math.min(size - 1, Math.floor(x) || 0)); }

// The address keeps the place; it is renewed when the pointer rests, because browsers are slow at it.
let naming;
function address() {
  return "#" + ["look", "b", "h", "i", "j"].map((n) => `${n}=${state[n] + 1}`).join("&") + "&show=" + state.show;
}

// Changes what is shown, and draws what depends on it.
function go(change, all) {
  const before = { ...state };
  Object.assign(state, change);
  const look = current();
  state.b = clamp(state.b, look.B); state.h = clamp(state.h, look.H);
  state.i = clamp(state.i, look.L); state.j = clamp(state.j, look.S);
  if (!look.dout && state.show === "dS") state.show = "weights";
  const changed = (...names) => all || names.some((name) => before[name] !== state[name]);
  if (changed("look")) texts(look);
  if (changed("look", "show")) drawHeads();
  if (changed("look", "b", "h", "show")) drawHead();
  $("shows").querySelector("[value=dS]").disabled = !look.dout;
  if (look.B * look.H * look.L * look.S === 0) { $("readout").textContent = "nothing: a size is 0"; return; }
  placeCursor(look);
  const found = row(look, state.b, state.h, state.i);
  $("readout").textContent = readout(found);
  if (changed("look", "b", "h", "i", "sort")) explore(look, found);
  markKey();
  clearTimeout(naming);
  naming = setTimeout(() => history.replaceState(null, "", address()), 250);
}

function point(event) {
  const box = $("picture").getBoundingClientRect(), look = current();
  go({ i: clamp((event.clientY - box.top) / box.height * look.L, look.L),
    j: clamp((event.clientX - box.left) / box.width * look.S, look.S) });
}

const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-16, 0],
  PageDown: [16, 0], Home: [0, -Infinity], End: [0, Infinity] };
$("frame").addEventListener("pointermove", point);
$("frame").addEventListener("pointerdown", point);
$("frame").addEventListener("keydown", (event) => {
  const step = steps[event.key], look = current();
  if (!step) return;
  event.preventDefault();
  const within = (x, size) => Math.max(0, Math.min(size - 1, x));
  go({ i: within(state.i + step[0], look.L), j: within(state.j + step[1], look.S) });
});
$("query").addEventListener("change", () => go({ i: Number($("query").value) - 1 }));
$("back").addEventListener("click", () => go({ i: Math.max(0, state.i - 1) }));
$("forth").addEventListener("click", () => go({ i: state.i + 1 }));
document.querySelectorAll("#shows button").forEach((button) => {
  button.addEventListener("click", () => go({ show: button.value }));
});
data.looks.forEach((look, n) => $("looks").append(element("option", { value: n }, look.name)));
$("looks").addEventListener("change", () => go({ look: Number($("looks").value) }));
$("looks").hidden = data.looks.length < 2;
const wanted = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
for (const name of ["look", "b", "h", "i", "j"]) if (wanted[name]) state[name] = Number(wanted[name]) - 1;
if (listOf[wanted.show]) state.show = wanted.show;
state.look = clamp(state.look, data.looks.length);
$("looks").value = state.look;
go({}, true);
]==]
