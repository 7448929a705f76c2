
"use strict";
(() => {
  const root = document.documentElement;
  const key = document.body.dataset.key;
  const cards = [...document.querySelectorAll(".sample")];
  let marks = {};
  try { marks = JSON.parse(localStorage.getItem(key)) || {}; } catch { /* a browser that keeps nothing */ }
  root.classList.add("scripted");

  const keep = () => {
    try { localStorage.setItem(key, JSON.stringify(marks)); } catch { /* export still works */ }
    const of = (mark) => Object.values(marks).filter((one) => one.mark === mark).length;
    const told = document.getElementById("marked");
    if (told) told.textContent = `${of("good")} good, ${of("bad")} bad, ${cards.length - of("good") - of("bad")} open`;
  };
  const show = (card) => {
    const one = marks[card.dataset.index] || {};
    for (const mark of ["good", "bad"]) {
      card.classList.toggle(`is-${mark}`, one.mark === mark);
      card.querySelector(`.choose-${mark}`).setAttribute("aria-pressed", String(one.mark === mark));
    }
    card.querySelector("textarea").value = one.note || "";
  };
  const text = (card, part) => card.querySelector(`[data-part=${part}]`).textContent;

  for (const card of cards) {
    const index = card.dataset.index;
    const change = (what) => { marks[index] = { ...marks[index], ...what }; keep(); };
    for (const mark of ["good", "bad"]) {
      card.querySelector(`.choose-${mark}`).addEventListener("click", () => {
        change({ mark: (marks[index] || {}).mark === mark ? null : mark });
        show(card);
      });
    }
    card.querySelector("textarea").addEventListener("input", (event) => change({ note: event.target.value }));
    show(card);
  }
  keep();

  const button = document.getElementById("export");
  if (button) button.addEventListener("click", () => {
    const reviewed = cards.map((card) => ({
      index: Number(card.dataset.index), row: card.dataset.row ? Number(card.dataset.row) : null,
      mark: (marks[card.dataset.index] || {}).mark || null, note: (marks[card.dataset.index] || {}).note || "",
      prompt: text(card, "prompt"), reference: text(card, "reference"),
      base: text(card, "base"), tuned: text(card, "tuned"),
    }));
    const job = { namespace: document.body.dataset.namespace, name: document.body.dataset.job };
    const whole = JSON.stringify({ job, step: Number(document.body.dataset.step), reviewed }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([whole], { type: "application/json" }));
    link.download = `${document.body.dataset.job}-review.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details[data-print]")) part.open = true;
  });
})();
