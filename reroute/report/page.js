"use strict";

const { scenes } = JSON.parse(document.getElementById("data").textContent);
const state = { scene: 0, method: "", budget: "", layer: 0, heat: false, boxes: true, timer: 0 };
const find = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)];
const GONE = { route: "deferred", remove: "removed" };
const HINT = "Point at a patch to see in which layers it runs.";
const RAMP = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];

/* --- data ------------------------------------------------------------------------------------------------------- */

for (const scene of scenes) {
  scene.tokens = scene.grid[0] * scene.grid[1];
  scene.picture = Object.assign(new Image(), { src: scene.image });
  for (const run of scene.runs) {
    for (const stage of run.stages) {
      stage.active = new Set(stage.kept);
      stage.returned = new Set(stage.back);
      stage.levels = Uint8Array.from(atob(stage.heat), (c) => c.charCodeAt(0));
    }
  }
}

const scene = () => scenes[state.scene];
const runs = () => scene().runs.filter((run) => run.method === state.method && run.budget === state.budget);
const stageAt = (run, layer) => run.stages.findLast((stage) => stage.first <= layer);
const layersOf = (stage) => (stage.first === stage.last ? `layer ${stage.first}` : `layers ${stage.first}–${stage.last}`);

function status(run, stage, token) {
  if (!stage.active.has(token)) return GONE[run.action];
  return stage.returned.has(token) ? "re-admitted" : "active";
}

function summary(run, stage) {
  const total = scene().tokens;
  const active = stage.kept.length;
  if (active === total) return `all ${total} patches active`;
  const back = stage.back.length ? `, ${stage.back.length} of them re-admitted` : "";
  return `${active} of ${total} active${back}; ${total - active} ${GONE[run.action]}`;
}

/* --- drawing ---------------------------------------------------------------------------------------------------- */

function heatColour(level) {
  const at = Math.sqrt((level - 1) / 254) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  const mixed = RAMP[low].map((c, i) => Math.round(c + (at - low) * (RAMP[low + 1][i] - c)));
  return `rgba(${mixed}, .82)`;
}

/* Lines on one raster for the whole picture, so that they run on from cell to cell. */
function hatch(context, x, y, w, h) {
  context.fillStyle = "#101215";
  context.fillRect(x, y, w, h);
  context.save();
  context.beginPath();
  context.rect(x, y, w, h);
  context.clip();
  context.strokeStyle = "rgba(255, 255, 255, .17)";
  context.lineWidth = 1;
  context.beginPath();
  const step = 7;
  for (let sum = Math.floor((x + y) / step) * step; sum < x + y + w + h + step; sum += step) {
    context.moveTo(sum - y + 1, y - 1);
    context.lineTo(sum - y - h - 1, y + h + 1);
  }
  context.stroke();
  context.restore();
}

/* The outer edges of a set of patches, drawn inside them. */
function outline(context, tokens, columns, cell, colour, line) {
  Object.assign(context, { strokeStyle: colour, lineWidth: line, lineCap: "square" });
  context.beginPath();
  for (const token of tokens) {
    const [x, y, w, h] = cell(token);
    const [left, right, top, bottom] = [x + line / 2, x + w - line / 2, y + line / 2, y + h - line / 2];
    const column = token % columns;
    const edges = [
      [column > 0 && tokens.has(token - 1), left, top, left, bottom],
      [column < columns - 1 && tokens.has(token + 1), right, top, right, bottom],
      [tokens.has(token - columns), left, top, right, top],
      [tokens.has(token + columns), left, bottom, right, bottom],
    ];
    for (const [inside, ...ends] of edges) {
      if (inside) continue;
      context.moveTo(ends[0], ends[1]);
      context.lineTo(ends[2], ends[3]);
    }
  }
  context.stroke();
}

function drawBox(context, box, width, height, colour, dash) {
  const edges = [box[0] * width, box[1] * height, (box[2] - box[0]) * width, (box[3] - box[1]) * height];
  for (const [style, line, pattern] of [["rgba(0, 0, 0, .75)", 4.5, []], [colour, 2.2, dash]]) {
    Object.assign(context, { strokeStyle: style, lineWidth: line });
    context.setLineDash(pattern);
    context.strokeRect(...edges);
  }
  context.setLineDash([]);
}

/* The picture, with a run's stage and the boxes over it where there are any. */
function draw(canvas, run, stage, answer) {
  const { grid: [rows, columns], size, picture, truth } = scene();
  const width = canvas.clientWidth;
  const height = Math.round((width * size[1]) / size[0]);
  const density = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: width * density, height: height * density });
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(density, density);
  context.imageSmoothingEnabled = size[0] > 200;
  context.drawImage(picture, 0, 0, width, height);
  const edge = (index, count, length) => Math.round((index * length) / count); // whole pixels leave no seams
  const cell = (token) => {
    const [row, column] = [Math.floor(token / columns), token % columns];
    const [x, y] = [edge(column, columns, width), edge(row, rows, height)];
    return [x, y, edge(column + 1, columns, width) - x, edge(row + 1, rows, height) - y];
  };
  if (run) drawStage(context, run, stage, rows * columns, cell);
  if (!state.boxes || !answer) return;
  if (truth?.box) drawBox(context, truth.box, width, height, "#fff", [6, 4]);
  if (answer.box) drawBox(context, answer.box, width, height, "#fb923c", []);
}

function drawStage(context, run, stage, total, cell) {
  const heated = state.heat && stage.levels.length > 0;
  for (let token = 0; token < total; token++) {
    const kind = status(run, stage, token);
    if (heated && stage.levels[token]) {
      context.fillStyle = heatColour(stage.levels[token]);
      context.fillRect(...cell(token));
    } else if (kind === "deferred") {
      context.fillStyle = "rgba(13, 15, 18, .74)";
      context.fillRect(...cell(token));
    } else if (kind === "removed") hatch(context, ...cell(token));
  }
  const columns = scene().grid[1];
  const line = Math.max(1, Math.min(3, cell(0)[2] / 7));
  if (heated) outline(context, stage.active, columns, cell, "#fff", line);
  outline(context, stage.returned, columns, cell, "#22d3ee", line);
}

/* --- building blocks -------------------------------------------------------------------------------------------- */

function element(tag, properties = {}, ...children) {
  const { style = {}, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(style)) made.style.setProperty(name, value);
  made.append(...children);
  return made;
}

function choices(group, names, chosen, face, choose) {
  find(group).replaceChildren(...names.map((name, i) => {
    const input = element("input", { type: "radio", name: group, checked: i === chosen, onchange: () => choose(i) });
    return element("label", {}, input, ...face(name, i));
  }));
}

function verdict(answer) {
  const line = element("p", { className: "said" });
  if (answer.correct !== null) {
    line.append(element("span", { className: answer.correct ? "good" : "bad" }, answer.correct ? "✓ " : "✗ "));
  }
  line.append(answer.text.replaceAll(/(\d)-(\d)/g, "$1\u2011$2") || "(no answer)"); // a range stays on one line
  if (answer.iou !== null) line.append(element("span", { className: "count" }, ` IoU ${answer.iou.toFixed(2)}`));
  return line;
}

function panel(name, kind, answer, run) {
  const canvas = element("canvas");
  canvas.setAttribute("role", "img");
  const count = element("p", { className: "count" });
  const box = element("div", { className: `panel ${kind}` }, element("h4", {}, name), canvas, verdict(answer), count);
  if (run?.note) box.append(element("p", { className: "note" }, run.note));
  const refresh = () => {
    const stage = run && stageAt(run, state.layer);
    draw(canvas, run, stage, answer);
    count.textContent = run ? summary(run, stage) : `all ${scene().tokens} patches active in every layer`;
    canvas.setAttribute("aria-label", `${name}: ${count.textContent}`);
  };
  if (run) {
    canvas.onpointermove = canvas.onpointerdown = (event) => read(event, canvas, run);
    canvas.onpointerleave = () => (find("readout").textContent = HINT);
  }
  return { box, refresh };
}

function read(event, canvas, run) {
  const { grid: [rows, columns] } = scene();
  const area = canvas.getBoundingClientRect();
  const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - area.left) / area.width) * columns)));
  const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - area.top) / area.height) * rows)));
  const token = row * columns + column;
  const stage = stageAt(run, state.layer);
  const ran = run.stages.filter((s) => s.active.has(token)).map((s) => layersOf(s).replace(/layers? /, ""));
  const level = stage.levels[token];
  const score = level ? `; score ${((level - 1) / 254).toFixed(2)} of the stage's highest` : "";
  find("readout").textContent =
    `${run.action}, patch in row ${row + 1}, column ${column + 1}: ${status(run, stage, token)}; runs in layers ${ran.join(", ")}${score}`;
}

function bars(run) {
  const total = scene().tokens;
  return Array.from({ length: scene().layers }, (_, layer) => {
    const stage = stageAt(run, layer);
    const share = (count) => `${(100 * count) / total}%`;
    const style = { "--all": share(stage.kept.length), "--back-share": share(stage.back.length) };
    const title = `layer ${layer}: ${summary(run, stage)}`;
    const label = layer === stage.first ? String(stage.kept.length) : "";
    return element("i", { style, title, onclick: () => goTo(layer), className: layer === state.layer ? "now" : "" }, label);
  });
}

function strip(run) {
  const frames = run.stages.map((stage) => {
    const canvas = element("canvas");
    const caption = `${layersOf(stage)}: ${stage.kept.length}${stage.back.length ? `, ${stage.back.length} back` : ""}`;
    const button = element("button", { type: "button", onclick: () => goTo(stage.first) }, canvas, caption);
    return { button, refresh: () => {
      draw(canvas, run, stage, null);
      button.setAttribute("aria-current", stage === stageAt(run, state.layer));
    } };
  });
  const box = element("div", { className: run.action }, element("h4", {}, run.action),
    element("div", { className: "strip" }, ...frames.map((frame) => frame.button)));
  return { box, refresh: () => frames.forEach((frame) => frame.refresh()) };
}

/* --- the page --------------------------------------------------------------------------------------------------- */

let parts = [];

function build() {
  const { kind, question, why, truth, dense, layers } = scene();
  const methods = unique(scene().runs.map((run) => run.method));
  if (!methods.includes(state.method)) state.method = methods[0];
  const budgets = unique(scene().runs.filter((run) => run.method === state.method).map((run) => run.budget));
  if (!budgets.includes(state.budget)) state.budget = budgets[budgets.length - 1];
  choices("methods", methods, methods.indexOf(state.method), (name) => [element("span", {}, name)], (i) => {
    state.method = methods[i];
    build();
    find("methods").querySelector(":checked").focus();
  });
  for (const [id, names] of [["methods", methods], ["budgets", budgets]]) find(id).hidden = names.length < 2;
  choices("budgets", budgets, budgets.indexOf(state.budget), (name) => [element("span", {}, name)], (i) => {
    state.budget = budgets[i];
    build();
    find("budgets").querySelector(":checked").focus();
  });
  find("kind").textContent = [kind, why].filter(Boolean).join(" · ");
  find("question").textContent = question;
  find("ask").hidden = scenes.length < 2; // the page's title says it all
  find("truth").textContent = truth ? `true answer: ${truth.text}` : "";
  const shown = runs();
  const panels = [
    ...(dense ? [panel("dense", "dense", dense, null)] : []),
    ...shown.map((run) => panel(run.action, run.action, run.answer, run)),
  ];
  find("panels").style.setProperty("--columns", Math.max(2, panels.length));
  find("panels").replaceChildren(...panels.map((part) => part.box));
  const strips = shown.map(strip);
  find("film").replaceChildren(...strips.map((part) => part.box));
  Object.assign(find("layer"), { max: layers - 1, value: state.layer });
  find("layers").style.setProperty("--layers", layers);
  const anyBox = [dense, truth, ...shown.map((run) => run.answer)].some((answer) => answer?.box);
  find("boxes-label").hidden = find("legend-answer").hidden = !anyBox;
  find("legend-truth").hidden = !truth?.box;
  for (const [id, action] of [["back", "route"], ["deferred", "route"], ["removed", "remove"]]) {
    find(`legend-${id}`).hidden = !shown.some((run) => run.action === action);
  }
  parts = [...panels, ...strips];
  refresh();
}

function refresh() {
  const shown = runs();
  find("depth").replaceChildren(...shown.flatMap((run) => [
    element("span", {}, run.action),
    element("div", { className: `bars ${run.action}` }, ...bars(run)),
  ]));
  const where = `layer ${state.layer} of 0–${scene().layers - 1}`;
  find("where").textContent = where;
  find("layer").value = state.layer;
  find("layer").setAttribute("aria-valuetext", where);
  find("legend-heat").hidden = !state.heat;
  for (const part of parts) part.refresh();
}

function goTo(layer) {
  state.layer = Math.min(scene().layers - 1, Math.max(0, layer));
  refresh();
}

/* First layer of the next (or previous) stage of any run shown. */
function decision(step) {
  const starts = unique(runs().flatMap((run) => run.stages.map((stage) => stage.first))).sort((a, b) => a - b);
  return step > 0 ? starts.find((first) => first > state.layer) : starts.findLast((first) => first < state.layer);
}

function play(on) {
  clearInterval(state.timer);
  find("play").setAttribute("aria-pressed", on);
  find("play").textContent = on ? "pause" : "play";
  if (!on) return;
  if (state.layer === scene().layers - 1) goTo(0);
  state.timer = setInterval(() => {
    goTo(state.layer + 1);
    if (state.layer === scene().layers - 1) play(false);
  }, 700);
}

function start() {
  choices("scenes", scenes, 0, ({ image, question, kind }) => [
    element("img", { src: image, alt: question }), element("small", {}, kind),
  ], (i) => {
    state.scene = i;
    build();
  });
  find("scenes").hidden = scenes.length < 2;
  find("layer").oninput = (event) => goTo(Number(event.target.value));
  find("previous").onclick = () => goTo(decision(-1) ?? 0);
  find("next").onclick = () => goTo(decision(1) ?? scene().layers - 1);
  find("play").onclick = () => play(find("play").getAttribute("aria-pressed") !== "true");
  for (const name of ["heat", "boxes"]) {
    find(name).onchange = (event) => {
      state[name] = event.target.checked;
      refresh();
    };
  }
  find("readout").textContent = HINT;
  find("viewer").hidden = false;
  state.layer = Math.max(...scenes[0].runs.map((run) => run.stages.at(-1).first));
  build();
  window.addEventListener("resize", refresh);
}

Promise.all(scenes.map((one) => one.picture.decode())).finally(start);
