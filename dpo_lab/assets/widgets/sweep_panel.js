// viridis, coarse: perceptually even and safe for the colour-blind
const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]];
const viridis = t => { const x = Math.max(0, Math.min(1, t)) * 9, i = Math.min(8, Math.floor(x)), f = x - i; return VIRIDIS[i].map((a, k) => Math.round(a + f * (VIRIDIS[i + 1][k] - a))); };
const METRICS = { 'test/accuracy': 'held-out accuracy', 'test/margin': 'held-out margin', 'test/dpo_loss': 'held-out loss', 'test/kl': 'held-out KL', 'test/nll': 'held-out NLL', 'test/true_reward': 'true reward', accuracy: 'training accuracy', margin: 'training margin', dpo_loss: 'training loss', kl: 'training KL' };
const LESS = ['test/dpo_loss', 'dpo_loss', 'test/nll'];

export default { render({ model, el: host }) {
  const ui = frame(host, 'Sweep panel'), root = ui.root, can = typeof model.send === 'function', ask = m => can && model.send(m);
  root.append(el('style', {}, `
    .dl .heat { display:grid; gap:3px; overflow:auto; font-size:12px; }
    .dl .heat .cell { position:relative; border:2px solid transparent; border-radius:6px; min-height:44px; min-width:66px; padding:3px 5px; text-align:center; font-variant-numeric:tabular-nums; overflow:hidden; line-height:1.25; }
    .dl .heat .cell.on { border-color:var(--fg); outline:2px solid var(--accent); }
    .dl .heat .cell.lit { outline:3px solid var(--fg); outline-offset:-3px; }
    .dl .heat .cell small { display:block; font-size:10px; opacity:.9; }
    .dl .heat .cell .done { position:absolute; left:0; bottom:0; height:4px; background:var(--accent); }
    .dl .heat .axis { display:flex; align-items:center; justify-content:center; color:var(--dim); padding:2px 4px; white-space:nowrap; }
    .dl .two { display:grid; gap:12px; grid-template-columns:repeat(auto-fit,minmax(min(360px,100%),1fr)); align-items:start; }`));
  const pill = el('span', { class: 'pill', role: 'status' }), bar = el('progress', { max: 1, value: 0, 'aria-label': 'share of the sweep that is done', style: 'width:140px' }), where = el('span', { class: 'dim num' });
  const note = el('div', { role: 'status', class: 'dim', style: 'min-height:18px;font-size:12px;white-space:pre-wrap' });
  const verdict = el('div', { role: 'status', class: 'dim', style: 'font-size:12px;white-space:pre-wrap' });
  const asked = model.get('asked') || {}, text = (name, label, size) => el('input', { type: 'text', size, value: asked[name] ?? '', 'aria-label': label });
  const inputs = { dpo_beta: text('dpo_beta', 'values of beta, with commas between them', 18), learning_rate: text('learning_rate', 'values of the learning rate, with commas between them', 18), seed: text('seed', 'seeds, with commas between them', 6), max_steps: text('max_steps', 'most steps of a point', 5), samples: text('samples', 'most settings, drawn at random; empty takes all', 4), together: text('together', 'so many points train in lock-step; empty trains each apart', 3) };
  const more = text('more', 'another axis, such as loss=sigmoid,ipo', 20); more.placeholder = 'loss=sigmoid,ipo';
  const start = el('button', { type: 'button', class: 'main' }, 'Start'), stop = el('button', { type: 'button' }, 'Stop'), plan = el('button', { type: 'button', 'aria-label': 'Say what it would take' }, 'Estimate');
  const wish = () => ({ ...Object.fromEntries(Object.entries(inputs).map(([k, i]) => [k, i.value])), more: more.value });
  start.onclick = () => ask({ do: 'start', asked: wish() }); stop.onclick = () => ask({ do: 'stop' }); plan.onclick = () => ask({ do: 'plan', asked: wish() });
  const hands = el('div', {}, el('div', { class: 'row' }, el('label', {}, 'beta', inputs.dpo_beta), el('label', {}, 'learning rate', inputs.learning_rate), el('label', {}, 'seeds', inputs.seed), el('label', {}, 'another axis', more)),
    el('div', { class: 'row' }, el('label', {}, 'steps a point', inputs.max_steps), el('label', {}, 'at most', inputs.samples, 'settings'), el('label', {}, 'in lock-step', inputs.together), start, stop, plan));
  const metric = el('select', { 'aria-label': 'Metric of the heat map' }), xAxis = el('select', { 'aria-label': 'Axis from left to right' }), yAxis = el('select', { 'aria-label': 'Axis from top to bottom' });
  const heat = el('div', { class: 'heat', role: 'grid', 'aria-label': 'Heat map of the sweep: arrow keys move, Enter chooses' }), legend = el('div', { class: 'dim', style: 'font-size:11px' });
  const right = el('div', {}), two = el('div', { class: 'two' }, el('div', {}, el('div', { class: 'row', style: 'font-size:12px' }, metric, el('label', {}, 'across', xAxis), el('label', {}, 'down', yAxis)), heat, legend), right);
  const parallel = el('canvas', { tabIndex: 0, style: 'height:190px', role: 'img', 'aria-label': 'Parallel coordinates: a line for each point, through its values and its score. Up and down arrows go from the best point to the worst, Enter chooses' });
  const said = el('div', { class: 'sr', 'aria-live': 'polite' }), parallelBox = el('div', { class: 'plot', hidden: true }, el('div', { class: 'head' }, el('b', {}, 'all axes')), parallel, said);
  const chosen = el('div', { role: 'status' }), code = codeLine(), shell = codeLine('command');
  root.append(el('div', { class: 'row' }, el('h4', {}, 'Sweep'), pill, bar, where), hands, note, verdict, two, parallelBox, chosen, code.node, shell.node);
  const curves = new Plot(right, ui, { title: 'curves of all points', height: 250, onPick: s => pick(s.point) });
  curves.button.hidden = false;
  ui.plots.push({ draw: () => drawParallel() });

  let lit = null;
  curves.onNear = s => { // a curve under the pointer lights its cell and its line
    const now = s ? s.point : null, old = lit ? lit[0] : null;
    if (now === old) return;
    lit = now ? [now] : null;
    for (const c of heat.querySelectorAll('.cell')) c.classList.toggle('lit', now !== null && c.points.includes(now));
    drawCurves(); drawParallel();
  };
  const points = () => model.get('points') || [], axes = () => model.get('axes') || {};
  const settingAxes = () => Object.keys(axes()).filter(a => a !== 'seed');
  const setting = p => settingAxes().map(a => `${a}=${p.values[a]}`).join(', ');
  const score = (p, m) => { for (let i = p.curve.length - 1; i >= 0; i--) { const v = p.curve[i][1][m]; if (v !== undefined && v !== null) return v; } return null; };
  const same = (p, values) => Object.entries(values).every(([k, v]) => p.values[k] === v);
  const avg = v => v.length ? v.reduce((a, x) => a + x, 0) / v.length : null;
  function pick(name) { model.set('chosen', name); model.save_changes(); later(); }
  function light(names) { lit = names; later(); }
  function options(select, names, want) { const key = names.join('|'); if (select.dataset.key === key) return; const keep = select.dataset.key && names.includes(select.value) ? select.value : want; select.dataset.key = key; select.replaceChildren(...names.map(n => el('option', { value: n }, METRICS[n] || n))); select.value = keep; }
  function draw() {
    const ps = points(), names = settingAxes(), ax = axes(), found = new Set(ps.flatMap(p => p.curve.flatMap(c => Object.keys(c[1]))));
    options(metric, Object.keys(METRICS).filter(m => found.has(m)), 'test/accuracy');
    options(xAxis, names, names[0]); options(yAxis, ['', ...names], names[1] || '');
    const m = metric.value || 'test/accuracy', less = LESS.includes(m), x = xAxis.value, y = yAxis.value === x ? '' : yAxis.value;
    const xs = ax[x] || [], ys = y ? ax[y] : [null];
    const cell = (xv, yv) => ps.filter(p => same(p, { [x]: xv, ...(y ? { [y]: yv } : {}) }));
    const value = group => avg(group.map(p => score(p, m)).filter(v => v !== null));
    const values = xs.flatMap(xv => ys.map(yv => value(cell(xv, yv)))).filter(v => v !== null), lo = Math.min(...values), hi = Math.max(...values);
    heat.style.gridTemplateColumns = `auto repeat(${xs.length}, minmax(66px,1fr))`;
    const at = focused(root), was = heat.contains(at) ? at.dataset.at : null;
    const picked = ps.find(p => p.name === model.get('chosen'));
    const row = cells => el('div', { role: 'row', style: 'display:contents' }, ...cells);
    const rows = [row([el('div', { class: 'axis', role: 'columnheader' }, y ? `${y} ↓  ${x} →` : `${x} →`), ...xs.map(v => el('div', { class: 'axis', role: 'columnheader' }, typeof v === 'number' ? short(v) : String(v)))])];
    ys.forEach((yv, j) => {
      const cells = [el('div', { class: 'axis', role: 'rowheader' }, y ? (typeof yv === 'number' ? short(yv) : String(yv)) : '')];
      xs.forEach((xv, i) => {
        const group = cell(xv, yv), v = value(group), failed = group.filter(p => p.status === 'failed'), done = avg(group.map(p => p.progress)) ?? 0;
        const t = v === null || hi === lo ? .5 : (v - lo) / (hi - lo), rgb = v === null ? null : viridis(less ? 1 - t : t), bright = rgb && (.299 * rgb[0] + .587 * rgb[1] + .114 * rgb[2]) > 130;
        const words = v === null ? (failed.length ? 'failed' : done > 0 ? '…' : 'waiting') : short(v);
        const b = el('button', { type: 'button', class: 'cell' + (picked && group.includes(picked) ? ' on' : ''), role: 'gridcell', 'data-at': `${i},${j}`, title: failed.map(p => p.error).join('\n'),
          'aria-label': `${x} ${xv}${y ? `, ${y} ${yv}` : ''}: ${METRICS[m] || m} ${words}, ${Math.round(done * 100)} percent done, ${group.length} runs`,
          style: rgb ? `background:rgb(${rgb});color:${bright ? '#111' : '#fff'}` : '' }, words,
          el('small', {}, failed.length ? `${failed.length} failed` : done < 1 ? `${Math.round(done * 100)} %` : group.length > 1 ? `${group.length} runs` : 'done'), el('span', { class: 'done', style: `width:${done < 1 ? done * 100 : 0}%` }));
        // a cell may be drawn anew between press and release, so the press counts; a click without one comes from a key
        b.onpointerdown = () => group.length && pick(group[0].name);
        b.points = group.map(p => p.name); if (lit && !heat.matches(':hover') && b.points.includes(lit[0])) b.classList.add('lit');
        b.onclick = e => e.detail === 0 && group.length && pick(group[0].name);
        b.onmouseenter = b.onfocus = () => { if (!lit || lit[0] !== (group[0] || {}).name) { lit = group.map(p => p.name); drawCurves(); drawParallel(); } };
        b.onmouseleave = b.onblur = () => { lit = null; drawCurves(); drawParallel(); };
        b.onkeydown = e => { const d = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key]; if (!d) return; e.preventDefault(); heat.querySelector(`[data-at="${i + d[0]},${j + d[1]}"]`)?.focus(); };
        cells.push(b);
      });
      rows.push(row(cells));
    });
    heat.replaceChildren(...rows);
    if (was) heat.querySelector(`[data-at="${was}"]`)?.focus();
    legend.textContent = values.length ? `${METRICS[m] || m}: yellow is ${less ? 'lowest' : 'highest'}, ${short(lo)} to ${short(hi)}; the newest measurement of each run, mean over seeds${names.length > 2 ? ' and the other axes' : ''}. One number each: the verdict of the sweep says which differences count.` : '';
    drawCurves(); drawParallel(); choose();
  }
  const seen = t => viridis(root.classList.contains('dark') ? .2 + .8 * t : .85 * t);    // a line on this background
  function drawCurves() {
    const m = metric.value || 'test/accuracy', now = model.get('chosen'), ps = points(), keys = [...new Set(ps.map(setting))];
    curves.title = METRICS[m] || m; curves.box.querySelector('b').textContent = curves.title;
    curves.set(ps.map(p => {
      const c = p.curve.filter(q => q[1][m] !== undefined && q[1][m] !== null), strong = lit ? lit.includes(p.name) : p.name === now;
      const t = keys.length > 1 ? keys.indexOf(setting(p)) / (keys.length - 1) : .5, rgb = seen(t);
      return { name: setting(p) + ('seed' in p.values ? `, seed ${p.values.seed}` : ''), quiet: true, point: p.name, x: c.map(q => q[0]), y: c.map(q => q[1][m]), color: `rgb(${rgb})`, width: strong ? 3.2 : 1.3, alpha: strong ? 1 : lit || now ? .4 : .85 };
    }).sort((a, b) => a.width - b.width));
  }
  function drawParallel() {
    const names = Object.keys(axes()); parallelBox.hidden = names.length < 3; if (names.length < 3) return;
    const c = parallel, r = devicePixelRatio || 1, w = c.clientWidth, h = 190, g = c.getContext('2d'), m = metric.value, ps = points(), fg = getComputedStyle(root).getPropertyValue('--fg');
    if (!w) return; c.width = w * r; c.height = h * r; g.scale(r, r); g.font = '11px system-ui,sans-serif'; g.textAlign = 'center'; g.fillStyle = fg;
    const scores = ps.map(p => score(p, m)).filter(v => v !== null), lo = Math.min(...scores), hi = Math.max(...scores), xAt = i => 60 + i * (w - 120) / names.length;
    const yAt = t => h - 30 - t * (h - 60);
    ways = [];
    g.fillText(METRICS[m] || m, xAt(names.length), 14); g.fillText(short(hi), xAt(names.length) + 30, yAt(1) + 4); g.fillText(short(lo), xAt(names.length) + 30, yAt(0) + 4);
    for (const p of ps) {
      const s = score(p, m); if (s === null) continue;
      const t = hi > lo ? (s - lo) / (hi - lo) : .5, strong = lit ? lit.includes(p.name) : p.name === model.get('chosen');
      g.strokeStyle = `rgb(${seen(t)})`; g.globalAlpha = strong ? 1 : lit ? .2 : .65; g.lineWidth = strong ? 3 : 1.4; g.beginPath();
      const way = [...names.flatMap((a, i) => { const n = axes()[a].length, y = yAt(n > 1 ? axes()[a].indexOf(p.values[a]) / (n - 1) : .5); return [[xAt(i) - 24, y], [xAt(i) + 24, y]]; }).slice(1), [xAt(names.length), yAt(t)]];
      way.forEach((at, i) => g[i ? 'lineTo' : 'moveTo'](...at)); g.stroke(); g.globalAlpha = 1;
      ways.push({ name: p.name, way });
    }
    const bg = getComputedStyle(root).getPropertyValue('--bg'), write = (text, x, y) => { g.fillStyle = bg; const w2 = g.measureText(text).width + 8; g.fillRect(x - w2 / 2, y - 11, w2, 15); g.fillStyle = fg; g.fillText(text, x, y); };
    names.forEach((a, i) => { write(a, xAt(i), 14); axes()[a].forEach((v, k) => write(typeof v === 'number' ? short(v) : String(v), xAt(i), yAt(axes()[a].length > 1 ? k / (axes()[a].length - 1) : .5) + 4)); });
  }
  let ways = [];      // the lines of the parallel coordinates, as they are drawn
  const under = e => {
    const gap = ({ way }) => Math.min(...way.slice(1).map(([x, y], i) => { const [x0, y0] = way[i]; return e.offsetX < x0 || e.offsetX > x ? Infinity : Math.abs(y0 + (y - y0) * (e.offsetX - x0) / (x - x0) - e.offsetY); }));
    const [near] = ways.map(w => [gap(w), w.name]).sort((a, b) => a[0] - b[0]);
    return near && near[0] < 12 ? near[1] : null;
  };
  parallel.onpointermove = e => { const name = under(e); if (name !== (lit ? lit[0] : null)) light(name ? [name] : null); };
  parallel.onpointerleave = () => light(null);
  parallel.onclick = e => { const name = under(e); if (name) pick(name); };
  parallel.onkeydown = e => {
    const way = { ArrowUp: -1, ArrowDown: 1, Enter: 0 }[e.key], m = metric.value, less = LESS.includes(m) ? 1 : -1;
    const ps = points().filter(p => score(p, m) !== null).sort((a, b) => less * (score(a, m) - score(b, m)));
    if (way === undefined || !ps.length) return;
    e.preventDefault();
    const at = ps.findIndex(p => lit && p.name === lit[0]);
    if (!way) return at >= 0 && pick(ps[at].name);
    const p = ps[Math.min(Math.max(at + way, 0), ps.length - 1)];
    light([p.name]); said.textContent = `${p.name}: ${METRICS[m] || m} ${short(score(p, m))}`;
  };
  parallel.onblur = () => light(null);
  function choose() {
    const p = points().find(q => q.name === model.get('chosen'));
    shell.node.hidden = !p;
    if (!p) { chosen.textContent = points().length ? 'Choose a cell or a curve to export it.' : ''; code.set(model.get('code')); return; }
    chosen.textContent = `${p.name}: ${p.status}${p.error ? ', ' + p.error : ''}`;
    code.set(p.python); shell.set(p.command);
  }
  function status() {
    const s = model.get('status'); pill.textContent = s.state; pill.className = 'pill ' + s.state;
    hands.hidden = !can || !s.live; start.disabled = s.state === 'running' || s.state === 'stopping'; stop.disabled = s.state !== 'running'; plan.disabled = s.state === 'running';
    bar.value = s.progress || 0; where.textContent = s.text || ''; note.textContent = s.note || ''; note.className = s.error ? 'bad' : 'dim';
    start.textContent = s.state === 'stopped' ? 'Continue' : 'Start';
    verdict.textContent = s.verdict || '';
    choose();
  }
  let waiting = false;
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } };
  const hear = m => { // what was added to the curves
    if (m.type !== 'grown') return;
    const byName = Object.fromEntries(points().map(p => [p.name, p]));
    for (const g of m.points) { const p = byName[g.name]; if (!p) continue; if (p.seen !== g.id) { p.seen = g.id; if (g.again) p.curve.length = 0; if (p.curve.length === g.start) p.curve.push(...g.curve); else if (p.curve.length < g.start) ask({ do: 'sync' }); } p.status = g.status; p.progress = g.progress; p.error = g.error; }
    later();
  };
  model.on('msg:custom', hear);
  for (const name of ['points', 'axes', 'chosen']) model.on(`change:${name}`, later);
  for (const name of ['status', 'code']) model.on(`change:${name}`, () => keepFocus(root, status));
  metric.onchange = xAxis.onchange = yAxis.onchange = later;
  status(); draw(); ask({ do: 'sync' });
  return () => { model.off?.('msg:custom', hear); ui.close(); };
} };
