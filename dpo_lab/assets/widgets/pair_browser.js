const ROW = 26, SEEN = 12;
const SHOWN = [['pair', 'pair'], ['step', 'seen at'], ['margin', 'margin'], ['delta', 'delta, nats'], ['chosen_logratio', 'chosen moved'], ['rejected_logratio', 'rejected moved'], ['length_difference', 'longer by'], ['loss', 'loss'], ['flip', 'flip'], ['suspect', 'suspect'], ['prompt', 'prompt']];

export default { render({ model, el: host }) {
  const ui = frame(host, 'Pair browser'), root = ui.root, can = typeof model.send === 'function';
  root.append(el('style', {}, `
    .dl .list { height:${ROW * SEEN + 30}px; overflow:auto; border:1px solid var(--line); border-radius:8px; position:relative; font-size:12px; }
    .dl .line { display:grid; grid-template-columns:56px 72px 74px 96px 116px 126px 84px 64px 48px 72px minmax(120px,1fr); height:${ROW}px; align-items:center; min-width:928px; }
    .dl .line > * { padding:0 7px; text-align:right; overflow:hidden; text-overflow:ellipsis; white-space:nowrap; font-variant-numeric:tabular-nums; }
    .dl .line > :last-child { text-align:left; }
    .dl .lines .line { position:absolute; left:0; right:0; cursor:pointer; border-bottom:1px solid var(--line); }
    .dl .lines .line:hover { background:var(--soft); }
    .dl .lines .line.on { background:var(--soft); box-shadow:inset 3px 0 0 var(--accent); }
    .dl .top { position:sticky; top:0; z-index:2; background:var(--bg); border-bottom:1px solid var(--line); height:30px; }
    .dl .top button { border:0; background:none; padding:0; min-height:24px; font-size:12px; color:var(--dim); text-align:inherit; }
    .dl .sides { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr)); gap:10px; margin-top:8px; }
    .dl .side { border:1px solid var(--line); border-radius:8px; padding:8px 10px; }
    .dl .text { font:12.5px/1.75 ui-monospace,Menlo,monospace; white-space:pre-wrap; overflow-wrap:anywhere; margin-top:5px; }
    .dl .tok { border-radius:3px; text-decoration-thickness:2px; text-underline-offset:4px; }
    .dl .tok.scored { text-decoration:underline; text-decoration-color:var(--dim); }
    .dl .tok.unscored { color:var(--dim); }
    .dl .tok.here { outline:2px solid var(--accent); }`));
  const all = model.get('columns'), n = all.pair.length;
  const count = el('span', { class: 'dim', role: 'status' });
  const search = el('input', { type: 'text', placeholder: 'end of prompt contains', 'aria-label': 'The last 160 characters of the prompt contain', size: 18 });
  const by = el('select', { 'aria-label': 'Number to filter by' }, ...SHOWN.slice(0, 8).filter(([k]) => all[k]).map(([k, t]) => el('option', { value: k, selected: k === 'delta' }, t)));
  const from = el('input', { type: 'text', size: 6, placeholder: 'from', 'aria-label': 'from' }), to = el('input', { type: 'text', size: 6, placeholder: 'to', 'aria-label': 'to' });
  const flips = el('input', { type: 'checkbox' }), odd = el('input', { type: 'checkbox' });
  root.append(el('div', { class: 'row' }, el('h4', {}, 'Pairs'), count),
    el('div', { class: 'row' }, search, by, from, to, el('label', {}, flips, `flipped (${all.flip.filter(Boolean).length})`), el('label', {}, odd, `suspect (${all.suspect.filter(Boolean).length})`)));
  const cols = SHOWN.filter(([k]) => all[k]);
  const top = el('div', { class: 'line top', role: 'row' }), lines = el('div', { class: 'lines', role: 'presentation', style: 'position:relative' });
  const list = el('div', { class: 'list', tabIndex: 0, role: 'grid', 'aria-label': 'Pairs: arrow keys move, Enter opens', 'aria-rowcount': n }, top, lines);
  for (const [k, t] of cols) {
    const b = el('button', { type: 'button', 'aria-label': `Sort by ${t}` }, t);
    b.onclick = () => { const s = model.get('sort'); model.set('sort', [k, s[0] === k ? -s[1] : 1]); model.save_changes(); arrange(); };
    top.append(el('span', { role: 'columnheader' }, b));
  }
  const detail = el('div', { 'aria-live': 'polite' }), code = codeLine();
  root.append(list, detail, code.node);
  let order = [], active = 0;
  const bound = (field, none) => { const odd = isNaN(+field.value); field.setAttribute('aria-invalid', odd); return odd || field.value.trim() === '' ? none : +field.value; };
  function arrange() {
    const [key, way] = model.get('sort'), needle = search.value.toLowerCase(), c = all[by.value], lo = bound(from, -Infinity), hi = bound(to, Infinity), bounded = lo > -Infinity || hi < Infinity;
    order = [];
    for (let i = 0; i < n; i++) if ((!needle || all.prompt[i].toLowerCase().includes(needle)) && (!bounded || (c[i] >= lo && c[i] <= hi)) && (!flips.checked || all.flip[i]) && (!odd.checked || all.suspect[i])) order.push(i);
    const v = all[key];
    order.sort((a, b) => way * (v[a] < v[b] ? -1 : v[a] > v[b] ? 1 : 0) || a - b);
    [...top.children].forEach((h, j) => { const on = cols[j][0] === key; h.setAttribute('aria-sort', on ? (way > 0 ? 'ascending' : 'descending') : 'none'); h.firstChild.textContent = cols[j][1] + (on ? (way > 0 ? ' ↑' : ' ↓') : ''); });
    count.textContent = order.length === n ? `${n} pairs` : `${order.length} of ${n} pairs`;
    list.setAttribute('aria-rowcount', order.length);
    lines.style.height = `${order.length * ROW}px`; active = Math.min(active, Math.max(0, order.length - 1)); list.scrollTop = 0; paint();
  }
  // only the rows in sight are in the page
  function paint() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6), last = Math.min(order.length, first + SEEN + 14), opened = model.get('opened');
    const rows = [];
    for (let r = first; r < last; r++) {
      const i = order[r], on = all.pair[i] === opened;
      const line = el('div', { class: 'line' + (r === active ? ' on' : ''), role: 'row', 'aria-rowindex': r + 1, 'aria-selected': on, id: `${uid}-${r}`, style: `top:${r * ROW}px` },
        ...cols.map(([k]) => { const v = all[k][i]; return el('span', { role: 'gridcell', title: k === 'prompt' ? v : '' }, typeof v === 'number' ? short(v) : v === true ? 'yes' : v === false ? '' : String(v ?? '')); }));
      line.onclick = () => { active = r; open(i); };
      rows.push(line);
    }
    lines.replaceChildren(...rows);
    list.setAttribute('aria-activedescendant', `${uid}-${active}`);
  }
  const uid = 'p' + Math.random().toString(36).slice(2);
  function open(i) {
    const pair = all.pair[i], kept = (model.get('details') || []).find(d => d.pair === pair);
    model.set('opened', pair);
    if (kept) { model.set('detail', kept); show(); }
    else if (can) { detail.replaceChildren(el('p', { class: 'dim' }, `Reading pair ${pair} …`)); model.send({ do: 'open', pair }); }
    else detail.replaceChildren(el('p', { class: 'dim' }, `Pair ${pair} was not recorded on this page: open the notebook to read it.`));
    model.save_changes(); paint();
  }
  const signed = v => `${v >= 0 ? '+' : ''}${v.toFixed(2)}`;
  function show() {
    const d = model.get('detail');
    if (!d || d.pair === undefined) { detail.replaceChildren(); return; }
    if (d.error) { detail.replaceChildren(el('p', { class: 'bad' }, d.error)); code.set(model.get('code')); return; }
    const at = all.pair.indexOf(d.pair), dark = root.classList.contains('dark'), nats = [...d.chosen, ...d.rejected].map(t => Math.abs(t[1] ?? 0)), reach = Math.max(.05, ...nats);
    const tokens = side => side.map(([text, v]) => {
      const rgb = v >= 0 ? (dark ? '64,150,255' : '0,100,200') : (dark ? '255,130,60' : '213,94,0');
      return el('span', { class: 'tok ' + (v === null ? 'unscored' : 'scored'), style: v === null ? '' : `background:rgba(${rgb},${(.75 * Math.sqrt(Math.abs(v) / reach) * (Math.abs(v) > .005)).toFixed(2)})`, title: v === null ? 'not scored' : `${v >= 0 ? '+' : ''}${v.toFixed(3)} nats` }, text);
    });
    // arrows go through the tokens, and their numbers are said
    const reading = (name, spans) => {
      const said = el('span', { class: 'sr', 'aria-live': 'polite' }), text = el('div', { class: 'text', tabIndex: 0, role: 'group', 'aria-label': `${name} completion: left and right arrows read its tokens` }, ...spans);
      let at = -1;
      text.onkeydown = e => {
        const way = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
        if (!way || !spans.length) return;
        e.preventDefault();
        spans[at]?.classList.remove('here'); at = Math.min(Math.max(at + way, 0), spans.length - 1);
        spans[at].classList.add('here'); said.textContent = `${spans[at].textContent}: ${spans[at].title}`;
      };
      return el('div', {}, text, said);
    };
    const box = name => { const s = d[name].reduce((a, t) => a + (t[1] ?? 0), 0), k = d[name].filter(t => t[1] !== null).length; return el('div', { class: 'side' }, el('b', {}, name), el('span', { class: 'dim num' }, `  ${signed(s)} nats since the reference with the final weights, ${k} scored tokens`),
      el('div', { class: 'dim num', style: 'font-size:11.5px' }, at < 0 || !all[name + '_logratio'] ? '' : `${signed(all[name + '_logratio'][at])} when step ${all.step[at]} saw it, as in the table`), reading(name, tokens(d[name]))); };
    detail.replaceChildren(el('div', { class: 'side', style: 'margin-top:8px' }, el('b', {}, `prompt of pair ${d.pair}`), el('div', { class: 'text', style: 'max-height:180px;overflow:auto', tabIndex: 0 }, d.prompt)), el('div', { class: 'sides' }, box('chosen'), box('rejected')),
      el('div', { class: 'dim', style: 'font-size:11.5px;margin:4px 0' }, `log π − log ref of each token: blue has become likelier, orange less likely; full colour is ${reach.toFixed(2)} nats. Underlined tokens are scored.`));
    code.set(model.get('code'));
  }
  list.onscroll = () => requestAnimationFrame(paint);
  list.onkeydown = e => {
    if (e.target !== list) return;
    const go = { ArrowDown: 1, ArrowUp: -1, PageDown: SEEN, PageUp: -SEEN, Home: -1e9, End: 1e9 }[e.key];
    if (go !== undefined) { active = Math.max(0, Math.min(order.length - 1, active + go)); const y = active * ROW; if (y < list.scrollTop) list.scrollTop = y; if (y > list.scrollTop + (SEEN - 1) * ROW) list.scrollTop = y - (SEEN - 1) * ROW; paint(); }
    else if (e.key === 'Enter' || e.key === ' ') open(order[active]);
    else return;
    e.preventDefault();
  };
  for (const f of [search, from, to]) f.oninput = arrange;
  by.onchange = flips.onchange = odd.onchange = arrange;
  model.on('change:detail', show); model.on('change:code', () => code.set(model.get('code')));
  ui.plots.push({ draw: show });
  arrange(); show(); code.set(model.get('code'));
  return () => ui.close();
} };
