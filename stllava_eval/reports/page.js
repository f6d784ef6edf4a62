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
  // What the reader chose: the task; the kind of questions and groups of rows of the first table; the score that ranks
  // (`by`), the column that orders (`sort`) and its direction; category field and score of the breakdown; and the
  // systems, filters and page of the questions.
  const state = {
    task: data.opens || (data.tasks[0] || {}).name, kind: "both", groups: new Set(data.groups), by: null, sort: null, down: true,
    field: null, of: "recall",
    a: null, b: null, show: "all", in: "", text: "", page: 0,
  };
  const rowsOf = (task) => data.rows.filter((row) => row.task === task);
  const taskNow = () => data.tasks.find((task) => task.name === state.task);
  const isOfKind = (column) => state.kind === "both" || column.kind === "both" || column.kind === state.kind;
  const columns = () => data.columns.filter((column) => isOfKind(column) && rowsOf(state.task).some((row) => column.name in row.scores));
  const ranked = () => columns().filter((column) => column.ranked);

  byId("notice").textContent = data.notice;
  byId("ranking").textContent = data.ranking;
  byId("explained").textContent = data.explained;
  byId("footer").textContent = `${data.notice} Made by stllava-eval from the runs named above; every figure is in board.csv and board.json beside this page.`;
  for (const task of data.tasks) byId("task").append(element("option", { value: task.name, textContent: `${task.name} (${task.data})`, selected: task.name === state.task }));
  byId("task").addEventListener("change", (event) => { state.task = event.target.value; reset(); draw(); });

  function reset() {
    const viewed = data.viewer[state.task] ? data.viewer[state.task].systems.map((system) => system.name) : [];
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

  // What the chosen column orders a row by; null if the row does not have the score.
  function sortKey(row) {
    if (state.sort === "system") return row.system.toLowerCase();
    if (state.sort === "prompt") return prompt(row);
    return state.sort in row.scores ? row.scores[state.sort][VALUE] : null;
  }

  // The rows that are shown, in the order that the reader chose; those without the score are last in both directions.
  function ordered() {
    return rowsOf(state.task).filter((row) => state.groups.has(row.group)).sort((x, y) => {
      const [a, b] = [sortKey(x), sortKey(y)];
      if (a === null || b === null) return (a === null) - (b === null);
      return (a < b ? -1 : a > b ? 1 : 0) * (state.down ? -1 : 1);
    });
  }

  const prompt = (row) => row.about.prompt || (row.kind === "reported" ? "not given" : row.kind === "blind" ? "none" : "not recorded");

  // What the rank column says of a row: [the rank, or the word that replaces it; "of" how many; the reason].
  function rank(row) {
    if (!(state.by in row.scores)) return ["-", "", "the row does not have this score"];
    const given = ((taskNow().ranks[state.by] || { places: {} }).places)[row.system];
    if (row.kind === "measured" && given) return [`${given[0]}`, `of ${given[1]}`, `in the group "${row.group}"`];
    if (row.kind === "measured") return ["partial", "", "it did not answer the same questions as the ranked rows"];
    return [row.kind, "", row.kind === "blind" ? "image-blind rows are not ranked" : "reported figures are not ranked"];
  }

  function choose(name) {
    const column = data.columns.find((candidate) => candidate.name === name);
    state.down = state.sort === name ? !state.down : column !== undefined;
    state.sort = name;
    if (column && column.ranked) state.by = name;
    drawBoard(); drawIntervals();
  }

  // Choose the score that ranks and the column that orders again if the table does not have them (another task or kind).
  function settleOrder(shown) {
    if (!ranked().some((column) => column.name === state.by)) {
      // the score that most rows have: with reported rows this is the one that papers report
      const count = (name) => rowsOf(state.task).filter((row) => name in row.scores).length;
      state.by = ranked().map((column) => column.name).sort((x, y) => count(y) - count(x))[0] || null;
      state.sort = state.by; state.down = true;
    }
    if (!["system", "prompt", ...shown.map((column) => column.name)].includes(state.sort)) { state.sort = state.by; state.down = true; }
  }

  const KIND_CHOICES = [["both", "open and closed"], ["open", "open"], ["closed", "closed"]];

  function drawTable() { drawBoard(); drawIntervals(); }

  function groupTick(group, index) {
    const change = (event) => keepingFocus(() => {
      if (event.target.checked) state.groups.add(group); else state.groups.delete(group);
      drawTable();
    });
    const box = element("input", { type: "checkbox", id: `group-${index}`, checked: state.groups.has(group), onchange: change });
    return element("label", { className: "tick" }, box, group);
  }

  const rankedChoices = () => ranked().map((column) => [column.name, `${column.name} (${column.kind} questions)`]);
  const rankBy = (label, id) => select(label, rankedChoices(), state.by, (value) => { state.sort = null; choose(value); }, id);

  function drawBoardControls() {
    const groups = data.groups.filter((group) => rowsOf(state.task).some((row) => row.group === group));
    byId("board-controls").replaceChildren(
      select("Questions", KIND_CHOICES, state.kind, (value) => { state.kind = value; drawTable(); }, "kind"),
      rankBy("Rank by", "by"),
      element("fieldset", {}, element("legend", { className: "unseen", textContent: "Rows that are shown" }), ...groups.map(groupTick)));
  }

  // The column's name in the sentence below the table. "words" and "unparsed" are heads of both kinds of questions.
  function orderName(shown) {
    const column = shown.find((candidate) => candidate.name === state.sort);
    if (!column) return state.sort;
    return ["cut", "empty"].includes(column.name) || column.ranked ? column.label : `${column.label}, ${column.kind} questions`;
  }

  // The sentence that says by which column and in which direction the rows are ordered.
  function orderText(shown) {
    const isText = state.sort === "system" || state.sort === "prompt";
    const direction = isText ? (state.down ? "z to a" : "a to z") : state.down ? "highest first" : "lowest first";
    const notes = ((taskNow().ranks[state.by] || {}).notes || []).join(" ");
    const isRanked = state.sort === state.by;
    return `Ordered ${isRanked ? "and ranked " : ""}by ${orderName(shown)}, ${direction}. ${isRanked ? "" : `Ranked by ${state.by}. `}${notes}`;
  }

  function drawBoard() {
    const shown = columns();
    settleOrder(shown);
    drawBoardControls();
    byId("order").textContent = orderText(shown);
    byId("scores").replaceChildren(
      element("caption", { className: "unseen", textContent: `Scores on ${state.task}` }),
      ...heads(shown), element("tbody", { role: "rowgroup" }, ...ordered().map((row) => line(row, shown))));
    fit();
  }

  const KINDS = { open: "Open questions", closed: "Closed questions", both: "Replies" };

  // The columns by kind of questions, [kind, its columns], without kinds that have none.
  const byKind = (shown) => Object.keys(KINDS).map((kind) => [kind, shown.filter((column) => column.kind === kind)]).filter(([, members]) => members.length);

  // A head whose button orders the rows by its column.
  function sortingHead(name, text, title, classes = "") {
    const direction = state.sort === name ? (state.down ? "descending" : "ascending") : "none";
    // the click draws the heads again, so the focus goes to the new head of the same column
    const click = () => { choose(name); byId("scores").querySelector(`th[aria-sort$="ending"] button`).focus(); };
    return element("th", { scope: "col", role: "columnheader", className: classes, title: title || "", "aria-sort": direction },
      element("button", { type: "button", textContent: breakable(text), onclick: click }));
  }

  const plainHead = (text, classes, title = "") => element("th", { scope: "col", role: "columnheader", className: classes, textContent: text, title: title });

  // The heads of one kind's columns; open and closed questions have their number before them.
  function headsOfKind([kind, members]) {
    const number = kind === "both" ? [] : [plainHead("n", "first", `answered ${kind} questions`)];
    return [...number, ...members.map((column, index) => {
      const classes = [kind === "both" && index === 0 ? "first" : "", column.name === state.sort ? "picked" : ""];
      return sortingHead(column.name, column.label, column.title, classes.join(" "));
    })];
  }

  // The head that spans one kind's columns, and the column of their number.
  function spanningHead([kind, members]) {
    return element("th", { scope: "colgroup", role: "columnheader", className: "first", colSpan: members.length + (kind === "both" ? 0 : 1), textContent: KINDS[kind] });
  }

  function heads(shown) {
    const kinds = byKind(shown);
    const widths = element("colgroup", {}, element("col", { className: "narrow" }), element("col"));
    return [widths, element("thead", { role: "rowgroup" },
      element("tr", { role: "row", className: "kinds" }, element("td", { colSpan: 3, role: "cell" }), ...kinds.map(spanningHead)),
      element("tr", { role: "row" }, plainHead("rank", "left"), sortingHead("system", "system", "", "left"),
        sortingHead("prompt", "prompt", "how the questions were put", "left"), ...kinds.flatMap(headsOfKind)))];
  }

  // The number of questions of a kind that a row answered. A reported row has none, as papers do not give it.
  function numberCell(row, kind, members) {
    const n = members.map((column) => row.scores[column.name]).filter(Boolean).map((figure) => figure[N])[0];
    return element("td", { role: "cell", className: n ? "first" : "first absent", "data-label": `n, ${kind}`, title: n === 0 ? "reported without n" : "", textContent: n || "-" });
  }

  function cellsOfKind(row, [kind, members]) {
    const number = kind === "both" ? [] : [numberCell(row, kind, members)];
    return [...number, ...members.map((column, index) => cell(row, column, kind === "both" && index === 0))];
  }

  function rankCell(row) {
    const [given, count, reason] = rank(row);
    return element("td", { role: "cell", className: /^\d/.test(given) ? "rank left" : "rank left none", title: reason },
      element("b", { textContent: given }), count ? element("small", { textContent: ` ${count}` }) : null);
  }

  // The system's name, which opens how the row was made, and below it the row's group.
  function systemCell(row) {
    const group = [row.group, row.unanswered ? `${row.unanswered} not answered` : null].filter(Boolean).join(", ");
    const name = Object.keys(row.about).length ? element("button", { type: "button", className: "more", textContent: row.system, title: "how this row was made", onclick: () => openAbout(row) }) : row.system;
    return element("th", { scope: "row", role: "rowheader" }, name, element("small", { textContent: group }));
  }

  function line(row, shown) {
    return element("tr", { className: row.kind, role: "row" }, rankCell(row), systemCell(row),
      element("td", { role: "cell", className: "prompt left", "data-label": "prompt", textContent: prompt(row) }),
      ...byKind(shown).flatMap((kind) => cellsOfKind(row, kind)));
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

  // Open the dialog that says how a row was made.
  function openAbout(row) {
    const list = element("dl");
    for (const [name, value] of Object.entries(row.about)) list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    for (const [name, value] of Object.entries(row.notes)) list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    const close = element("button", { type: "button", textContent: "Close", onclick: () => byId("about").close() });
    byId("about").replaceChildren(element("h3", { id: "about-title", textContent: row.system }), list, close);
    byId("about").showModal();
  }

  function drawIntervals() {
    byId("interval-controls").replaceChildren(rankBy("Score", "metric"));
    const rows = ordered().filter((row) => state.by in row.scores);
    const scale = ["0", "50", "100"].map((text) => element("span", { textContent: text }));
    byId("plot").replaceChildren(...rows.map(intervalRow),
      element("div", { className: "row" }, element("span"), element("span", { className: "ends", "aria-hidden": "true" }, ...scale), element("span")));
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
    const [given, count] = rank(row);
    const group = count ? `${row.group}, rank ${given} ${count}` : given === "partial" ? `${row.group}, partial` : row.group;
    return element("div", { className: `row ${row.kind}` }, element("span", { className: "name" }, `${row.system} `, element("small", { textContent: group })), intervalTrack(figure),
      element("span", { className: "value" }, element("b", { textContent: figure[TEXT] }), ` ${figure[INTERVAL]}${figure[N] ? ` n ${figure[N]}` : " n not given"}`));
  }

  // The rows that the breakdown shows: those whose answers are known, without the constant answers.
  function inspectedRows() {
    const isShown = (row) => row.kind === "measured" || (row.kind === "blind" && (Object.keys(row.about).length || row.system === "commonest answer"));
    return rowsOf(state.task).filter(isShown);
  }

  // The fields of the rows' categories, which are named FIELD=VALUE.
  function fieldsOf(rows) {
    const fields = new Set();
    for (const row of rows) {
      for (const figures of Object.values(row.categories)) for (const category of Object.keys(figures)) fields.add(category.split("=")[0]);
    }
    return [...fields].sort();
  }

  // The categories of the chosen field in which any row has the chosen score.
  function categoriesOf(rows) {
    const categories = new Set();
    for (const row of rows) {
      for (const category of Object.keys(row.categories[state.of] || {})) if (category.split("=")[0] === state.field) categories.add(category);
    }
    return [...categories].sort();
  }

  function drawBreakdownControls(fields, scores) {
    const fieldText = (name) => name === "asks" ? "what is asked (by our rules)" : name.replaceAll("_", " ");
    byId("breakdown-controls").replaceChildren(
      select("Category", fields.map((name) => [name, fieldText(name)]), state.field, (value) => { state.field = value; drawBreakdown(); }, "field"),
      select("Score", scores.map((metric) => [metric, metric]), state.of, (value) => { state.of = value; drawBreakdown(); }, "of"));
  }

  function categoryLine(row, category) {
    const figure = category === "all" ? row.scores[state.of] : (row.categories[state.of] || {})[category];
    const cells = figure
      ? [element("td", {}, element("span", { className: figure[BELOW] ? "below" : "", textContent: figure[TEXT] })), element("td", {}, element("small", { textContent: figure[INTERVAL] })), element("td", { textContent: figure[N] })]
      : [element("td", { textContent: "-" }), element("td"), element("td", { textContent: "0" })];
    const name = category === "all" ? "all" : category.slice(category.indexOf("=") + 1);
    return element("tr", {}, element("th", { scope: "row", textContent: name }), ...cells);
  }

  function categoryTable(row, categories) {
    const field = state.field === "asks" ? "what is asked" : (state.field || "").replaceAll("_", " ");
    const heads = [element("th", { scope: "col", className: "left", textContent: field }), ...[state.of, "95 %", "n"].map((text) => element("th", { scope: "col", textContent: breakable(text) }))];
    return element("div", { className: "sheet" }, element("h3", { textContent: row.system }),
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...categories.map((category) => categoryLine(row, category)))));
  }

  // A table for each system, side by side where there is room: however many systems there are, none is off the page.
  function drawBreakdown() {
    const rows = inspectedRows();
    const fields = fieldsOf(rows);
    if (!fields.includes(state.field)) state.field = fields[0] || null;
    const scores = data.inspected.filter((metric) => rows.some((row) => metric in row.categories));
    if (!scores.includes(state.of)) state.of = scores[0];
    drawBreakdownControls(fields, scores);
    const categories = ["all", ...categoriesOf(rows)];
    byId("categories").replaceChildren(...rows.filter((row) => state.of in row.scores).map((row) => categoryTable(row, categories)));
  }

  // A table whose rows may become blocks. Columns that are `whole` hold text, and take a line of their own in a block.
  function table(label, heads, whole, lines) {
    const head = (text) => element("th", { scope: "col", role: "columnheader", className: whole.includes(text) ? "left" : "", textContent: text });
    const bodyCell = (text, index) => index === 0
      ? element("th", { scope: "row", role: "rowheader", textContent: text })
      : element("td", { role: "cell", className: whole.includes(heads[index]) ? "whole left" : "", "data-label": heads[index], textContent: text });
    return element("div", { className: "sheet" }, element("table", { className: "stack", role: "table", "aria-label": label },
      element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads.map(head))),
      element("tbody", { role: "rowgroup" }, ...lines.map((cells) => element("tr", { role: "row" }, ...cells.map(bodyCell))))));
  }

  function drawInspection() {
    const inspections = data.inspections.filter((inspection) => inspection.task === state.task);
    const parts = [];
    const pairs = inspections.flatMap((inspection) => inspection.consistency.map((cells) => [inspection.run, ...cells]));
    const agree = "Do answers to questions that belong together fit each other?";
    if (pairs.length) parts.push(element("h3", { textContent: agree }), table(agree, ["system", "pairs of questions", "consistent [95 %]", "both right", "pairs", "images"], ["system", "pairs of questions"], pairs));
    const blind = inspections.flatMap((inspection) => inspection.blind.map((cells) => [inspection.run, ...cells]));
    const reach = "How much of a score do answers without the image reach?";
    if (blind.length) parts.push(element("h3", { textContent: reach }), table(reach, ["system", "score", "this system", "commonest answer", "best without the image", "which is"], ["system", "score", "which is"], blind));
    byId("inspection").replaceChildren(...(parts.length ? parts : [element("p", { className: "soft", textContent: "No run of this data set was shown its own images." })]));
    fit();
  }

  // Signs rate answers: R right, W wrong, U no verdict, X all words of the reference, 0-9 tenths of them, - no answer.
  const verdict = (sign) => sign === "R" || sign === "X" ? "right" : sign === "-" ? "none" : "wrong";
  const says = (sign) => ({ R: "right", W: "wrong", U: "no verdict", X: "all words", "-": "" })[sign] ?? (sign === "0" ? "under 10 % of the words" : `${sign}0 % of the words`);

  const SHOW_CHOICES = [
    ["all", "all questions"], ["ab", "A right, B wrong"], ["ba", "B right, A wrong"], ["changed", "the answer changed from A to B (DPO: A before, B after)"],
    ["wrong", "A and B wrong"], ["unparsed", "A without a verdict"], ["empty", "A with an empty answer"], ["silent", "A did not answer"]];

  function drawNoQuestions() {
    byId("question-controls").replaceChildren();
    byId("pager").replaceChildren();
    byId("found").textContent = "";
    byId("cards").replaceChildren(element("p", { className: "soft", textContent: "No run of this data set is on this board." }));
  }

  function drawQuestionControls(viewer) {
    const names = viewer.systems.map((system) => [system.name, system.name]);
    const categories = new Set(viewer.questions.flatMap((question) => question.categories));
    const changed = (name) => (value) => { state[name] = value; state.page = 0; drawQuestions(); };
    // typing draws the cards alone: the field that is typed into must stay
    const search = element("input", { id: "search", type: "search", value: state.text, oninput: (event) => { state.text = event.target.value; state.page = 0; list(); } });
    byId("question-controls").replaceChildren(
      select("A", names, state.a, changed("a"), "a"), select("B", names, state.b, changed("b"), "b"),
      select("Show", SHOW_CHOICES, state.show, changed("show"), "show"),
      select("Kind", KIND_CHOICES, state.asked || "both", changed("asked"), "asked"),
      select("Category", [["", "all"], ...[...categories].sort().map((name) => [name, name])], state.in, changed("in"), "in"),
      element("label", {}, "Words in question, reference or answers", search));
  }

  function drawQuestions() {
    const viewer = data.viewer[state.task];
    if (!viewer) { drawNoQuestions(); return; }
    byId("kept").textContent = viewer.questions.length < viewer.of ? `The page has ${viewer.questions.length} of ${viewer.of} questions, those on which the systems differ most, because it would be too large with all of them.` : "";
    drawQuestionControls(viewer);
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

  // Draw the cards of the page that the reader is on, and the pager above them.
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
