const PANELS = [
  { title: 'margin', lines: ['margin'], band: true },
  { title: 'rewards', lines: ['chosen_reward', 'rejected_reward'], band: true },
  { title: 'accuracy', lines: ['accuracy'] },
  { title: 'loss', lines: ['dpo_loss', 'loss'], band: true },
  { title: 'gradient norm', lines: ['grad_norm'], log: true },
  { title: 'KL from the reference, nats', lines: ['kl'], band: true, log: true },
  { title: 'beta', lines: ['beta'], log: true, exact: true },
  { title: 'learning rate', lines: ['learning_rate'], exact: true },
  { title: 'tokens a second', lines: ['tokens_per_second'] },
  { title: 'true reward', lines: ['true_reward'] },
];

export default { render({ model, el: host }) {
  const ui = frame(host, 'Training monitor'), root = ui.root, can = typeof model.send === 'function';
  const ask = message => can && model.send(message);
  const pill = el('span', { class: 'pill', role: 'status' }), where = el('span', { class: 'dim num' }), note = el('div', { role: 'status', class: 'dim', style: 'min-height:18px;font-size:12px' });
  const bar = el('progress', { max: 1, value: 0, 'aria-label': 'steps done', style: 'width:130px' });
  const button = (text, label, what, main) => { const b = el('button', { type: 'button', 'aria-label': label, class: main ? 'main' : '' }, text); b.onclick = () => ask(what()); return b; };
  const pause = button('Pause', 'Pause the training', () => ({ do: model.get('status').state === 'running' ? 'pause' : 'start' }), true);
  const stop = button('Stop', 'Stop the training and keep a checkpoint', () => ({ do: 'stop' }));
  const save = button('Checkpoint', 'Save a checkpoint now', () => ({ do: 'checkpoint' }));
  const back = el('select', { 'aria-label': 'Checkpoint to rewind to' });
  const rewind = button('Rewind', 'Rewind to the chosen checkpoint', () => ({ do: 'rewind', step: +back.value }));
  const go = rewind.onclick, calm = () => { rewind.textContent = 'Rewind'; delete rewind.dataset.sure; };
  rewind.onclick = () => {    // a finished run would lose its final weights
    if (model.get('status').state !== 'finished' || rewind.dataset.sure) { calm(); return go(); }
    rewind.textContent = 'Rewind and lose what came after?'; rewind.dataset.sure = 1; setTimeout(calm, 6000);
  };
  const forkTo = el('input', { type: 'text', size: 16, 'aria-label': 'Folder of the fork', placeholder: 'folder of the fork' });
  const typed = () => Object.fromEntries([['dpo_beta', beta], ['learning_rate', rate], ['loss', loss]].filter(([, f]) => f.dataset.dirty).map(([name, f]) => [name, f.value]));
  const over = () => ['finished', 'failed'].includes(model.get('status').state);
  const fork = button('Fork', 'Fork from here into a new run', () => ({ do: 'fork', path: forkTo.value, step: over() ? +back.value : null, ...typed() }));
  const beta = el('input', { type: 'text', size: 6, inputMode: 'decimal', 'aria-label': 'beta from the next step' });
  const rate = el('input', { type: 'text', size: 7, inputMode: 'decimal', 'aria-label': 'learning rate from the next step, the peak of its schedule' });
  const loss = el('input', { type: 'text', size: 14, 'aria-label': 'loss from the next step' });
  const names = el('datalist', { id: 'dl' + Math.random().toString(36).slice(2) }, ...(model.get('losses') || []).map(n => el('option', { value: n })));
  loss.setAttribute('list', names.id);
  const apply = button('Apply from the next step', 'Apply beta, learning rate and loss from the next step', () => ({ do: 'change', ...typed() }), true);
  for (const field of [beta, rate, loss]) { field.oninput = () => field.dataset.dirty = 1; field.onkeydown = e => { if (e.key === 'Enter') apply.click(); }; }
  const hands = el('div', {}, el('div', { class: 'row' }, pause, stop, save, el('label', {}, back), rewind, forkTo, fork),
    el('div', { class: 'row' }, el('label', {}, 'beta', beta), el('label', {}, 'learning rate', rate), el('label', {}, 'loss', loss, names), apply));
  const smoothing = el('input', { type: 'range', min: 0, max: .98, step: .02, value: model.get('smoothing'), 'aria-label': 'smoothing of the curves', style: 'width:110px' });
  const bands = el('input', { type: 'checkbox', checked: true }), behind = el('input', { type: 'checkbox', checked: true }), reset = el('button', { type: 'button' }, 'Show all steps');
  const overLabel = el('label', {}, behind, 'earlier runs');
  const view = el('div', { class: 'row dim', style: 'font-size:12px' }, el('label', {}, 'smoothing', smoothing), el('label', {}, bands, 'bands: middle half and 80 % of the pairs'), overLabel, reset,
    el('span', {}, 'drag to zoom, double click to go back'));
  const grid = el('div', { class: 'plots' }), code = codeLine(), said = el('details', { open: true });
  root.append(el('div', { class: 'row' }, el('h4', {}, 'Training'), pill, bar, where), hands, note, view, grid, said, code.node);
  const group = { plots: [], range: null };
  const plots = PANELS.map(p => ({ ...p, plot: new Plot(grid, ui, { title: p.title, logy: !!p.log, group }) }));
  reset.onclick = () => plots[0].plot.zoom(null);

  const column = (points, name) => points.map(p => p[1][name] ?? null);
  function lines(points, p, prefix, k0, quiet) {
    const out = [], x = points.map(q => q[0]), w = p.exact ? 0 : +smoothing.value;    // a setting has no noise
    p.lines.forEach((name, i) => {
      const y = column(points, name);
      if (y.some(v => v !== null)) {
        const label = prefix + name.replace('dpo_', '').replace(/_/g, ' '), color = k0 ?? i, raw = { x, y, color, quiet: true, name: '', alpha: .3, width: 1 };
        if (!quiet && p.band && bands.checked) for (const [a, b] of [[0, 4], [1, 3]]) { const q = points.map(r => r[2] && r[2][name]); if (q.some(Boolean)) out.push({ x, y: q.map(() => null), lo: q.map(v => v ? v[a] : null), hi: q.map(v => v ? v[b] : null), color, quiet: true, name: '' }); }
        if (w && !quiet) out.push(raw);
        out.push({ x, y: smooth(y, w), color, name: label, dash: quiet ? [5, 4] : null, alpha: quiet ? .75 : 1, width: quiet ? 1.2 : 1.8 });
      }
      const t = points.filter(q => q[1]['test/' + name] !== undefined && q[1]['test/' + name] !== null);
      if (t.length) out.push({ x: t.map(q => q[0]), y: column(t, 'test/' + name), lo: column(t, `test/${name}_low`), hi: column(t, `test/${name}_high`), color: k0 ?? i, points: true, join: quiet || name === 'true_reward', dash: [2, 3], width: 1, quiet, name: `held-out ${prefix}${name.replace('dpo_', '').replace(/_/g, ' ')}` });
    });
    return out;
  }
  function draw() {
    const points = model.get('points') || [], overlays = behind.checked ? model.get('overlays') || [] : [];
    overLabel.hidden = !(model.get('overlays') || []).length;
    const marks = (model.get('events') || []).filter(e => e.event !== 'started').map((e, i) => ({ x: e.step, text: e.text || e.event, row: i % 3, color: e.event === 'changed' ? 4 : undefined }));
    for (const p of plots) {
      const series = [...overlays.flatMap((o, i) => lines(o.points, p, o.name + ' ', 2 + i % 4, true)), ...lines(points, p, '', null, false)];
      p.plot.box.hidden = !series.length && p.title !== 'margin';
      p.plot.set(series, marks);
    }
  }
  function status() {
    const s = model.get('status'), fields = model.get('fields') || {}, live = can && s.live;
    pill.textContent = s.state; pill.className = 'pill ' + s.state; pill.dataset.told = s.told ?? ''; pill.title = s.told ? `since ${new Date(1000 * s.told).toLocaleTimeString()}` : '';
    bar.hidden = !s.total; bar.value = s.total ? (s.step ?? 0) / s.total : 0;
    where.textContent = `step ${s.step ?? '–'}${s.total ? ` of ${s.total}` : ''}${s.path ? ' · ' + s.path : ''}${s.every > 1 ? ` · every ${s.every}th step is drawn` : ''}`;
    note.textContent = s.note || ''; note.className = s.note && /Error|error/.test(s.note) ? 'bad' : 'dim';
    hands.hidden = !live;
    pause.textContent = s.state === 'running' ? 'Pause' : s.state === 'ready' ? 'Start' : 'Continue';
    pause.setAttribute('aria-label', `${pause.textContent} the training`);
    pause.disabled = over(); stop.disabled = !['running', 'paused', 'pausing'].includes(s.state);
    for (const b of [rewind, fork, beta, rate, loss, back, forkTo]) b.disabled = !s.steerable;
    for (const b of [save, apply]) b.disabled = !s.steerable || over();
    fork.setAttribute('aria-label', `Fork from ${over() ? 'the chosen checkpoint' : 'here'} into a new run`);
    apply.title = s.steerable ? '' : 'these steps come from a loop of their own: only a Config or a run of run_dpo can be steered';
    for (const [field, name] of [[beta, 'dpo_beta'], [rate, 'learning_rate'], [loss, 'loss']]) if (!field.dataset.dirty && focused(root) !== field) field.value = fields[name] ?? '';
    const steps = model.get('checkpoints') || [], was = back.value;
    if (back.dataset.key !== `${steps}`) back.replaceChildren(...steps.map(v => el('option', { value: v }, `step ${v}`)), ...(steps.length ? [] : [el('option', { value: '' }, 'no checkpoint yet')]));
    if (steps.includes(+was) && was !== '') back.value = was; else if (steps.length) back.value = steps.at(over() && steps.length > 1 ? -2 : -1);
    back.dataset.key = `${steps}`;
    if (!steps.length) rewind.disabled = true;
    if (!steps.length && over()) fork.disabled = true;
    code.set(model.get('code'));
  }
  function samples() {     // what the model wrote when it was last asked
    const those = model.get('samples') || [], cell = text => el('td', { style: 'text-align:left;vertical-align:top;white-space:pre-wrap;padding:3px 10px 3px 0' }, text);
    said.hidden = !those.length;
    if (those.length) said.replaceChildren(el('summary', {}, `samples at step ${those[0].step}`), el('table', { style: 'font-size:12px;max-width:100%' }, ...those.map(s => el('tr', {}, cell(s.asked), cell(s.answer), cell(s.ended)))));
  }
  let waiting = false;
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } };
  // new points come as messages; whoever missed some asks for them
  const hear = m => {
    if (m.type === 'applied') { for (const f of [beta, rate, loss]) delete f.dataset.dirty; status(); return; }
    if (m.type !== 'points') return;
    const points = model.get('points');
    if (points.last !== m.id) { if (m.again) points.length = 0; if (points.length === m.start) { points.push(...m.points); points.last = m.id; } else if (points.length < m.start) ask({ do: 'sync' }); }
    later();
  };
  model.on('msg:custom', hear);
  for (const name of ['points', 'events', 'overlays']) model.on(`change:${name}`, later);
  for (const name of ['status', 'fields', 'checkpoints', 'code']) model.on(`change:${name}`, () => keepFocus(root, status));
  model.on('change:samples', samples);
  smoothing.oninput = bands.onchange = behind.onchange = later;
  status(); draw(); samples(); ask({ do: 'sync' });
  return () => { model.off?.('msg:custom', hear); ui.close(); };
} };
