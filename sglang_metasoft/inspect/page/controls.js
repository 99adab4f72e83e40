// Sliders, pointer, keyboard, and the fixed words of the page.

function say(id, text) {
  $$(id + "-out").textContent = text;
  $$(id).setAttribute("aria-valuetext", text);
}

let mapHead = null;
function update() {
  const began = performance.now();
  state.step = +$$("ratio").value;
  state.layer = +$$("layer").value - 1;
  state.head = +$$("head").value - 1;
  rows = selection();
  const [ratio, kept] = steps[state.step];
  const entries = tokens.length - S + kept;
  say("ratio", `${+ratio.toFixed(2)}: ${number(entries)} of ${number(tokens.length)} entries stay` + (stored(state.step) < 0 ? " (flows not stored)" : ""));
  say("layer", state.layer < 0 ? `all ${layers}` : `${state.layer} (0 to ${layers - 1})`);
  say("head", state.head < 0 ? `all ${heads}` : `${state.head} (0 to ${heads - 1})`);
  const token = state.token;
  clearHighlights();
  countKept();
  colour();
  if (mapHead !== state.head) {
    mapHead = state.head;
    computeMap();
  }
  showToken(token);
  showAnswers();
  stats.updates++;
  stats.lastUpdateMs = performance.now() - began;
}

$$("ratio").max = steps.length - 1;
$$("ratio").value = Math.max(0, steps.findIndex(([ratio]) => ratio === (results.find((r) => r.ratio >= 4) || results.at(-1)).ratio));
$$("layer").max = layers;
$$("head").max = heads;
let isAsked = false;
for (const id of ["ratio", "layer", "head"])
  $$(id).addEventListener("input", () => {
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(() => {
      isAsked = false;
      update();
    });
  });

const prompt = $$("prompt");
const tokenOf = (event) => event.target.closest?.(".t")?.index ?? -1;
function reveal(token) {
  const box = prompt.getBoundingClientRect();
  const at = spans[token].getBoundingClientRect();
  if (at.top < box.top || at.bottom > box.bottom) prompt.scrollTop += at.top - box.top - box.height / 3;
}
prompt.addEventListener("mouseover", (event) => {
  const token = tokenOf(event);
  if (!state.isHeld && token >= 0 && token !== state.token) showToken(token);
});
prompt.addEventListener("click", (event) => {
  const token = tokenOf(event);
  state.isHeld = token >= 0 && !(state.isHeld && token === state.token);
  if (token >= 0) showToken(token);
});
prompt.addEventListener("keydown", (event) => {
  const last = tokens.length - 1;
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, PageDown: 200, PageUp: -200, Home: -last, End: last };
  if (event.key in moves) {
    const token = Math.max(0, Math.min(last, Math.max(0, state.token) + (state.token < 0 ? 0 : moves[event.key])));
    state.isHeld = true;
    showToken(token);
    reveal(token);
  } else if (event.key === "Enter" && state.token >= 0) state.isHeld = !state.isHeld;
  else if (event.key === "Escape") {
    state.isHeld = false;
    showToken(-1);
  } else return;
  event.preventDefault();
});

const sinks = sinkTokens ? `${sinkTokens} sinks, ` : "";
$$("facts").textContent = [...Object.values(data.facts), `${number(tokens.length)} prompt tokens: ${sinks}span of ${number(S)}, window of ${tokens.length - S}`].join(" · ");
for (const [name, text] of [["t k5", "kept by all selected heads"], ["t k3", "by half"], ["t k1", "by few"], ["t", "dropped by all"], ["t sink", "sink"], ["t window", "window"], ["t flow", "flow from or to the token you point at"]]) {
  const item = element("li");
  const sample = element("span", name, "abc");
  sample.style.setProperty("--share", "0.4");
  item.append(sample, text);
  $$("legend").append(item);
}
map.setAttribute("aria-label", `Heat map: importance of ${number(S)} tokens, left to right, in ${layers} layers, top to bottom`);
$$("map-note").textContent = `Rows: layers 0 to ${layers - 1} from the top. Columns: the prompt from left to right. Yellow: high importance within its layer, on a logarithmic scale; the window at the right has none. Click to go to a layer and a token.`;
$$("footer").textContent =
  "Kept sets are exact at every ratio; flows and answers are stored at " + results.map((r) => r.ratio).join(", ") +
  ". Approximate: importance in steps of 0.07 %, flow weights in steps of 1/255. Computed with Hugging Face transformers and the project's own stages, without a server.";
new ResizeObserver(resizeMap).observe(map);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", resizeMap);
update();
for (const [n, result] of results.entries()) {
  if (!result.targets) continue;
  const targets = await unpack("targets" + n, data.rankBytes);
  result.weightArray = await unpack("weights" + n, 1);
  result.targetArray = targets;
  if (n === stored(state.step)) showToken(state.token);
}
document.documentElement.dataset.state = "ready";
