
"use strict";
(() => {
  const root = document.documentElement;
  const key = document.body.dataset.key;
  const cards = [...document.querySelectorAll(".sample")];
  let reviews = {};
  try { reviews = JSON.parse(localStorage.getItem(key)) || {}; } catch { /* a browser without storage */ }
  root.classList.add("scripted");

  const store = () => {
    try { localStorage.setItem(key, JSON.stringify(reviews)); } catch { /* export still works */ }
    const count = (mark) => Object.values(reviews).filter((review) => review.mark === mark).length;
    const status = document.getElementById("marked");
    const unmarked = cards.length - count("good") - count("bad");
    if (status) status.textContent = `${count("good")} good, ${count("bad")} bad, ${unmarked} unmarked`;
  };
  const show = (card) => {
    const review = reviews[card.dataset.index] || {};
    for (const mark of ["good", "bad"]) {
      card.classList.toggle(`is-${mark}`, review.mark === mark);
      card.querySelector(`.choose-${mark}`).setAttribute("aria-pressed", String(review.mark === mark));
    }
    card.querySelector("textarea").value = review.note || "";
  };
  const text = (card, part) => card.querySelector(`[data-part=${part}]`).textContent;

  for (const card of cards) {
    const index = card.dataset.index;
    const update = (fields) => { reviews[index] = { ...reviews[index], ...fields }; store(); };
    for (const mark of ["good", "bad"]) {
      card.querySelector(`.choose-${mark}`).addEventListener("click", () => {
        update({ mark: (reviews[index] || {}).mark === mark ? null : mark });
        show(card);
      });
    }
    card.querySelector("textarea").addEventListener("input", (event) => update({ note: event.target.value }));
    show(card);
  }
  store();

  const button = document.getElementById("export");
  if (button) button.addEventListener("click", () => {
    const reviewed = cards.map((card) => ({
      index: Number(card.dataset.index), row: card.dataset.row ? Number(card.dataset.row) : null,
      mark: (reviews[card.dataset.index] || {}).mark || null, note: (reviews[card.dataset.index] || {}).note || "",
      prompt: text(card, "prompt"), reference: text(card, "reference"),
      base: text(card, "base"), tuned: text(card, "tuned"),
    }));
    const job = { namespace: document.body.dataset.namespace, name: document.body.dataset.job };
    const json = JSON.stringify({ job, step: Number(document.body.dataset.step), reviewed }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([json], { type: "application/json" }));
    link.download = `${document.body.dataset.job}-review.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details[data-print]")) part.open = true;
  });
})();
