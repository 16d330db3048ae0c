// Shared by all widgets; put in front of each of them.
const COLORS = {
  light: ['#0072b2', '#d55e00', '#00795c', '#a8467f', '#946200', '#3a86b7', '#555555'],
  dark: ['#56b4e9', '#ff8f50', '#2fd3a0', '#e79ac8', '#f0b429', '#9ad0f5', '#bbbbbb'],
};

const CSS = `
.dl { color-scheme:light; --bg:#fff; --fg:#1d2127; --dim:#5b6470; --line:#d9dee4; --soft:#f3f5f8; --accent:#0064a4; --on:#fff; --bad:#b3261e;
  background:var(--bg); color:var(--fg); font:13px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif; border:1px solid var(--line);
  border-radius:10px; padding:12px 14px; box-sizing:border-box; max-width:100%; container-type:inline-size; }
.dl.dark { color-scheme:dark; --bg:#16191d; --fg:#e7eaee; --dim:#a3adb9; --line:#343b44; --soft:#20252b; --accent:#63b3ed; --on:#10141a; --bad:#ff8a80; }
.dl * { box-sizing:border-box; }
.dl [hidden] { display:none !important; }
.dl .row { display:flex; flex-wrap:wrap; gap:8px 12px; align-items:center; margin:4px 0; }
.dl h4 { margin:0; font-size:14px; font-weight:650; }
.dl .dim { color:var(--dim); }
.dl .bad { color:var(--bad); }
.dl .num { font-variant-numeric:tabular-nums; }
.dl .pill { border:1px solid var(--line); border-radius:99px; padding:1px 10px; background:var(--soft); font-size:12px; }
.dl .pill.running, .dl .pill.pausing, .dl .pill.stopping { border-color:var(--accent); color:var(--accent); }
.dl .pill.failed { border-color:var(--bad); color:var(--bad); }
.dl button, .dl select, .dl input[type=text], .dl input[type=number] { font:inherit; color:var(--fg); background:var(--soft);
  border:1px solid var(--line); border-radius:6px; padding:3px 9px; min-height:28px; }
.dl input[aria-invalid=true] { border-color:var(--bad); color:var(--bad); }
.dl button { cursor:pointer; }
.dl button:hover:not(:disabled) { border-color:var(--accent); }
.dl button.main { background:var(--accent); border-color:var(--accent); color:var(--on); }
.dl button:disabled, .dl input:disabled, .dl select:disabled { opacity:.5; cursor:not-allowed; }
.dl :focus-visible { outline:2px solid var(--accent); outline-offset:1px; }
.dl input[type=range] { accent-color:var(--accent); vertical-align:middle; }
.dl input[type=checkbox] { accent-color:var(--accent); }
.dl label { display:inline-flex; gap:5px; align-items:center; }
.dl .plots { display:grid; gap:10px; grid-template-columns:repeat(auto-fit,minmax(min(270px,100%),1fr)); margin:8px 0; }
.dl .plot { position:relative; border:1px solid var(--line); border-radius:8px; padding:5px 6px 2px; min-width:0; }
.dl .plot .head { display:flex; gap:8px; align-items:center; font-size:12px; min-height:22px; }
.dl .plot .head b { font-weight:600; }
.dl .plot .head button { padding:0 6px; min-height:20px; font-size:11px; margin-left:auto; }
.dl .plot .keys { display:flex; flex-wrap:wrap; gap:0 9px; font-size:11px; color:var(--dim); }
.dl .plot .keys i { display:inline-block; width:12px; height:3px; border-radius:2px; margin-right:4px; vertical-align:middle; }
.dl .plot .keys i.dot { width:7px; height:7px; border-radius:50%; }
.dl canvas { display:block; width:100%; touch-action:pan-y; border-radius:4px; }
.dl .tip { position:absolute; pointer-events:none; background:var(--bg); color:var(--fg); border:1px solid var(--line); border-radius:6px;
  padding:3px 7px; font-size:11px; white-space:pre; z-index:5; box-shadow:0 2px 8px #0003; font-variant-numeric:tabular-nums; }
.dl code { font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace; background:var(--soft); color:var(--fg); border:1px solid var(--line);
  border-radius:6px; padding:4px 8px; overflow-wrap:anywhere; white-space:pre-wrap; flex:1 1 200px; }
.dl table { border-collapse:collapse; font-size:12px; font-variant-numeric:tabular-nums; }
.dl td, .dl th { padding:2px 9px; text-align:right; border-bottom:1px solid var(--line); color:var(--fg); background:none; }
.dl th { color:var(--dim); font-weight:500; }
.dl .sr { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); white-space:nowrap; }
`;

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (k === 'style' || k === 'class' || k.startsWith('aria-') || k.startsWith('data-') || k === 'for' || k === 'role') node.setAttribute(k, v);
    else node[k] = v;
  }
  node.append(...children.filter(c => c !== null && c !== undefined));
  return node;
}

function short(v) {
  if (v === null || v === undefined || !isFinite(v)) return '–';
  const a = Math.abs(v);
  if (a !== 0 && (a < 1e-3 || a >= 1e5)) return v.toExponential(2).replace('e+', 'e').replace(/\.?0+e/, 'e');
  return String(+v.toPrecision(a >= 100 ? 4 : 3));
}

// The background behind decides, so that every theme is met, also from within a shadow root. Where nothing is behind, as in
// the frames that show an output in VS Code and Colab, what those write on body and html; then what the browser prefers.
function isDark(node) {
  const behind = n => n.parentElement || n.getRootNode().host;
  for (let n = behind(node); n; n = behind(n)) {
    const c = getComputedStyle(n).backgroundColor.match(/[\d.]+/g);
    if (c && (c.length < 4 || +c[3] > .5)) return (.299 * c[0] + .587 * c[1] + .114 * c[2]) < 128;
  }
  const told = `theme-${document.documentElement.getAttribute('theme')} ${document.body.className}`;
  if (/(theme|vscode|contrast)-light/.test(told)) return false;
  return /theme-dark|vscode-(dark|high-contrast)/.test(told) || matchMedia('(prefers-color-scheme: dark)').matches;
}

const focused = node => node.getRootNode().activeElement;   // in a shadow root the document knows only the host

function frame(el0, label) {
  const root = el('div', { class: 'dl', role: 'region', 'aria-label': label });
  // Jupyter would take plain keys for its cells: arrows leave a slider, d d on a button deletes the cell. It asks for this attribute
  const plain = e => !e.ctrlKey && !e.metaKey && !e.altKey;
  const keep = e => { const [at] = e.composedPath(); if (root.contains(at)) at.toggleAttribute('data-lm-suppress-shortcuts', plain(e)); };
  window.addEventListener('keydown', keep, true);      // Notebook takes keys on their way down, JupyterLab and others on their way up
  root.addEventListener('keydown', e => { if (plain(e)) e.stopPropagation(); });
  root.append(el('style', {}, CSS));
  el0.append(root);
  const plots = [];
  const retheme = () => {
    const dark = isDark(root);
    if (root.classList.contains('dark') !== dark || !root.dataset.themed) {
      root.dataset.themed = 1;
      root.classList.toggle('dark', dark);
      plots.forEach(p => p.draw());
    }
  };
  const watch = new MutationObserver(() => setTimeout(retheme, 60));
  for (const n of [document.documentElement, document.body])
    watch.observe(n, { attributes: true, attributeFilter: ['class', 'style', 'theme', 'data-theme', 'data-bs-theme', 'data-jp-theme-light', 'data-jp-theme-name', 'data-vscode-theme-kind'] });
  const media = matchMedia('(prefers-color-scheme: dark)');
  media.addEventListener('change', retheme);
  requestAnimationFrame(retheme); setTimeout(retheme, 300);
  return { root, plots, retheme, close() { window.removeEventListener('keydown', keep, true); watch.disconnect(); media.removeEventListener('change', retheme); } };
}

// A button that switches itself off hands the focus on, so that the next key is still heard here.
function keepFocus(root, update) {
  const at = focused(root);
  update();
  if (at?.disabled && root.contains(at)) root.querySelector('button:not(:disabled)')?.focus();
}

// The line of Python that a widget stands for, or a command, and a button that copies it.
function codeLine(what = 'line of Python') {
  const code = el('code', { 'aria-label': `The ${what} for what is shown`, tabIndex: 0 });
  const button = el('button', { type: 'button', 'aria-label': `Copy the ${what}` }, 'Copy');
  const say = text => { button.textContent = text; setTimeout(() => button.textContent = 'Copy', 1200); };
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(code.textContent); say('Copied'); }
    catch { getSelection().selectAllChildren(code); say('Selected'); }    // a frame that may not write there
  };
  return { node: el('div', { class: 'row' }, code, button), set(text) { code.textContent = text; } };
}

function ticks(lo, hi, log, n) {
  if (log) {
    const out = [], a = Math.floor(Math.log10(lo)), b = Math.ceil(Math.log10(hi)), span = Math.log10(hi / lo), every = Math.max(1, Math.ceil(span / n));
    for (let e = a; e <= b; e += every) for (const m of span < .8 ? [1, 1.5, 2, 3, 4, 5, 7] : span < 2 ? [1, 2, 5] : [1]) { const v = m * 10 ** e; if (v >= lo * .999 && v <= hi * 1.001) out.push(v); }
    return out;
  }
  const raw = (hi - lo) / n, mag = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(m => m * mag >= raw) * mag, out = [];
  for (let v = Math.ceil(lo / step) * step; v <= hi + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}

// A line chart on a canvas: bands, points with intervals, marks, hover, zoom, log and linear axes, keyboard.
class Plot {
  constructor(host, ui, { title, xlabel = 'step', logx = false, logy = false, height = 150, group = null, onPick = null, toggle = true } = {}) {
    Object.assign(this, { ui, title, xlabel, logx, logy, height, onPick, series: [], marks: [], dots: [], at: null, atY: null, pressed: null });
    this.group = group || { plots: [], range: null };
    this.group.plots.push(this);
    this.canvas = el('canvas', { tabIndex: 0, role: 'img', style: `height:${height}px` });
    this.keys = el('div', { class: 'keys' });
    this.tip = el('div', { class: 'tip', hidden: true });
    this.say = el('div', { class: 'sr', 'aria-live': 'polite' });
    this.button = el('button', { type: 'button' });
    this.button.onclick = () => { this.logy = !this.logy; this.draw(); };
    this.button.hidden = !toggle;
    this.box = el('div', { class: 'plot' }, el('div', { class: 'head' }, el('b', {}, title), this.keys, this.button), this.canvas, this.tip, this.say);
    host.append(this.box);
    ui.plots.push(this);
    this.sized = new ResizeObserver(() => this.draw());
    this.sized.observe(this.canvas);
    const c = this.canvas;
    c.onpointermove = e => { const x = e.offsetX; if (this.pressed !== null) { this.drag = x; } this.hover(this.xOf(x), e.offsetY); };
    c.onpointerleave = () => { if (this.pressed === null) this.hover(null); };
    c.onpointerdown = e => { this.pressed = this.drag = e.offsetX; c.setPointerCapture?.(e.pointerId); };
    c.onpointerup = e => {
      const a = this.pressed, b = e.offsetX; this.pressed = null;
      if (a !== null && Math.abs(a - b) > 8) this.zoom([this.xOf(Math.min(a, b)), this.xOf(Math.max(a, b))]);
      else if (this.onPick && this.near) this.onPick(this.near);
      this.draw();
    };
    c.ondblclick = () => this.zoom(null);
    c.onkeydown = e => this.key(e);
  }
  get left() { return 46; }
  get width() { return this.canvas.clientWidth || 300; }
  scale(v, lo, hi, log) { return log ? (Math.log(v) - Math.log(lo)) / (Math.log(hi) - Math.log(lo)) : (v - lo) / (hi - lo); }
  px(x) { return this.left + this.scale(x, ...this.xr, this.logx) * (this.width - this.left - 8); }
  py(y) { return this.height - 18 - this.scale(y, ...this.yr, this.logy) * (this.height - 26); }
  xOf(px) {
    const t = (px - this.left) / (this.width - this.left - 8), [lo, hi] = this.xr || [0, 1];
    return this.logx ? Math.exp(Math.log(lo) + t * (Math.log(hi) - Math.log(lo))) : lo + t * (hi - lo);
  }
  zoom(range) { this.group.range = range; this.group.plots.forEach(p => p.draw()); }
  hover(x, y = null) { this.group.plots.forEach(p => { p.at = x; p.atY = p === this ? y : null; p.draw(); p.tell(p === this); }); this.onNear?.(x === null ? null : this.near); }
  key(e) {
    const [lo, hi] = this.xr, span = hi - lo, at = this.at ?? (lo + hi) / 2, jump = this.logx ? null : Math.max(span / 60, 1e-9);
    const move = d => this.hover(this.logx ? at * Math.exp(d * Math.log(hi / lo) / 60) : Math.min(hi, Math.max(lo, at + d * jump)), this.atY);
    const next = d => {     // the next curve below or above
      const ys = this.series.map(s => [s, this.nearest(s, at)]).filter(([, k]) => k >= 0).map(([s, k]) => d * this.py(s.y[k])).filter(y => y > (this.atY === null ? -Infinity : d * this.atY) + .01);
      if (ys.length) this.hover(at, d * Math.min(...ys));
    };
    const closer = () => this.zoom(this.logx ? [at * (lo / hi) ** .25, at * (hi / lo) ** .25] : [at - span / 4, at + span / 4]);
    const k = { ArrowLeft: () => move(-1), ArrowRight: () => move(1), '+': closer, '=': closer,
      '-': () => this.zoom(null), '0': () => this.zoom(null), Escape: () => this.zoom(null), l: () => this.button.click(), ...(this.onPick && { ArrowUp: () => next(-1), ArrowDown: () => next(1) }), Enter: () => this.onPick && this.near && this.onPick(this.near) }[e.key];
    if (k) { e.preventDefault(); k(); this.say.textContent = this.tip.textContent; }
  }
  set(series, marks = [], dots = []) {
    const xs = [...series.map(s => s.x).flat(), ...marks.map(m => m.x)].filter(x => !this.logx || x > 0);
    this.span = xs.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
    this.series = series; this.marks = marks; this.dots = dots; this.draw();
  }
  // plots of a group show the same steps, so that a mark stands on all of them
  bounds() {
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    const z = this.group.range;
    for (const { span } of this.group.plots) if (span) { x0 = Math.min(x0, span[0]); x1 = Math.max(x1, span[1]); }
    for (const s of this.series) for (let i = 0; i < s.x.length; i++) {
      const x = s.x[i]; if (this.logx && !(x > 0)) continue;
      if (z && (x < z[0] || x > z[1])) continue;
      for (const y of s.lo ? [s.y[i], s.lo[i], s.hi[i]] : [s.y[i]]) {
        if (y === null || y === undefined || !isFinite(y) || (this.logy && !(y > 0))) continue;
        if (y < y0) y0 = y; if (y > y1) y1 = y;
      }
    }
    if (!(x0 <= x1)) { x0 = this.logx ? .1 : 0; x1 = 1; }
    if (!(y0 <= y1)) { y0 = this.logy ? .1 : 0; y1 = 1; }
    if (x0 === x1) { x0 -= this.logx ? 0 : .5; x1 += 1; }
    if (this.yMax !== undefined) y1 = Math.min(y1, this.yMax);
    if (this.logy) { if (y1 / y0 < 1.2) { y0 /= 1.1; y1 *= 1.1; } } else { const pad = (y1 - y0) * .06 || Math.abs(y1) * .1 || .5; y0 -= pad; y1 += pad; }
    this.xr = z ? [...z] : [x0, x1]; this.yr = [y0, y1];
  }
  draw() {
    const c = this.canvas, r = devicePixelRatio || 1, w = this.width, h = this.height;
    if (!w) return;
    c.width = w * r; c.height = h * r;
    const g = c.getContext('2d'), dark = this.ui.root.classList.contains('dark'), palette = COLORS[dark ? 'dark' : 'light'];
    const style = getComputedStyle(this.ui.root), fg = style.getPropertyValue('--fg'), dim = style.getPropertyValue('--dim'), line = style.getPropertyValue('--line');
    const color = s => typeof s.color === 'number' ? palette[s.color % palette.length] : s.color;
    this.button.textContent = this.logy ? 'log' : 'lin';
    this.button.setAttribute('aria-label', `${this.title}: vertical axis is ${this.logy ? 'logarithmic' : 'linear'}, switch`);
    const key = (s, name) => el('span', {}, el('i', { class: s.points ? 'dot' : '', style: `background:${color(s)}` }), name);
    const lines = this.series.filter(s => s.name && !s.quiet && !s.points), held = this.series.find(s => s.points && !s.quiet);
    this.keys.replaceChildren(...lines.filter(() => lines.length > 1).map(s => key(s, s.name)), ...(held ? [key(held, 'held-out')] : []));
    this.bounds();
    g.scale(r, r); g.clearRect(0, 0, w, h);
    g.font = '10px system-ui,sans-serif'; g.lineWidth = 1; g.textBaseline = 'middle';
    for (const v of ticks(...this.yr, this.logy, 4)) {
      const y = this.py(v);
      g.strokeStyle = line; g.globalAlpha = .7; g.beginPath(); g.moveTo(this.left, y); g.lineTo(w - 8, y); g.stroke();
      g.globalAlpha = 1; g.fillStyle = dim; g.textAlign = 'right'; g.fillText(short(v), this.left - 5, y);
    }
    g.textBaseline = 'alphabetic'; g.textAlign = 'center'; g.fillStyle = dim;
    for (const v of ticks(...this.xr, this.logx, Math.max(2, w / 90))) g.fillText(short(v), Math.min(w - 14, this.px(v)), h - 5);
    g.textAlign = 'right'; g.save(); g.beginPath(); g.rect(this.left, 0, w - this.left - 4, h - 16); g.clip();
    for (const m of this.marks) {
      const x = this.px(m.x);
      g.strokeStyle = m.color !== undefined ? palette[m.color] : fg; g.setLineDash([3, 3]); g.globalAlpha = .75; g.beginPath(); g.moveTo(x, 2); g.lineTo(x, h - 18); g.stroke();
      g.setLineDash([]); g.fillStyle = g.strokeStyle; g.textAlign = x > w - 90 ? 'right' : 'left'; g.globalAlpha = 1;
      if (m.text) g.fillText(m.text, x + (x > w - 90 ? -4 : 4), 10 + 11 * (m.row || 0));
    }
    const ok = v => v !== null && v !== undefined && isFinite(v) && (!this.logy || v > 0);
    for (const s of this.series) {
      g.fillStyle = g.strokeStyle = color(s);
      if (s.lo && !s.points) {
        g.globalAlpha = s.quiet ? .1 : .16; g.beginPath();
        const idx = s.x.map((_, i) => i).filter(i => ok(s.lo[i]) && ok(s.hi[i]));
        idx.forEach((i, k) => g[k ? 'lineTo' : 'moveTo'](this.px(s.x[i]), this.py(s.hi[i])));
        for (const i of idx.reverse()) g.lineTo(this.px(s.x[i]), this.py(s.lo[i]));
        g.fill(); g.globalAlpha = 1;
      }
      if (s.points) for (let i = 0; i < s.x.length; i++) {
        if (!ok(s.y[i])) continue;
        const x = this.px(s.x[i]), y = this.py(s.y[i]);
        if (s.lo && ok(s.lo[i]) && ok(s.hi[i])) { g.lineWidth = 1.2; g.beginPath(); g.moveTo(x, this.py(s.lo[i])); g.lineTo(x, this.py(s.hi[i])); g.stroke(); }
        g.beginPath(); g.arc(x, y, 3.4, 0, 7); g.fill();
      }
      if (!s.points || s.join) {
        g.lineWidth = s.width || 1.6; g.globalAlpha = s.alpha ?? 1; if (s.dash) g.setLineDash(s.dash); g.beginPath();
        let open = false, drawn = 0, last;
        for (let i = 0; i < s.x.length; i++) {
          if (!ok(s.y[i]) || (this.logx && !(s.x[i] > 0))) { if (s.y[i] === undefined || !s.bridge) open = false; continue; }
          last = [this.px(s.x[i]), this.py(s.y[i])]; drawn++;
          g[open ? 'lineTo' : 'moveTo'](...last); open = true;
        }
        g.stroke(); g.setLineDash([]);
        if (drawn === 1 && !s.points) { g.beginPath(); g.arc(...last, 2.4, 0, 7); g.fill(); }   // a line of one point
        g.globalAlpha = 1;
      }
    }
    for (const d of this.dots) { if (!ok(d.y)) continue; g.globalAlpha = d.alpha ?? .35; g.fillStyle = color(d); g.beginPath(); g.arc(this.px(d.x), this.py(d.y), d.r || 2.4, 0, 7); g.fill(); }
    g.globalAlpha = 1;
    if (this.pressed !== null && this.pressed !== undefined && Math.abs(this.drag - this.pressed) > 4) { g.globalAlpha = .15; g.fillStyle = fg; g.fillRect(Math.min(this.pressed, this.drag), 0, Math.abs(this.drag - this.pressed), h - 18); g.globalAlpha = 1; }
    if (this.at !== null && this.at !== undefined) { g.strokeStyle = dim; g.lineWidth = 1; g.beginPath(); g.moveTo(this.px(this.at), 0); g.lineTo(this.px(this.at), h - 18); g.stroke(); }
    g.restore();
    const named = this.series.filter(s => s.name && s.x.length).map(s => `${s.name} ${short(s.y.filter(v => v !== null && v !== undefined && isFinite(v)).at(-1))}`);
    c.setAttribute('aria-label', `${this.title}, against ${this.xlabel}. Newest: ${named.join(', ') || 'nothing yet'}. Arrow keys read values, plus zooms, zero shows all, l changes the axis.${this.onPick ? ' Up and down arrows go from curve to curve, Enter chooses.' : ''}`);
  }
  nearest(s, at) {
    let k = -1, gap = Infinity;
    for (let i = 0; i < s.x.length; i++) { const d = Math.abs(this.logx ? Math.log(s.x[i] / at) : s.x[i] - at); if (d < gap && s.y[i] !== null && s.y[i] !== undefined) { gap = d; k = i; } }
    return k;
  }
  // the value of each series nearest to the cursor
  tell(mine) {
    this.near = null;
    if (this.at === null || !this.series.length) { this.tip.hidden = true; return; }
    let best = null; const lines = [];
    for (const s of this.series) {
      const k = this.nearest(s, this.at);
      if (k < 0 || (s.quiet && !this.onPick)) continue;
      const text = `${s.name} ${short(s.y[k])}` + (s.lo && s.lo[k] !== undefined && s.lo[k] !== null ? `  (${short(s.lo[k])} to ${short(s.hi[k])})` : '') + (s.points ? ` @${short(s.x[k])}` : '');
      if (this.onPick && this.atY !== null) { const d = Math.abs(this.py(s.y[k]) - this.atY); if (!best || d <= best.d) best = { d, s, text, x: s.x[k] }; }
      else lines.push(text);
      if (!s.points) this.shown = s.x[k];
    }
    if (best) { this.near = best.s; lines.push(best.text); this.shown = best.x; }
    if (!mine && !lines.length) { this.tip.hidden = true; return; }
    this.tip.textContent = [`${this.xlabel} ${short(this.shown ?? this.at)}`, ...lines].join('\n');
    this.tip.hidden = !mine;
    const x = this.px(this.at);
    this.tip.style.top = '26px';
    if (x > this.width / 2) { this.tip.style.right = `${this.width - x + 16}px`; this.tip.style.left = 'auto'; } else { this.tip.style.left = `${x + 16}px`; this.tip.style.right = 'auto'; }
  }
}

// Exponential smoothing without bias at the start (as in Adam).
function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0, n = 0;
  return values.map(v => { if (v === null || v === undefined || !isFinite(v)) return v; mean = weight * mean + (1 - weight) * v; n += 1; return mean / (1 - weight ** n); });
}
