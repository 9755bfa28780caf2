"use strict";
// Keys, and menus that apply themselves. Every page works without this file.
(() => {
  const rows = [...document.querySelectorAll("[data-row]")];
  const search = document.getElementById("search"), help = document.getElementById("help");
  const button = document.getElementById("help-button");
  let current = -1;

  function go(name) {
    const place = document.body.dataset[name];
    if (place) location.assign(place);
  }

  function mark(step) {
    rows[current]?.classList.remove("current");
    current = Math.max(0, Math.min(rows.length - 1, current + step));
    rows[current].classList.add("current");
    const link = rows[current].querySelector("a");
    link.focus({ preventScroll: true });
    rows[current].scrollIntoView({ block: "nearest" });
  }

  const turn = (step) => (rows.length ? mark(step) : go(step > 0 ? "next" : "previous"));
  const keys = {
    j: () => turn(1),
    k: () => turn(-1),
    m: () => go("twin"),
    u: () => go("up"),
    "/": () => { search?.focus(); search?.select(); },
    "?": () => (help.open ? help.close() : help.showModal()),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target instanceof Element && event.target.closest("input, textarea, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  document.querySelectorAll("[data-submit]").forEach((menu) => menu.addEventListener("change", () => menu.form.requestSubmit()));
  button.hidden = false;
  button.addEventListener("click", () => help.showModal());
})();
