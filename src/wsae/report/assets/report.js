"use strict";
// Latent browser and hook tabs. All text enters the page as text nodes; nothing is parsed as markup or code.
(() => {
  const PAGE = 15, SHOWN = 4, LEVELS = 6;
  const SORTS = {
    "index": ["latent number", (a, b) => a.latent - b.latent],
    "density": ["density, high first", by("density", -1)],
    "-density": ["density, low first", by("density", 1)],
    "variance": ["variance, high first", by("variance", -1)],
    "max": ["strongest activation, high first", by("max", -1)],
    "match": ["match, least alike first", by("cosine", 1)],
    "-match": ["match, most alike first", by("cosine", -1)],
  };
  const SCORE = "score-";
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("contexts").textContent);
  data.scores.forEach((name, i) => {
    SORTS[SCORE + i] = [name + ", high first", by(SCORE + i, -1)];
    SORTS["-" + SCORE + i] = [name + ", low first", by(SCORE + i, 1)];
  });
  const state = { hook: "", member: "", latent: null, sort: "index", query: "" };
  let hooks = new Map(), shown = [], drawn = 0;

  function by(key, sign) { // missing values last, ties by latent number
    return (a, b) => {
      if (a[key] === b[key]) return a.latent - b.latent;
      if (a[key] === null) return 1;
      if (b[key] === null) return -1;
      return sign * (a[key] - b[key]);
    };
  }

  function node(tag, kind, text) {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Characters that are invisible or would reorder the line are shown by name.
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  function visible(text) {
    return text.replace(HIDDEN, (c) => {
      if (c === "\n") return "↵";
      if (c === "\t") return "⇥";
      return "⟨" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
    });
  }

  function number(value) {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(1);
    return String(Number(value.toPrecision(3)));
  }
  const percent = (value) => (value === null ? "–" : number(100 * value) + " %");

  function unpack() {
    for (const [hook, members] of data.hooks) {
      const byMember = new Map();
      members.forEach(([name, latents], index) => byMember.set(name, { name, index, latents: latents.map(latent) }));
      for (const member of byMember.values()) member.byIndex = new Map(member.latents.map((l) => [l.latent, l]));
      hooks.set(hook, byMember);
      chosenBy(byMember);
    }
  }
  // A plain latent records no match; it gets the closest sampled latent that chose it.
  function chosenBy(members) {
    for (const member of members.values()) {
      for (const other of member.latents) {
        const [name, index, cosine] = other.match ?? [];
        const entry = members.get(name)?.byIndex.get(index);
        if (!entry || entry.match || (entry.suitor && entry.suitor[2] >= cosine)) continue;
        entry.suitor = [member.name, other.latent, cosine];
        entry.cosine = cosine;
      }
    }
  }
  function latent([index, density, variance, max, match, contexts, scores, explanation, typical]) {
    const entry = { latent: index, density, variance, max, match, contexts, scores, explanation, typical };
    data.scores.forEach((_, i) => { entry[SCORE + i] = scores[i] ?? null; });
    return Object.assign(entry, { cosine: match ? match[2] : null, suitor: null, text: null });
  }
  function textOf(entry) {
    if (entry.text === null) {
      const lines = entry.contexts.map((c) => c[0].map((t) => data.tokens[t]).join(""));
      entry.text = [entry.explanation ?? "", ...lines].join("\n").toLowerCase();
    }
    return entry.text;
  }

  function partner(entry) {
    const pair = entry.match ?? entry.suitor;
    if (!pair) return null;
    const [name, index, cosine] = pair;
    return { name, index, cosine, entry: hooks.get(state.hook).get(name)?.byIndex.get(index) ?? null };
  }

  function imageNode([tokens, , image, pairs], query) {
    const box = node("figure", "shot"), label = visible(data.tokens[tokens[0]]);
    const picture = node("img");
    picture.src = "data:image/png;base64," + data.images[image];
    picture.alt = `image ${image}: ${label}`;
    picture.title = `image ${image}, activation ${number(pairs[1])}`;
    box.append(picture, node("figcaption", matched(tokens, query).size ? "hit" : "", label));
    return box;
  }
  function contextNodes(contexts, entry) { // images side by side, texts one below the other
    if (!contexts.every((c) => Object.hasOwn(data.images, c[2]))) return contexts.map((c) => contextNode(c, entry.max, state.query));
    const sheet = node("div", "sheet");
    sheet.append(...contexts.map((c) => imageNode(c, state.query)));
    return [sheet];
  }

  function contextNode([tokens, peak, , pairs], max, query) {
    const line = node("p", "ctx");
    const acts = new Map();
    for (let i = 0; i < pairs.length; i += 2) acts.set(pairs[i], pairs[i + 1]);
    const hits = matched(tokens, query);
    let plain = "";
    const flush = () => {
      const text = line.hasChildNodes() ? plain : plain.trimStart();
      if (text) line.append(text);
      plain = "";
    };
    tokens.forEach((token, i) => {
      const act = acts.get(i), text = visible(data.tokens[token]) || (act === undefined ? "" : "⋯"); // a character goes on
      if (act === undefined && !hits.has(i)) { plain += text; return; }
      const space = /^ +(?=\S)/.exec(text)?.[0] ?? ""; // outside the shading, so that lines break cleanly
      plain += space;
      flush();
      const span = node("span", "tok", text.slice(space.length));
      if (act !== undefined) {
        span.classList.add("a" + Math.max(1, Math.min(LEVELS, Math.ceil(LEVELS * act / (max || act)))));
        span.title = "activation " + number(act);
      }
      if (i === peak) span.classList.add("peak");
      if (hits.has(i)) span.classList.add("hit");
      line.append(span);
    });
    flush();
    return line;
  }

  function matched(tokens, query) { // positions of the tokens that the search text covers
    const hits = new Set();
    if (!query) return hits;
    const starts = [];
    let text = "";
    for (const t of tokens) { starts.push(text.length); text += data.tokens[t].toLowerCase(); }
    for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
      starts.forEach((start, i) => {
        const end = i + 1 < starts.length ? starts[i + 1] : text.length;
        if (start < at + query.length && end > at) hits.add(i);
      });
    }
    return hits;
  }

  function swatch(name) {
    return node("span", "swatch s" + (hooks.get(state.hook).get(name)?.index ?? 0) % 7);
  }

  function side(kind, name, entry, head) {
    const box = node("div", "side " + kind), title = node("p", "side-head");
    title.append(swatch(name), head);
    box.append(title);
    if (!entry) {
      box.append(node("p", "ctx code", "Not among the sampled latents, so no contexts are stored here."));
      return box;
    }
    if (entry.explanation !== null) box.append(node("p", "explained", "“" + visible(entry.explanation) + "”"));
    else if (entry.typical.length) {
      const line = node("p", "explained", "fires on ");
      entry.typical.forEach((token) => line.append(node("code", "typical", visible(token).trim() || "␣"), " "));
      box.append(line);
    }
    if (entry.scores.length) {
      const scores = node("p", "scores");
      data.scores.forEach((name, i) => scores.append(stat(name, number(entry.scores[i]))));
      box.append(scores);
    }
    const ordered = entry.contexts, pictured = ordered.some((c) => Object.hasOwn(data.images, c[2]));
    const first = pictured ? ordered.length : SHOWN, rest = ordered.slice(first);
    box.append(...contextNodes(ordered.slice(0, first), entry));
    if (rest.length) {
      const more = node("button", "fold", `${rest.length} more`);
      more.type = "button";
      more.addEventListener("click", () => {
        more.replaceWith(...contextNodes(rest, entry));
      });
      box.append(more);
    }
    return box;
  }

  function card(entry) {
    const box = node("article", "latent"), head = node("div", "latent-head"), title = node("h3");
    const link = node("a", "", "Latent " + entry.latent);
    link.href = address({ ...state, latent: entry.latent });
    title.append(link);
    head.append(title, stat("fires on", percent(entry.density)), stat("variance", number(entry.variance)),
      stat("strongest", number(entry.max)));
    const other = partner(entry), pair = node("div", "pair" + (other ? "" : " lone"));
    pair.append(side("own", state.member, entry, state.member));
    if (other) {
      const words = `${other.name}, latent ${other.index} · cosine ${number(other.cosine)}`;
      pair.append(side("twin", other.name, other.entry, words));
    }
    box.append(head, pair);
    box.tabIndex = -1;
    box.dataset.latent = entry.latent;
    return box;
  }
  function stat(name, value) {
    const box = node("span", "stat", name + " ");
    box.append(node("b", "", value));
    return box;
  }

  function draw(count) {
    const list = find("latents"), end = Math.min(shown.length, drawn + count);
    for (; drawn < end; drawn++) list.append(card(shown[drawn]));
    find("more-row").hidden = drawn >= shown.length;
    find("more").textContent = `Show more (${shown.length - drawn} left)`;
  }

  function render() {
    const members = hooks.get(state.hook), member = members.get(state.member);
    for (const button of find("members").children) {
      button.setAttribute("aria-pressed", String(button.dataset.member === state.member));
    }
    shown = member.latents.filter((l) => !state.query || textOf(l).includes(state.query));
    shown.sort(SORTS[state.sort][1]);
    find("latents").replaceChildren();
    drawn = 0;
    find("count").textContent = state.query
      ? `${shown.length} of ${member.latents.length} sampled latents contain “${visible(state.query)}”`
      : `${member.latents.length} sampled latents`;
    if (!shown.length) find("latents").append(node("p", "empty", "No sampled latent has this in its contexts."));
    const at = shown.findIndex((l) => l.latent === state.latent);
    draw(Math.max(PAGE, at + 1));
    if (at >= 0) select(at, true);
  }

  function select(at, scroll) {
    if (at >= drawn) draw(Math.max(PAGE, at + 1 - drawn));
    const list = find("latents").children;
    for (const element of document.querySelectorAll(".latent.current")) element.classList.remove("current");
    state.latent = shown[at].latent;
    list[at].classList.add("current");
    if (scroll) { list[at].scrollIntoView({ block: "start" }); list[at].focus({ preventScroll: true }); }
  }

  function step(by) {
    if (!shown.length) return;
    const at = shown.findIndex((l) => l.latent === state.latent);
    select(Math.max(0, Math.min(shown.length - 1, at < 0 ? 0 : at + by)), true);
    remember();
  }

  // Address: #hook/member/latent?sort=...&q=...
  function address(s) {
    const path = [s.hook, s.member, s.latent ?? ""].map((part) => encodeURIComponent(part)).join("/");
    const query = new URLSearchParams();
    if (s.sort !== "index") query.set("sort", s.sort);
    if (s.query) query.set("q", s.query);
    return "#" + path + (query.size ? "?" + query : "");
  }
  function remember() {
    const wanted = address(state);
    if (location.hash !== wanted) history.replaceState(null, "", wanted);
  }
  function decoded(part) {
    try { return decodeURIComponent(part); } catch { return part; } // a hand-made address with a stray % sign
  }
  function follow() { // returns whether the address named a place in the browser
    const [path, query] = location.hash.slice(1).split("?");
    if (!path.includes("/")) return false;
    const [hook, member, index] = path.split("/").map(decoded);
    if (!hooks.get(hook)?.has(member)) return false;
    const options = new URLSearchParams(query ?? ""), sort = options.get("sort");
    state.sort = sort !== null && Object.hasOwn(SORTS, sort) ? sort : "index";
    state.query = (options.get("q") ?? "").toLowerCase();
    state.latent = index ? Number(index) : null;
    choose(hook, member);
    if (state.latent === null) find("browser").scrollIntoView();
    return true;
  }

  function choose(hook, member) {
    const changed = hook !== state.hook, members = hooks.get(hook);
    state.hook = hook;
    state.member = members.has(member) ? member : firstOf(members);
    if (changed) memberButtons(members);
    find("search").value = state.query;
    find("sort").value = state.sort;
    showHook([...document.querySelectorAll("[data-tab]")].find((tab) => tab.textContent === hook)?.dataset.tab);
    render();
  }
  function firstOf(members) { // the first weighted member: the one with matches
    const names = [...members.keys()];
    return names.find((name) => members.get(name).latents.some((l) => l.match)) ?? names[0];
  }
  function memberButtons(members) {
    find("members").replaceChildren(...[...members.keys()].map((name) => {
      const button = node("button", "");
      button.type = "button";
      button.dataset.member = name;
      button.append(swatch(name), name);
      button.addEventListener("click", () => { state.member = name; state.latent = null; render(); remember(); });
      return button;
    }));
  }

  function showHook(index) {
    if (index === undefined) return;
    for (const tab of document.querySelectorAll("[data-tab]")) {
      tab.setAttribute("aria-pressed", String(tab.dataset.tab === index));
    }
    for (const part of document.querySelectorAll("[data-hook]")) part.hidden = part.dataset.hook !== index;
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const steps = { j: 1, k: -1 };
    if (event.key === "/") find("search").focus();
    else if (Object.hasOwn(steps, event.key)) step(steps[event.key]);
    else return;
    event.preventDefault();
  }

  function startTabs() {
    const tabs = [...document.querySelectorAll("[data-tab]")];
    for (const tab of tabs) {
      tab.addEventListener("click", () => {
        state.latent = null;
        if (hooks.has(tab.textContent)) { choose(tab.textContent, state.member); remember(); }
        showHook(tab.dataset.tab);
      });
    }
    if (tabs.length) showHook(tabs[0].dataset.tab);
  }

  function startBrowser() {
    for (const [key, [name]] of Object.entries(SORTS)) {
      const option = node("option", "", name);
      option.value = key;
      find("sort").append(option);
    }
    let timer = 0;
    find("search").addEventListener("input", (event) => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        state.query = event.target.value.toLowerCase();
        state.latent = null;
        render();
        remember();
      }, 120);
    });
    find("sort").addEventListener("change", (event) => {
      state.sort = event.target.value; state.latent = null; render(); remember();
    });
    find("more").addEventListener("click", () => draw(PAGE));
    document.addEventListener("keydown", keys);
    window.addEventListener("hashchange", follow);
    if (!follow()) {
      const first = [...hooks.keys()][0];
      choose(first, firstOf(hooks.get(first)));
    }
  }

  unpack();
  startTabs();
  if (find("browser") && hooks.size) startBrowser();
})();
