// The view Graph: the drawing of the pipeline, and the state of each of its tables.
'use strict';

(() => {
  const el = OV.el;
  const view = (OV.views.graph = { title: 'Graph' });
  const line = OV.line();
  let body = null, params = null, drawn = '';

  view.enter = (main, next) => {
    params = next;
    drawn = '';
    body = el('div', { id: 'graph-body' });
    main.append(el('div', { data: { view: 'graph' } }, el('h1', { tabindex: '-1', class: 'unseen' }, 'Graph'), body));
    load();
    return {};
  };
  view.navigate = next => { if (next.run !== params.run) { params = next; drawn = ''; load(); } else params = next; };
  view.leave = () => line.stop();
  view.update = async () => { if (await load(true)) OV.say('Updated'); };

  const load = async quiet => {
    if (!quiet) body.replaceChildren(OV.waiting());
    try {
      const got = await line.run(signal => OV.get('api/graph', { run: params.run }, signal));
      if (!got) return false;
      const text = JSON.stringify(got);
      if (text === drawn) return false;
      drawn = text;
      body.replaceChildren(...draw(got).filter(Boolean));
      return true;
    } catch (error) {
      body.replaceChildren(OV.failure(error));
      return false;
    }
  };

  const draw = got => {
    const box = el('div', { class: 'scroll graph', tabindex: '0', role: 'region', 'aria-label': 'Drawing of the pipeline' });
    if (got.svg_light) {
      const stamp = OV.bundle ? '' : `${got.svg_light.includes('?') ? '&' : '?'}at=${Date.now()}`;
      const img = el('img', { id: 'graph-image', src: got.svg_light + stamp, alt: 'The tables of the pipeline and what they are built from. The table below lists them.' });
      img.addEventListener('error', () => box.replaceWith(OV.empty('The drawing cannot be loaded.')));
      box.append(img);
    }
    const state = t => el('span', { class: `state ${String(t.state).replaceAll(' ', '-')}`, data: { state: t.state } }, t.state);
    return [
      got.problem && el('p', { class: 'failure' }, OV.text(got.problem, { tag: 'span' })),
      got.svg_light ? box : null,
      el('h2', null, 'Tables'),
      got.tables.length ? OV.table('Tables of the run', ['Table', { name: 'Round', number: true }, 'Stage', { name: 'Rows', number: true }, { name: 'Compute time', number: true }, 'State', 'Next run'],
        got.tables.map(t => [OV.tableLink(params.run, t.table), t.round, el('code', null, t.stage_type), t.rows, t.seconds == null ? null : OV.seconds(t.seconds), state(t),
          el('div', null, t.action, t.reasons?.length ? el('ul', { class: 'plain' }, t.reasons.map(r => el('li', { class: 'muted' }, OV.prose(r)))) : null)]), { id: 'graph-table', head: true }) : OV.empty('The run has no tables yet.'),
    ];
  };
  view.keys = {};
})();
