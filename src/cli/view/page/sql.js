// The view SQL: a query, ready-made queries, the tables, and the result with pictures and links to prompts.
'use strict';

(() => {
  const el = OV.el;
  const view = (OV.views.sql = { title: 'SQL' });
  const line = OV.line(), sideLine = OV.line();
  const IMAGES = new Set(['image_id', 'training_image_id', 'image_ids', 'frame_ids']);
  let root = null, parts = null, params = null, clock = 0;

  view.enter = (main, next) => {
    params = next;
    parts = {
      query: el('textarea', { ...OV.raw, type: null, id: 'query', rows: '6', 'aria-describedby': 'query-help', 'aria-keyshortcuts': 'Control+Enter' }),
      run: el('button', { type: 'submit', id: 'run-query', class: 'primary' }, 'Run'),
      cancel: el('button', { type: 'button', id: 'cancel-query', hidden: true, onclick: () => { line.stop(); idle(); parts.result.replaceChildren(OV.empty('Canceled.')); } }, 'Cancel'),
      csv: el('a', { id: 'download-csv', download: '' }, 'CSV'), parquet: el('a', { id: 'download-parquet', download: '' }, 'Parquet'),
      downloads: el('span', { class: 'muted', hidden: true }),
      result: el('section', { id: 'result', 'aria-label': 'Result' }), status: el('p', { class: 'summary', id: 'result-summary' }),
      questions: el('div', { id: 'questions' }), tables: el('div', { id: 'tables' }),
    };
    parts.downloads.append('All rows as ', parts.csv, ', ', parts.parquet);
    parts.query.value = next.q ?? OV.store.get('query') ?? '';
    parts.query.addEventListener('keydown', event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit(); } });
    root = el('div', { class: 'sql', data: { view: 'sql' } }, el('h1', { tabindex: '-1', class: 'unseen' }, 'SQL'),
      el('div', { class: 'sql-main' },
        el('form', { id: 'sql-form', onsubmit: event => { event.preventDefault(); submit(); } },
          el('label', { for: 'query', class: 'unseen' }, 'Query'), parts.query,
          el('div', { class: 'filters' }, parts.run, parts.cancel,
            OV.select('limit', 'Show', [['50', '50 rows'], ['200', '200 rows'], ['1000', '1,000 rows']], next.limit ?? '200', value => OV.go('sql', { ...params, limit: value })),
            el('span', { id: 'query-help', class: 'muted' }, 'Ctrl+Enter runs the query. Queries only read.'), parts.downloads)),
        parts.status, parts.result),
      el('aside', { class: 'sql-side', 'aria-label': 'Ready-made queries and tables' }, parts.questions, parts.tables));
    main.append(root);
    drawTables();
    loadQuestions();
    begin();
    return {};
  };
  view.navigate = next => {
    const before = params;
    params = next;
    if (next.run !== before.run) { drawTables(); loadQuestions(); }
    parts.query.value = next.q ?? '';
    root.querySelector('#limit').value = next.limit ?? '200';
    begin();
  };
  const begin = () => {
    if (params.q) { execute(); return; }
    line.stop();
    idle();
    parts.status.replaceChildren();
    parts.downloads.hidden = true;
    parts.result.replaceChildren(OV.empty('Write a query, or choose one.'));
  };
  view.leave = () => { line.stop(); sideLine.stop(); clearInterval(clock); };
  view.update = () => {
    drawTables();
    if (!params.q || parts.status.querySelector('[data-changed]')) return;
    parts.status.append(el('span', { data: { changed: '' } }, ' The run has changed since. ', el('button', { type: 'button', class: 'link', onclick: execute }, 'Run the query again')));
    OV.say('The run has changed. The result is from before.');
  };

  const submit = () => {
    const q = parts.query.value.trim();
    if (!q) { parts.query.focus(); return; }
    OV.store.set('query', q);
    if (q === params.q) execute();
    else OV.go('sql', { ...params, q });
  };
  const idle = () => { clearInterval(clock); parts.cancel.hidden = true; parts.result.setAttribute('aria-busy', 'false'); parts.result.classList.remove('loading'); };

  const execute = async () => {
    const { run, q } = params, limit = params.limit ?? '200', since = performance.now();
    clearInterval(clock);
    parts.result.setAttribute('aria-busy', 'true');
    parts.result.classList.add('loading');
    parts.status.replaceChildren(OV.muted('Running…'));
    parts.downloads.hidden = true;
    clock = setInterval(() => {
      parts.cancel.hidden = false;
      parts.status.replaceChildren(OV.muted(`Running… ${Math.round((performance.now() - since) / 1000)} s`));
    }, 1000);
    try {
      const got = await line.run(signal => OV.get('api/sql', { run, q, limit }, signal));
      if (!got) return;
      idle();
      parts.csv.href = OV.address('api/sql.csv', { run, q });
      parts.parquet.href = OV.address('api/sql.parquet', { run, q });
      parts.downloads.hidden = false;
      const n = OV.plural(got.rows.length, 'row');
      parts.status.replaceChildren(el('strong', { id: 'row-count' }, got.more ? `first ${n}` : n), ' ', OV.muted(OV.seconds(got.seconds), got.more ? '. The query has more rows.' : ''));
      parts.result.replaceChildren(got.columns.length ? result(got) : OV.empty('The query has no columns.'));
      OV.say(got.more ? `First ${n}` : n);
    } catch (error) {
      idle();
      parts.status.replaceChildren();
      parts.result.replaceChildren(OV.failure(error));
    }
  };

  const NUMBER = /^(U?Int\d+|Float\d+|Decimal)/i;
  const result = ({ columns, rows }) => {
    const numeric = columns.map((c, i) => NUMBER.test(c.type ?? '') || rows.some(r => typeof r[i] === 'number'));
    return el('div', { class: 'scroll result', tabindex: '0', role: 'region', 'aria-label': 'Rows of the result' },
      el('table', { id: 'result-table' }, el('caption', { class: 'unseen' }, 'Result of the query'),
        el('thead', null, el('tr', null, columns.map((c, i) => el('th', { scope: 'col', class: numeric[i] ? 'number' : null, title: OV.plain(c.type ?? '') }, OV.inline(c.name, 60))))),
        el('tbody', null, rows.map(row => el('tr', null, row.map((v, i) => el('td', { class: numeric[i] ? 'number' : null }, cell(v, columns[i].name))))))));
  };
  const cell = (v, column) => {
    if (v === null || v === undefined) return OV.muted('null');
    if (typeof v === 'number' || typeof v === 'boolean') return String(v);
    const images = IMAGES.has(column) ? [v].flat() : [v].flat().map(x => x?.$image);
    if (images.length && images.every(OV.isImage)) return OV.pictures(params.run, images, [], { small: true });
    if (column === 'prompt_id' && typeof v === 'string' && v) return el('a', { href: OV.promptHref(params.run, v), title: OV.plain(v), data: { promptLink: '' } }, OV.plain(v.length > 14 ? `${OV.cut(v, 12)}…` : v, 20));
    return OV.text(typeof v === 'string' ? v : JSON.stringify(v), { most: 400 });
  };

  const loadQuestions = async () => {
    try {
      const got = await sideLine.run(signal => OV.get('api/questions', { run: params.run }, signal));
      if (!got) return;
      parts.questions.replaceChildren(...(got.questions.length ? [el('h2', null, 'Questions'), el('ul', { class: 'plain' }, got.questions.map(x => el('li', null, el('a', { href: OV.hash('sql', { run: params.run, q: x.sql }), data: { question: '' } }, x.title))))] : []));
    } catch (error) {
      parts.questions.replaceChildren(el('h2', null, 'Questions'), OV.failure(error));
    }
  };
  const drawTables = () => {
    const list = OV.runs[params.run]?.tables ?? [], byName = new Map();
    for (const t of list) {
      const one = byName.get(t.name) ?? { rows: 0, rounds: 0, kind: t.kind, open: false };
      one.rows += t.rows ?? 0;
      one.rounds += t.round == null ? 0 : 1;
      one.open ||= t.complete === false;
      byName.set(t.name, one);
    }
    parts.tables.replaceChildren(...(byName.size ? [el('h2', null, 'Tables'), el('ul', { class: 'plain tables' }, [...byName, ...['images', 'rejects', 'telemetry'].map(name => [name, null])].map(([name, t]) => t == null ? el('li', null, OV.tableLink(params.run, name)) : el('li', null, OV.tableLink(params.run, name), ' ', OV.muted(OV.plural(t.rows, 'row'), t.rounds ? `, ${OV.plural(t.rounds, 'round')}` : '', t.open ? ', incomplete' : ''))))] : []));
  };

  view.keys = { '/': () => { parts.query.focus(); } };
})();
