// The data of the page, unpacked.

const $$ = (id) => document.getElementById(id);
const data = JSON.parse($$("data").textContent);
const { tokens, spanTokens: S, sinkTokens, layers, heads, steps, results } = data;
const LH = layers * heads;
const LEVELS = 5;
const SHOWN_FLOWS = 8;
const HIGHLIGHTED = 12;
const PART_TOKENS = 400;
// What was done since the page opened, for tests and measurements.
const stats = { classWrites: 0, cells: 0, mapCells: 0, updates: 0, lastUpdateMs: 0 };
globalThis.inspector = { stats };

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const number = (value) => value.toLocaleString("en");
const percent = (share) => (share < 0.01 && share > 0 ? "<1" : Math.round(share * 100)) + " %";
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");

async function unpack(name, bytes) {
  const script = $$("array-" + name);
  const text = atob(script.textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  script.remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  if (bytes === 1) return planes;
  const count = planes.length / bytes;
  const out = bytes === 2 ? new Uint16Array(count) : new Uint32Array(count);
  for (let plane = 0; plane < bytes; plane++)
    for (let i = 0, from = plane * count; i < count; i++) out[i] |= planes[from + i] << (8 * plane);
  return out;
}

const importance = await unpack("importance", 2);
const rank = await unpack("rank", data.rankBytes);
const mass = (code) => (code === 0 ? 0 : 2 ** ((code - 1) / data.log2Steps + data.log2Floor));
