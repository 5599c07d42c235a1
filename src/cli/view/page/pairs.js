// The view Pairs: filters, and a window of at most 200 cards that grows and shrinks while one scrolls.
'use strict';

(() => {
  const PAGE = 50, MOST = 200;
  const SORTS = [['margin', 'Margin'], ['chosen_reward', 'Chosen reward'], ['rejected_reward', 'Rejected reward'], ['length_difference', 'Length difference'],
    ['chosen_tokens', 'Chosen length'], ['rejected_tokens', 'Rejected length'], ['question', 'Question'], ['order', 'Order of the table']];
  const KEPT = ['run', 'table', 'round', 'sort', 'desc', 'where', 'text'];
  const el = OV.el;

  const view = (OV.views.pairs = { title: 'Pairs' });
  let root = null, list = null, parts = null, params = null;
  let start = 0, rows = [], total = 0, at = -1, stale = false, left = false;
  let table = null;
  const line = OV.line();

  const tables = run => OV.runs[run]?.pair_tables ?? [];
  const roundsOf = run => {
    const own = (OV.runs[run]?.tables ?? []).filter(t => t.name === table && t.round != null).map(t => t.round);
    return [...new Set(own.length ? own : OV.runs[run]?.rounds ?? [])].sort((a, b) => a - b);
  };
  const same = (a, b) => KEPT.every(k => (a[k] ?? '') === (b[k] ?? ''));
  const query = () => ({ run: params.run, table, round: params.round, where: params.where, text: params.text, sort: params.sort ?? 'margin', desc: params.desc ?? '1' });
  const change = (changes, replace = false) => {
    const next = { ...params, ...changes };
    delete next.at;
    for (const key of Object.keys(next)) if (next[key] == null || next[key] === '') delete next[key];
    OV.go('pairs', next, { replace });
  };

  view.enter = (main, next) => {
    if (root && params && same(params, next)) { // back from another view: everything is as it was
      params = next;
      main.append(root);
      left = false;
      if (at >= 0) OV.note('pairs', (params = { ...next, at: String(at) }));
      if (stale) view.update();
      else watch();
      return { restored: true, focus: at >= 0 ? cardAt(at) : null };
    }
    params = next;
    build(main);
    load();
    return {};
  };
  view.leave = () => { left = true; line.stop(); unwatch(); };
  view.navigate = next => {
    const before = params;
    params = next;
    if (same(before, next)) return;
    if (before.run !== next.run || before.table !== next.table) { root.remove(); build(OV.by('main')); }
    else fill();
    load();
  };

  const build = main => {
    const run = params.run;
    table = tables(run).includes(params.table) ? params.table : tables(run)[0] ?? null;
    const onText = OV.later(250, value => change({ text: value.trim() }, true));
    const submit = event => { event.preventDefault(); change({ text: parts.text.value.trim(), where: parts.where?.value.trim() }); };
    parts = {
      text: el('input', { id: 'text-filter', type: 'search', autocomplete: 'off', spellcheck: 'false', placeholder: 'words', 'aria-keyshortcuts': '/', oninput: () => onText(parts.text.value) }),
      where: OV.bundle ? null : el('input', { ...OV.raw, id: 'where', placeholder: "margin > 3 and chosen like '%red%'", 'aria-describedby': 'where-help', onchange: () => change({ where: parts.where.value.trim() }) }),
      direction: el('button', { id: 'direction', type: 'button', onclick: () => change({ desc: (params.desc ?? '1') === '1' ? '0' : '1' }) }),
      count: el('strong', { id: 'pair-count' }, '…'), seconds: el('span', { id: 'pair-seconds', class: 'muted' }), sql: el('span', { id: 'pair-sql' }),
      marks: el('input', { id: 'marks', type: 'checkbox', onchange: () => { OV.store.set('marks', parts.marks.checked ? '1' : '0'); list.classList.toggle('unmarked', !parts.marks.checked); } }),
      message: el('div', { id: 'pair-message' }),
      before: el('button', { id: 'pairs-before', type: 'button', class: 'wide', hidden: true, onclick: () => earlier() }, 'Show earlier pairs'),
      after: el('button', { id: 'pairs-after', type: 'button', class: 'wide', hidden: true, onclick: () => more() }, 'Show more pairs'),
    };
    parts.marks.checked = OV.store.get('marks') !== '0';
    list = el('div', { id: 'pair-list', role: 'feed', 'aria-busy': 'false', 'aria-label': 'Pairs', class: parts.marks.checked ? null : 'unmarked' });
    for (const type of ['focusin', 'click']) list.addEventListener(type, event => { const card = event.target.closest('.pair'); if (card) mark(Number(card.dataset.index)); });
    const bar = el('form', { id: 'pair-filters', class: 'filters', 'aria-label': 'Filters', onsubmit: submit },
      el('span', { id: 'round-slot' }),
      tables(run).length > 1 ? OV.select('table-select', 'Table', tables(run).map(t => [t, t]), table, value => change({ table: value, round: null })) : null,
      OV.select('sort', 'Sort', SORTS, params.sort ?? 'margin', value => change({ sort: value })), parts.direction,
      el('label', { class: 'check' }, parts.marks, 'Mark differences'),
      el('label', { class: 'field grow' }, el('span', null, 'Text'), ' ', parts.text),
      parts.where && el('label', { class: 'field grow2' }, el('span', null, 'SQL where'), ' ', parts.where),
      el('button', { type: 'submit', class: 'unseen' }, 'Apply filters'));
    root = el('div', { data: { view: 'pairs' } },
      el('h1', { tabindex: '-1', class: 'unseen' }, 'Pairs'),
      bar,
      el('p', { class: 'summary', id: 'pair-summary' }, parts.count, ' ', parts.seconds, ' ', parts.sql,
        OV.bundle ? el('span', { class: 'muted', id: 'bundle-note' }, OV.prose(' Filters in SQL need `pipeline view`; the bundle has none.')) : el('span', { id: 'where-help', class: 'unseen' }, 'A condition over the columns of the table and round. Press Enter to apply it.')),
      parts.message, parts.before, list, parts.after);
    fill();
    main.append(root);
  };

  // Brings the fields in line with the address.
  const fill = () => {
    const run = params.run, rounds = roundsOf(run);
    const slot = root.querySelector('#round-slot');
    const had = document.activeElement?.id === 'round';
    slot.replaceChildren(OV.select('round', 'Round', [['', 'all'], ...rounds.map(r => [String(r), String(r)])], params.round ?? '', value => change({ round: value })));
    if (had) slot.querySelector('select').focus();
    root.querySelector('#sort').value = params.sort ?? 'margin';
    const desc = (params.desc ?? '1') === '1';
    parts.direction.textContent = desc ? '↓ Descending' : '↑ Ascending';
    parts.direction.dataset.desc = desc ? '1' : '0';
    if (document.activeElement !== parts.text) parts.text.value = params.text ?? '';
    if (parts.where && document.activeElement !== parts.where) parts.where.value = params.where ?? '';
  };

  const get = (offset, limit, signal) => OV.get('api/pairs', { ...query(), offset, limit }, signal);

  const load = async () => {
    unwatch();
    stale = false;
    at = -1; rows = []; start = 0;
    if (!table) { list.replaceChildren(); showCount(null); parts.message.replaceChildren(OV.empty('This run has no table of pairs yet.')); return; }
    list.setAttribute('aria-busy', 'true');
    list.classList.add('loading');
    if (!list.childElementCount) parts.message.replaceChildren(OV.waiting());
    const wanted = /^\d+$/.test(params.at ?? '') ? Number(params.at) : -1;
    const from = wanted < 0 ? 0 : Math.max(0, wanted - 10);
    try {
      const got = await line.run(signal => get(from, PAGE, signal));
      if (!got) return;
      ({ rows, total } = got);
      start = from;
      list.replaceChildren(...rows.map((p, i) => card(p, start + i)));
      parts.message.replaceChildren(...(rows.length ? [] : [OV.empty(nothing())]));
      showCount(got);
      parts.where?.removeAttribute('aria-invalid');
      if (wanted >= 0) { const chosen = cardAt(wanted); if (chosen) { mark(wanted); chosen.scrollIntoView({ block: 'center' }); } }
      else if (!left && window.scrollY > root.offsetTop) window.scrollTo(0, 0);
      OV.say(OV.plural(total, 'pair'));
    } catch (error) {
      list.replaceChildren();
      showCount(null);
      parts.message.replaceChildren(OV.failure(error));
      if (params.where) parts.where?.setAttribute('aria-invalid', 'true');
    }
    settle();
  };
  const nothing = () => (params.text || params.where || params.round ? 'No pair matches the filters.' : 'The table has no pairs.');
  const settle = () => {
    list.setAttribute('aria-busy', 'false');
    list.classList.remove('loading');
    parts.before.hidden = start === 0 || !rows.length;
    parts.after.hidden = start + rows.length >= total || !rows.length;
    parts.before.textContent = `Show earlier pairs (${OV.count(start)})`;
    parts.after.textContent = `Show more pairs (${OV.count(total - start - rows.length)})`;
    watch();
  };
  const showCount = got => {
    parts.count.textContent = got ? OV.plural(got.total, 'pair') : '';
    parts.seconds.textContent = got ? OV.seconds(got.seconds) : '';
    parts.sql.replaceChildren(...[got && OV.sqlLink(params.run, got.sql)].filter(Boolean));
  };

  // Loads the next (or earlier) page; drops cards at the other end beyond MOST, and keeps what is seen in place.
  let growing = null;
  const grow = forward => {
    if (growing) return growing;
    const offset = forward ? start + rows.length : Math.max(0, start - PAGE);
    const limit = forward ? PAGE : start - offset;
    if (limit <= 0 || offset >= total) return Promise.resolve(false);
    list.setAttribute('aria-busy', 'true');
    growing = line.run(signal => get(offset, limit, signal)).then(got => {
      if (!got) return false;
      total = got.total;
      const anchor = seen() ?? list.firstElementChild, top = anchor?.getBoundingClientRect().top;
      if (forward) {
        list.append(...got.rows.map((p, i) => card(p, offset + i)));
        rows = rows.concat(got.rows);
        const over = Math.max(0, rows.length - MOST);
        for (let i = 0; i < over; i++) list.firstElementChild.remove();
        rows = rows.slice(over);
        start += over;
      } else {
        list.prepend(...got.rows.map((p, i) => card(p, offset + i)));
        rows = got.rows.concat(rows).slice(0, MOST);
        start = offset;
        while (list.childElementCount > rows.length) list.lastElementChild.remove();
      }
      if (anchor?.isConnected) window.scrollBy(0, anchor.getBoundingClientRect().top - top);
      showCount(got);
      return true;
    }).catch(error => { parts.message.replaceChildren(OV.failure(error)); return false; }).finally(() => { growing = null; settle(); });
    return growing;
  };
  const more = () => grow(true);
  const earlier = () => grow(false);
  const seen = () => [...list.children].find(c => c.getBoundingClientRect().bottom > 80);

  let watcher = null;
  const unwatch = () => { watcher?.disconnect(); watcher = null; };
  const watch = () => {
    unwatch();
    if (left) return;
    watcher = new IntersectionObserver(entries => {
      for (const e of entries) if (e.isIntersecting) (e.target === parts.after ? more() : window.scrollY > 200 && earlier());
    }, { rootMargin: '1000px 0px' });
    watcher.observe(parts.before);
    watcher.observe(parts.after);
  };

  const cardAt = index => list?.querySelector(`.pair[data-index="${index}"]`) ?? null;
  const rowAt = index => rows[index - start] ?? null;
  const mark = index => {
    if (index === at && cardAt(index)?.hasAttribute('aria-current')) return;
    list.querySelector('.pair[aria-current]')?.removeAttribute('aria-current');
    at = index;
    cardAt(index)?.setAttribute('aria-current', 'true');
    params = { ...params, at: String(index) };
    OV.note('pairs', params);
  };

  const card = (p, index) => {
    const difference = p.chosen_tokens == null || p.rejected_tokens == null ? null : p.chosen_tokens - p.rejected_tokens;
    const diff = OV.diff(p.chosen ?? '', p.rejected ?? '');
    const id = `q${index}`;
    const side = (name, title) => el('div', { class: `side ${name}`, data: { side: name } },
      el('h3', null, title, ' ', el('span', { class: 'muted light' }, 'reward'), ' ', el('span', { class: 'reward', data: { fact: `${name}_reward` } }, OV.number(p[`${name}_reward`]))),
      OV.text(p[name], { parts: name === 'chosen' ? diff.a : diff.b, mark: `only ${name}`, most: 900 }),
      OV.facts([
        ['tokens', p[`${name}_tokens`] == null ? null : OV.count(p[`${name}_tokens`])],
        ['log-probability', p[`${name}_logp`] == null ? null : OV.number(p[`${name}_logp`])],
        ['label', p[`${name}_label`] == null ? null : OV.inline(p[`${name}_label`], 100)],
        ['candidate', p[`${name}_candidate`]],
      ]),
      p[`${name}_reply`] != null && OV.details('Judge’s reply', OV.text(p[`${name}_reply`])));
    const node = el('article', { class: 'pair', tabindex: '-1', 'aria-labelledby': id, 'aria-posinset': String(index + 1), 'aria-setsize': String(total), data: { key: p.key, index: String(index), prompt: p.prompt_id, round: String(p.round ?? '') } },
      OV.pictures(params.run, p.images, p.videos),
      el('div', { class: 'pair-body' },
        el('div', { class: 'pair-head' },
          el('h2', { id }, OV.text(p.question, { tag: 'bdi', most: 1000 })),
          OV.facts([
            ['margin', OV.number(p.margin), 'margin'],
            ['length difference', difference == null ? null : el('span', { title: 'Tokens of the chosen answer − tokens of the rejected answer' }, OV.signed(difference)), 'length_difference'],
            ['round', p.round, 'round'],
            ['', el('a', { href: OV.promptHref(params.run, p.prompt_id), data: { promptLink: '' } }, 'Prompt', el('span', { class: 'unseen' }, ` of pair ${index + 1}`))],
          ], { class: 'facts head' })),
        OV.context(p),
        el('div', { class: 'sides' }, side('chosen', 'Chosen'), side('rejected', 'Rejected')),
        OV.facts([['known answer', p.answer == null ? null : OV.text(p.answer, { tag: 'bdi', most: 600 }), 'answer'], ...OV.kept(p.kept), ['id', p.id == null ? null : OV.inline(p.id, 80), 'id'],
          diff.exact ? null : ['', 'long texts: a word is marked if the other answer does not have it']], { class: 'facts foot' })));
    node.ovData = JSON.stringify(p);
    return node;
  };

  // The tables of the run changed: fetches the window again and replaces only the cards that differ.
  view.update = async () => {
    if (left) { stale = true; return; }
    stale = false;
    const now = tables(params.run).includes(params.table) ? params.table : tables(params.run)[0] ?? null;
    if (now !== table) { root.remove(); build(OV.by('main')); load(); return; }
    if (!table) return;
    fill();
    const before = total, from = start, limit = Math.min(MOST, Math.max(PAGE, rows.length));
    let got;
    try {
      got = await line.run(signal => get(from, limit, signal));
    } catch (error) {
      parts.message.replaceChildren(OV.failure(error));
      return;
    }
    if (!got) return;
    const anchor = cardAt(at) && visible(cardAt(at)) ? cardAt(at) : seen(), top = anchor?.getBoundingClientRect().top;
    const name = p => `${p.round}/${p.key}`;
    const old = new Map([...list.children].map((c, i) => [name(rows[i]), c]));
    const current = rowAt(at) ? name(rowAt(at)) : null, inside = document.activeElement;
    ({ rows, total } = got);
    start = from;
    let place = null; // moves only what is out of place, so that focus and open details stay
    rows.forEach((p, i) => {
      let node = old.get(name(p));
      if (node && node.ovData === JSON.stringify(p)) {
        old.delete(name(p));
        node.dataset.index = String(start + i);
        node.setAttribute('aria-posinset', String(start + i + 1));
        node.setAttribute('aria-setsize', String(total));
        node.querySelector('h2').id = `q${start + i}`;
        node.setAttribute('aria-labelledby', `q${start + i}`);
      } else node = card(p, start + i);
      const after = place ? place.nextElementSibling : list.firstElementChild;
      if (after !== node) list.insertBefore(node, after);
      place = node;
    });
    while (list.childElementCount > rows.length) list.lastElementChild.remove();
    const moved = rows.findIndex(p => name(p) === current);
    list.querySelector('.pair[aria-current]')?.removeAttribute('aria-current');
    at = moved >= 0 ? start + moved : -1;
    cardAt(at)?.setAttribute('aria-current', 'true');
    if (inside && inside !== document.body && inside.isConnected && document.activeElement !== inside) inside.focus({ preventScroll: true });
    if (anchor?.isConnected) window.scrollBy(0, anchor.getBoundingClientRect().top - top);
    parts.message.replaceChildren(...(rows.length ? [] : [OV.empty(nothing())]));
    showCount(got);
    settle();
    const added = total - before;
    OV.say(added > 0 ? `Updated: ${OV.plural(added, 'new pair')}, ${OV.count(total)} in all` : added < 0 ? `Updated: ${OV.plural(-added, 'pair')} fewer, ${OV.count(total)} in all` : 'Updated');
  };
  const visible = node => { const r = node.getBoundingClientRect(); return r.bottom > 0 && r.top < innerHeight; };

  const step = async by => {
    if (!rows.length) return;
    let next = at + by;
    if (at < 0 || !cardAt(at)) next = Number((seen() ?? list.firstElementChild).dataset.index);
    if (next < 0) { OV.say('This is the first pair'); return; }
    if (next >= total) { OV.say('This is the last pair'); return; }
    if (next >= start + rows.length) await more();
    else if (next < start) await earlier();
    const node = cardAt(next);
    if (!node) return;
    mark(next);
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: 'nearest' });
    if (by > 0 && next > start + rows.length - 8 && start + rows.length < total) more();
  };
  view.keys = {
    j: () => step(1),
    k: () => step(-1),
    Enter: event => {
      const p = rowAt(at);
      if (!p || event.target.closest('a, button, summary, input, select')) return false;
      OV.go('prompt', { run: params.run, id: p.prompt_id });
      return true;
    },
    i: () => { const node = cardAt(at) ?? seen(); node?.querySelector('[data-pictures]')?.click(); },
    '/': () => parts.text.focus(),
    r: () => {
      const rounds = ['', ...roundsOf(params.run).map(String)];
      const next = rounds[(rounds.indexOf(params.round ?? '') + 1) % rounds.length];
      change({ round: next });
      OV.say(next === '' ? 'All rounds' : `Round ${next}`);
    },
  };
  // For `j` and `k` in the view Prompt: goes to the prompt of the next pair of the list.
  view.neighbour = (by, id) => {
    if (!root || rowAt(at)?.prompt_id !== id) return false;
    let next = at + by;
    while (rowAt(next)?.prompt_id === id) next += by;
    const p = rowAt(next);
    if (!p) return false;
    mark(next);
    OV.go('prompt', { run: params.run, id: p.prompt_id }, { replace: true });
    return true;
  };
})();
