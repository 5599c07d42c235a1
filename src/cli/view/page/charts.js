// Draws charts as SVG: lines, bars, histograms and scatter plots, each with a caption, a legend, a readout and its table.
'use strict';

(() => {
  const el = OV.el;
  const NS = 'http://www.w3.org/2000/svg';
  const STYLES = 7;
  const DASHES = ['', '7 4', '2 3', '10 3 2 3', '5 2', '1 4', '12 4'];
  const svg = (tag, attributes, ...children) => {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes ?? {})) if (value != null) node.setAttribute(name, value);
    for (const child of children.flat(Infinity)) if (child != null) node.append(child);
    return node;
  };
  let patterns = 0;

  const MARKS = [
    r => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
    r => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
    r => `M0,${-1.3 * r}L${1.2 * r},${r}H${-1.2 * r}z`,
    r => `M0,${-1.4 * r}L${1.4 * r},0L0,${1.4 * r}L${-1.4 * r},0z`,
    r => `M0,${1.3 * r}L${1.2 * r},${-r}H${-1.2 * r}z`,
    r => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`,
    r => `M${-1.2 * r},0H${1.2 * r}M0,${-1.2 * r}V${1.2 * r}`,
  ];
  const marker = (i, x, y, r = 3.5) => svg('path', { d: MARKS[i % MARKS.length](r), transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, class: `mark c${i % STYLES}` });

  const ticks = (low, high, about) => {
    const span = high - low || 1, rough = span / Math.max(1, about), power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find(m => m * power >= rough * 0.999) * power;
    const out = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9 && out.length < 50; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : Number(v.toPrecision(12)));
    return out;
  };
  const value = v => (v == null || v === '' ? null : Number.isFinite(Number(v)) ? Number(v) : null);

  // Turns the rows of a chart into series: [{label, color, dash, marker, points: [{x, y}]}].
  const seriesOf = (spec, sets) => {
    const several = sets.length > 1, out = [];
    sets.forEach((set, run) => {
      const index = name => set.data.columns.indexOf(name);
      const x = index(spec.x), by = spec.series ? index(spec.series) : -1;
      let own = [];
      const categories = spec.kind === 'bars';
      const point = (row, y) => ({ x: categories ? String(row[x] ?? '–') : value(row[x]), y: value(row[y]) });
      if (by >= 0) {
        const groups = new Map();
        for (const row of set.data.rows) {
          const key = row[by];
          if (!groups.has(key)) groups.set(key, []);
          groups.get(key).push(point(row, index(spec.y[0])));
        }
        const keys = [...groups.keys()].sort((a, b) => (typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b), 'en', { numeric: true })));
        own = keys.map(k => ({ label: `${typeof k === 'number' ? `${spec.series} ` : ''}${OV.plain(k ?? '–', 60)}`, points: groups.get(k) }));
      } else own = spec.y.filter(y => index(y) >= 0).map(y => ({ label: OV.plain(y, 60), points: set.data.rows.map(row => point(row, index(y))) }));
      own.forEach((s, i) => {
        s.points = s.points.filter(p => p.x != null && p.y != null);
        s.color = s.dash = several ? run : i;
        s.marker = i;
        if (several) s.label = own.length > 1 ? `${set.name}: ${s.label}` : set.name;
      });
      out.push(...own);
    });
    if (spec.kind === 'lines') out.forEach(s => s.points.sort((a, b) => a.x - b.x));
    return out;
  };

  const extent = (list, zero) => {
    let low = Infinity, high = -Infinity;
    for (const v of list) { if (v < low) low = v; if (v > high) high = v; }
    if (!Number.isFinite(low)) return [0, 1];
    if (zero) { low = Math.min(0, low); high = Math.max(0, high); }
    if (low === high) { const by = Math.abs(low) * 0.1 || 1; return zero ? [Math.min(0, low), high || 1] : [low - by, high + by]; }
    return [low, high];
  };

  // Draws one panel into `box` and returns its points: [{px, py, text}].
  const draw = (box, spec, series, label) => {
    const width = Math.max(240, Math.floor(box.clientWidth)), height = Math.round(Math.min(300, Math.max(190, width * 0.5)));
    const bars = spec.kind === 'bars', histogram = spec.kind === 'histogram';
    const all = series.flatMap(s => s.points);
    let [y0, y1] = extent(all.map(p => p.y), bars || histogram);
    const pad = (y1 - y0) * 0.06;
    if (!(bars || histogram) || y0 < 0) y0 -= pad;
    y1 += pad;
    const yTicks = ticks(y0, y1, height / 50);
    const names = yTicks.map(t => OV.number(t));
    const left = 14 + 7 * Math.max(2, ...names.map(n => n.length)), right = 12, top = 14, bottom = 40;
    const plotW = width - left - right, plotH = height - top - bottom;
    const Y = v => top + plotH - ((v - y0) / (y1 - y0)) * plotH;
    const root = svg('svg', { width, height, viewBox: `0 0 ${width} ${height}`, class: 'chart', role: 'img', tabindex: '0', 'aria-label': label });
    const grid = svg('g', { class: 'grid' }), body = svg('g'), axis = svg('g', { class: 'axis' });
    yTicks.forEach((t, i) => {
      grid.append(svg('line', { x1: left, x2: width - right, y1: Y(t), y2: Y(t), class: t === 0 ? 'zero' : null }));
      axis.append(svg('text', { x: left - 6, y: Y(t) + 4, 'text-anchor': 'end' }, names[i]));
    });
    const yName = spec.unit ?? (spec.y.length === 1 ? spec.y[0] : '');
    const points = [];
    const add = (s, p, px, py, x = OV.number(p.x)) => points.push({ px, py, text: `${OV.plain(spec.x, 30)} ${x}, ${s.label}: ${OV.number(p.y)}` });
    if (bars) drawBars();
    else drawNumeric();
    axis.append(svg('text', { x: left + plotW / 2, y: height - 6, 'text-anchor': 'middle', class: 'name' }, OV.plain(spec.x, 40)));
    if (yName) axis.append(svg('text', { x: 4, y: 10, class: 'name' }, OV.plain(yName, 40)));
    const cursor = svg('circle', { r: 6, class: 'cursor', visibility: 'hidden' });
    root.append(grid, body, axis, cursor);
    box.replaceChildren(root);
    return { root, points, cursor };

    function drawNumeric() {
      const xs = all.map(p => p.x);
      let [x0, x1] = extent(xs, false), bin = 0;
      if (histogram) {
        const sorted = [...new Set(xs)].sort((a, b) => a - b);
        bin = sorted.length > 1 ? Math.min(...sorted.slice(1).map((v, i) => v - sorted[i])) : 1;
        if (sorted.length) { x0 = sorted[0]; x1 = sorted[sorted.length - 1] + bin; }
      } else if (spec.kind === 'scatter') { const by = (x1 - x0) * 0.03; x0 -= by; x1 += by; }
      const X = v => left + ((v - x0) / (x1 - x0)) * plotW;
      const integers = xs.length && xs.every(Number.isInteger) && x1 - x0 <= 12 && !histogram && spec.kind !== 'scatter';
      const xTicks = integers ? [...new Set(xs)].sort((a, b) => a - b) : ticks(x0, x1, plotW / 70);
      for (const t of xTicks) axis.append(svg('text', { x: X(t), y: top + plotH + 17, 'text-anchor': 'middle' }, OV.number(t)), svg('line', { x1: X(t), x2: X(t), y1: top + plotH, y2: top + plotH + 4 }));
      for (const s of series) {
        const c = `c${s.color % STYLES}`, dash = DASHES[s.dash % DASHES.length];
        if (histogram) {
          const sorted = [...s.points].sort((a, b) => a.x - b.x);
          let d = '', end = null;
          for (const p of sorted) {
            if (end === null || Math.abs(p.x - end) > bin * 1e-6) d += `${end === null ? '' : `V${Y(0)}`}M${X(p.x)},${Y(0)}`;
            d += `V${Y(p.y)}H${X(p.x + bin)}`;
            end = p.x + bin;
            add(s, p, X(p.x + bin / 2), Y(p.y), `${OV.number(p.x)} to ${OV.number(p.x + bin)}`);
          }
          if (sorted.length) body.append(svg('path', { d: `${d}V${Y(0)}`, class: `step ${c}`, 'stroke-dasharray': dash || null }));
        } else if (spec.kind === 'scatter') {
          for (const p of s.points) { body.append(marker(s.marker, X(p.x), Y(p.y), 2.8)); add(s, p, X(p.x), Y(p.y)); }
        } else {
          body.append(svg('path', { d: s.points.map((p, i) => `${i ? 'L' : 'M'}${X(p.x).toFixed(1)},${Y(p.y).toFixed(1)}`).join(''), class: `line ${c}${s.points.length > 60 ? ' thin' : ''}`, 'stroke-dasharray': dash || null }));
          const sparse = s.points.length <= 40;
          s.points.forEach(p => {
            if (sparse) { const m = marker(s.marker, X(p.x), Y(p.y)); m.setAttribute('class', `mark ${c}`); body.append(m); }
            add(s, p, X(p.x), Y(p.y));
          });
        }
      }
      points.sort((a, b) => a.px - b.px);
    }

    function drawBars() {
      const categories = [...new Set(all.map(p => p.x))], band = plotW / Math.max(1, categories.length);
      const inner = Math.min(band * 0.8, 60 * series.length), each = inner / series.length;
      const defs = svg('defs');
      body.append(defs);
      series.forEach((s, i) => {
        const id = `hatch${patterns++}`, c = `c${s.color % STYLES}`;
        if (i) defs.append(svg('pattern', { id, width: 6, height: 6, patternUnits: 'userSpaceOnUse', patternTransform: `rotate(${[0, 45, 135, 90, 0, 60, 120][i % 7]})` }, svg('rect', { width: 6, height: 6, class: `fill ${c} soft` }), svg('rect', { width: 3, height: 6, class: `fill ${c}` })));
        for (const p of s.points) {
          const x = left + categories.indexOf(p.x) * band + (band - inner) / 2 + i * each;
          const y = Math.min(Y(0), Y(p.y)), h = Math.abs(Y(p.y) - Y(0));
          const rect = svg('rect', { x, y, width: Math.max(1, each - 2), height: Math.max(0.5, h), class: `bar ${c}` }, svg('title', null, `${OV.plain(p.x, 60)}, ${s.label}: ${OV.number(p.y)}`));
          if (i) rect.setAttribute('fill', `url(#${id})`);
          else rect.classList.add('fill');
          body.append(rect);
          add(s, p, x + each / 2, Y(p.y), OV.plain(p.x, 60));
        }
      });
      const every = Math.ceil(categories.length / Math.max(1, plotW / 60)), room = Math.max(3, Math.floor((band * every) / 7));
      categories.forEach((name, i) => {
        if (i % every) return;
        const text = OV.plain(name, 100);
        axis.append(svg('text', { x: left + (i + 0.5) * band, y: top + plotH + 17, 'text-anchor': 'middle' }, text.length > room ? `${OV.cut(text, room - 1)}…` : text, svg('title', null, text)));
      });
    }
  };

  // Hover and arrow keys read the points.
  const readable = (box, drawn, tip) => {
    const { root, points, cursor } = drawn;
    let at = -1;
    const show = i => {
      at = i;
      const p = points[i];
      cursor.setAttribute('visibility', p ? 'visible' : 'hidden');
      tip.hidden = !p;
      if (!p) return;
      cursor.setAttribute('cx', p.px);
      cursor.setAttribute('cy', p.py);
      tip.textContent = p.text;
      const w = tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(box.clientWidth - w, p.px - w / 2))}px`;
      tip.style.top = `${p.py < 60 ? p.py + 14 : p.py - 34}px`;
    };
    root.addEventListener('pointermove', event => {
      const r = root.getBoundingClientRect(), x = event.clientX - r.left, y = event.clientY - r.top;
      let best = -1, near = 45 * 45;
      points.forEach((p, i) => { const d = (p.px - x) ** 2 + (p.py - y) ** 2; if (d < near) { near = d; best = i; } });
      show(best);
    });
    root.addEventListener('pointerleave', () => show(-1));
    root.addEventListener('blur', () => show(-1));
    root.addEventListener('keydown', event => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!points.length || (!by && !['Home', 'End'].includes(event.key))) return;
      event.preventDefault();
      show(event.key === 'Home' ? 0 : event.key === 'End' ? points.length - 1 : Math.max(0, Math.min(points.length - 1, at + by)));
      OV.say(points[at].text);
    });
  };

  const legend = series => el('ul', { class: 'legend' }, series.map((s, i) => {
    const key = svg('svg', { width: 30, height: 12, 'aria-hidden': 'true' });
    if (s.kind === 'bars') {
      key.append(svg('rect', { x: 6, y: 1, width: 18, height: 10, class: `bar fill c${s.color % STYLES}${i ? ' soft' : ''}` }));
      if (i) key.append(svg('path', { d: 'M10,1v10M15,1v10M20,1v10', class: `line c${s.color % STYLES}` }));
    } else {
      if (s.kind !== 'scatter') key.append(svg('line', { x1: 1, x2: 29, y1: 6, y2: 6, class: `line c${s.color % STYLES}`, 'stroke-dasharray': DASHES[s.dash % DASHES.length] || null }));
      if (s.kind !== 'histogram') { const m = marker(s.marker, 15, 6); m.setAttribute('class', `mark c${s.color % STYLES}`); key.append(m); }
    }
    return el('li', null, key, s.label);
  }));

  // A figure: caption, panels, legend, "show as table", "open in SQL". `sets` is [{run, name, data}].
  OV.chartFigure = (spec, sets, { level = 'h3', small = false } = {}) => {
    const together = spec.kind === 'lines';
    const panels = el('div', { class: 'panels' }), key = el('div'), tables = el('div', { hidden: true });
    const isTable = spec.kind === 'table';
    const toggle = isTable ? null : el('button', { type: 'button', class: 'link', 'aria-pressed': 'false', data: { showTable: '' } }, 'Show as table');
    const links = spec.sql && !OV.bundle ? el('span', null, sets.length > 1 ? sets.map((s, i) => [i ? ', ' : 'Open in SQL: ', OV.sqlLink(s.run, spec.sql, s.name)]) : OV.sqlLink(sets[0].run, spec.sql)) : null;
    const tools = el('span', { class: 'chart-tools' }, toggle, links);
    const figure = el('figure', { class: `chart-figure${small ? ' small' : ''}`, data: { chart: spec.id, kind: spec.kind } },
      el('figcaption', null, el(level, null, spec.title), ' ', tools, spec.help ? el('p', { class: 'muted' }, OV.prose(spec.help)) : null), panels, key, tables);
    const fillTables = () => tables.replaceChildren(...sets.map(s => OV.table(sets.length > 1 ? s.name : spec.title, s.data.columns, s.data.rows.slice(0, 2000), { seen: sets.length > 1 })));
    if (isTable) { fillTables(); tables.hidden = false; tables.className = 'panels'; return figure; }
    toggle.addEventListener('click', () => {
      const on = toggle.getAttribute('aria-pressed') !== 'true';
      toggle.setAttribute('aria-pressed', String(on));
      toggle.textContent = on ? 'Show as chart' : 'Show as table';
      if (on) fillTables();
      tables.hidden = !on;
      panels.hidden = key.hidden = on;
      if (!on) paint();
    });
    const groups = together ? [{ name: null, series: seriesOf(spec, sets) }] : sets.map(s => ({ name: sets.length > 1 ? s.name : null, series: seriesOf(spec, [s]) }));
    const boxes = groups.map(g => {
      const box = el('div', { class: 'plot' }), tip = el('div', { class: 'tip', hidden: true, 'aria-hidden': 'true' });
      panels.append(el('div', { class: 'panel' }, g.name && el('p', { class: 'panel-name' }, g.name), el('div', { class: 'plot-box' }, box, tip)));
      return { box, tip, g, width: 0 };
    });
    const some = groups.flatMap(g => g.series);
    const paint = () => {
      for (const b of boxes) {
        if (!b.box.clientWidth || b.width === b.box.clientWidth) continue;
        b.width = b.box.clientWidth;
        if (!b.g.series.some(s => s.points.length)) { b.box.replaceChildren(OV.empty('No data yet.')); continue; }
        const n = b.g.series.reduce((sum, s) => sum + s.points.length, 0);
        readable(b.box, draw(b.box, spec, b.g.series, `${OV.plain(spec.title, 120)}${b.g.name ? `, ${b.g.name}` : ''}. ${OV.plural(n, 'point')} in ${OV.plural(b.g.series.length, 'series', 'series')}. Arrow keys read the points.`), b.tip);
      }
    };
    const shown = together || groups.length === 1 ? some : groups.reduce((a, g) => (g.series.length > a.length ? g.series : a), []);
    if (shown.length > 1) key.append(legend(shown.map(s => ({ ...s, kind: spec.kind }))));
    new ResizeObserver(() => requestAnimationFrame(paint)).observe(panels);
    return figure;
  };
})();
