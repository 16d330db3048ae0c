export default { render({ model, el: host }) {
  const ui = frame(host, 'Loss explorer'), root = ui.root;
  const pairs = (model.get('pairs') || []).map(([w, l, pw, pl, nw, nl]) => ({ w, l, pw, pl, nw, nl }));
  const base = pairs.length ? { w: 0, l: 0, pw: mean(pairs.map(p => p.pw - p.w)), pl: mean(pairs.map(p => p.pl - p.l)), nw: mean(pairs.map(p => p.nw)), nl: mean(pairs.map(p => p.nl)) }
    : { w: 0, l: 0, pw: -40, pl: -40, nw: 20, nl: 20 };
  const z = zeroPoints(pairs), used = model.get('used_beta');

  const beta = el('input', { type: 'range', min: -3, max: 1, step: .01, value: Math.log10(model.get('beta')), 'aria-label': 'beta, logarithmic from 0.001 to 10', style: 'width:min(300px,60vw)' });
  const eps = el('input', { type: 'range', min: 0, max: .49, step: .01, value: model.get('label_smoothing'), 'aria-label': 'label smoothing, chance that a label is flipped' });
  const betaText = el('b', { class: 'num' }), epsText = el('span', { class: 'num' });
  const boxes = el('div', { class: 'row', role: 'group', 'aria-label': 'Losses to draw', style: 'gap:2px 12px;font-size:12px' });
  for (const name of model.get('losses')) {
    const box = el('input', { type: 'checkbox', checked: model.get('selected').includes(name) });
    box.onchange = () => { const now = model.get('selected').filter(n => n !== name); model.set('selected', box.checked ? [...now, name] : now); model.save_changes(); };
    boxes.append(el('label', { title: model.get('formulas')[name] || '' }, box, name));
  }
  root.append(el('div', { class: 'row' }, el('h4', {}, 'Loss explorer'), el('label', {}, 'beta', beta, betaText), el('label', {}, 'smoothing', eps, epsText)), boxes);
  const grid = el('div', { class: 'plots', style: 'grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr))' });
  root.append(grid);
  const group = { plots: [], range: null };
  const curve = new Plot(grid, ui, { title: 'loss of a pair', xlabel: 'delta, nats', height: 210, group });
  const slope = new Plot(grid, ui, { title: 'slope: d loss / d delta', xlabel: 'delta, nats', height: 210, group });
  const teach = pairs.length ? new Plot(grid, ui, { title: 'what these pairs still teach, at any beta', xlabel: 'beta', logx: true, height: 210, toggle: false }) : null;
  const rewards = pairs.length ? new Plot(grid, ui, { title: 'rewards of these pairs at this beta', xlabel: 'reward', height: 210, toggle: false }) : null;
  const table = el('div', { 'aria-live': 'polite', style: 'overflow-x:auto' });
  const note = el('div', { class: 'dim', style: 'font-size:11.5px' });
  const code = codeLine();
  root.append(table, note, code.node);
  if (teach) teach.onPick = null;

  const color = name => model.get('losses').indexOf(name);
  function draw() {
    const b = model.get('beta'), e = model.get('label_smoothing'), chosen = model.get('selected').filter(n => LOSS[n]);
    betaText.textContent = short(b); epsText.textContent = e.toFixed(2);
    beta.value = Math.log10(b); beta.setAttribute('aria-valuetext', `beta ${short(b)}`); eps.value = e;
    const deltas = pairs.map(p => p.w - p.l), reach = Math.max(6, ...deltas.map(Math.abs)) * 1.15, xs = Array.from({ length: 241 }, (_, i) => -reach + 2 * reach * i / 240);
    const at = (f, d) => f(moved(base, d), b, e, z), h = 1e-4;
    curve.yMax = undefined;
    const lines = chosen.map((name, i) => ({ name, color: i, x: xs, y: xs.map(d => at(LOSS[name], d)) }));
    const slopes = chosen.map((name, i) => ({ name, color: i, x: xs, y: xs.map(d => (at(LOSS[name], d + h) - at(LOSS[name], d - h)) / (2 * h)) }));
    const shown = pairs.length > 600 ? pairs.filter((_, i) => i % Math.ceil(pairs.length / 600) === 0) : pairs;
    const dots = chosen.flatMap((name, i) => shown.map(p => ({ x: p.w - p.l, y: LOSS[name](p, b, e, z), color: i })));
    const weights = chosen.flatMap((name, i) => shown.map(p => { const f = LOSS[name]; return { x: p.w - p.l, y: (f(moved(p, h), b, e, z) - f(moved(p, -h), b, e, z)) / (2 * h), color: i }; }));
    // a quadratic loss beside a logistic one would flatten it: the axis follows the lower three quarters of what is drawn
    const all = lines.flatMap(s => s.y).filter(isFinite).sort((a, c) => a - c);
    if (chosen.length > 1 && all.length && all.at(-1) > 8 * all[Math.floor(all.length * .75)]) curve.yMax = all[Math.floor(all.length * .75)] * 2;
    curve.set(lines, [{ x: 0, text: 'reference' }], dots);
    slope.set(slopes, [{ x: 0 }], weights);
    const head = ['loss', 'mean loss', 'weight', 'saturated', 'effective pairs', 'chosen reward', 'rejected reward', 'margin'];
    if (pairs.length) {
      const rows = chosen.map(name => { const c = counterfactual(name, pairs, b, e); return [name, short(c.loss), short(c.weight), (100 * c.saturated).toFixed(1) + ' %', `${c.effective_pairs.toFixed(1)} of ${pairs.length}`, short(c.chosen_reward), short(c.rejected_reward), short(c.margin)]; });
      table.replaceChildren(el('table', {}, el('caption', { class: 'sr' }, `Counterfactual beta ${short(b)}`), el('tr', {}, ...head.map(t => el('th', { scope: 'col' }, t))), ...rows.map(r => el('tr', {}, ...r.map(t => el('td', {}, t))))));
      const shownLoss = chosen[0] || 'sigmoid', bs = Array.from({ length: 41 }, (_, i) => 10 ** (-3 + i / 10)), cs = bs.map(v => counterfactual(shownLoss, pairs, v, e));
      teach.set([{ name: `${shownLoss}: effective share`, color: 0, x: bs, y: cs.map(c => c.effective_pairs / pairs.length) }, { name: 'saturated', color: 1, x: bs, y: cs.map(c => c.saturated) }],
        [{ x: b, text: 'now' }, ...(used ? [{ x: used, text: 'run', color: 2, row: 1 }] : [])]);
      const rw = pairs.map(p => b * p.w), rl = pairs.map(p => b * p.l), both = [...rw, ...rl], lo = Math.min(...both), hi = Math.max(...both) + 1e-9, n = 28, step = (hi - lo) / n;
      const count = v => { const c = Array(n).fill(0); v.forEach(x => c[Math.min(n - 1, Math.floor((x - lo) / step))]++); return c; };
      const steps = c => ({ x: c.flatMap((_, i) => [lo + i * step, lo + (i + 1) * step]), y: c.flatMap(v => [v, v]) });
      const area = (name, c, k) => { const s = steps(c); return { name, color: k, ...s, lo: s.y.map(() => 0), hi: s.y }; };
      rewards.set([area('chosen', count(rw), 0), area('rejected', count(rl), 1)], [{ x: 0 }]);
      note.textContent = `${pairs.length} pairs${used ? `, trained with beta ${short(used)}` : ''}. The weights, not the model, are what another beta would change: these numbers are exact for the policy as it is. Curves are of a pair as long as the mean one, its two sides moved apart by delta, half each; dots are the pairs themselves${shown.length < pairs.length ? ` (${shown.length} of them drawn)` : ''}.`;
    } else note.textContent = `Curves are of a pair of ${base.nw} and ${base.nl} tokens, its two sides moved apart by delta, half each.`;
    const first = chosen[0] || 'sigmoid', takes = ['sigmoid', 'cdpo', 'robust', 'exo_pair'].includes(first) && (e || first !== 'sigmoid');
    const words = takes ? `${first}(label_smoothing=${+Math.max(e, first === 'exo_pair' ? .001 : 0).toFixed(3)})` : first, bt = +b.toPrecision(3);
    code.set(pairs.length ? `counterfactual(${model.get('source')}, beta=${bt}, loss='${words}')` : `get_loss('${words}')(logps, beta=${bt})`);
  }
  let waiting = false;
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } };
  beta.oninput = () => { model.set('beta', +(10 ** +beta.value).toPrecision(4)); later(); };
  beta.onchange = eps.onchange = () => model.save_changes();
  eps.oninput = () => { model.set('label_smoothing', +eps.value); later(); };
  for (const name of ['beta', 'label_smoothing', 'selected']) model.on(`change:${name}`, later);
  draw();
  return () => ui.close();
} };
