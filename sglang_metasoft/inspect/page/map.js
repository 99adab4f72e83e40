// The heat map.

// Cividis, thinned: readable with any colour vision, and in grey.
const SCALE = [[0, 32, 81], [26, 53, 110], [69, 77, 109], [109, 105, 113], [146, 134, 117], [186, 164, 106], [227, 197, 76], [253, 231, 55]];
const map = $$("map");
const mapImage = new OffscreenCanvas(1, 1); // a pixel per layer and token, or per few tokens
let windowColour = "";
function shade(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (SCALE.length - 1);
  const low = Math.floor(at);
  return SCALE[low].map((value, c) => value + (at - low) * (SCALE[low + 1][c] - value));
}

function computeMap() {
  const width = Math.min(S, 1400);
  const values = new Float32Array(layers * width).fill(-Infinity);
  for (let layer = 0; layer < layers; layer++)
    for (let i = 0; i < S; i++) {
      let sum = 0, count = 0;
      for (let head = 0; head < heads; head++)
        if (state.head < 0 || head === state.head) {
          sum += importance[(layer * heads + head) * S + i];
          count++;
        }
      const at = layer * width + Math.floor((i * width) / S);
      if (sum / count > values[at]) values[at] = sum / count;
    }
  stats.mapCells += LH * S;
  const colours = Array.from({ length: 256 }, (_, n) => [...shade(n / 255), 255]);
  const image = new ImageData(width, layers);
  for (let layer = 0; layer < layers; layer++) {
    const line = values.subarray(layer * width, (layer + 1) * width);
    const sorted = Float32Array.from(line).sort();
    const low = sorted[Math.floor(width * 0.02)], high = sorted[Math.floor(width * 0.99)];
    line.forEach((value, at) => {
      const share = (value - low) / (high - low || 1);
      image.data.set(colours[Math.round(255 * Math.min(1, Math.max(0, share)))], (layer * width + at) * 4);
    });
  }
  mapImage.width = width;
  mapImage.height = layers;
  mapImage.getContext("2d").putImageData(image, 0, 0);
}

function drawMarks() {
  const { width, height } = map;
  const ratio = globalThis.devicePixelRatio || 1;
  const canvas = map.getContext("2d");
  const spanWidth = (width * S) / tokens.length;
  canvas.imageSmoothingEnabled = false;
  canvas.fillStyle = windowColour;
  canvas.fillRect(0, 0, width, height);
  canvas.drawImage(mapImage, 0, 0, spanWidth, height);
  canvas.lineWidth = 2 * ratio;
  if (state.layer >= 0) {
    canvas.strokeStyle = "#ffffff";
    canvas.strokeRect(ratio, (state.layer * height) / layers, width - 2 * ratio, height / layers);
  }
  const mark = (i, colour, size) => {
    canvas.fillStyle = colour;
    canvas.fillRect((i / tokens.length) * width - (size * ratio) / 2, 0, size * ratio, height);
  };
  for (const i of highlighted.slice(0, SHOWN_FLOWS)) mark(i, "rgba(255, 130, 40, .8)", 2);
  if (state.token >= 0) mark(state.token, "#ffffff", 2);
}

// Layout is read here and never in an update: that would lay out the whole prompt at once.
function resizeMap() {
  const ratio = globalThis.devicePixelRatio || 1;
  map.width = Math.round(map.clientWidth * ratio);
  map.height = Math.round(map.clientHeight * ratio);
  windowColour = getComputedStyle(document.body).getPropertyValue("--window-fill");
  drawMarks();
}

map.addEventListener("click", (event) => {
  const box = map.getBoundingClientRect();
  $$("layer").value = 1 + Math.min(layers - 1, Math.floor(((event.clientY - box.top) / box.height) * layers));
  const token = Math.min(tokens.length - 1, Math.floor(((event.clientX - box.left) / box.width) * tokens.length));
  update();
  state.isHeld = true;
  showToken(token);
  reveal(token);
});
