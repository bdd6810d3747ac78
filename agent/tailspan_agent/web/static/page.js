// The page works without this file, which adds live updates, shortcuts, the theme switch and filters for lines.
"use strict";
(() => {
  const root = document.documentElement;
  const find = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const MOST_LINES = 5000;

  const stored = (key, value) => {
    try {
      if (value === undefined) return localStorage.getItem(key);
      localStorage.setItem(key, value);
    } catch { /* the browser forbids storage: settings are not kept */ }
    return null;
  };
  const theme = stored("theme");
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const switchTheme = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored("theme", root.dataset.theme);
  };
  const themeSwitch = find("[data-theme-switch]");
  if (themeSwitch) {
    themeSwitch.hidden = false;
    themeSwitch.addEventListener("click", switchTheme);
  }

  // Times are sent in UTC, and shown in the browser's zone or in UTC.
  const two = (number) => String(number).padStart(2, "0");
  const isUtc = () => root.dataset.zone === "utc";
  const clockOf = (at) => [0, 1, 2].map((part) => two(isUtc() ? [at.getUTCHours(), at.getUTCMinutes(), at.getUTCSeconds()][part] : [at.getHours(), at.getMinutes(), at.getSeconds()][part])).join(":");
  const dayOf = (at) => (isUtc() ? at.toISOString().slice(0, 10) : `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`);
  const zoneOf = (at) => {
    if (isUtc()) return "UTC";
    const parts = new Intl.DateTimeFormat("en-GB", { timeZoneName: "short" }).formatToParts(at);
    return parts.find((part) => part.type === "timeZoneName")?.value ?? "local";
  };
  const millisOf = (at) => `.${String(at.getUTCMilliseconds()).padStart(3, "0")}`;
  const showTime = (element) => {
    const at = new Date(element.dateTime);
    if (Number.isNaN(at.getTime())) return;
    const form = element.dataset.form;
    const full = `${dayOf(at)} ${clockOf(at)}`;
    if (form === "line") element.textContent = clockOf(at) + millisOf(at);
    else if (form === "minute") element.textContent = clockOf(at).slice(0, 5);
    else if (form === "day") element.textContent = dayOf(at).slice(5);
    else if (form === "clock") element.textContent = clockOf(at);
    else if (form === "full") element.textContent = `${full} ${zoneOf(at)}`;
    element.title = `${full}${millisOf(at)} ${zoneOf(at)}`;
  };
  const showTimes = (from = document) => all("time[data-form]", from).forEach(showTime);
  const zoneSwitch = find("[data-zone-switch]");
  const showZone = () => {
    showTimes();
    const zone = zoneOf(new Date());
    if (zoneSwitch) zoneSwitch.textContent = isUtc() ? "UTC" : "Local";
    all("[data-zone-note]").forEach((note) => { note.textContent = isUtc() ? "times are UTC" : `times are local (${zone})`; });
  };
  if (stored("zone") === "utc") root.dataset.zone = "utc";
  if (zoneSwitch) {
    zoneSwitch.hidden = false;
    zoneSwitch.addEventListener("click", () => {
      if (isUtc()) delete root.dataset.zone;
      else root.dataset.zone = "utc";
      stored("zone", root.dataset.zone ?? "local");
      showZone();
    });
  }
  showZone();

  // Only HTML that our own server has rendered and escaped gets here.
  const rowsOf = (html) => {
    const template = document.createElement("template");
    template.innerHTML = html;
    showTimes(template.content);
    return [...template.content.children];
  };

  const replace = (selector, html) => {
    const place = find(selector);
    const open = all("details[open][data-keep]", place).map((details) => details.dataset.keep);
    const focused = place.contains(document.activeElement) ? all("a, summary", place).indexOf(document.activeElement) : -1;
    place.replaceChildren(...rowsOf(html));
    all("details[data-keep]", place).forEach((details) => { details.open = open.includes(details.dataset.keep); });
    if (focused >= 0) all("a, summary", place)[focused]?.focus({ preventScroll: true });
  };

  const live = find("[data-live]");
  const listen = (path, handlers) => {
    let source = null;
    let isEnded = false;
    const close = () => { source?.close(); source = null; };
    const end = () => { isEnded = true; close(); };
    const open = () => {
      if (source || isEnded || document.hidden) return;
      source = new EventSource(path);
      source.onopen = () => { live.hidden = false; live.textContent = "live"; live.classList.remove("off"); };
      source.onerror = () => { live.hidden = false; live.textContent = "not live"; live.classList.add("off"); };
      for (const [name, handle] of Object.entries({ banner: ({ html }) => replace("#banner", html), ...handlers })) source.addEventListener(name, (event) => handle(JSON.parse(event.data), end));
    };
    // A browser opens at most six connections to a server: hidden tabs must leave them to the visible one.
    document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
    addEventListener("pagehide", close);
    addEventListener("pageshow", open);
    open();
  };

  const jobs = find("table.jobs[data-events]");
  if (jobs) {
    const body = find("#rows");
    listen(jobs.dataset.events, {
      timeline: ({ html }) => replace("#timeline", html),
      jobs: ({ order, rows, head, foot }) => {
        const active = document.activeElement;
        const focused = active?.closest("tr")?.dataset.key;
        const chip = all("#head a").indexOf(active);
        const known = new Map(all("tr", body).map((row) => [decodeURIComponent(row.dataset.key), row]));
        for (const [key, html] of Object.entries(rows)) known.set(key, rowsOf(html)[0]);
        body.replaceChildren(...order.map((key) => known.get(key)).filter(Boolean));
        find("#empty").hidden = order.length > 0;
        if (head !== undefined) find("#head").replaceChildren(...rowsOf(head));
        if (foot !== undefined) replace("#foot", foot);
        const row = focused && all("tr", body).find((candidate) => candidate.dataset.key === focused);
        if (row) (active.tagName === "A" ? find("a", row) : row).focus({ preventScroll: true });
        if (chip >= 0) all("#head a")[chip]?.focus({ preventScroll: true });
      },
    });
  }

  const agent = find("#agent[data-events]");
  if (agent) listen(agent.dataset.events, { agent: ({ html }) => replace("#agent", html) });

  const log = find("table.log");
  if (log) {
    const toggles = find("[data-toggles]");
    if (toggles) toggles.hidden = false;
    all("[data-stream]").forEach((box) => box.addEventListener("change", () => log.classList.toggle(`no-${box.dataset.stream}`, !box.checked)));
    find("[data-wrap]")?.addEventListener("change", (event) => log.classList.toggle("wrap", event.target.checked));
    const follow = find("[data-follow]");
    const pill = find("[data-newest]");
    const box = find(".logbox");
    const lines = find("#lines");
    let missed = 0;
    const isAtEnd = () => box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    const toEnd = () => { box.scrollTop = box.scrollHeight; };
    const showPill = () => {
      if (!pill) return;
      if (isAtEnd()) missed = 0;
      pill.hidden = isAtEnd();
      pill.textContent = missed ? `Jump to newest (${missed.toLocaleString("en")} new)` : "Jump to newest";
    };
    if (box.dataset.tail !== undefined && !/^#L\d/.test(location.hash)) toEnd();
    // Who scrolls up reads: the log follows again when the end is reached, or by the button.
    box.addEventListener("scroll", () => {
      if (follow) follow.checked = isAtEnd();
      showPill();
    });
    pill?.addEventListener("click", () => { toEnd(); box.focus({ preventScroll: true }); });
    follow?.addEventListener("change", () => { if (follow.checked) toEnd(); });
    const keepAtEnd = (change, added = 0) => {
      const follows = follow?.checked;
      change();
      if (follows) toEnd();
      else missed += added;
      showPill();
    };
    const copy = find("[data-copy]");
    if (copy && navigator.clipboard) {
      copy.hidden = false;
      copy.addEventListener("click", async () => {
        const shown = all("tr", log).filter((row) => row.offsetParent).map((row) => find(".text", row)?.textContent ?? "");
        try {
          await navigator.clipboard.writeText(`${shown.join("\n")}\n`);
          copy.textContent = "Copied";
        } catch { copy.textContent = "Not allowed"; }
        setTimeout(() => { copy.textContent = "Copy"; }, 2000);
      });
    }
    if (log.dataset.events) {
      listen(log.dataset.events, {
        reset: ({ html }) => keepAtEnd(() => lines.replaceChildren(...rowsOf(html))),
        lines: ({ html }) => {
          const rows = rowsOf(html);
          keepAtEnd(() => {
            lines.append(...rows);
            while (lines.children.length > MOST_LINES) lines.firstElementChild.remove();
          }, rows.length);
        },
        open_line: ({ html }) => keepAtEnd(() => find("#open").replaceChildren(...rowsOf(html))),
        head: ({ html }) => replace("#jobhead", html),
        side: ({ html }) => replace("#side", html),
        tasks: ({ html }) => keepAtEnd(() => {
          const tasks = find("#tasks");
          const active = tasks.contains(document.activeElement) ? document.activeElement : null;
          const key = active?.closest("tr")?.dataset.key;
          const place = key ? all("a", active.closest("tr")).indexOf(active) : -1;
          const top = find(".scroll", tasks)?.scrollTop ?? 0;
          tasks.replaceChildren(...rowsOf(html));
          find(".scroll", tasks).scrollTop = top;
          const row = key && all("tr", tasks).find((candidate) => candidate.dataset.key === key);
          if (row) (all("a", row)[place] ?? row).focus({ preventScroll: true });
          else if (active) find(".scroll", tasks).focus({ preventScroll: true });
        }),
        end: (_, end) => { end(); location.reload(); },
      });
    }
  }

  all("[data-confirm]").forEach((button) => button.addEventListener("click", (event) => {
    if (!confirm(button.dataset.confirm)) event.preventDefault();
  }));

  const move = (step) => {
    const rows = all(".scroll tbody tr");
    if (!rows.length) return;
    const now = rows.indexOf(document.activeElement?.closest("tr"));
    const next = rows[Math.min(rows.length - 1, Math.max(0, now < 0 ? (step > 0 ? 0 : rows.length - 1) : now + step))];
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  };
  // Speech input or a mistake may trigger a single letter, so the shortcuts can be disabled (WCAG 2.1.4).
  const keysOn = find("[data-keys-on]");
  const showKeys = () => find("#keys").showModal();
  const keysShow = find("[data-keys-show]");
  keysOn.checked = stored("keys") !== "off";
  keysOn.addEventListener("change", () => stored("keys", keysOn.checked ? "on" : "off"));
  keysShow.hidden = false;
  keysShow.addEventListener("click", showKeys);
  const keys = {
    "/": () => find("[data-search]")?.focus(),
    j: () => move(1),
    k: () => move(-1),
    Enter: () => { const row = document.activeElement; if (row?.tagName === "TR") find("a", row)?.click(); else return false; },
    e: () => find("[data-error]")?.click(),
    u: () => find("[data-up]")?.click(),
    t: switchTheme,
    "?": showKeys,
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea, dialog");
    if (typing) {
      if (event.key === "Escape" && event.target.blur) event.target.blur();
      return;
    }
    if (!keysOn.checked && event.key !== "Enter") return;
    const action = Object.hasOwn(keys, event.key) ? keys[event.key] : null;
    if (action && action() !== false) event.preventDefault();
  });
})();
