// Where values went: of one token, over the selected layers and heads.

// Of one row at the current ratio: position of each kept entry, and dropped entries before each position.
const layouts = new Map();
function layoutOf(row, kept) {
  const key = row + ":" + kept;
  if (layouts.has(key)) return layouts.get(key);
  const positions = new Uint32Array(kept);
  const dropped = new Uint32Array(S - kept);
  for (let i = 0, k = 0, d = 0, start = row * S; i < S; i++) {
    if (rank[start + i] < kept) positions[k++] = i;
    else dropped[d++] = i;
  }
  stats.cells += S;
  if (layouts.size >= 2 * LH) layouts.clear();
  layouts.set(key, { positions, dropped });
  return layouts.get(key);
}

function search(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Where the token's values flow, over the selected heads that drop it: position -> mean weight. */
function sent(token, result) {
  const flows = new Map();
  let from = 0;
  const { targets: m, kept } = result;
  for (const row of rows) {
    if (rank[row * S + token] < kept) continue;
    from++;
    const { positions, dropped } = layoutOf(row, kept);
    const base = (row * (S - kept) + search(dropped, token)) * m;
    for (let n = base; n < base + m; n++) {
      const target = positions[result.targetArray[n]];
      flows.set(target, (flows.get(target) || 0) + result.weightArray[n] / data.weightSteps);
    }
  }
  for (const [target, weight] of flows) flows.set(target, weight / from);
  return { flows, from };
}

/** What the token receives, over the selected heads that keep it: position -> mean weight, and the mean gate. */
function received(token, result) {
  const flows = new Map();
  let by = 0, gates = 0;
  const { targets: m, kept } = result;
  for (const row of rows) {
    if (rank[row * S + token] >= kept) continue;
    by++;
    const { positions, dropped } = layoutOf(row, kept);
    const slot = search(positions, token);
    const base = row * (S - kept) * m;
    let moved = 0;
    for (let n = 0; n < dropped.length * m; n++) {
      if (result.targetArray[base + n] !== slot) continue;
      const source = dropped[Math.floor(n / m)];
      const weight = result.weightArray[base + n] / data.weightSteps;
      if (weight === 0) continue;
      moved += weight * mass(importance[row * S + source]);
      flows.set(source, (flows.get(source) || 0) + weight);
    }
    stats.cells += dropped.length * m;
    const own = mass(importance[row * S + token]);
    gates += moved > 0 ? Math.min(1, Math.max(0, (data.gateScale[row] * moved) / (own + moved))) : 0;
  }
  for (const [source, weight] of flows) flows.set(source, weight / by);
  return { flows, by, gate: by ? gates / by : 0 };
}

const strongest = (flows) => [...flows].sort((a, b) => b[1] - a[1]);
