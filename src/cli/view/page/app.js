// Ties the views together: addresses, tabs, keys, the theme, and live updates.
'use strict';

(() => {
  const by = OV.by;
  const TABS = ['pairs', 'prompt', 'rounds', 'graph', 'sql'];
  const POLL = 2000;
  let current = null, params = {}, stamps = [], started = false;
  const lastParams = {}; // the last address of each tab

  // The address: #/view?name=value…
  OV.hash = (view, values) => OV.address(`#/${view}`, values);
  const parse = () => {
    const m = /^#\/([a-z]+)(?:\?(.*))?$/s.exec(location.hash);
    const view = m && OV.views[m[1]] && !(OV.bundle && m[1] === 'sql') ? m[1] : 'pairs';
    const values = Object.fromEntries(new URLSearchParams(m?.[2] ?? ''));
    values.run = /^\d+$/.test(values.run ?? '') && OV.runs[Number(values.run)] ? values.run : '0';
    return [view, values];
  };
  OV.go = (view, values, { replace = false } = {}) => {
    const hash = OV.hash(view, values);
    if (hash === location.hash) return;
    if (!replace) { location.hash = hash; return; }
    history.replaceState(history.state, '', hash);
    route();
  };
  // Keeps a detail (the current pair) in the address without a new entry of the history.
  OV.note = (view, values) => {
    lastParams[view] = values;
    if (current !== view) return;
    params = values;
    clearTimeout(OV.note.timer);
    OV.note.timer = setTimeout(() => { if (current === view && params === values) try { history.replaceState(history.state, '', OV.hash(view, values)); } catch { /* the browser limits how often */ } }, 300);
  };

  const scrolls = {};
  const route = () => {
    clearTimeout(OV.note.timer);
    const [view, values] = parse();
    const main = by('main');
    if (view === current) {
      params = values;
      lastParams[view] = values;
      OV.views[view].navigate(values);
    } else {
      if (current) {
        scrolls[current] = window.scrollY;
        OV.views[current].leave?.();
      }
      main.replaceChildren();
      current = view;
      params = values;
      lastParams[view] = values;
      document.title = `${OV.views[view].title} – ovchat`;
      const { restored, focus } = OV.views[view].enter(main, values);
      window.scrollTo(0, restored ? scrolls[view] ?? 0 : 0);
      if (started) (focus ?? main.querySelector('h1') ?? main).focus({ preventScroll: true });
    }
    started = true;
    chrome();
  };

  // The header: tabs, the choice of the run, its state.
  const chrome = () => {
    for (const link of document.querySelectorAll('#tabs a')) {
      const tab = link.dataset.tab;
      if (tab === current) link.setAttribute('aria-current', 'page');
      else link.removeAttribute('aria-current');
      link.hidden = !!OV.bundle && tab === 'sql';
      link.href = OV.hash(tab, tabParams(tab));
    }
    const select = by('run-select'), field = by('run-field');
    field.hidden = OV.runs.length < 2 || current === 'rounds';
    const names = OV.runs.map(r => r.name + (OV.runs.some(o => o !== r && o.name === r.name) ? ` (${r.folder})` : ''));
    if (select.childElementCount !== names.length || [...select.options].some((o, i) => o.textContent !== OV.plain(names[i], 60))) {
      select.replaceChildren(...names.map((n, i) => OV.el('option', { value: String(i) }, OV.plain(n, 60))));
    }
    select.value = params.run ?? '0';
    select.title = OV.plain(OV.runs[params.run]?.folder ?? '');
    const run = OV.runs[params.run], state = by('run-state');
    state.replaceChildren();
    if (OV.bundle) OV.add(state, [['bundle', OV.bundle.note, OV.bundle.made].filter(Boolean).join(', ')]);
    else if (run?.running) OV.add(state, [OV.el('span', { class: 'dot', 'aria-hidden': 'true' }), `running: ${run.running}`]);
    else if (run?.tables?.some(table => !table.complete)) state.textContent = `not running, unfinished: ${[...new Set(run.tables.filter(table => !table.complete).map(table => table.name))].slice(0, 3).map(name => OV.plain(name, 30)).join(', ')}`;
    if (OV.runs.length === 1) state.prepend(OV.el('strong', { title: OV.plain(run.folder) }, OV.plain(run.name, 60)), ' ');
    notice();
  };
  const tabParams = tab => {
    const run = params.run ?? '0';
    if (tab === current) return params;
    if (tab === 'pairs') return lastParams.pairs?.run === run ? lastParams.pairs : { run };
    if (tab === 'prompt') return lastParams.prompt?.run === run ? lastParams.prompt : { run };
    if (tab === 'rounds') return lastParams.rounds ?? {};
    if (tab === 'sql') return { run, q: lastParams.sql?.q };
    return { run };
  };
  let offline = false;
  const notice = () => {
    const node = by('notice');
    const problems = OV.runs.filter(r => r.problem).map(r => `${OV.plain(r.name, 60)}: ${OV.plain(r.problem, 400)}`);
    const text = offline ? 'The server does not answer. The page shows what it last received.' : problems.join('\n');
    node.hidden = !text;
    if (node.textContent !== text) node.textContent = text;
  };

  const chooseRun = value => {
    if (current === 'pairs') {
      const { round, table, at, ...rest } = params;
      const next = OV.runs[value];
      OV.go('pairs', { ...rest, run: value, ...(round != null && next?.rounds.map(String).includes(round) ? { round } : {}), ...(next?.pair_tables.includes(table) ? { table } : {}) });
    } else OV.go(current, { ...params, run: value });
  };

  // Live updates.
  const tick = async () => {
    let wait = POLL;
    if (document.visibilityState === 'visible') {
      try {
        const got = (await OV.get('api/stamps')).stamps;
        if (offline) { offline = false; notice(); OV.say('The server answers again'); }
        const changed = got.map((s, i) => s !== stamps[i]);
        if (changed.includes(true)) {
          const begun = performance.now();
          OV.runs = (await OV.get('api/runs')).runs;
          stamps = got;
          chrome();
          const shown = current === 'rounds' ? changed.some((c, i) => c && OV.views.rounds.shows(i)) : changed[Number(params.run)];
          if (shown) await OV.views[current].update?.();
          if (current !== 'pairs' && changed[Number(lastParams.pairs?.run)]) OV.views.pairs.update();
          // A run in progress needs the processors: the server works at most a fiftieth of the time.
          if (OV.runs.some(run => run.running)) wait = Math.min(60000, Math.max(POLL, 50 * (performance.now() - begun)));
        }
      } catch (error) {
        if (error.offline && !offline) { offline = true; notice(); OV.say('The server does not answer'); }
      }
    }
    setTimeout(tick, offline ? 3 * POLL : wait);
  };

  // Light and dark.
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const theme = (chosen = OV.store.get('theme')) => {
    const isDark = chosen ? chosen === 'dark' : dark.matches;
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    by('theme-button').textContent = isDark ? 'Light' : 'Dark';
    by('theme-button').setAttribute('aria-label', isDark ? 'Light colors' : 'Dark colors');
  };

  const onKey = event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || event.isComposing) return;
    const target = event.target, typing = target.closest?.('input:not([type=checkbox]), textarea, select, [contenteditable]');
    if (event.key === 'Escape' && typing && !target.closest('dialog')) { target.blur(); return; }
    if (typing || document.querySelector('dialog[open]')) return;
    if (event.key !== 'Enter' && OV.store.get('keys') === '0') return;
    if (event.key === '?') { by('keys-dialog').showModal(); event.preventDefault(); return; }
    if (/^[1-5]$/.test(event.key)) {
      const tab = TABS[event.key - 1];
      if (!(OV.bundle && tab === 'sql')) OV.go(tab, tabParams(tab));
      event.preventDefault();
      return;
    }
    const action = OV.views[current]?.keys?.[event.key];
    if (action && action(event) !== false) event.preventDefault();
  };

  const start = async () => {
    by('theme-button').addEventListener('click', () => {
      const next = by('theme-button').textContent === 'Dark' ? 'dark' : 'light';
      OV.store.set('theme', next);
      theme(next);
    });
    theme();
    dark.addEventListener('change', () => theme());
    by('keys-button').addEventListener('click', () => by('keys-dialog').showModal());
    by('keys-on').checked = OV.store.get('keys') !== '0';
    by('keys-on').addEventListener('change', () => OV.store.set('keys', by('keys-on').checked ? '1' : '0'));
    by('run-select').addEventListener('change', event => chooseRun(event.target.value));
    by('skip').addEventListener('click', event => { event.preventDefault(); (by('main').querySelector('h1') ?? by('main')).focus(); });
    OV.setUpDialogs();
    document.addEventListener('keydown', onKey);
    by('main').replaceChildren(OV.waiting());
    try {
      const [runs, first] = await Promise.all([OV.get('api/runs'), OV.bundle ? null : OV.get('api/stamps')]);
      OV.runs = runs.runs;
      stamps = first?.stamps ?? [];
    } catch (error) {
      by('main').replaceChildren(OV.el('h1', null, 'ovchat'), OV.failure(error));
      return;
    }
    by('main').replaceChildren();
    if ('scrollRestoration' in history) history.scrollRestoration = 'manual';
    addEventListener('hashchange', route);
    route();
    if (!OV.bundle) setTimeout(tick, POLL);
  };
  start();
})();
