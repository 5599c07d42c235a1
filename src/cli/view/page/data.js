// Gets data from the server or from a bundle: requests, their errors and their cancellation.
'use strict';

(() => {
  const bundle = window.OVCHAT_BUNDLE ?? null;
  OV.bundle = bundle;
  OV.runs = [];

  OV.address = (path, params) => {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries(params ?? {})) if (value != null && value !== '') query.set(name, value);
    const text = query.toString().replaceAll('+', '%20');
    return text ? `${path}?${text}` : path;
  };

  OV.get = async (path, params, signal) => {
    if (bundle) return fromBundle(path, params ?? {});
    let response;
    try {
      response = await fetch(OV.address(path, params), { signal, cache: 'no-store' });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      const silent = new Error('The server does not answer. Check that `pipeline view` is still running.');
      silent.offline = true;
      throw silent;
    }
    let body = null;
    try {
      body = await response.json();
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new Error(`${path}: the server's reply is not JSON (status ${response.status}).`);
    }
    if (!response.ok) throw new Error(body?.error ?? `${path}: status ${response.status}`);
    return body;
  };

  // A line of requests of which only the newest counts: `run(work)` aborts the one before. Results of superseded
  // requests are never seen: `work` rejects with AbortError, which `run` turns into undefined.
  OV.line = () => {
    let current = null;
    const stop = () => { current?.abort(); current = null; };
    return {
      stop,
      run: async work => {
        stop();
        const mine = (current = new AbortController());
        try {
          const result = await work(mine.signal);
          return mine.signal.aborted ? undefined : result;
        } catch (error) {
          if (mine.signal.aborted || error.name === 'AbortError') return undefined;
          throw error;
        } finally {
          if (current === mine) current = null;
        }
      },
    };
  };

  const fromBundle = async (path, params) => {
    if (path === 'api/pairs') return pairsOfBundle(params);
    const plain = Object.entries(params).filter(([, v]) => v != null && v !== '').map(([k, v]) => `${k}=${v}`).join('&');
    const found = bundle.get[OV.address(path, params)] ?? bundle.get[plain ? `${path}?${plain}` : path];
    if (found === undefined) {
      const missing = new Error(path === 'api/prompt' ? 'The bundle does not have this prompt.' : 'The bundle does not have this.');
      missing.missing = true;
      throw missing;
    }
    return found;
  };

  const SORT = {
    margin: p => p.margin, chosen_reward: p => p.chosen_reward, rejected_reward: p => p.rejected_reward,
    chosen_tokens: p => p.chosen_tokens, rejected_tokens: p => p.rejected_tokens, question: p => p.question,
    length_difference: p => (p.chosen_tokens == null || p.rejected_tokens == null ? null : p.chosen_tokens - p.rejected_tokens),
  };

  const pairsOfBundle = ({ run, table, round, text, sort, desc, offset, limit }) => {
    let rows = (bundle.get[`api/pairs?run=${run}&table=${table}`] ?? bundle.get[`api/pairs?run=${run}`])?.rows ?? [];
    rows = rows.filter(p => p.table == null || !table || p.table === table);
    if (round != null && round !== '') rows = rows.filter(p => String(p.round) === String(round));
    const words = (text ?? '').toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length) {
      rows = rows.filter(p => {
        const all = [p.question, p.chosen, p.rejected, p.answer].join('\n').toLowerCase();
        return words.every(w => all.includes(w));
      });
    }
    const by = SORT[sort], way = desc === 1 || desc === '1' ? -1 : 1;
    if (by) {
      rows = rows.map((p, i) => [by(p), i, p]).sort(([x, i], [y, j]) => {
        if (x == null || y == null) return (x == null) - (y == null) || i - j;
        return (x < y ? -way : x > y ? way : 0) || i - j;
      }).map(r => r[2]);
    } else if (way < 0) rows = [...rows].reverse();
    return { total: rows.length, offset, rows: rows.slice(offset, offset + limit), seconds: null, sql: null };
  };
})();
