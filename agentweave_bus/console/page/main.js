// Puts the parts of the page together.

import { byId } from "./dom.js";
import { keepTime } from "./clock.js";
import { Live } from "./live.js";
import { top } from "./top.js";
import { flow } from "./flow.js";
import { agents } from "./agents.js";
import { Tasks } from "./tasks.js";
import { Decisions } from "./decisions.js";
import { waiting } from "./waiting.js";
import { Story } from "./story.js";

const live = new Live();
keepTime(() => live.now());
top(live); // first: it says which trust domain the others may leave out
const tasks = new Tasks(live);
flow(live, (state) => tasks.choose(state));
agents(live);
waiting(live);
new Decisions(live);
new Story(live);

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, select, textarea, dialog");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    byId("filter-text").focus();
  }
});

live.open();
