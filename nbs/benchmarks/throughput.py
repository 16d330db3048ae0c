"""dpo_lab beside TRL: the same pairs, tokens, weights and optimiser, in turn, on this machine.

    make bench ARGS='model_name=path/to/model dataset=hhh dataset_path=pairs.jsonl renderer_name=role_colon'

Both first have to agree on log-probs, loss and gradient of the same pairs, or no speed is printed. TRL runs in three
ways. `trl_tuned`: reference precomputed, micro-batch and attention searched on pairs that are not timed, and the
float32 products and the fused optimiser that dpo_lab uses. `trl_stock`: reference precomputed, one pair at a time, its
own attention and PyTorch's default products. `trl_documented`: as its documentation starts it, with a live reference,
the whole batch at once and gradient checkpointing, which is its default. The allocator settings of the environment
hold for all, and so do the large pages that `import dpo_lab` asks for and the freed memory that its runs keep.
"""
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import chz
import torch

from dpo_lab.batches import collate, encode_pairs, pack
from dpo_lab.data import load_pairs
from dpo_lab.logprobs import base_transformer, find_layout, keep_freed_memory, pair_logps, use_exact_products
from dpo_lab.models import load_policy
from dpo_lab.reference import ReferenceColumn, compute_reference, sizes_of, with_reference
from dpo_lab.renderers import get_renderer, recommended_renderer
from dpo_lab.training import DPOObjective, make_optimizer, trainable_weights

warnings.filterwarnings('ignore')
RATE, BETA = 1e-6, .1
TOLERANCE = {'float32': (1e-3, 1e-5, 1e-3), 'bfloat16': (3., .1, .5)}    # nats, loss, relative error of the gradient


@chz.chz
class Bench:
    "What is timed."
    model_name: str = chz.field(default='tiny', doc="folder, GGUF file or hub id")
    dataset: str = chz.field(default='toy', doc="as in dpo_lab.train")
    dataset_path: str|None = chz.field(default=None, doc="as in dpo_lab.train")
    renderer_name: str|None = chz.field(default=None, doc="as in dpo_lab.train")
    pairs: int = chz.field(default=48, doc="timed pairs, at most")
    minutes: float = chz.field(default=60., doc="no step is timed that would begin later than this")
    prompt_share: float|None = chz.field(default=None, doc="share of the prompt in the tokens of the two sides")
    batch_size: int = chz.field(default=8, doc="pairs in an optimiser step")
    max_length: int = chz.field(default=512, doc="tokens of a side")
    dtype: str = chz.field(default='float32', doc="of the weights")
    lora_rank: int = chz.field(default=0, doc="rank of the adapters; 0 trains all weights")
    micro_batches: str = chz.field(default='1,2,4,8', doc="sizes that TRL may try")
    attentions: str = chz.field(default='eager,sdpa', doc="attentions that TRL may try")
    ways: str = chz.field(default='tuned,stock,documented', doc="how TRL runs; documented alone takes least memory")
    contestant: str|None = chz.field(default=None, doc="run only this one for two steps, and print its peak memory")
    out: str|None = chz.field(default=None, doc="JSON lines file that the result is added to")


class Ours:
    "dpo_lab, as it comes."
    name = 'dpo_lab'
    def __init__(self, c, model):
        self.model, self.objective, self.optimizer = model, DPOObjective(beta=BETA), make_optimizer(model, RATE)
        find_layout(model)

    def logps(self, rows):
        with torch.no_grad(): return pair_logps(self.model, collate(rows).to(device_of(self.model))).double()

    def refer(self, rows): return with_reference(rows, ReferenceColumn(
        compute_reference(self.model, rows), torch.tensor(sizes_of(rows))))

    def gradient(self, rows):
        self.optimizer.zero_grad()
        return self.objective(self.model, [b.to(device_of(self.model)) for b in pack(rows)], 0)[0]['dpo_loss']


class Peer:
    "TRL's DPOTrainer: its collator, its loss, its reference pass."
    name = 'trl'
    def __init__(self, c, model, micro=8, attention='sdpa', live=None):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
        base_transformer(model).set_attn_implementation(attention)
        if live:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
            model.train()                               # which checkpointing asks for; no dropout is left in it
        self.model, self.optimizer, self.micro = model, make_optimizer(model, RATE), micro
        dummy = Dataset.from_list([dict(prompt='a', chosen='b', rejected='c')])
        args = DPOConfig(output_dir=tempfile.mkdtemp(), beta=BETA, max_length=c.max_length, report_to=[], bf16=False,
                         use_cpu=device_of(model).type == 'cpu', gradient_checkpointing=False,
                         precompute_ref_log_probs=live is None, disable_tqdm=True)
        os.environ['TQDM_DISABLE'] = '1'
        self.trainer = DPOTrainer(model, ref_model=live, args=args, train_dataset=dummy, processing_class=c.tokenizer)
        self.known = {}

    def inputs(self, rows):
        examples = [dict(prompt_ids=row.prompt, chosen_ids=row.chosen, rejected_ids=row.rejected) for row in rows]
        for row, example in zip(rows, examples):
            if row.index in self.known: example.update(self.known[row.index])
        batch = self.trainer.data_collator(examples)
        return {k: v.to(device_of(self.model)) if torch.is_tensor(v) else v for k, v in batch.items()}

    def chunks(self, rows): return [rows[i:i+self.micro] for i in range(0, len(rows), self.micro)]
    def reference(self, rows):
        sides = [self.trainer.compute_ref_log_probs(self.model, self.inputs(part)) for part in self.chunks(rows)]
        return torch.stack([torch.cat(side) for side in zip(*sides)])

    def logps(self, rows): return self.reference(rows).double()
    def refer(self, rows):
        if self.trainer.precompute_ref_logps:
            for row, (chosen, rejected) in zip(rows, self.reference(rows).T.tolist()):
                self.known[row.index] = dict(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
        return rows

    def gradient(self, rows):
        self.optimizer.zero_grad()
        total = 0.
        for part in self.chunks(rows):
            loss = self.trainer.compute_loss(self.model, self.inputs(part)) * len(part) / len(rows)
            loss.backward()
            total += loss.item()
        return total


def device_of(model): return next(model.parameters()).device


def now():
    "Seconds, when a GPU has done what it was given."
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()


def step_seconds(contestant, rows):
    start = now()
    contestant.gradient(rows)
    contestant.optimizer.step()
    return now() - start


def refer_seconds(contestant, rows):
    start = now()
    rows = contestant.refer(rows)
    return rows, now() - start


def disagreement(ours, peer, rows):
    "Largest difference in log-probs (nats) and loss, and the relative difference of the gradients of one step."
    nats = (ours.logps(rows) - peer.logps(rows)).abs().max().item()
    losses, gradients = [], []
    for contestant in (ours, peer):
        losses.append(contestant.gradient(contestant.refer(rows)))
        gradients.append([p.grad.clone() for p in trainable_weights(contestant.model).values()])
    off, size = (sum(x.float().norm()**2 for x in xs)**.5 for xs in (
        [a.float() - b.float() for a, b in zip(*gradients)], gradients[1]))
    return dict(nats=nats, loss=abs(losses[0] - losses[1]), gradient=(off/size).item())


def peak_gflops(weight):
    "Speed of a large product in the dtype and on the device of a weight, at the present setting."
    m, k, n = (2048, 576, 1536) if weight.device.type == 'cpu' else (8192, 8192, 8192)
    a, b = (torch.randn(*shape).to(weight) for shape in ((m, k), (k, n)))
    def run(times=20):
        start = now()
        for _ in range(times): a @ b
        return 2*times*m*k*n / (now() - start) / 1e9
    return max(run() for _ in range(5))


def work(c, model, rows):
    "GFLOP that one exact step on these rows cannot avoid, without attention."
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}     # the first is looked up
    head = model.get_output_embeddings().weight.numel()
    body = {n: p.numel() for n, p in model.named_parameters() if 'lora_' not in n and p not in tables}
    last = f'layers.{model.config.num_hidden_layers - 1}.'      # but for keys and values only where the head reads
    late = sum(size for n, size in body.items() if last in n and 'k_proj' not in n and 'v_proj' not in n)
    tokens, scored = sum(row.num_tokens for row in rows), sum(sizes_of(rows))
    read = sum(len(collate([row]).predictors.unique()) for row in rows)
    return (4 if c.lora_rank else 6) * ((sum(body.values()) - late)*tokens + late*read + head*scored) / 1e9


def alone(script, c, **changed):
    "What a script prints last as JSON when it runs with these words in a process of its own."
    words = [f'{k}={v}' for k, v in (chz.asdict(c) | changed).items() if v is not None and k != 'out']
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def peak_gb():
    "The most this process had resident, or allocated on the GPU where there is one."
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated() / 1e9
    return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))) / 1e6


def allocator():
    "Settings of the allocator in the environment."
    return {k: v for k, v in os.environ.items() if k.startswith(('MALLOC_', 'THP_'))}


def add_line(path, result):
    "Add a result to a JSON lines file, if one is asked for."
    if not path: return
    with open(path, 'a') as f: f.write(json.dumps(result) + '\n')


def prompt_share(rows):
    "Share of the prompt in the tokens of two unrolled sides."
    twice = 2 * sum(len(row.prompt) for row in rows)
    return twice / (twice + sum(len(row.chosen) + len(row.rejected) for row in rows))


def with_share(rows, wanted):
    "The most pairs, in their order, whose prompts together have this share, by leaving out those furthest from it."
    low = prompt_share(rows) < wanted
    chosen = sorted(rows, key=lambda row: prompt_share([row]), reverse=low)
    while chosen and (prompt_share(chosen) < wanted) == low: chosen.pop()
    kept = {row.index for row in chosen}
    return [row for row in rows if row.index in kept]


class Place:
    "The configuration with what is loaded once."
    def __init__(self, c):
        self.c, (model, self.tokenizer) = c, load_policy(c.model_name)
        renderer = c.renderer_name or recommended_renderer(self.tokenizer, model.config)[0]
        pairs = load_pairs(c.dataset, c.dataset_path).train
        rows = encode_pairs(pairs, get_renderer(renderer, self.tokenizer), max_length=c.max_length)
        if c.prompt_share is not None: rows = with_share(rows, c.prompt_share)
        wanted = c.pairs + c.batch_size
        if len(rows) < wanted: raise SystemExit(f'{len(rows)} pairs are too few for pairs={c.pairs}')
        spread = [rows[i * len(rows) // wanted] for i in range(wanted)]         # all through the file
        self.rows, self.others = spread[:c.pairs], spread[c.pairs:]
    def __getattr__(self, name): return getattr(self.c, name)
    def model(self): return load_policy(self.c.model_name, dtype=self.c.dtype, lora_rank=self.c.lora_rank)[0]


def search(c):
    "The settings under which TRL is fastest, and what was tried; of one setting nothing is."
    settings = [dict(attention=a, micro=int(m)) for a in c.attentions.split(',') for m in c.micro_batches.split(',')]
    if len(settings) == 1: return settings[0], {}
    tried = []
    for setting in settings:
        peer = Peer(c, c.model(), **setting)
        rows = peer.refer(c.others[:max(4, peer.micro)])
        tried.append(min(step_seconds(peer, rows) for _ in range(2)) / len(rows))
        del peer
        gc.collect()            # a trainer holds itself
        print(f"  TRL with {setting['attention']} attention, micro-batch {setting['micro']}: {tried[-1]:.3f} s a pair")
    named = {f"{s['attention']}, {s['micro']}": seconds for s, seconds in zip(settings, tried)}
    return settings[tried.index(min(tried))], named


def main(c):
    keep_freed_memory()
    products, place = use_exact_products(), Place(c)
    if c.contestant:
        kind = Ours(place, place.model()) if c.contestant == 'dpo_lab' else Peer(
            place, place.model(), int(c.micro_batches.split(',')[0]), c.attentions.split(',')[0])
        rows = kind.refer(place.rows[:2*c.batch_size])
        for i in (0, len(rows) - c.batch_size): step_seconds(kind, rows[i:i+c.batch_size])
        return print(peak_gb())
    best, tried = search(place)
    tuned = chz.replace(c, micro_batches=str(best['micro']), attentions=best['attention'])
    measured = ('dpo_lab', 'trl') if 'tuned' in c.ways else ('dpo_lab',)
    memory = {name: alone(__file__, tuned, contestant=name) for name in measured}      # while there is room beside them
    ours, peer = Ours(place, place.model()), Peer(place, place.model(), **best)
    differ = disagreement(ours, peer, place.others)
    print('  they differ by', ', '.join(f'{k} {v:.1e}' for k, v in differ.items()))
    if any(value > limit for value, limit in zip(differ.values(), TOLERANCE[c.dtype])):
        raise SystemExit(f'dpo_lab and TRL do not compute the same thing: {differ}, allowed {TOLERANCE[c.dtype]}')
    padded = sum(peer.inputs(part)['input_ids'].numel() for part in peer.chunks(place.rows))
    ways = {'tuned': lambda: peer, 'stock': lambda: Peer(place, place.model(), 1, 'sdpa'),
            'documented': lambda: Peer(place, place.model(), c.batch_size, 'sdpa', live=place.model())}
    if 'tuned' not in c.ways: peer = None
    gc.collect()                # a trainer holds itself
    contestants = {'dpo_lab': ours} | {f'trl_{way}': ways[way]() for way in c.ways.split(',')}
    ready, reference, steps = {}, {}, {name: [] for name in contestants}
    end = time.monotonic() + 60*c.minutes
    for name, contestant in contestants.items():
        ready[name], seconds = refer_seconds(contestant, place.rows)
        reference[name] = seconds / len(place.rows)
        step_seconds(contestant, contestant.refer(place.others))          # warm
    gflops = peak_gflops(next(ours.model.parameters()))
    for i in range(0, len(place.rows), c.batch_size):
        if i and time.monotonic() > end: break
        for name, contestant in contestants.items():                    # in turn: a busy machine is unfair to none
            if name in ('trl_stock', 'trl_documented'): torch.set_float32_matmul_precision('highest')
            steps[name].append(step_seconds(contestant, ready[name][i:i+c.batch_size]) / c.batch_size)
            use_exact_products()
        print(f'  step {i//c.batch_size}:', ', '.join(f'{k} {v[-1]:.3f}' for k, v in steps.items()), 's a pair')
    median = {name: statistics.median(seconds) for name, seconds in steps.items()}
    result = {
        'asked': {k: v for k, v in chz.asdict(c).items() if k not in ('out', 'contestant', 'dataset_path')}
                 | {'model_name': Path(c.model_name).name, 'dataset': Path(c.dataset).name},
        'machine': machine(products), 'timed_pairs': c.batch_size * len(steps['dpo_lab']),
        'tokens': {'unique': sum(r.num_tokens for r in place.rows), 'padded': padded,
                   'scored': sum(sizes_of(place.rows)), 'prompt_share': prompt_share(place.rows)},
        'differ': differ, 'best': best, 'tried': tried, 'seconds': median, 'steps': steps, 'reference': reference,
        'ratios': {name: statistics.median(b/a for a, b in zip(steps['dpo_lab'], steps[name]))
                   for name in contestants if name != 'dpo_lab'},
        'share_of_peak': work(c, ours.model, place.rows) / len(place.rows) / median['dpo_lab'] / gflops,
        'sweep_of_6': {name: 6*(median[name] + reference[name]) / (6*median['dpo_lab'] + reference['dpo_lab'])
                       for name in contestants if name != 'dpo_lab'},
        'memory_gb': memory}
    print(json.dumps({k: v for k, v in result.items() if k not in ('steps', 'tried')}, indent=1))
    add_line(c.out, result)


def machine(products):
    "Where it ran."
    import trl
    cpu = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')),
               platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    gpu = {'gpu': torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | dict(cpu=cpu, instructions=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
                      torch=torch.__version__, trl=trl.__version__, products=products, allocator=allocator())


if __name__ == '__main__' and '__file__' in globals(): main(chz.entrypoint(Bench))
