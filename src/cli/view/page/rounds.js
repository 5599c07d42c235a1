// The view Rounds: the health of each round as a table, then the charts; several runs beside each other.
'use strict';

(() => {
  const el = OV.el;
  const view = (OV.views.rounds = { title: 'Rounds' });
  const line = OV.line();
  let root = null, health = null, charts = null, params = null, runs = [];
  let drawn = new Map(); // chart id -> the text of its data, so that an update redraws only what changed

  const chosen = next => {
    const wanted = (next.runs ?? (next.run && !next.runs ? next.run : '')).split(',').filter(s => /^\d+$/.test(s) && OV.runs[Number(s)]).map(Number);
    return wanted.length && next.runs != null ? [...new Set(wanted)] : OV.runs.map((_, i) => i).slice(0, 7);
  };
  view.shows = run => runs.includes(run);

  view.enter = (main, next) => {
    params = next;
    runs = chosen(next);
    drawn = new Map();
    health = el('section', { id: 'health', 'aria-label': 'Health' });
    charts = el('section', { id: 'charts', 'aria-label': 'Charts' });
    const boxes = OV.runs.map((r, i) => {
      const box = el('input', { type: 'checkbox', value: String(i), data: { run: String(i) } });
      box.checked = runs.includes(i);
      box.addEventListener('change', () => {
        const on = [...root.querySelectorAll('#run-choice input')].filter(b => b.checked).map(b => b.value);
        if (!on.length) { box.checked = true; return; }
        OV.go('rounds', { runs: on.join(',') });
      });
      return el('label', { class: 'check' }, box, OV.runName(i));
    });
    root = el('div', { data: { view: 'rounds' } }, el('h1', { tabindex: '-1', class: 'unseen' }, 'Rounds'),
      boxes.length > 1 ? el('fieldset', { id: 'run-choice', class: 'filters' }, el('legend', null, 'Runs'), boxes) : null, health, charts);
    main.append(root);
    load();
    return {};
  };
  view.navigate = next => {
    params = next;
    const now = chosen(next);
    if (now.join() === runs.join()) return;
    runs = now;
    root.querySelectorAll('#run-choice input').forEach(b => { b.checked = runs.includes(Number(b.value)); });
    load();
  };
  view.leave = () => line.stop();
  view.update = async () => { await load(true); OV.say('Updated'); };

  const load = async quiet => {
    if (!quiet && !health.childElementCount) health.replaceChildren(OV.waiting());
    await line.run(async signal => {
      const each = (path, extra) => Promise.all(runs.map(run => OV.get(path, { run, ...extra }, signal).catch(error => { if (error.name === 'AbortError') throw error; return { error }; })));
      const shown = [...runs];
      await Promise.all([
        each('api/health').then(all => { if (!signal.aborted) health.replaceChildren(...drawHealth(shown, all).filter(Boolean)); }),
        each('api/charts').then(async all => {
          if (signal.aborted) return;
          const specs = new Map();
          all.forEach((one, i) => (one.charts ?? []).forEach(c => { if (!specs.has(c.id)) specs.set(c.id, { spec: c, runs: [] }); specs.get(c.id).runs.push(shown[i]); }));
          place([...specs.keys()]);
          all.forEach(one => { if (one.error && !one.error.missing) charts.prepend(OV.failure(one.error)); });
          if (!specs.size && !all.some(one => one.error)) charts.append(OV.empty('The charts appear when the first tables are complete.'));
          const queue = [...specs.values()];
          const work = async () => { for (let job; (job = queue.shift());) await one(job, signal); };
          await Promise.all([work(), work(), work()]); // three requests at a time
        }),
      ]);
    });
  };

  // One place for each chart, in order; charts that are gone leave.
  const place = ids => {
    const old = new Map([...charts.querySelectorAll('[data-place]')].map(n => [n.dataset.place, n]));
    const nodes = ids.map(id => old.get(id) ?? el('div', { class: 'chart-place', data: { place: id } }, OV.waiting()));
    charts.replaceChildren(el('h2', null, 'Charts'), el('div', { class: 'chart-grid' }, nodes));
    for (const id of drawn.keys()) if (!ids.includes(id)) drawn.delete(id);
  };
  const one = async ({ spec, runs: of }, signal) => {
    const sets = [], errors = [];
    await Promise.all(of.map(async (run, i) => {
      try { sets[i] = { run, name: OV.runName(run), data: await OV.get('api/chart', { run, id: spec.id }, signal) }; }
      catch (error) { if (error.name === 'AbortError') throw error; errors.push(error); }
    }));
    if (signal.aborted) return;
    const good = sets.filter(Boolean), text = JSON.stringify([spec, good, errors.map(String)]);
    if (drawn.get(spec.id) === text) return;
    drawn.set(spec.id, text);
    const node = charts.querySelector(`[data-place="${CSS.escape(spec.id)}"]`);
    if (!node) return;
    node.classList.toggle('across', good.length > 1 && spec.kind !== 'lines');
    const asTable = node.querySelector('[data-show-table][aria-pressed=true]');
    node.replaceChildren(...(good.length ? [OV.chartFigure(spec, good)] : [el('h3', null, spec.title)]), ...errors.map(OV.failure));
    if (asTable) node.querySelector('[data-show-table]')?.click();
  };

  const words = { stop: 'Stop', warn: 'Warning' };
  const drawHealth = (shown, all) => {
    const several = shown.length > 1, out = [el('h2', null, 'Health')];
    all.forEach((one, i) => { if (one.error && !one.error.missing) out.push(OV.failure(one.error)); });
    const good = all.map((one, i) => ({ ...one, run: shown[i] })).filter(one => one.rows);
    const titles = new Map(good.flatMap(g => g.metrics.map(m => [m.metric, m])));
    const title = r => titles.get(r.metric)?.title ?? r.metric;
    const alerts = good.flatMap(g => g.rows.filter(r => r.action).map(r => ({ ...r, run: g.run }))).sort((a, b) => (a.action === 'stop' ? 0 : 1) - (b.action === 'stop' ? 0 : 1) || b.round - a.round);
    if (alerts.length) {
      out.push(el('ul', { class: 'alerts', id: 'alerts' }, alerts.map(r => el('li', { class: r.action, data: { action: r.action } }, el('strong', null, words[r.action] ?? r.action), several ? ` in ${OV.runName(r.run)}` : '', `, round ${r.round}: ${title(r)}`, r.of ? [' of ', el('code', null, r.of)] : '', ` is ${OV.number(r.value)}`, r.bound ? [' (bound: ', el('code', null, r.bound), ')'] : '', r.n == null ? '' : `, n = ${OV.count(r.n)}`, '.'))));
    } else if (good.some(g => g.rows.some(r => r.bound))) out.push(el('p', { id: 'alerts' }, 'No value is out of bounds.'));
    for (const g of good) if (g.kept) out.push(el('p', { class: 'kept', data: { kept: String(g.kept.round) } }, several ? `${OV.runName(g.run)} keeps ` : 'Kept: ', el('strong', null, `round ${g.kept.round}`), ', by ', el('code', null, g.kept.by), g.kept.values?.length ? ` (${g.kept.values.map(([r, v]) => `round ${r}: ${OV.number(v)}`).join(', ')})` : '', '.'));
    const rows = good.flatMap(g => g.rows);
    if (!rows.length) { out.push(good.length ? OV.empty('No metrics yet: they appear when the first round ends.') : null); return out; }
    const rounds = [...new Set(rows.map(r => r.round))].sort((a, b) => a - b);
    const lines = new Map();
    for (const g of good) {
      for (const r of g.rows) {
        const key = JSON.stringify([r.metric, r.of]);
        if (!lines.has(key)) lines.set(key, { metric: r.metric, of: r.of, runs: new Map() });
        const of = lines.get(key).runs;
        if (!of.has(g.run)) of.set(g.run, new Map());
        of.get(g.run).set(r.round, r);
      }
    }
    const weight = l => Math.min(...[...l.runs.values()].flatMap(m => [...m.values()].map(r => (r.action === 'stop' ? 0 : r.action ? 1 : 2))));
    const order = [...lines.values()].map((l, i) => [weight(l), i, l]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(x => x[2]);
    const cell = r => {
      if (!r) return null;
      const limits = r.low != null && r.high != null ? el('span', { class: 'interval' }, ` ${OV.number(r.low)} to ${OV.number(r.high)}`) : null;
      return el('span', { class: r.action ? `flag ${r.action}` : null, title: r.n == null ? null : `n = ${OV.count(r.n)}` }, el('span', { class: 'value' }, OV.number(r.value)), limits, r.action ? [' ', el('strong', null, words[r.action] ?? r.action)] : null);
    };
    const table = order.flatMap(l => [...l.runs].map(([run, byRound], i) => [
      i ? el('span', { class: 'unseen' }, title(l)) : el('span', { title: titles.get(l.metric)?.help }, title(l), ' ', el('code', { class: 'muted' }, l.of ? `${l.metric} of ${OV.plain(l.of, 40)}` : l.metric)),
      ...(several ? [OV.runName(run)] : []), ...rounds.map(r => cell(byRound.get(r))), [...byRound.values()].find(r => r.bound)?.bound ?? '']));
    out.push(OV.table('Metrics by round', ['Metric', ...(several ? ['Run'] : []), ...rounds.map(r => ({ name: `Round ${r}`, number: true })), 'Bound'], table, { id: 'health-table', head: true }));
    const help = [...titles.values()].filter(m => m.help);
    if (help.length) out.push(OV.details('What the metrics mean', el('dl', { class: 'help' }, help.map(m => el('div', null, el('dt', null, m.title, ' ', el('code', null, m.metric)), el('dd', null, OV.prose(m.help)))))));
    return out;
  };

  view.keys = {
    '/': () => root.querySelector('#run-choice input')?.focus(),
  };
})();
