"""Do joined products pay? q, k, v in one product, and gate and up in one, beside a product each.

    python nbs/benchmarks/joined.py out=joined.jsonl

In the shapes of a layer of SmolLM2-135M, forward and backward: the products that full training needs, and those of
adapters of rank 16. The joined weights lie joined already, which is the best case: a model keeps them apart.
"""
import statistics
import time

import chz
import torch
from throughput import add_line

from dpo_lab.logprobs import use_exact_products

HIDDEN, KINDS = 576, {'q, k, v': (576, 192, 192), 'gate, up': (1536, 1536)}


@chz.chz
class Joined:
    "What is timed."
    dtypes: str = chz.field(default='float32,bfloat16', doc="of weights and tokens")
    tokens: int = chz.field(default=1024, doc="of a micro-batch")
    rank: int = chz.field(default=16, doc="of the adapters")
    repeats: int = chz.field(default=25, doc="times each way, in turn")
    out: str|None = chz.field(default=None, doc="JSON lines file that the result is added to")


def full(x, weights, grads):
    "Outputs, gradient of x, gradients of the weights."
    back = grads[0] @ weights[0]
    for g, w in zip(grads[1:], weights[1:]): back.addmm_(g, w)
    return [x @ w.T for w in weights], back, [g.T @ x for g in grads]


def adapted(x, weights, grads, A, B):
    "The same with frozen weights and an adapter for each; gradients of the adapters."
    thin, outs = [x @ a.T for a in A], []
    for w, t, b in zip(weights, thin, B): outs.append((x @ w.T).addmm_(t, b.T))
    backs = [g @ b for g, b in zip(grads, B)]
    back = grads[0] @ weights[0]
    for g, w in zip(grads[1:], weights[1:]): back.addmm_(g, w)
    for thin_back, a in zip(backs, A): back.addmm_(thin_back, a)
    return outs, back, [thin_back.T @ x for thin_back in backs], [t.T @ g for t, g in zip(thin, grads)]


def adapted_joined(x, weight, grad, A, B, widths):
    "All adapters' A in one product; each B on its own columns."
    thin, out = x @ A.T, x @ weight.T
    parts = [*zip(out.split(widths, 1), grad.split(widths, 1), thin.split(A.shape[0]//len(widths), 1), B)]
    for o, _, t, b in parts: o.addmm_(t, b.T)
    thin_back = torch.cat([g @ b for _, g, _, b in parts], 1)
    return out, (grad @ weight).addmm_(thin_back, A), thin_back.T @ x, [t.T @ g for _, g, t, _ in parts]


def ways(kind, dtype, c):
    "Name -> a function to time."
    widths = KINDS[kind]
    def made(*shape): return torch.randn(*shape).to(dtype)
    x, weights, grads = made(c.tokens, HIDDEN), [made(n, HIDDEN) for n in widths], [made(c.tokens, n) for n in widths]
    A, B = [made(c.rank, HIDDEN) for _ in widths], [made(n, c.rank) for n in widths]
    weight, grad, all_A = torch.cat(weights), torch.cat(grads, 1), torch.cat(A)
    return {'full, apart': lambda: full(x, weights, grads), 'full, joined': lambda: full(x, [weight], [grad]),
            'LoRA, apart': lambda: adapted(x, weights, grads, A, B),
            'LoRA, joined': lambda: adapted_joined(x, weight, grad, all_A, B, widths)}


def milliseconds(functions, repeats):
    "The median of each, run in turn."
    found = {name: [] for name in functions}
    for i in range(repeats + 3):                # three to warm up
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i >= 3: found[name].append(1000*(time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def main(c):
    use_exact_products()
    for dtype in c.dtypes.split(','):
        for kind in KINDS:
            found = milliseconds(ways(kind, getattr(torch, dtype), c), c.repeats)
            result = dict(kind=kind, dtype=dtype, tokens=c.tokens, threads=torch.get_num_threads(), milliseconds=found)
            print(result)
            add_line(c.out, result)


if __name__ == '__main__' and '__file__' in globals(): main(chz.entrypoint(Joined))
