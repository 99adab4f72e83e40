// The answers side by side.

function answerCard(className, title, answer, entries, common) {
  const card = element("div", "answer " + className);
  const quote = element("blockquote", "");
  quote.append(answer.text.slice(0, common));
  if (common < answer.text.length) quote.append(element("mark", "", answer.text.slice(common)));
  const figures = element("dl", "usage");
  const row = (name, value) => figures.append(element("dt", "", name), element("dd", "", value));
  row("prompt tokens", number(tokens.length));
  row("KV entries per layer and head", number(entries));
  row("KV memory", ((entries * data.bytesPerEntry) / 2 ** 20).toFixed(1) + " MiB");
  row("output tokens", number(answer.tokens) + (answer.isEnded ? "" : " (limit)"));
  row("log-probability of the plain answer", answer.score.toFixed(3) + " per token");
  card.append(element("h3", "", title), quote, figures);
  return card;
}

let shownAnswer = -1;
function showAnswers() {
  const distance = (result) => Math.abs(Math.log(result.ratio / steps[state.step][0]));
  const nearest = results.reduce((best, _, n) => (distance(results[n]) < distance(results[best]) ? n : best), 0);
  if (nearest === shownAnswer) return;
  shownAnswer = nearest;
  const { ratio, kept, answer } = results[nearest];
  let common = 0;
  while (common < answer.text.length && answer.text[common] === data.plain.text[common]) common++;
  const same = common === answer.text.length && common === data.plain.text.length;
  $$("answers").replaceChildren(
    answerCard("compressed", `Compressed at ratio ${ratio}` + (same ? ": the same" : ""), answer, tokens.length - S + kept, common),
    answerCard("plain", "Without compression", data.plain, tokens.length, data.plain.text.length),
    element("p", "note", "Greedy. Underlined: from the first difference on. The log-probability is that of the uncompressed answer's tokens, over the one cache and the other."),
  );
}
