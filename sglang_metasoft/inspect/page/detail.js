// The panel about the token that is pointed at.

let highlighted = [];
function clearHighlights() {
  for (const i of highlighted) {
    setClass(i, baseClass(i));
    spans[i].style.removeProperty("--share");
  }
  highlighted = [];
}

function highlight(flows) {
  const top = flows.length ? flows[0][1] : 1;
  for (const [i, weight] of flows) {
    setClass(i, baseClass(i) + " flow");
    spans[i].style.setProperty("--share", (0.15 + 0.5 * (weight / top)).toFixed(2));
    highlighted.push(i);
  }
}

function flowList(flows, shown) {
  const list = element("ol");
  const top = flows.length ? flows[0][1] : 1;
  for (const [i, weight] of flows.slice(0, shown)) {
    const item = element("li");
    const bar = element("span", "bar");
    bar.style.width = (100 * weight) / top + "%";
    const text = element("span", "text");
    const context = (from, to) => element("span", "context", visible(tokens.slice(Math.max(0, from), to).join("")));
    text.append(context(i - 2, i), visible(tokens[i]), context(i + 1, i + 4));
    text.title = "token " + number(i);
    item.append(bar, element("span", "share", weight.toFixed(2)), text);
    list.append(item);
  }
  return list;
}

function showToken(token) {
  clearHighlights();
  if (state.token >= 0) setClass(state.token, baseClass(state.token));
  state.token = token;
  const detail = $$("detail");
  const lines = [];
  const say = (text) => lines.push(element("p", "", text));
  if (token < 0) {
    say("Point at a token of the prompt. A dropped one shows where its values flowed, a kept one what it received.");
    detail.replaceChildren(...lines);
    drawMarks();
    return;
  }
  lines.push(element("p", "name", visible(tokens[token])));
  const where = "Token " + number(token) + " of " + number(tokens.length);
  const index = stored(state.step);
  const result = index >= 0 ? results[index] : null;
  if (token >= S) {
    say(where + ", in the window at the prompt's end: it stays raw.");
  } else {
    const kept = keptCount[token];
    const all = rows.length;
    const who = all === 1 ? (kept ? "kept by this head" : "dropped by this head") : `kept by ${kept} of ${all} heads`;
    say(where + ": " + who + (token < sinkTokens ? ", as a sink." : "."));
    let sum = 0;
    for (const row of rows) sum += mass(importance[row * S + token]);
    const mean = sum / all;
    const place = all === 1 ? `, rank ${number(rank[rows[0] * S + token] + 1)} of ${number(S)}` : "";
    say(`Importance ${mean.toPrecision(2)}: ${(mean * S).toPrecision(2)} times the even share${place}.`);
    if (!result) say("Flows are stored for ratios " + results.map((r) => r.ratio).join(", ") + ".");
    else if (!result.targets) say("This method drops values: nothing flows.");
    else if (!result.targetArray) say("The flows are still being unpacked.");
    else {
      const shown = kept && kept < all ? SHOWN_FLOWS / 2 : SHOWN_FLOWS;
      if (kept < all) {
        const { flows, from } = sent(token, result);
        const sorted = strongest(flows);
        say(`Its values flow${all === 1 ? "" : `, in the ${number(from)} heads that drop it,`} to:`);
        lines.push(flowList(sorted, shown));
        if (kept * 2 < all) highlight(sorted.slice(0, HIGHLIGHTED));
      }
      if (kept) {
        const { flows, gate } = received(token, result);
        const sorted = strongest(flows);
        say(`Where it stays it receives from ${number(sorted.length)} dropped tokens; ${percent(gate)} of its value is theirs.`);
        lines.push(flowList(sorted, shown));
        if (kept * 2 >= all) highlight(sorted.slice(0, HIGHLIGHTED));
      }
    }
  }
  setClass(token, classes[token] + " here");
  detail.replaceChildren(...lines);
  drawMarks();
}
