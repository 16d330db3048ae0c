"""Train the tiny model many times and measure what each policy is worth: the numbers of two tutorials.

    python measure.py frontier    # data/frontier.csv, for the_frontier
    python measure.py family      # data/family.csv, for the_loss_family

They take about ten and twenty minutes on one core. What is in the file already is not run again, so a stopped
measurement goes on where it was, and removing the file measures everything again.
"""
import copy
import csv
import itertools
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from dpo_lab.batches import encode_pairs, pack, rows_of_step
from dpo_lab.data import PreferencePair, load_pairs
from dpo_lab.logprobs import scored_log_softmax
from dpo_lab.losses import LOSSES
from dpo_lab.models import tiny_model
from dpo_lab.reference import reference_logps, with_reference
from dpo_lab.renderers import get_renderer
from dpo_lab.toy import is_well_formed, prompts, toy_reward
from dpo_lab.training import DPOObjective, make_optimizer, train

SEEDS, BATCH, WARMUP = range(3), 16, 10
MARKS = (10, 25, 50, 100, 150, 200)      # steps at which the frontier is measured
SERIES = {                          # name: (loss, beta, learning rate)
    **{f'DPO, β = {beta}': ('sigmoid', beta, 5e-4) for beta in (.05, .1, 1., 5.)},
    'DPO, β = 0.05, twice the rate': ('sigmoid', .05, 1e-3),
    'IPO, τ = 0.1': ('ipo_sum', .1, 5e-4), 'SimPO, β = 2': ('simpo', 2., 5e-4), 'SFT on chosen': ('sft', .1, 5e-4)}
LABELS = ('clean', 'flipped', 'length')


class Lab:
    "The tiny model, its renderer, and the pairs it wrote."
    def __init__(self):
        self.reference, self.tokenizer = tiny_model()
        self.renderer, self.pairs = get_renderer('role_colon', self.tokenizer), load_pairs('toy').train

    def rows(self, pairs):
        "Encoded pairs with their reference."
        rows = encode_pairs(pairs, self.renderer)
        return with_reference(rows, reference_logps(self.reference, rows))

    def trained(self, rows, loss, beta, learning_rate, steps, seed):
        "Train a copy of the model, warmed up, then at a level rate; yields step k and the policy after k updates."
        policy = copy.deepcopy(self.reference)
        def reference_of(batch):    # the TDPO losses compare whole distributions
            with torch.no_grad(): return scored_log_softmax(self.reference, batch)
        objective = DPOObjective(loss, beta, live_reference=reference_of)
        optimizer = make_optimizer(policy, learning_rate)
        def batches_of(step): return pack(rows_of_step(rows, step, BATCH, seed))
        def rate(step): return learning_rate*min(1, (step + 1)/WARMUP)
        for metrics in train(policy, batches_of, objective, optimizer, steps + 1, rate):
            yield metrics.step, policy

    def answers(self, policy, asked, seed):
        "Sampled answers at temperature 1, and the KL from the reference along each, nats."
        heads = [self.renderer.build_generation_prompt([message('user', prompt)]) for prompt in asked]
        batch = self.tokenizer.pad(dict(input_ids=heads), padding_side='left', return_tensors='pt')
        start = batch['input_ids'].shape[1]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            ids = policy.generate(**batch, do_sample=True, temperature=1., top_k=0, top_p=1., max_new_tokens=24)
            mask = torch.cat([batch['attention_mask'], torch.ones_like(ids[:, start:])], 1)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            p, q = (model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, start-1:-1].log_softmax(-1)
                    for model in (policy, self.reference))
        each = (p.exp()*(p - q)).sum(-1)        # of the next word, exact: its sum estimates the KL of the answer
        said = ids[:, start:].tolist()
        kls = [row[:self.length(answer)].sum().item() for row, answer in zip(each, said)]
        return [self.renderer.parse_response(answer)[0]['content'] for answer in said], kls

    def length(self, answer):
        "Tokens until the answer has said its stop, or all of them."
        text = ''
        for n, token in enumerate(answer, 1):
            text += self.tokenizer.decode([token])
            if token == self.tokenizer.eos_token_id or any(stop in text for stop in self.renderer.stop): return n
        return len(answer)

    def worth(self, policy, seed, each=40):
        "What sampled answers to the held-out prompts are worth, and how far they are from the reference."
        said, kls = self.answers(policy, prompts('test')*each, seed)
        numbers = dict(reward=mean(map(toy_reward, said)), kl=mean(kls), well_formed=mean(map(is_well_formed, said)),
                       words=mean(len(text.split()) for text in said))
        return {name: round(value, 4) for name, value in numbers.items()}


def message(role, text): return dict(role=role, content=text)


def labelled(pairs, how, seed):
    "The pairs as another rater would label them: by true reward, one in five flipped, or half of them by length."
    rng = random.Random(seed)
    def words(messages): return len(messages[0]['content'].split())
    for pair in pairs:
        gap, longer = pair.strength, words(pair.chosen) - words(pair.rejected)
        if not gap: continue                                                    # the reward does not tell them apart
        right = gap > 0
        if how == 'flipped' and rng.random() < .2: right = not right
        if how == 'length' and longer and rng.random() < .5: right = longer > 0
        sides = (pair.chosen, pair.rejected) if right else (pair.rejected, pair.chosen)
        yield PreferencePair(pair.prompt, *sides, strength=abs(gap))


def with_columns(pairs, needs):
    "The columns that some losses read: how sure, and by how much, a rater who knows the reward would be."
    for pair in pairs:
        soft = 1/(1 + math.exp(-pair.strength)) if 'soft_label' in needs else None
        yield replace(pair, soft_label=soft, offset=pair.strength if 'offset' in needs else None)


def frontier(lab, have):
    "Reward against KL along the training of every series."
    rows = lab.rows(lab.pairs)
    for seed, (name, (loss, beta, rate)) in itertools.product(SEEDS, SERIES.items()):
        if (name, str(seed)) in have: continue
        yield [dict(series=name, seed=seed, step=step, **lab.worth(policy, seed))
               for step, policy in lab.trained(rows, loss, beta, rate, MARKS[-1], seed) if step in MARKS]


def family(lab, have, steps=100):
    "Every loss, at the beta of its paper, on pairs labelled in three ways."
    for seed, how, (name, loss) in itertools.product(SEEDS[:2], LABELS, LOSSES.items()):
        if (name, str(seed), how) in have: continue
        rows = lab.rows([*with_columns(labelled(lab.pairs, how, seed), loss.needs)])
        *_, (_, policy) = lab.trained(rows, name, loss.beta0, 3e-4, steps, seed)
        yield [dict(series=name, seed=seed, labels=how, **lab.worth(policy, seed, each=20))]


def main(what):
    "Append to the file what it does not have yet."
    torch.set_num_threads(1)
    measure, keys, runs = {'frontier': (frontier, ('series', 'seed'), len(SERIES)*len(SEEDS)),
                           'family': (family, ('series', 'seed', 'labels'), len(LOSSES)*len(LABELS)*2)}[what]
    path = Path(__file__).parent/'data'/f'{what}.csv'
    path.parent.mkdir(exist_ok=True)
    found = [*csv.DictReader(path.open())] if path.exists() else []
    have = {tuple(row[key] for key in keys) for row in found}
    for rows in tqdm(measure(Lab(), have), desc=what, total=runs, initial=len(have)):
        with path.open('a', newline='') as f:
            writer = csv.DictWriter(f, rows[0])
            if not f.tell(): writer.writeheader()
            writer.writerows(rows)


if __name__ == '__main__':
    if sys.argv[1:] not in (['frontier'], ['family']): sys.exit(__doc__)
    main(sys.argv[1])
