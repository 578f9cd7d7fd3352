"use strict";
// The stage slider, and the link between a source line and what it became. All data is in the page.
const NEAR = 3; // equal lines that are shown around a difference

function cell(kind, text) {
  const td = document.createElement("td");
  if (kind) td.className = kind;
  td.textContent = text;
  return td;
}

// Marks what lies between the beginning and the end that both lines have.
function marked(kind, text, other) {
  const td = cell(kind, "");
  let a = 0;
  while (a < text.length && text[a] === other[a]) a++;
  let b = 0;
  while (b < text.length - a && b < other.length - a && text[text.length - 1 - b] === other[other.length - 1 - b]) b++;
  const mark = document.createElement("mark");
  mark.textContent = text.slice(a, text.length - b);
  td.append(text.slice(0, a), mark, text.slice(text.length - b));
  return td;
}

function diffRow(lines, left, right) {
  const tr = document.createElement("tr");
  const was = left < 0 ? ["", ""] : lines[left];
  const now = right < 0 ? ["", ""] : lines[right];
  const same = left >= 0 && right >= 0 && was[0] === now[0];
  const sides = [[left, was, now, "was"], [right, now, was, "now"]];
  for (const [at, own, other, kind] of sides) {
    tr.append(cell("at", own[1]));
    if (same || at < 0) tr.append(cell("", own[0]));
    else if (left < 0 || right < 0) tr.append(cell(kind, own[0]));
    else tr.append(marked(kind, own[0], other[0]));
  }
  tr.dataset.lines = `${was[1]} ${now[1]}`;
  return [tr, same];
}

function stagesOf(root) {
  const { lines, stages } = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const body = root.querySelector("tbody");
  const range = root.querySelector("input[type=range]");
  const all = root.querySelector("input[type=checkbox]");
  const steps = root.querySelector(".steps");
  const heads = root.querySelectorAll("th.name");
  const told = root.querySelector("output");
  stages.forEach((stage, n) => {
    const button = document.createElement("button");
    button.textContent = stage.name;
    button.title = `${stage.changed} lines changed`;
    button.onclick = () => { range.value = n; show(); };
    steps.append(button);
  });
  range.max = stages.length - 1;
  range.value = Math.min(1, stages.length - 1);
  function show() {
    const n = Number(range.value);
    const stage = stages[n];
    heads[0].textContent = n ? `${n - 1}  ${stages[n - 1].name}` : "";
    heads[1].textContent = `${n}  ${stage.name}`;
    told.textContent = n ? `${stage.changed} lines changed by ${stage.name}` : "as traced";
    [...steps.children].forEach((button, i) => button.setAttribute("aria-pressed", i === n));
    const rows = stage.rows.map(([a, b]) => diffRow(lines, n ? a : -1, b));
    if (!n) for (const [tr] of rows) tr.querySelectorAll(".now").forEach((td) => td.classList.remove("now"));
    const near = rows.map((_, i) => rows.slice(Math.max(0, i - NEAR), i + NEAR + 1).some(([, same]) => !same));
    body.replaceChildren();
    let hidden = 0;
    const close = () => {
      if (!hidden) return;
      const tr = document.createElement("tr");
      tr.className = "gap";
      const td = cell("", `${hidden} equal lines`);
      td.colSpan = 4;
      tr.append(td);
      body.append(tr);
      hidden = 0;
    };
    rows.forEach(([tr], i) => {
      if (!all.checked && n && !near[i]) { hidden++; return; }
      close();
      body.append(tr);
    });
    close();
    light();
  }
  range.oninput = show;
  all.onchange = show;
  show();
  return show;
}

let chosen = "";
function light() {
  document.querySelectorAll(".lit").forEach((tr) => tr.classList.remove("lit"));
  if (!chosen) return;
  document.querySelectorAll(`.source tr[data-line="${chosen}"]`).forEach((tr) => tr.classList.add("lit"));
  document.querySelectorAll(".diff tr[data-lines]").forEach((tr) => {
    if (tr.dataset.lines.split(" ").includes(chosen)) tr.classList.add("lit");
  });
}

document.querySelectorAll(".stages").forEach(stagesOf);
document.querySelectorAll(".source tr").forEach((tr) => {
  tr.onclick = () => { chosen = chosen === tr.dataset.line ? "" : tr.dataset.line; light(); };
});
document.documentElement.dataset.ready = "yes";
