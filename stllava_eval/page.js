"use strict";
// What the page shows is text of models and data sets: it is set with textContent alone, never as HTML.
const PER_PAGE = 20;
const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A control that is drawn anew keeps the focus; `draw` may draw any of them.
function keepingFocus(draw) {
  const id = document.activeElement && document.activeElement.id;
  draw();
  if (id && byId(id) && document.activeElement !== byId(id)) byId(id).focus();
}

function select(label, options, value, change, id) {
  const made = element("select", { id: id, onchange: (event) => keepingFocus(() => change(event.target.value)) });
  for (const [key, text] of options) made.append(element("option", { value: key, textContent: text, selected: key === value }));
  return element("label", {}, label, made);
}

const number = (value, metric, digits = 1) => value === null ? "-" : metric === "words" ? value.toFixed(1) : (100 * value).toFixed(digits);
const interval = (low, high) => low === null || high === null ? "" : ` [${(100 * low).toFixed(0)}, ${(100 * high).toFixed(0)}]`;

function start(data) {
  const state = { task: data.tasks[0].name, kind: "both", groups: new Set(data.groups), sort: null, down: true, metric: null, field: null, of: "recall", a: null, b: null, show: "all", in: "", text: "", page: 0 };
  const rowsOf = (task) => data.rows.filter((row) => row.task === task);
  const metrics = () => data.metrics.filter((one) => state.kind === "both" || one.kind === "both" || one.kind === state.kind).filter((one) => rowsOf(state.task).some((row) => one.name in row.scores));

  byId("notice").textContent = data.notice;
  byId("explained").textContent = data.explained;
  byId("footer").textContent = `${data.notice} Made by stllava-eval from the runs named above; every figure is in board.csv and board.json beside this page.`;
  for (const task of data.tasks) byId("task").append(element("option", { value: task.name, textContent: `${task.name} (${task.data})` }));
  byId("task").addEventListener("change", (event) => { state.task = event.target.value; reset(); draw(); });

  function reset() {
    const viewed = data.viewer[state.task] ? data.viewer[state.task].systems.map((one) => one.name) : [];
    state.a = viewed[0] || null; state.b = viewed[1] || viewed[0] || null;
    state.show = "all"; state.in = ""; state.text = ""; state.page = 0; state.field = null; state.sort = null;
  }

  function draw() { drawHead(); drawBoard(); drawIntervals(); drawBreakdown(); drawInspection(); drawQuestions(); }

  function drawHead() {
    const task = data.tasks.find((one) => one.name === state.task);
    byId("counts").textContent = task.title[0];
    byId("sample").hidden = task.title.length < 2;
    byId("sample").textContent = task.title[1] || "";
    byId("remarks").replaceChildren(...task.remarks.map((line) => element("p", { textContent: line })));
  }

  function drawBoard() {
    const groups = data.groups.filter((group) => rowsOf(state.task).some((row) => row.group === group));
    byId("board-controls").replaceChildren(
      select("Questions", [["both", "open and closed"], ["open", "open"], ["closed", "closed"]], state.kind, (value) => { state.kind = value; drawBoard(); drawIntervals(); }, "kind"),
      ...groups.map((group, place) => element("label", { className: "tick" }, element("input", { type: "checkbox", id: `group-${place}`, checked: state.groups.has(group), onchange: (event) => keepingFocus(() => { if (event.target.checked) state.groups.add(group); else state.groups.delete(group); drawBoard(); drawIntervals(); }) }), group)),
    );
    const shown = metrics();
    const head = (name, text, title) => element("th", { scope: "col", title: title || "", "aria-sort": state.sort === name ? (state.down ? "descending" : "ascending") : "none" },
      element("button", { type: "button", textContent: text.replaceAll("_", "_\u200b"), onclick: () => { state.down = state.sort === name ? !state.down : name !== "system"; state.sort = name; drawBoard(); byId("scores").querySelector(`th[aria-sort$="ending"] button`).focus(); } }));
    const body = element("tbody");
    const line = (row) => element("tr", { className: row.kind },
      element("th", { scope: "row" }, Object.keys(row.about).length ? element("button", { type: "button", className: "more", textContent: row.system, title: "what this row rests on", onclick: () => tell(row) }) : row.system, row.unanswered ? element("small", { textContent: ` ${row.unanswered} unanswered` }) : null),
      ...shown.map((one) => cell(row, one.name)));
    const visible = rowsOf(state.task).filter((row) => state.groups.has(row.group));
    if (state.sort === null) {
      for (const group of groups.filter((name) => state.groups.has(name))) {
        body.append(element("tr", { className: "group" }, element("th", { colSpan: shown.length + 1, scope: "rowgroup", textContent: group })));
        body.append(...visible.filter((row) => row.group === group).map(line));
      }
    } else {
      const key = (row) => state.sort === "system" ? row.system : state.sort in row.scores ? row.scores[state.sort][0] : null;
      const order = [...visible].sort((x, y) => {
        const [a, b] = [key(x), key(y)];
        if (a === null || b === null) return (a === null) - (b === null);
        return (a < b ? -1 : a > b ? 1 : 0) * (state.down ? -1 : 1);
      });
      body.append(...order.map(line));
    }
    byId("scores").replaceChildren(element("thead", {}, element("tr", {}, head("system", "system"), ...shown.map((one) => head(one.name, one.name, one.title)))), body);
  }

  function cell(row, metric) {
    if (!(metric in row.scores)) return element("td", { textContent: "-" });
    const [, low, high, n, text] = row.scores[metric];
    const mark = row.marks[metric] === data.best ? "best" : row.marks[metric] ? "equal" : "";
    const note = row.notes[metric] ? " †" : "";
    return element("td", { title: row.notes[metric] || (n ? `n ${n}` : "as reported") },
      element("span", { className: mark, textContent: text + note }),
      ["words", "unparsed", "cut"].includes(metric) ? null : element("small", { textContent: interval(low, high) }));
  }

  function tell(row) {
    const list = element("dl");
    for (const [name, value] of Object.entries(row.about)) list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    for (const [name, value] of Object.entries(row.notes)) list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    const close = element("button", { type: "button", textContent: "Close", onclick: () => byId("about").close() });
    byId("about").replaceChildren(element("h3", { textContent: row.system }), list, close);
    byId("about").showModal();
  }

  function drawIntervals() {
    if (!metrics().some((one) => one.name === state.metric)) state.metric = metrics()[0].name;
    byId("interval-controls").replaceChildren(select("Score", metrics().filter((one) => one.name !== "words").map((one) => [one.name, `${one.name} - ${one.title}`]), state.metric, (value) => { state.metric = value; drawIntervals(); }, "metric"));
    const rows = rowsOf(state.task).filter((row) => state.metric in row.scores && state.groups.has(row.group));
    const place = (value) => `${(100 * Math.min(1, Math.max(0, value))).toFixed(2)}%`;
    byId("plot").replaceChildren(...rows.map((row) => {
      const [value, low, high, n] = row.scores[state.metric];
      const track = element("span", { className: "track", "aria-hidden": "true" });
      if (low !== null && high !== null) {
        const whisker = element("i", { className: "whisker" });
        whisker.style.left = place(low); whisker.style.width = `calc(${place(high)} - ${place(low)})`;
        track.append(whisker);
      }
      const dot = element("i", { className: "dot" }); dot.style.left = place(value); track.append(dot);
      return element("div", { className: `row ${row.kind}` }, element("span", { className: "name", textContent: row.system }), track,
        element("span", { className: "value" }, element("b", { textContent: number(value, state.metric) }), interval(low, high) + (n ? ` n ${n}` : " reported")));
    }), element("div", { className: "row" }, element("span"), element("span", { className: "ends" }, element("span", { textContent: "0" }), element("span", { textContent: "50" }), element("span", { textContent: "100" })), element("span")));
  }

  const worse = (metric, low, high, whole) => metric === "unparsed" || metric === "cut" ? low !== null && low > whole : high !== null && high < whole;

  function drawBreakdown() {
    const rows = rowsOf(state.task).filter((row) => row.kind !== "reported" && (row.kind === "measured" || Object.keys(row.about).length || row.system === "commonest answer"));
    const fields = new Set();
    for (const row of rows) for (const cells of Object.values(row.categories)) for (const name of Object.keys(cells)) fields.add(name.split("=")[0]);
    const names = [...fields].sort();
    if (!fields.has(state.field)) state.field = names[0] || null;
    const scores = data.inspected.filter((metric) => rows.some((row) => metric in row.categories));
    if (!scores.includes(state.of)) state.of = scores[0];
    byId("breakdown-controls").replaceChildren(
      select("Category", names.map((name) => [name, name === "asks" ? "what is asked (by our rules)" : name.replaceAll("_", " ")]), state.field, (value) => { state.field = value; drawBreakdown(); }, "field"),
      select("Score", scores.map((metric) => [metric, metric]), state.of, (value) => { state.of = value; drawBreakdown(); }, "of"));
    const categories = new Set();
    for (const row of rows) for (const name of Object.keys(row.categories[state.of] || {})) if (name.split("=")[0] === state.field) categories.add(name);
    const body = element("tbody", {}, ...["all", ...[...categories].sort()].map((category) => element("tr", {},
      element("th", { scope: "row", textContent: category === "all" ? "all" : category.slice(category.indexOf("=") + 1) }),
      ...rows.map((row) => {
        const found = category === "all" ? row.scores[state.of] : (row.categories[state.of] || {})[category];
        if (!found) return element("td", { textContent: "-" });
        const [value, low, high, n] = found;
        const bad = category !== "all" && worse(state.of, low, high, row.scores[state.of][0]);
        return element("td", {}, element("span", { className: bad ? "below" : "", textContent: number(value, state.of) }), element("small", { textContent: `${interval(low, high)} n ${n}` }));
      }))));
    byId("categories").replaceChildren(element("thead", {}, element("tr", {}, element("th", { scope: "col", textContent: "questions" }), ...rows.map((row) => element("th", { scope: "col", textContent: row.system })))), body);
  }

  function table(heads, lines) {
    return element("div", { className: "scroll", tabIndex: 0 }, element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col", textContent: text })))),
      element("tbody", {}, ...lines.map((line) => element("tr", {}, ...line.map((text, place) => element(place ? "td" : "th", { textContent: text })))))));
  }

  function drawInspection() {
    const found = data.inspections.filter((one) => one.task === state.task);
    const parts = [];
    const pairs = found.flatMap((one) => one.consistency.map((of) => [one.run, of.what, number(of.value) + interval(of.low, of.high), number(of.both_right), `${of.pairs}`, `${of.images}`]));
    if (pairs.length) parts.push(element("h3", { textContent: "Do answers to questions that belong together fit each other?" }), table(["system", "pairs of questions", "consistent [95 %]", "both right", "pairs", "images"], pairs));
    const blind = found.flatMap((one) => one.blind.map((of) => [one.run, of.metric, number(of.value), number(of.prior), number(of.best), of.best_of]));
    if (blind.length) parts.push(element("h3", { textContent: "How much of a score do answers without the image reach?" }), table(["system", "score", "this system", "commonest answer", "best without the image", "which is"], blind));
    byId("inspection").replaceChildren(...(parts.length ? parts : [element("p", { className: "soft", textContent: "No run of this data set was shown its own images." })]));
  }

  const verdict = (sign) => sign === "R" || sign === "X" ? "right" : sign === "-" ? "none" : "wrong";
  const says = (sign) => ({ R: "right", W: "wrong", U: "no verdict", X: "all words", "-": "unanswered" })[sign] || (sign === "0" ? "no word, or under a tenth" : `${sign}0 % of the words`);

  function drawQuestions() {
    const viewer = data.viewer[state.task];
    if (!viewer) { byId("question-controls").replaceChildren(); byId("pager").replaceChildren(); byId("cards").replaceChildren(element("p", { className: "soft", textContent: "No run of this data set is on this board." })); return; }
    byId("kept").textContent = viewer.questions.length < viewer.of ? `Here are ${viewer.questions.length} of ${viewer.of} questions, those on which the systems differ most; the page would be too large with all.` : "";
    const names = viewer.systems.map((one) => [one.name, one.name]);
    const shows = [["all", "all questions"], ["ab", "A right, B wrong"], ["ba", "B right, A wrong"], ["changed", "the answer changed from A to B (DPO: A before, B after)"], ["wrong", "A and B wrong"], ["unparsed", "A without a verdict"]];
    const categories = new Set();
    for (const question of viewer.questions) for (const category of question.categories) categories.add(category);
    const changed = (name) => (value) => { state[name] = value; state.page = 0; drawQuestions(); };
    const search = element("input", { id: "search", type: "search", value: state.text, oninput: (event) => { state.text = event.target.value; state.page = 0; list(); } });
    byId("question-controls").replaceChildren(select("A", names, state.a, changed("a"), "a"), select("B", names, state.b, changed("b"), "b"), select("Show", shows, state.show, changed("show"), "show"),
      select("Kind", [["both", "open and closed"], ["open", "open"], ["closed", "closed"]], state.asked || "both", changed("asked"), "asked"),
      select("Category", [["", "all"], ...[...categories].sort().map((name) => [name, name])], state.in, changed("in"), "in"), element("label", {}, "Words in question, reference or answers", search));
    list();
  }

  function list() {
    const viewer = data.viewer[state.task];
    const [a, b] = [state.a, state.b].map((name) => viewer.systems.find((one) => one.name === name));
    const said = (system, place) => system.answers[place] < 0 ? null : data.strings[system.answers[place]];
    const wanted = state.text.toLowerCase();
    const places = viewer.questions.map((_, place) => place).filter((place) => {
      const question = viewer.questions[place];
      const [x, y] = [verdict(a.signs[place]), verdict(b.signs[place])];
      if (state.show === "ab" && !(x === "right" && y === "wrong")) return false;
      if (state.show === "ba" && !(y === "right" && x === "wrong")) return false;
      if (state.show === "wrong" && !(x === "wrong" && y === "wrong")) return false;
      if (state.show === "unparsed" && a.signs[place] !== "U") return false;
      if (state.show === "changed" && (a.answers[place] === b.answers[place] || a.answers[place] < 0 || b.answers[place] < 0)) return false;
      if (state.asked && state.asked !== "both" && question.kind !== state.asked) return false;
      if (state.in && !question.categories.includes(state.in)) return false;
      return !wanted || [question.question, question.reference, question.id, ...viewer.systems.map((one) => said(one, place) || "")].some((text) => text.toLowerCase().includes(wanted));
    });
    const pages = Math.max(1, Math.ceil(places.length / PER_PAGE));
    state.page = Math.min(state.page, pages - 1); state.pages = pages;
    byId("pager").replaceChildren(element("button", { type: "button", id: "previous", textContent: "Previous page", disabled: state.page === 0, onclick: () => turn(-1) }), `${places.length} questions, page ${state.page + 1} of ${pages}`,
      element("button", { type: "button", id: "next", textContent: "Next page", disabled: state.page >= pages - 1, onclick: () => turn(1) }));
    byId("cards").replaceChildren(...places.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE).map((place) => {
      const question = viewer.questions[place];
      const image = question.image === null ? element("div", { className: "noimage", textContent: `image ${question.image_id}` }) : element("img", { src: data.images[question.image], alt: `image ${question.image_id}`, loading: "lazy" });
      return element("article", { className: "card", tabIndex: 0, "aria-label": question.question }, element("div", {}, image),
        element("div", {}, element("h3", { textContent: question.question }), element("div", { className: "meta", textContent: [question.id, question.kind, ...question.categories].join(" · ") }),
          element("p", {}, "Reference: ", element("span", { className: "reference", textContent: question.reference })),
          element("div", { className: "answers" }, ...viewer.systems.map((system) => {
            const sign = system.signs[place];
            const chosen = system.name === state.a || system.name === state.b ? " chosen" : "";
            return element("div", { className: `answer ${verdict(sign)}${chosen}` }, element("small", {}, element("span", { textContent: system.name }), element("span", { className: "says", textContent: says(sign) })),
              element("span", { className: "said", textContent: said(system, place) === null ? "" : said(system, place) || "(says nothing)" }));
          }))));
    }));
  }

  function turn(by) {
    const fromCard = byId("cards").contains(document.activeElement);
    const fromPager = byId("pager").contains(document.activeElement);
    state.page = Math.min(state.pages - 1, Math.max(0, state.page + by));
    keepingFocus(list);
    if (fromCard && byId("cards").firstElementChild) byId("cards").firstElementChild.focus();
    if (fromPager && document.activeElement === document.body) byId(by > 0 ? "previous" : "next").focus();
    byId("pager").scrollIntoView({ block: "nearest" });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) || byId("about").open) return;
    if (event.key === "n") turn(1);
    if (event.key === "p") turn(-1);
    if (event.key === "j" || event.key === "k") {
      const cards = [...byId("cards").querySelectorAll(".card")];
      const now = cards.indexOf(document.activeElement);
      const next = cards[Math.min(cards.length - 1, Math.max(0, now + (event.key === "j" ? 1 : -1)))];
      if (next) { next.focus(); next.scrollIntoView({ block: "center" }); }
    }
  });

  reset(); draw();
  document.body.dataset.ready = "yes";
}

(async () => {
  const packed = Uint8Array.from(atob(byId("data").textContent.trim()), (sign) => sign.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  start(JSON.parse(await new Response(stream).text()));
})().catch((error) => { byId("notice").textContent += ` This page needs a browser of 2023 or later (${error.message}).`; });
