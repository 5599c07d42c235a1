// The view Prompt: everything that happened to one prompt in the rounds, its evaluations, and similar prompts.
'use strict';

(() => {
  const el = OV.el;
  const view = (OV.views.prompt = { title: 'Prompt' });
  const line = OV.line(), similarLine = OV.line();
  let root = null, body = null, similar = null, params = null, drawn = '';

  view.enter = (main, next) => {
    params = next;
    drawn = '';
    body = el('div', { id: 'prompt-body' });
    similar = el('section', { id: 'similar', 'aria-label': 'Similar prompts' });
    const input = el('input', { ...OV.raw, id: 'prompt-id' });
    input.value = params.id ?? '';
    root = el('div', { data: { view: 'prompt' } },
      el('h1', { tabindex: '-1', id: 'prompt-title', class: 'unseen' }, 'Prompt'),
      el('form', { class: 'filters', id: 'prompt-form', onsubmit: event => { event.preventDefault(); if (input.value.trim()) OV.go('prompt', { run: params.run, id: input.value.trim() }); } },
        el('label', { class: 'field grow' }, el('span', null, 'Prompt'), ' ', input), el('button', { type: 'submit' }, 'Open')),
      body, similar);
    main.append(root);
    load();
    return {};
  };
  view.navigate = next => { const main = root.parentNode; view.leave(); root.remove(); view.enter(main, next); window.scrollTo(0, 0); OV.by('prompt-title').focus({ preventScroll: true }); };
  view.leave = () => { line.stop(); similarLine.stop(); };
  view.update = async () => { if (await load(true)) OV.say('Updated'); };

  const load = async quiet => {
    if (!params.id) { body.replaceChildren(OV.empty('Open a prompt from a pair, from a result in SQL, or by its prompt_id.')); return false; }
    if (!quiet) body.replaceChildren(OV.waiting());
    if (!quiet) loadSimilar();
    try {
      const got = await line.run(signal => OV.get('api/prompt', { run: params.run, id: params.id }, signal));
      if (!got) return false;
      const text = JSON.stringify(got);
      if (text === drawn) return false;
      drawn = text;
      const open = [...body.querySelectorAll('details')].map(d => d.open), y = window.scrollY;
      body.replaceChildren(...draw(got).filter(Boolean));
      const now = body.querySelectorAll('details');
      if (quiet && now.length === open.length) now.forEach((d, i) => { d.open = open[i]; });
      if (quiet) window.scrollTo(0, y);
      return true;
    } catch (error) {
      body.replaceChildren(OV.failure(error));
      return false;
    }
  };

  const draw = ({ prompt: p, rounds, evaluations }) => {
    document.title = `${OV.plain(p.question, 60)} – ovchat`;
    const title = OV.by('prompt-title');
    title.textContent = `Prompt: ${OV.plain(p.question, 100)}`;
    return [
      el('section', { class: 'prompt-head', 'aria-label': 'Question' }, OV.pictures(params.run, p.images, p.videos),
        el('div', null, el('div', { class: 'question' }, OV.text(p.question, { most: 4000 })), OV.context(p),
          OV.facts([['known answer', p.answer == null ? null : OV.text(p.answer, { tag: 'bdi', most: 1000 }), 'answer'], ['table', p.table && OV.tableLink(params.run, p.table)], ...OV.kept(p.kept), ['id', p.id == null ? null : OV.inline(p.id, 80)], ['prompt_id', el('code', null, p.prompt_id)]])), trend(rounds ?? [], evaluations ?? [])),
      ...(rounds ?? []).map(drawRound),
      evaluations?.length ? drawEvaluations(evaluations) : null,
      !rounds?.length && !evaluations?.length ? OV.empty('The run has no answers to this prompt yet.') : null,
    ];
  };

  const reward = answer => answer.rewards?.find(r => r.reward != null)?.reward ?? null;

  // A chart of the rewards by round, where there is more than one.
  const trend = (rounds, evaluations) => {
    const all = [...rounds.map(r => [r.round, r.answers.map(reward)]), ...evaluations.map(e => [e.round, [reward(e)]])].map(([r, list]) => [r, list.filter(x => x != null)]).filter(r => r[1].length);
    const byRound = new Map();
    for (const [r, list] of all) byRound.set(r, [...(byRound.get(r) ?? []), ...list]);
    if (byRound.size < 2) return null;
    const several = [...byRound.values()].some(l => l.length > 1);
    const mean = l => l.reduce((a, b) => a + b, 0) / l.length;
    const rows = [...byRound].sort((a, b) => a[0] - b[0]).map(([r, l]) => (several ? [r, Math.max(...l), mean(l), Math.min(...l)] : [r, l[0]]));
    const names = several ? ['highest', 'mean', 'lowest'] : ['reward'];
    return OV.chartFigure({ id: 'prompt-rewards', title: 'Reward by round', kind: 'lines', x: 'round', y: names, series: null, unit: 'reward' },
      [{ run: params.run, name: OV.runName(params.run), data: { columns: ['round', ...names], rows } }], { level: 'h2', small: true });
  };

  const rewardsOf = answer => (answer.rewards ?? []).map(r => el('div', { class: 'judged' },
    OV.facts([[el('span', { title: OV.plain(r.table) }, OV.inline(r.judge ?? r.table ?? 'reward', 40)), r.reward == null ? '–' : OV.number(r.reward)], ['label', r.label == null ? null : OV.inline(r.label, 100)]]),
    r.failure != null && el('p', { class: 'bad' }, 'Failed: ', OV.inline(r.failure)),
    r.reply != null && OV.details('Judge’s reply', OV.text(r.reply))));

  const logp = a => {
    const one = (value, from) => (value == null ? el('span', { class: 'muted', title: OV.plain(from ?? 'not known') }, '–') : el('span', { title: OV.plain(from ?? '') }, OV.number(value)));
    if (a.logp_before == null && a.logp_after == null) return OV.facts([['log-probability', OV.muted(OV.inline(a.logp_before_from ?? 'not known', 120))]]);
    return OV.facts([
      ['log-probability before', one(a.logp_before, a.logp_before_from)], ['after', one(a.logp_after, a.logp_after_from)],
      ['change', a.logp_before != null && a.logp_after != null ? OV.signed(a.logp_after - a.logp_before) : null],
      ['', a.logp_after == null && a.logp_after_from ? OV.muted(OV.inline(a.logp_after_from, 120)) : null],
    ]);
  };

  const side = (answer, ...rest) => el('div', { class: 'answer-side' }, el('span', { class: 'reward' }, el('span', { class: 'unseen' }, 'reward '), OV.number(reward(answer))), ...rest);

  const roundName = round => round == null ? 'Once' : `Round ${round}`;

  const drawRound = r => {
    const chosen = r.answers.find(a => a.role === 'chosen'), rejected = r.answers.find(a => a.role === 'rejected');
    const order = [...r.answers].sort((a, b) => (reward(b) ?? -Infinity) - (reward(a) ?? -Infinity) || a.candidate - b.candidate);
    const t = r.training;
    return el('section', { class: 'round', 'aria-label': roundName(r.round), data: { round: String(r.round) } },
      el('h2', null, roundName(r.round), ' ', el('span', { class: 'muted light' }, r.table ? [OV.inline(r.table, 60), ', '] : null, OV.plural(r.answers.length, 'answer'))),
      el('p', { data: { training: '' } }, t
        ? ['Trained at ', el('strong', null, `step ${OV.count(t.step)}`), t.steps == null ? '' : ` of ${OV.count(t.steps)}`, t.epoch == null ? '' : `, epoch ${OV.number(t.epoch)}`, t.table ? [' (', OV.tableLink(params.run, t.table), ')'] : '', t.loss == null ? '' : `. Loss ${OV.number(t.loss)}`, t.accuracy == null ? '' : `, accuracy ${OV.number(t.accuracy)}`, '.']
        : OV.muted('Not trained on: ', OV.inline(r.training_why ?? 'not known'))),
      r.pairs?.length ? el('ul', { class: 'plain' }, r.pairs.map(p => el('li', { data: { pair: p.key } }, 'Pair in ', OV.tableLink(params.run, p.table), `: candidate ${p.chosen_candidate ?? '–'} chosen over ${p.rejected_candidate ?? '–'}, margin ${OV.number(p.margin)}`))) : null,
      r.rejects?.length ? el('ul', { class: 'plain' }, r.rejects.map(x => el('li', null, el('strong', null, x.class === 'fault' ? 'Fault' : 'Dropped'), ' by ', el('code', null, x.stage), ': ', OV.inline(x.reason)))) : null,
      el('ol', { class: 'answers' }, order.map(a => {
        const other = a === chosen ? rejected : chosen;
        const diff = other && OV.diff(a.text ?? '', other.text ?? '');
        return el('li', { class: `answer ${a.role ?? ''}`, data: { candidate: String(a.candidate), role: a.role ?? '' } },
          side(a, a.role ? el('span', { class: `role ${a.role}` }, a.role) : null, OV.muted(`candidate ${a.candidate}`)),
          OV.text(a.text, { parts: diff?.a, mark: `only ${a === chosen ? 'chosen' : 'rejected'}` }),
          el('div', { class: 'answer-facts' }, a.why && el('p', null, OV.inline(a.why)),
            OV.facts([['tokens', a.tokens == null ? null : OV.count(a.tokens)], ['', a.finish === 'length' ? el('strong', { class: 'bad' }, 'cut off at max_new_tokens') : null]]),
            logp(a), rewardsOf(a)));
      })));
  };

  const drawEvaluations = list => {
    const groups = new Map();
    for (const e of list) {
      const key = `${e.table}/${e.candidate ?? 0}`;
      groups.set(key, [...(groups.get(key) ?? []), e]);
    }
    return el('section', { class: 'round', id: 'evaluations', 'aria-label': 'Evaluations' }, el('h2', null, 'Evaluations'),
      el('p', { class: 'muted' }, 'The prompt is held out. Marked words differ from the answer of the round before.'),
      [...groups.values()].map(group => {
        group.sort((a, b) => a.round - b.round);
        return [el('h3', null, OV.tableLink(params.run, group[0].table), groups.size > 1 && group[0].candidate != null ? `, candidate ${group[0].candidate}` : ''),
          el('ol', { class: 'answers' }, group.map((e, i) => {
            const before = group[i - 1];
            const diff = before && OV.diff(before.text ?? '', e.text ?? '');
            const change = before && reward(e) != null && reward(before) != null ? reward(e) - reward(before) : null;
            return el('li', { class: 'answer', data: { round: String(e.round) } },
              side(e, el('strong', null, e.round == null ? 'once' : `round ${e.round}`),
                change == null ? null : el('span', { class: 'muted', data: { rewardChange: '' } }, change === 0 ? 'reward unchanged' : `${OV.signed(change)} since round ${before.round}`)),
              OV.text(e.text, { parts: diff?.b, mark: 'only changed' }),
              el('div', { class: 'answer-facts' }, before && before.text === e.text ? el('p', null, `same answer as in round ${before.round}`) : null,
                OV.facts([['tokens', e.tokens == null ? null : OV.count(e.tokens)]]), rewardsOf(e)));
          }))];
      }));
  };

  const loadSimilar = async () => {
    similar.replaceChildren(OV.waiting('Looking for similar prompts…'));
    try {
      const got = await similarLine.run(signal => OV.get('api/similar', { run: params.run, id: params.id }, signal));
      if (!got) return;
      const group = (key, title, refs, note) => (refs?.length ? [el('h3', null, title, ' ', el('span', { class: 'muted light' }, OV.count(refs.length))), el('ul', { class: 'refs', data: { similar: key } }, refs.map(r => reference(r, note(r))))] : null);
      const groups = [
        group('same_image', 'Same image', got.same_image, () => null),
        group('near_duplicates', 'Near-duplicate images', got.near_duplicates, r => `${r.distance} of 64 bits differ`),
        group('questions', 'Similar questions', got.questions, r => `${OV.number(r.shared * 100)} % shared words`),
      ].filter(Boolean);
      similar.replaceChildren(el('h2', null, 'Similar prompts'));
      OV.add(similar, groups.length ? groups : [OV.empty('No other prompt has the same image, a similar image or a similar question.')]);
    } catch (error) {
      similar.replaceChildren(...(OV.bundle ? [] : [el('h2', null, 'Similar prompts'), OV.failure(error)]));
    }
  };
  const reference = (r, note) => el('li', null, OV.pictures(params.run, r.images, r.videos, { small: true }),
    el('div', null, el('a', { href: OV.promptHref(params.run, r.prompt_id) }, OV.inline(r.question, 160)),
      el('div', { class: 'muted' }, [note, r.table, ...(r.pairs ?? []).slice(0, 4).map(p => `${p.round == null ? 'once' : `round ${p.round}`}: margin ${OV.number(p.margin)}`), r.pairs?.length > 4 && `${r.pairs.length - 4} more pairs`].filter(Boolean).join(' · '))));

  view.keys = {
    j: () => OV.views.pairs.neighbour(1, params.id) || OV.say('No next pair in the list'),
    k: () => OV.views.pairs.neighbour(-1, params.id) || OV.say('No previous pair in the list'),
    i: () => body.querySelector('[data-pictures]')?.click(),
    '/': () => OV.by('prompt-id').focus(),
    r: () => {
      const all = [...body.querySelectorAll('.round')];
      if (!all.length) return;
      const next = all.find(s => s.getBoundingClientRect().top > 60) ?? all[0];
      next.scrollIntoView({ block: 'start' });
      const h = next.querySelector('h2');
      h.tabIndex = -1;
      h.focus({ preventScroll: true });
    },
  };
})();
