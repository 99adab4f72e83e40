// What is selected, and the prompt's tokens coloured by it.

const state = { step: 0, layer: -1, head: -1, token: -1, isHeld: false };
const stored = (step) => results.findIndex((result) => result.ratio === steps[step][0]);
const selection = () => {
  const rows = [];
  for (let layer = 0; layer < layers; layer++)
    for (let head = 0; head < heads; head++)
      if ((state.layer < 0 || layer === state.layer) && (state.head < 0 || head === state.head)) rows.push(layer * heads + head);
  return rows;
};
let rows = selection();
const keptCount = new Uint16Array(S);

const spans = [];
const classes = new Array(tokens.length).fill("");
{
  let part = element("div", "part");
  for (let i = 0, inPart = 0; i < tokens.length; i++, inPart++) {
    const span = element("span", "t");
    span.index = i;
    const lines = tokens[i].split("\n");
    lines.forEach((line, n) => {
      if (n) span.append(element("span", "end", "↵"), "\n");
      span.append(line);
    });
    spans.push(span);
    part.append(span);
    if (lines.length > 1 && inPart > PART_TOKENS) {
      $$("prompt").append(part);
      part = element("div", "part");
      inPart = 0;
    }
  }
  $$("prompt").append(part);
}

function setClass(i, name) {
  if (classes[i] === name) return;
  classes[i] = name;
  spans[i].className = name;
  stats.classWrites++;
}

function baseClass(i) {
  if (i >= S) return "t window";
  if (i < sinkTokens) return "t sink";
  return keptCount[i] ? "t k" + Math.ceil((keptCount[i] / rows.length) * LEVELS) : "t";
}

function countKept() {
  const kept = steps[state.step][1];
  keptCount.fill(0);
  for (const row of rows) {
    const start = row * S;
    for (let i = 0; i < S; i++) if (rank[start + i] < kept) keptCount[i]++;
  }
  stats.cells += rows.length * S;
}

function colour() {
  for (let i = 0; i < tokens.length; i++) setClass(i, baseClass(i));
}
