// Turns texts and numbers of a run into safe, readable nodes: visible control characters, word differences, formatted numbers.
'use strict';

const OV = (window.OV = { views: {}, by: id => document.getElementById(id) });

(() => {
  // Characters that change or hide what a reader sees. Newline and tab stay.
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\u{e0000}-\u{e0fff}]/u;
  const HIDDEN_RUN = new RegExp(`(${HIDDEN.source})\\1*`, 'gu');
  const JOINER_IN_EMOJI = /(?<=\p{Extended_Pictographic}[\ufe0f\u{1f3fb}-\u{1f3ff}]*)\u200d(?=\p{Extended_Pictographic})/gu;
  const SHOWN = 2000; // characters of a text before "Show all"
  const CELLS = 1_500_000; // the largest table of the word comparison

  const chip = (char, count) => {
    const node = document.createElement('span');
    node.className = 'chip';
    node.textContent = 'U+' + char.codePointAt(0).toString(16).toUpperCase().padStart(4, '0') + (count > 1 ? ' × ' + count.toLocaleString('en-US') : '');
    return node;
  };

  // Appends `text` to `parent`; hidden characters become chips.
  OV.put = (parent, text) => {
    if (!HIDDEN.test(text)) { parent.append(document.createTextNode(text)); return; }
    const kept = new Set();
    if (text.includes('\u200d')) for (const m of text.matchAll(JOINER_IN_EMOJI)) kept.add(m.index);
    let from = 0;
    for (const m of text.matchAll(HIDDEN_RUN)) {
      if (kept.has(m.index)) continue;
      if (m.index > from) parent.append(document.createTextNode(text.slice(from, m.index)));
      parent.append(chip(m[1], m[0].length / m[1].length));
      from = m.index + m[0].length;
    }
    if (from < text.length) parent.append(document.createTextNode(text.slice(from)));
  };

  // The same for places that take only a string: titles, labels, options.
  OV.plain = (text, most = 200) => {
    let s = String(text ?? '');
    if (s.length > most) s = cut(s, most) + '…';
    return s.replace(HIDDEN_RUN, (run, char) => `[U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}]`);
  };

  const cut = (s, n) => s.slice(0, n > 0 && s.charCodeAt(n - 1) >= 0xd800 && s.charCodeAt(n - 1) <= 0xdbff ? n - 1 : n);
  OV.cut = cut;

  const CJK = '\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Thai}';
  const SOME_CJK = new RegExp(`[${CJK}]`, 'u');
  const WORDS = /[\p{L}\p{N}\p{M}_'’]+|\s+|[^]/gu;
  const WORDS_CJK = new RegExp(`[${CJK}]|(?:(?![${CJK}])[\\p{L}\\p{N}\\p{M}_'’])+|\\s+|[^]`, 'gu');
  OV.words = text => text.match(SOME_CJK.test(text) ? WORDS_CJK : WORDS) ?? [];

  const blank = word => /^\s/.test(word);

  // Compares two texts word by word: for each, a list of [text, differs]. `exact` is false where the texts are too
  // long for a longest common subsequence; then a word differs if the other text does not have it.
  OV.diff = (left, right) => {
    const a = OV.words(left), b = OV.words(right);
    const ai = [], bi = [];
    a.forEach((w, i) => blank(w) || ai.push(i));
    b.forEach((w, i) => blank(w) || bi.push(i));
    const aDiffers = new Uint8Array(a.length), bDiffers = new Uint8Array(b.length);
    let start = 0, n = ai.length, m = bi.length;
    while (start < n && start < m && a[ai[start]] === b[bi[start]]) start++;
    while (n > start && m > start && a[ai[n - 1]] === b[bi[m - 1]]) { n--; m--; }
    const exact = (n - start) * (m - start) <= CELLS;
    if (exact) common(a, b, ai, bi, start, n, m, aDiffers, bDiffers);
    else {
      const inA = new Set(a), inB = new Set(b);
      for (let i = start; i < n; i++) aDiffers[ai[i]] = inB.has(a[ai[i]]) ? 0 : 1;
      for (let j = start; j < m; j++) bDiffers[bi[j]] = inA.has(b[bi[j]]) ? 0 : 1;
    }
    return { a: runs(a, aDiffers), b: runs(b, bDiffers), exact };
  };

  // Marks the words of a[start..n] and b[start..m] that are outside their longest common subsequence.
  const common = (a, b, ai, bi, start, n, m, aDiffers, bDiffers) => {
    const rows = n - start, columns = m - start, width = columns + 1;
    const ids = new Map();
    const id = w => ids.get(w) ?? (ids.set(w, ids.size), ids.size - 1);
    const x = Uint32Array.from({ length: rows }, (_, i) => id(a[ai[start + i]]));
    const y = Uint32Array.from({ length: columns }, (_, j) => id(b[bi[start + j]]));
    const table = new Uint16Array((rows + 1) * width);
    for (let i = rows - 1; i >= 0; i--) {
      for (let j = columns - 1; j >= 0; j--) {
        const at = i * width + j;
        table[at] = x[i] === y[j] ? table[at + width + 1] + 1 : Math.max(table[at + width], table[at + 1]);
      }
    }
    let i = 0, j = 0;
    while (i < rows && j < columns) {
      if (x[i] === y[j]) { i++; j++; }
      else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) aDiffers[ai[start + i++]] = 1;
      else bDiffers[bi[start + j++]] = 1;
    }
    while (i < rows) aDiffers[ai[start + i++]] = 1;
    while (j < columns) bDiffers[bi[start + j++]] = 1;
  };

  // Joins neighbouring words of a kind; blanks between two differing words differ, too.
  const runs = (words, differs) => {
    const out = [];
    for (let i = 0; i < words.length; i++) {
      const is = blank(words[i]) ? i > 0 && i + 1 < words.length && !!(differs[i - 1] && differs[i + 1]) : !!differs[i];
      if (out.length && out[out.length - 1][1] === is) out[out.length - 1][0].push(words[i]);
      else out.push([[words[i]], is]);
    }
    return out.map(([list, is]) => [list.join(''), is]);
  };

  const RIGHT_TO_LEFT = /^[^\p{L}]*[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

  // A block with a whole text. `parts` is a list of [text, differs] of OV.diff; `mark` is the class of the differing
  // words. Long texts end in a button that shows the rest.
  OV.text = (text, { parts = null, mark = 'differs', most = SHOWN, tag = 'div' } = {}) => {
    const box = document.createElement(tag);
    box.className = 'text';
    box.dir = RIGHT_TO_LEFT.test(cut(String(text ?? ''), 100)) ? 'rtl' : 'ltr';
    if (text == null || text === '') {
      box.classList.add('muted');
      box.textContent = text === '' ? 'empty' : 'none';
      return box;
    }
    const draw = limit => {
      box.replaceChildren();
      let left = limit;
      for (const [piece, differs] of parts ?? [[text, false]]) {
        if (left <= 0) break;
        const shown = piece.length > left ? cut(piece, left) : piece;
        left -= piece.length;
        if (!differs) { OV.put(box, shown); continue; }
        const node = document.createElement('mark');
        node.className = mark;
        OV.put(node, shown);
        box.append(node);
      }
      if (text.length > limit) {
        const more = document.createElement('button');
        more.type = 'button';
        more.className = 'link more';
        more.dataset.more = '';
        more.textContent = `Show all ${OV.count(text.length)} characters`;
        more.addEventListener('click', () => { draw(Infinity); box.tabIndex = -1; box.focus({ preventScroll: true }); });
        box.append('… ', more);
      }
    };
    draw(text.length <= most * 1.2 ? Infinity : most);
    return box;
  };

  // A short text inside a line.
  OV.inline = (text, most = 300) => {
    const node = document.createElement('bdi');
    const s = String(text ?? '');
    OV.put(node, s.length > most ? cut(s, most) + '…' : s);
    return node;
  };

  const whole = new Intl.NumberFormat('en-US', { maximumFractionDigits: 0 });
  const three = new Intl.NumberFormat('en-US', { maximumSignificantDigits: 3 });
  const minus = s => s.replace(/^-/, '\u2212').replace('e-', 'e\u2212');
  OV.count = n => (n == null ? '–' : minus(whole.format(n)));
  OV.number = x => {
    if (x == null || x === '') return '–';
    if (typeof x !== 'number') return OV.plain(x, 40);
    if (!Number.isFinite(x)) return minus(String(x));
    if (Math.abs(x) >= 1e15) return minus(x.toExponential(2));
    if (Number.isInteger(x) || Math.abs(x) >= 100) return minus(whole.format(x));
    if (x !== 0 && Math.abs(x) < 0.001) return minus(x.toPrecision(2));
    return minus(three.format(x));
  };
  OV.signed = x => (x > 0 ? '+' : '') + OV.number(x);
  OV.seconds = s => (s == null ? '' : s < 0.0095 ? '< 0.01 s' : s < 90 ? `${OV.number(s)} s` : s < 5400 ? `${OV.number(s / 60)} min` : `${OV.number(s / 3600)} h`);
  OV.plural = (n, one, many = one + 's') => `${OV.count(n)} ${n === 1 ? one : many}`;
})();
