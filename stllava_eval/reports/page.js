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

// A control that is drawn again keeps the focus; `draw` may draw any of them.
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

// Names of scores break after an underscore.
const breakable = (text) => text.replaceAll("_", "_\u200b");
const VALUE = 0, LOW = 1, HIGH = 2, N = 3, TEXT = 4, INTERVAL = 5, BELOW = 6; // of a figure; its text is never rounded here

// Tables whose columns have no room become blocks, whatever the window, the font and the number of columns.
function fit() {
  for (const table of document.querySelectorAll(".stack")) {
    table.classList.remove("blocks");
    table.classList.toggle("blocks", table.offsetWidth > table.parentElement.clientWidth);
  }
}

function start(data) {
  const state = { task: data.opens || (data.tasks[0] || {}).name, kind: "both", groups: new Set(data.groups), by: null, sort: null, down: true, field: null, of: "recall", a: null, b: null, show: "all", in: "", text: "", page: 0 };
  const rowsOf = (task) => data.rows.filter((row) => row.task === task);
  const taskNow = () => data.tasks.find((one) => one.name === state.task);
  const columns = () => data.columns.filter((one) => state.kind === "both" || one.kind === "both" || one.kind === state.kind).filter((one) => rowsOf(state.task).some((row) => one.name in row.scores));
  const ranked = () => columns().filter((one) => one.ranked);

  byId("notice").textContent = data.notice;
  byId("ranking").textContent = data.ranking;
  byId("explained").textContent = data.explained;
  byId("footer").textContent = `${data.notice} Made by stllava-eval from the runs named above; every figure is in board.csv and board.json beside this page.`;
  for (const task of data.tasks) byId("task").append(element("option", { value: task.name, textContent: `${task.name} (${task.data})`, selected: task.name === state.task }));
  byId("task").addEventListener("change", (event) => { state.task = event.target.value; reset(); draw(); });

  function reset() {
    const viewed = data.viewer[state.task] ? data.viewer[state.task].systems.map((one) => one.name) : [];
    state.a = viewed[0] || null; state.b = viewed[1] || viewed[0] || null;
    state.show = "all"; state.in = ""; state.text = ""; state.page = 0; state.field = null; state.sort = null; state.by = null;
  }

  function draw() { drawHead(); drawBoard(); drawIntervals(); drawBreakdown(); drawInspection(); drawQuestions(); }

  function drawHead() {
    const task = taskNow();
    byId("counts").textContent = task.title[0];
    byId("sample").hidden = task.title.length < 2;
    byId("sample").textContent = task.title[1] || "";
    byId("remarks").replaceChildren(...task.remarks.map((line) => element("p", { textContent: line })));
  }

  // The rows that are shown, in the order that the reader chose; those without the score last.
  function ordered() {
    const key = (row) => state.sort === "system" ? row.system.toLowerCase() : state.sort === "prompt" ? prompt(row) : state.sort in row.scores ? row.scores[state.sort][VALUE] : null;
    return rowsOf(state.task).filter((row) => state.groups.has(row.group)).sort((x, y) => {
      const [a, b] = [key(x), key(y)];
      if (a === null || b === null) return (a === null) - (b === null);
      return (a < b ? -1 : a > b ? 1 : 0) * (state.down ? -1 : 1);
    });
  }

  const prompt = (row) => row.about.prompt || (row.kind === "reported" ? "not given" : row.kind === "blind" ? "none" : "not recorded");

  // [what the rank column says, after it, why]
  function rank(row) {
    if (!(state.by in row.scores)) return ["-", "", "the row does not have this score"];
    const place = ((taskNow().ranks[state.by] || { places: {} }).places)[row.system];
    if (row.kind === "measured" && place) return [`${place[0]}`, `of ${place[1]}`, `in the group "${row.group}"`];
    if (row.kind === "measured") return ["partial", "", "it did not answer the same questions as the ranked rows"];
    return [row.kind, "", row.kind === "blind" ? "image-blind rows are not ranked" : "reported figures are not ranked"];
  }

  function choose(name) {
    const column = data.columns.find((one) => one.name === name);
    state.down = state.sort === name ? !state.down : column !== undefined;
    state.sort = name;
    if (column && column.ranked) state.by = name;
    drawBoard(); drawIntervals();
  }

  function drawBoard() {
    const groups = data.groups.filter((group) => rowsOf(state.task).some((row) => row.group === group));
    const shown = columns();
    const names = shown.map((one) => one.name);
    if (!ranked().some((one) => one.name === state.by)) {
      // the score that most rows have: with reported rows the one that papers report
      const count = (name) => rowsOf(state.task).filter((row) => name in row.scores).length;
      state.by = ranked().map((one) => one.name).sort((x, y) => count(y) - count(x))[0] || null;
      state.sort = state.by; state.down = true;
    }
    if (!["system", "prompt", ...names].includes(state.sort)) { state.sort = state.by; state.down = true; }
    byId("board-controls").replaceChildren(
      select("Questions", [["both", "open and closed"], ["open", "open"], ["closed", "closed"]], state.kind, (value) => { state.kind = value; drawBoard(); drawIntervals(); }, "kind"),
      select("Rank by", ranked().map((one) => [one.name, `${one.name} (${one.kind} questions)`]), state.by, (value) => { state.sort = null; choose(value); }, "by"),
      element("fieldset", {}, element("legend", { className: "unseen", textContent: "Rows that are shown" }), ...groups.map((group, place) => element("label", { className: "tick" }, element("input", { type: "checkbox", id: `group-${place}`, checked: state.groups.has(group), onchange: (event) => keepingFocus(() => { if (event.target.checked) state.groups.add(group); else state.groups.delete(group); drawBoard(); drawIntervals(); }) }), group))),
    );
    const label = shown.filter((one) => one.name === state.sort).map((one) => ["cut", "empty"].includes(one.name) || one.ranked ? one.label : `${one.label}, ${one.kind} questions`)[0] || state.sort;
    const notes = ((taskNow().ranks[state.by] || {}).notes || []).join(" ");
    const upwards = state.sort === "system" || state.sort === "prompt" ? (state.down ? "z to a" : "a to z") : state.down ? "highest first" : "lowest first";
    byId("order").textContent = `Ordered ${state.sort === state.by ? "and ranked " : ""}by ${label}, ${upwards}. ${state.sort === state.by ? "" : `Ranked by ${state.by}. `}${notes}`;
    byId("scores").replaceChildren(
      element("caption", { className: "unseen", textContent: `Scores on ${state.task}` }),
      ...heads(shown), element("tbody", { role: "rowgroup" }, ...ordered().map((row) => line(row, shown))));
    fit();
  }

  const KINDS = { open: "Open questions", closed: "Closed questions", both: "Replies" };

  function heads(shown) {
    const head = (name, text, title, classes = "") => element("th", { scope: "col", role: "columnheader", className: classes, title: title || "", "aria-sort": state.sort === name ? (state.down ? "descending" : "ascending") : "none" },
      element("button", { type: "button", textContent: breakable(text), onclick: () => { choose(name); byId("scores").querySelector(`th[aria-sort$="ending"] button`).focus(); } }));
    const plain = (text, classes, title = "") => element("th", { scope: "col", role: "columnheader", className: classes, textContent: text, title: title });
    const kinds = Object.keys(KINDS).map((kind) => [kind, shown.filter((one) => one.kind === kind)]).filter(([, of]) => of.length);
    const spanning = kinds.map(([kind, of]) => element("th", { scope: "colgroup", role: "columnheader", className: "first", colSpan: of.length + (kind === "both" ? 0 : 1), textContent: KINDS[kind] }));
    const under = kinds.flatMap(([kind, of]) => [
      ...(kind === "both" ? [] : [plain("n", "first", `answered ${kind} questions`)]),
      ...of.map((one, place) => head(one.name, one.label, one.title, [kind === "both" && place === 0 ? "first" : "", one.name === state.sort ? "picked" : ""].join(" ")))]);
    const widths = element("colgroup", {}, element("col", { className: "narrow" }), element("col"));
    return [widths, element("thead", { role: "rowgroup" },
      element("tr", { role: "row", className: "kinds" }, element("td", { colSpan: 3, role: "cell" }), ...spanning),
      element("tr", { role: "row" }, plain("rank", "left"), head("system", "system", "", "left"), head("prompt", "prompt", "how the questions were put", "left"), ...under))];
  }

  function line(row, shown) {
    const [place, of, why] = rank(row);
    const standing = [row.group, row.unanswered ? `${row.unanswered} not answered` : null].filter(Boolean).join(", ");
    const named = Object.keys(row.about).length ? element("button", { type: "button", className: "more", textContent: row.system, title: "how this row was made", onclick: () => tell(row) }) : row.system;
    const kinds = Object.keys(KINDS).map((kind) => [kind, shown.filter((one) => one.kind === kind)]).filter(([, columns]) => columns.length);
    const cells = kinds.flatMap(([kind, columns]) => {
      const n = columns.map((one) => row.scores[one.name]).filter(Boolean).map((figure) => figure[N])[0];
      return [...(kind === "both" ? [] : [element("td", { role: "cell", className: n ? "first" : "first absent", "data-label": `n, ${kind}`, title: n === 0 ? "reported without n" : "", textContent: n || "-" })]),
        ...columns.map((one, at) => cell(row, one, kind === "both" && at === 0))];
    });
    return element("tr", { className: row.kind, role: "row" },
      element("td", { role: "cell", className: /^\d/.test(place) ? "rank left" : "rank left none", title: why }, element("b", { textContent: place }), of ? element("small", { textContent: ` ${of}` }) : null),
      element("th", { scope: "row", role: "rowheader" }, named, element("small", { textContent: standing })),
      element("td", { role: "cell", className: "prompt left", "data-label": "prompt", textContent: prompt(row) }), ...cells);
  }

  function cell(row, column, first) {
    const classes = [first ? "first" : "", column.name === state.sort ? "picked" : ""];
    const label = breakable(column.label === "words" ? `words, ${column.kind}` : column.label);
    if (!(column.name in row.scores)) return element("td", { role: "cell", className: [...classes, "absent"].join(" "), "data-label": label, textContent: "-" });
    const figure = row.scores[column.name];
    const mark = row.marks[column.name] === data.best ? "best" : row.marks[column.name] ? "equal" : "";
    const note = row.notes[column.name] ? " †" : "";
    return element("td", { role: "cell", className: classes.join(" "), "data-label": label, title: row.notes[column.name] || (figure[N] ? `n ${figure[N]}` : "as reported") },
      element("span", { className: mark, textContent: figure[TEXT] + note }),
      figure[INTERVAL] ? element("small", { textContent: ` ${figure[INTERVAL]}` }) : null);
  }

  function tell(row) {
    const list = element("dl");
    for (const [name, value] of Object.entries(row.about)) list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    for (const [name, value] of Object.entries(row.notes)) list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    const close = element("button", { type: "button", textContent: "Close", onclick: () => byId("about").close() });
    byId("about").replaceChildren(element("h3", { id: "about-title", textContent: row.system }), list, close);
    byId("about").showModal();
  }

  function drawIntervals() {
    byId("interval-controls").replaceChildren(select("Score", ranked().map((one) => [one.name, `${one.name} (${one.kind} questions)`]), state.by, (value) => { state.sort = null; choose(value); }, "metric"));
    const rows = ordered().filter((row) => state.by in row.scores);
    byId("plot").replaceChildren(...rows.map(intervalRow), element("div", { className: "row" }, element("span"), element("span", { className: "ends", "aria-hidden": "true" }, element("span", { textContent: "0" }), element("span", { textContent: "50" }), element("span", { textContent: "100" })), element("span")));
  }

  // A share as a position on a track of the plot, which reaches from 0 to 1.
  const position = (value) => `${(100 * Math.min(1, Math.max(0, value))).toFixed(2)}%`;

  function intervalTrack(figure) {
    const track = element("span", { className: "track", "aria-hidden": "true" });
    if (figure[LOW] !== null && figure[HIGH] !== null) {
      const whisker = element("i", { className: "whisker" });
      whisker.style.left = position(figure[LOW]); whisker.style.width = `calc(${position(figure[HIGH])} - ${position(figure[LOW])})`;
      track.append(whisker);
    }
    const dot = element("i", { className: "dot" }); dot.style.left = position(figure[VALUE]); track.append(dot);
    return track;
  }

  function intervalRow(row) {
    const figure = row.scores[state.by];
    const [standing, of] = rank(row);
    return element("div", { className: `row ${row.kind}` }, element("span", { className: "name" }, `${row.system} `, element("small", { textContent: of ? `${row.group}, rank ${standing} ${of}` : standing === "partial" ? `${row.group}, partial` : row.group })), intervalTrack(figure),
      element("span", { className: "value" }, element("b", { textContent: figure[TEXT] }), ` ${figure[INTERVAL]}${figure[N] ? ` n ${figure[N]}` : " n not given"}`));
  }

  // A table for each system, side by side where there is room: however many systems there are, none is off the page.
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
    const shown = ["all", ...[...categories].sort()];
    byId("categories").replaceChildren(...rows.filter((row) => state.of in row.scores).map((row) => element("div", { className: "sheet" }, element("h3", { textContent: row.system }),
      element("table", {}, element("thead", {}, element("tr", {}, element("th", { scope: "col", className: "left", textContent: state.field === "asks" ? "what is asked" : (state.field || "").replaceAll("_", " ") }), ...[state.of, "95 %", "n"].map((text) => element("th", { scope: "col", textContent: breakable(text) })))),
        element("tbody", {}, ...shown.map((category) => {
          const figure = category === "all" ? row.scores[state.of] : (row.categories[state.of] || {})[category];
          const cells = figure ? [element("td", {}, element("span", { className: figure[BELOW] ? "below" : "", textContent: figure[TEXT] })), element("td", {}, element("small", { textContent: figure[INTERVAL] })), element("td", { textContent: figure[N] })]
            : [element("td", { textContent: "-" }), element("td"), element("td", { textContent: "0" })];
          return element("tr", {}, element("th", { scope: "row", textContent: category === "all" ? "all" : category.slice(category.indexOf("=") + 1) }), ...cells);
        }))))));
  }

  // Heads that are `whole` hold text, and take a line of their own where rows are blocks.
  function table(label, heads, whole, lines) {
    return element("div", { className: "sheet" }, element("table", { className: "stack", role: "table", "aria-label": label },
      element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads.map((text) => element("th", { scope: "col", role: "columnheader", className: whole.includes(text) ? "left" : "", textContent: text })))),
      element("tbody", { role: "rowgroup" }, ...lines.map((line) => element("tr", { role: "row" }, ...line.map((text, place) => place ? element("td", { role: "cell", className: whole.includes(heads[place]) ? "whole left" : "", "data-label": heads[place], textContent: text }) : element("th", { scope: "row", role: "rowheader", textContent: text })))))));
  }

  function drawInspection() {
    const found = data.inspections.filter((one) => one.task === state.task);
    const parts = [];
    const pairs = found.flatMap((one) => one.consistency.map((cells) => [one.run, ...cells]));
    const agree = "Do answers to questions that belong together fit each other?";
    if (pairs.length) parts.push(element("h3", { textContent: agree }), table(agree, ["system", "pairs of questions", "consistent [95 %]", "both right", "pairs", "images"], ["system", "pairs of questions"], pairs));
    const blind = found.flatMap((one) => one.blind.map((cells) => [one.run, ...cells]));
    const reach = "How much of a score do answers without the image reach?";
    if (blind.length) parts.push(element("h3", { textContent: reach }), table(reach, ["system", "score", "this system", "commonest answer", "best without the image", "which is"], ["system", "score", "which is"], blind));
    byId("inspection").replaceChildren(...(parts.length ? parts : [element("p", { className: "soft", textContent: "No run of this data set was shown its own images." })]));
    fit();
  }

  const verdict = (sign) => sign === "R" || sign === "X" ? "right" : sign === "-" ? "none" : "wrong";
  const says = (sign) => ({ R: "right", W: "wrong", U: "no verdict", X: "all words", "-": "" })[sign] ?? (sign === "0" ? "under 10 % of the words" : `${sign}0 % of the words`);

  function drawQuestions() {
    const viewer = data.viewer[state.task];
    if (!viewer) { byId("question-controls").replaceChildren(); byId("pager").replaceChildren(); byId("found").textContent = ""; byId("cards").replaceChildren(element("p", { className: "soft", textContent: "No run of this data set is on this board." })); return; }
    byId("kept").textContent = viewer.questions.length < viewer.of ? `The page has ${viewer.questions.length} of ${viewer.of} questions, those on which the systems differ most, because it would be too large with all of them.` : "";
    const names = viewer.systems.map((one) => [one.name, one.name]);
    const shows = [["all", "all questions"], ["ab", "A right, B wrong"], ["ba", "B right, A wrong"], ["changed", "the answer changed from A to B (DPO: A before, B after)"], ["wrong", "A and B wrong"], ["unparsed", "A without a verdict"], ["empty", "A with an empty answer"], ["silent", "A did not answer"]];
    const categories = new Set();
    for (const question of viewer.questions) for (const category of question.categories) categories.add(category);
    const changed = (name) => (value) => { state[name] = value; state.page = 0; drawQuestions(); };
    const search = element("input", { id: "search", type: "search", value: state.text, oninput: (event) => { state.text = event.target.value; state.page = 0; list(); } });
    byId("question-controls").replaceChildren(select("A", names, state.a, changed("a"), "a"), select("B", names, state.b, changed("b"), "b"), select("Show", shows, state.show, changed("show"), "show"),
      select("Kind", [["both", "open and closed"], ["open", "open"], ["closed", "closed"]], state.asked || "both", changed("asked"), "asked"),
      select("Category", [["", "all"], ...[...categories].sort().map((name) => [name, name])], state.in, changed("in"), "in"), element("label", {}, "Words in question, reference or answers", search));
    list();
  }

  const said = (system, index) => data.strings[system.answers[index]];
  const silent = (system, index) => system.signs[index] === "-"; // what it "said" is then the reason

  // Whether a question is shown under the reader's choice of `Show`, which compares the systems A and B.
  function isChosen(a, b, index) {
    const [x, y] = [verdict(a.signs[index]), verdict(b.signs[index])];
    switch (state.show) {
      case "ab": return x === "right" && y === "wrong";
      case "ba": return y === "right" && x === "wrong";
      case "wrong": return x === "wrong" && y === "wrong";
      case "unparsed": return a.signs[index] === "U";
      case "changed": return a.answers[index] !== b.answers[index] && !silent(a, index) && !silent(b, index);
      case "silent": return silent(a, index);
      case "empty": return !silent(a, index) && !said(a, index).trim();
      default: return true;
    }
  }

  function hasWords(viewer, index, words) {
    const question = viewer.questions[index];
    const answers = viewer.systems.map((system) => silent(system, index) ? "" : said(system, index));
    return [question.question, question.reference, question.id, ...answers].some((text) => text.toLowerCase().includes(words));
  }

  // The indices of the questions that the reader's choices leave, in the split's order.
  function chosenQuestions(viewer) {
    const [a, b] = [state.a, state.b].map((name) => viewer.systems.find((system) => system.name === name));
    const words = state.text.toLowerCase();
    return viewer.questions.map((_, index) => index).filter((index) => {
      const question = viewer.questions[index];
      if (!isChosen(a, b, index)) return false;
      if (state.asked && state.asked !== "both" && question.kind !== state.asked) return false;
      if (state.in && !question.categories.includes(state.in)) return false;
      return !words || hasWords(viewer, index, words);
    });
  }

  function answerBox(system, index) {
    const sign = system.signs[index];
    const chosen = system.name === state.a || system.name === state.b ? " chosen" : "";
    return element("div", { className: `answer ${verdict(sign)}${chosen}` }, element("small", {}, element("span", { textContent: system.name }), element("span", { className: "says", textContent: says(sign) })),
      said(system, index).trim() ? element("span", { className: silent(system, index) ? "said silent" : "said", textContent: said(system, index) }) : element("span", { className: "said silent", textContent: "empty answer" }));
  }

  function questionCard(viewer, index) {
    const question = viewer.questions[index];
    const image = question.image === null ? element("div", { className: "noimage", textContent: `image ${question.image_id}` }) : element("img", { src: data.images[question.image], alt: `image ${question.image_id}`, loading: "lazy" });
    return element("article", { className: "card", tabIndex: 0, "aria-label": question.question }, element("div", {}, image),
      element("div", {}, element("h3", { textContent: question.question }), element("div", { className: "meta", textContent: [question.id, question.kind, ...question.categories].join(" · ") }),
        element("p", {}, "Reference: ", element("span", { className: "reference", textContent: question.reference })),
        element("div", { className: "answers" }, ...viewer.systems.map((system) => answerBox(system, index)))));
  }

  function drawPager(count) {
    const pages = Math.max(1, Math.ceil(count / PER_PAGE));
    state.page = Math.min(state.page, pages - 1); state.pages = pages;
    byId("pager").replaceChildren(element("button", { type: "button", id: "previous", textContent: "Previous page", disabled: state.page === 0, onclick: () => turn(-1) }),
      element("button", { type: "button", id: "next", textContent: "Next page", disabled: state.page >= pages - 1, onclick: () => turn(1) }));
    byId("found").textContent = `${count} questions, page ${state.page + 1} of ${pages}`;
  }

  function list() {
    const viewer = data.viewer[state.task];
    const indices = chosenQuestions(viewer);
    drawPager(indices.length);
    byId("cards").replaceChildren(...indices.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE).map((index) => questionCard(viewer, index)));
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

  function goToCard(by) {
    const cards = [...byId("cards").querySelectorAll(".card")];
    const now = cards.indexOf(document.activeElement);
    const next = cards[Math.min(cards.length - 1, Math.max(0, now + by))];
    if (next) { next.focus(); next.scrollIntoView({ block: "center" }); }
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) || byId("about").open) return;
    if (event.key === "n") turn(1);
    if (event.key === "p") turn(-1);
    if (event.key === "j") goToCard(1);
    if (event.key === "k") goToCard(-1);
  });

  window.addEventListener("resize", fit);
  window.addEventListener("beforeprint", () => { for (const table of document.querySelectorAll(".stack")) table.classList.add("blocks"); });
  window.addEventListener("afterprint", fit);

  reset(); draw();
  document.body.dataset.ready = "yes";
}

(async () => {
  const packed = Uint8Array.from(atob(byId("data").textContent.trim()), (sign) => sign.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  start(JSON.parse(await new Response(stream).text()));
})().catch((error) => { byId("notice").textContent += ` This page needs a browser of 2023 or later (${error.message}).`; });
