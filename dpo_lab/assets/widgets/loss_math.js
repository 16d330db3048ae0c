// The losses of chapter `losses` for one pair p: logratios w and l, log-probs pw and pl, lengths nw and nl.
// b is beta, e the chance of a flipped label, z the zero points of KTO (they come from all pairs).
const softplus = x => x > 0 ? x + Math.log1p(Math.exp(-x)) : Math.log1p(Math.exp(x));
const nls = x => softplus(-x);                     // -log sigmoid(x)
const sig = x => x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x));
const log1mexp = x => x > -Math.LN2 ? Math.log(-Math.expm1(x)) : Math.log1p(-Math.exp(x));
const odds = a => { const x = Math.min(a, -1e-12); return x - log1mexp(x); };
const smoothed = (u, e) => (1 - e) * nls(u) + e * nls(-u);
const bent = (a, alpha) => -Math.expm1(Math.min(80, -alpha * a)) / alpha;

const LOSS = {
  sigmoid: (p, b, e) => smoothed(b * (p.w - p.l), e),
  cdpo: (p, b, e) => smoothed(b * (p.w - p.l), e),
  robust: (p, b, e) => { const u = b * (p.w - p.l); return ((1 - e) * nls(u) - e * nls(-u)) / (1 - 2 * e); },
  exo_pair: (p, b, e) => { const u = b * (p.w - p.l), q = sig(u), r = sig(-u), d = Math.max(e, .001); return q * (-nls(u) - Math.log1p(-d)) + r * (-nls(-u) - Math.log(d)); },
  hinge: (p, b) => Math.max(0, 1 - b * (p.w - p.l)),
  ipo_sum: (p, b) => (p.w - p.l - 1 / (2 * b)) ** 2,
  discopop: (p, b) => { const u = b * (p.w - p.l), t = .05; return sig(-u / t) * nls(u) + Math.exp(-nls(u / t) - u); },
  sigmoid_norm: (p, b) => nls(b * (p.w / p.nw - p.l / p.nl)),
  ipo: (p, b) => (p.w / p.nw - p.l / p.nl - 1 / (2 * b)) ** 2,
  rdpo: (p, b) => nls(b * (p.w - p.l) + .01 * (p.nw - p.nl)),
  nca_pair: (p, b) => nls(b * p.w) + .5 * nls(-b * p.w) + .5 * nls(-b * p.l),
  sppo_hard: (p, b) => (p.w - 1 / (2 * b)) ** 2 + (p.l + 1 / (2 * b)) ** 2,
  apo_zero: (p, b) => sig(-b * p.w) + sig(b * p.l),
  apo_down: (p, b) => sig(b * p.w) + sig(b * (p.l - p.w)),
  kto_pair: (p, b, e, z) => sig(b * (z.w - p.w)) + sig(b * (p.l - z.l)),
  dpop: (p, b) => nls(b * (p.w - p.l - 50 * Math.max(0, -p.w))),
  simpo: (p, b) => nls(b * (p.pw / p.nw - p.pl / p.nl) - 1),
  alphapo: (p, b) => nls(b * (bent(p.pw / p.nw, .25) - bent(p.pl / p.nl, .25)) - 1),
  sft: p => -p.pw / p.nw,
  cpo: (p, b) => nls(b * (p.pw - p.pl)) - p.pw / p.nw,
  orpo: (p, b) => -p.pw / p.nw + b * nls(odds(p.pw / p.nw) - odds(p.pl / p.nl)),
  bco_pair: (p, b) => nls(b * p.w) + nls(-b * p.l),
};

const mean = v => v.length ? v.reduce((a, x) => a + x, 0) / v.length : NaN;
const zeroPoints = pairs => ({ w: Math.max(0, mean(pairs.map(p => p.l)) || 0), l: Math.max(0, mean(pairs.map(p => p.w)) || 0) });
// the pair with its two sides moved apart by d nats, half each
const moved = (p, d) => ({ ...p, w: p.w + d / 2, l: p.l - d / 2, pw: p.pw + d / 2, pl: p.pl - d / 2 });
// slope along the chosen log-prob, per unit of reward: sigma(-beta*delta) for the DPO loss
function weight(f, p, b, e, z) {
  const h = 1e-5 * Math.max(1, Math.abs(p.w));
  const at = d => f({ ...p, w: p.w + d, pw: p.pw + d }, b, e, z);
  return Math.abs(at(h) - at(-h)) / (2 * h * b);
}
function counterfactual(name, pairs, b, e) {
  const f = LOSS[name], z = zeroPoints(pairs), ws = pairs.map(p => name === 'sigmoid' ? (1 - e) * sig(-b * (p.w - p.l)) - e * sig(b * (p.w - p.l)) : weight(f, p, b, e, z)).map(Math.abs);
  const total = ws.reduce((a, x) => a + x, 0), square = ws.reduce((a, x) => a + x * x, 0), chosen = b * mean(pairs.map(p => p.w)), rejected = b * mean(pairs.map(p => p.l));
  return { loss: mean(pairs.map(p => f(p, b, e, z))), weight: mean(ws), saturated: mean(ws.map(w => w < .01 ? 1 : 0)), effective_pairs: square ? total * total / square : 0,
    chosen_reward: chosen, rejected_reward: rejected, margin: chosen - rejected };
}
