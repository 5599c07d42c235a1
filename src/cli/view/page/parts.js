// Builds the pieces that several views share: elements, tables, pictures, facts, messages and dialogs.
'use strict';

(() => {
  // el('p', {class: 'x', onclick: f, data: {key: 1}}, child, …); strings become text nodes with visible hidden characters.
  OV.el = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value == null || value === false) continue;
      if (name === 'class') node.className = value;
      else if (name === 'data') Object.assign(node.dataset, value);
      else if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? '' : value);
    }
    OV.add(node, children);
    return node;
  };
  OV.add = (node, children) => {
    for (const child of children.flat(Infinity)) {
      if (child == null || child === false) continue;
      if (child instanceof Node) node.append(child);
      else OV.put(node, String(child));
    }
    return node;
  };
  const el = OV.el;

  OV.say = text => {
    const live = OV.by('live');
    live.textContent = '';
    setTimeout(() => { live.textContent = text; }, 50);
  };

  OV.store = {
    get: name => { try { return localStorage.getItem('ovchat.' + name); } catch { return null; } },
    set: (name, value) => { try { localStorage.setItem('ovchat.' + name, value); } catch { /* private mode: not kept */ } },
  };

  OV.later = (ms, work) => {
    let timer = 0;
    return (...args) => { clearTimeout(timer); timer = setTimeout(() => work(...args), ms); };
  };

  // A sentence of the program, in which `names` stand between backticks.
  OV.prose = text => String(text).split('`').map((piece, i) => (i % 2 ? el('code', null, piece) : OV.inline(piece, 2000)));
  OV.failure = error => el('div', { class: 'failure', role: 'alert', data: { error: '' } }, OV.text(error.message || String(error), { tag: 'pre' }));
  OV.waiting = (text = 'Loading…') => el('p', { class: 'waiting muted', data: { waiting: '' } }, text);
  OV.empty = (...text) => el('p', { class: 'empty muted', data: { empty: '' } }, ...text);

  // [[name, value]…] as a list on one line; values may be nodes. Empty values are left out.
  OV.facts = (pairs, attributes) => el('dl', { class: 'facts', ...attributes }, pairs.filter(p => p && p[1] != null && p[1] !== '').map(([name, value, key]) =>
    el('div', { data: key ? { fact: key } : null }, el('dt', null, name), el('dd', null, value))));

  OV.muted = (...text) => el('span', { class: 'muted' }, ...text);

  // Attributes of fields for code and ids.
  OV.raw = { type: 'text', class: 'code', autocomplete: 'off', autocapitalize: 'off', spellcheck: 'false' };

  OV.details = (title, ...content) => el('details', null, el('summary', null, title), ...content);

  OV.select = (id, label, options, value, onchange) => {
    const select = el('select', { id, onchange: () => onchange(select.value) }, options.map(([v, text]) => el('option', { value: v }, OV.plain(text, 60))));
    select.value = value;
    return el('label', { class: 'field' }, el('span', null, label), ' ', select);
  };

  // A table inside a region that scrolls sideways. Columns are names or {name, number}; cells are values or nodes.
  OV.table = (caption, columns, rows, { id, seen = false, head = false } = {}) => {
    const names = columns.map(c => (typeof c === 'string' ? { name: c } : c));
    const cell = (value, i) => {
      const number = names[i].number || typeof value === 'number';
      const node = el(head && i === 0 ? 'th' : 'td', { class: number ? 'number' : null, scope: head && i === 0 ? 'row' : null });
      if (value instanceof Node || Array.isArray(value)) OV.add(node, [value]);
      else if (value == null) OV.add(node, [OV.muted('–')]);
      else OV.put(node, typeof value === 'number' ? OV.number(value) : String(value));
      return node;
    };
    return el('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': OV.plain(caption, 100) },
      el('table', { id },
        el('caption', { class: seen ? null : 'unseen' }, caption),
        el('thead', null, el('tr', null, names.map(c => el('th', { scope: 'col', class: c.number ? 'number' : null, title: c.title }, c.name)))),
        el('tbody', null, rows.map(row => el('tr', null, row.map(cell))))));
  };

  OV.runName = run => OV.plain(OV.runs[run]?.name ?? `run ${run}`, 60);
  OV.sqlLink = (run, sql, text = 'Open in SQL') => (OV.bundle || !sql ? null : el('a', { href: OV.hash('sql', { run, q: sql }), data: { sqlLink: '' } }, text));
  OV.promptHref = (run, id) => OV.hash('prompt', { run, id });
  OV.tableLink = (run, name) => (OV.bundle ? el('code', null, name) : el('a', { href: OV.hash('sql', { run, q: `select * from ${quoted(name)} limit 100` }) }, el('code', null, name)));
  const quoted = name => (/^[a-z_][a-z0-9_]*$/.test(name) ? name : `"${String(name).replaceAll('"', '""')}"`);

  const IMAGE = /^[0-9a-f]{64}$/;
  OV.isImage = id => typeof id === 'string' && IMAGE.test(id);
  const thumb = (run, id) => {
    const img = el('img', { src: `thumb/${run}/${encodeURIComponent(id)}`, alt: '', loading: 'lazy', decoding: 'async' });
    img.addEventListener('error', () => img.replaceWith(el('span', { class: 'lost' }, 'no image')), { once: true });
    return img;
  };

  // One button that shows the pictures of a prompt: its images, and up to six frames of each video.
  OV.pictures = (run, images, videos, { small = false } = {}) => {
    images = images ?? []; videos = videos ?? [];
    const list = images.map((id, i) => ({ id, title: images.length > 1 ? `Image ${i + 1} of ${images.length}` : 'Image' }));
    videos.forEach((frames, v) => frames.forEach((id, f) => list.push({ id, title: `${videos.length > 1 ? `Video ${v + 1}, f` : 'F'}rame ${f + 1} of ${frames.length}` })));
    if (!list.length) return null;
    const what = [images.length && OV.plural(images.length, 'image'), ...videos.map(f => `a video of ${OV.plural(f.length, 'frame')}`)].filter(Boolean).join(', ');
    const most = small ? 1 : 6;
    const strip = videos.map(frames => {
      const n = Math.min(most, frames.length);
      const picked = Array.from({ length: n }, (_, i) => (n > 1 ? Math.round((i * (frames.length - 1)) / (n - 1)) : 0));
      return el('span', { class: 'strip' }, picked.map(i => thumb(run, frames[i])), !small && el('span', { class: 'strip-note' }, n < frames.length ? `${n} of ${frames.length} frames` : OV.plural(frames.length, 'frame')));
    });
    const shown = small && images.length ? images.slice(0, 1) : images.slice(0, 8);
    const button = el('button', { type: 'button', class: `pictures${small ? ' small' : ''}${shown.length > 1 ? ' many' : ''}`, data: { pictures: '' } },
      el('span', { class: 'unseen' }, `Show ${what === '1 image' ? 'the image' : what} in full size. `), shown.map(id => thumb(run, id)), small && images.length ? null : strip, images.length > shown.length && !small ? el('span', { class: 'strip-note' }, `${shown.length} of ${images.length} images`) : null);
    button.addEventListener('click', () => OV.showImages(run, list));
    return button;
  };

  // The dialog with an image in full size.
  const by = OV.by;
  let shownList = [], shownAt = 0, shownRun = 0;
  const showOne = at => {
    shownAt = (at + shownList.length) % shownList.length;
    const { id, title } = shownList[shownAt], img = by('image-full'), src = `image/${shownRun}/${encodeURIComponent(id)}`;
    img.classList.remove('tiny');
    img.alt = title;
    img.src = src;
    by('image-title').textContent = title;
    by('image-facts').textContent = OV.plain(id, 16);
    by('image-open').href = src;
    by('image-previous').hidden = by('image-next').hidden = shownList.length < 2;
  };
  OV.showImages = (run, list, at = 0) => {
    shownList = list; shownRun = run;
    showOne(at);
    by('image-dialog').showModal();
    by('image-close').focus();
  };
  OV.setUpDialogs = () => {
    by('image-full').addEventListener('load', () => {
      const img = by('image-full');
      img.classList.toggle('tiny', img.naturalWidth < 480 && img.naturalHeight < 480);
      by('image-facts').textContent = `${img.naturalWidth} × ${img.naturalHeight} pixels, ${OV.plain(shownList[shownAt].id, 16)}`;
    });
    by('image-full').addEventListener('error', () => { by('image-facts').textContent = 'The image cannot be loaded.'; });
    by('image-previous').addEventListener('click', () => showOne(shownAt - 1));
    by('image-next').addEventListener('click', () => showOne(shownAt + 1));
    by('image-close').addEventListener('click', () => by('image-dialog').close());
    by('image-dialog').addEventListener('keydown', event => {
      if (event.key === 'ArrowLeft') showOne(shownAt - 1);
      else if (event.key === 'ArrowRight') showOne(shownAt + 1);
      else if (event.key === 'i') by('image-dialog').close();
    });
    for (const id of ['image-dialog', 'keys-dialog']) by(id).addEventListener('click', event => { if (event.target === by(id)) by(id).close(); });
    by('keys-close').addEventListener('click', () => by('keys-dialog').close());
  };

  // System prompt, earlier turns, captions and kept columns of a prompt or pair.
  OV.context = p => el('div', { class: 'context' },
    p.system && OV.details('System prompt', OV.text(p.system)),
    p.turns?.length ? OV.details(OV.plural(p.turns.length, 'earlier turn'), p.turns.map(t => el('div', { class: 'turn' }, OV.muted(t.role), OV.text(t.text)))) : null,
    p.captions?.length ? OV.details(OV.plural(p.captions.length, 'caption'), el('ul', null, p.captions.map(c => el('li', null, OV.text(c))))) : null);
  OV.kept = kept => Object.entries(kept ?? {}).filter(([, v]) => v != null).map(([name, value]) => [OV.plain(name, 40), OV.inline(typeof value === 'string' ? value : JSON.stringify(value), 120)]);
})();
