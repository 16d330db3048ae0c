"Light SFT: its data, its objective, its runs, and the DPO that starts from them."
import copy
import csv
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_lab.batches import encode_pairs, pack
from dpo_lab.data import load_pairs
from dpo_lab.models import tiny_model
from dpo_lab.reference import reference_logps, with_reference
from dpo_lab.renderers import get_renderer
from dpo_lab.runs import Run
from dpo_lab.sft import (
    SFTConfig,
    SFTObjective,
    chosen_only,
    encode_examples,
    evaluate_examples,
    load_examples,
    main,
    run_sft,
)
from dpo_lab.train import Config, run_dpo
from dpo_lab.train import main as train_main
from dpo_lab.training import evaluate_pairs

ROOT = Path(__file__).parent.parent
DATA = ROOT/'dpo_lab/assets/examples'


def quiet(line): pass


def said(*texts): return [dict(role=('user', 'assistant')[i % 2], content=text) for i, text in enumerate(texts)]


def short(path, **more): return SFTConfig(log_path=str(path), **(dict(max_steps=6, eval_every=3, save_every=2) | more))


def weights(folder):
    "All final weights of a run, in one row."
    saved = load_file(folder/'final'/'model.safetensors')
    return torch.cat([saved[name].flatten() for name in sorted(saved)])


def write_jsonl(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A short run that nothing disturbed."
    path = tmp_path_factory.mktemp('whole')/'run'
    for _ in run_sft(short(path), quiet): pass
    return Run(path)


@pytest.fixture(scope='module')
def tiny():
    model, tokenizer = tiny_model()
    return model, get_renderer('role_colon', tokenizer)


# data

TALKS = [said(f'Question {i}?', f'Answer {i}.', 'And then?', f'Then {i + 1}.') for i in range(30)]


def written(folder, form):
    if form == 'jsonl': return write_jsonl(folder/'t.jsonl', [dict(messages=t) for t in TALKS])
    if form == 'mapped': return write_jsonl(folder/'t.jsonl', [dict(talk=t) for t in TALKS]) + '(messages=talk)'
    if form == 'sharegpt':
        who = dict(user='human', assistant='gpt')
        return write_jsonl(folder/'t.jsonl', [dict(conversations=[{'from': who[m['role']], 'value': m['content']}
                                                                  for m in t]) for t in TALKS])
    if form == 'parts': return write_jsonl(folder/'t.jsonl', [dict(prompt=t[:3], completion=t[3:]) for t in TALKS])
    if form == 'csv':
        with open(folder/'t.csv', 'w', newline='') as f:
            writer = csv.DictWriter(f, ['messages'])
            writer.writeheader()
            writer.writerows(dict(messages=json.dumps(t)) for t in TALKS)
        return str(folder/'t.csv')
    import pandas as pd
    pd.DataFrame(dict(messages=TALKS)).to_parquet(folder/'t.parquet')
    return str(folder/'t.parquet')


@pytest.mark.parametrize('form', ['jsonl', 'mapped', 'sharegpt', 'parts', 'csv', 'parquet'])
def test_conversations_of_every_form_say_the_same(form, tmp_path):
    pairs = load_examples(written(tmp_path, form))
    assert len(pairs.test) == 3 and len(pairs.train) == 27
    found = sorted((p.prompt + p.chosen for p in pairs.train + pairs.test), key=lambda t: int(t[0]['content'][9:-1]))
    assert found == TALKS and all(len(p.prompt) == 3 and p.rejected == [] for p in pairs.train)


def test_a_folder_as_the_hub_library_writes_it_is_read(tmp_path):
    import datasets
    rows = datasets.Dataset.from_list([dict(messages=t) for t in TALKS])
    datasets.DatasetDict(train=rows, test=rows.select(range(4))).save_to_disk(tmp_path/'set')
    pairs = load_examples(str(tmp_path/'set'))
    assert len(pairs.train) == 30 and len(pairs.test) == 4


@pytest.mark.parametrize('name', ['hhh', 'ultrafeedback', 'helpsteer3', 'tulu3', 'arena', 'helpsteer2'])
def test_the_chosen_side_of_a_preference_set_has_its_rows_and_its_split(name):
    pairs, examples = (load(name, dataset_path=str(DATA/f'{name}.jsonl')) for load in (load_pairs, load_examples))
    assert examples.train == chosen_only(pairs.train) and examples.test == chosen_only(pairs.test)


def test_a_preference_file_keeps_the_split_it_has_for_dpo(tmp_path):
    answers = [('yes', 'yes' if i % 5 == 0 else 'no') for i in range(40)]
    path = write_jsonl(tmp_path/'p.jsonl', [dict(prompt=f'{i % 7}?', chosen=a, rejected=b)
                                            for i, (a, b) in enumerate(answers)])
    pairs, examples = load_pairs(path), load_examples(path)
    assert [p.id for p in examples.test] == [p.id for p in pairs.test] and examples.audit == pairs.audit


def test_rows_that_teach_nothing_are_counted(tmp_path):
    odd = [said('Anyone?'), said('Hello?', ' '), [dict(role='assistant', content='x', tool_calls=[1])], []]
    path = write_jsonl(tmp_path/'t.jsonl', [dict(messages=t) for t in TALKS + odd])
    dropped = load_examples(path).audit.dropped
    assert dropped == {"last turn not the assistant's": 2, 'empty completion': 1, 'tool call': 1}


def test_held_out_examples_come_from_another_file_if_asked(tmp_path):
    train = write_jsonl(tmp_path/'a.jsonl', [dict(messages=t) for t in TALKS])
    test = write_jsonl(tmp_path/'b.jsonl', [dict(messages=t) for t in TALKS[:5]])
    for other in (test, f'{test}(messages=messages)'):
        pairs = load_examples(train, test_dataset=other)
        assert len(pairs.train) == 30 and len(pairs.test) == 5 and pairs.audit.overlap['test_pairs'] == 5


@pytest.mark.parametrize('what, scored', [('last_assistant_turn', ' Then 1.'), ('last_assistant_message', ' Then 1.'),
                                          ('all_assistant_messages', ' Answer 0.')])
def test_what_is_scored_has_a_name(what, scored, tiny, tmp_path):
    _, renderer = tiny
    examples = load_examples(written(tmp_path, 'jsonl')).train
    example = next(p for p in examples if p.prompt[0]['content'] == 'Question 0?')
    row, = encode_examples([example], renderer, train_on_what=what)
    text = renderer.tokenizer.decode([t for t, s in zip(row.chosen, row.chosen_scored) if s])
    assert text.startswith(scored) and ('Then 1.' in text) and row.rejected == []


def test_long_examples_are_cut_by_the_rules_of_pairs_and_counted(tiny):
    _, renderer = tiny
    pairs = load_pairs('toy').train[:50]
    for truncation in ('keep_start', 'keep_end', 'drop'):
        rows = encode_examples(chosen_only(pairs), renderer, 24, truncation)
        assert rows.audit and all(row.num_tokens <= 24 and row.num_scored[0] for row in rows)
        assert len(rows) + sum(n for why, n in rows.audit.items() if why.startswith('dropped')) == 50
    with pytest.raises(ValueError, match='max_length=4 leaves none of 50'):
        encode_examples(chosen_only(pairs), renderer, 4)


# objective

@pytest.fixture(scope='module')
def rows(tiny): return encode_examples(load_examples('toy').train[:24], tiny[1])


def gradients(model, batches):
    model = copy.deepcopy(model)
    report, records = SFTObjective()(model, batches, 0)
    return report, records, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_micro_batches_are_one_batch(tiny, rows):
    model, _ = tiny
    (a, x, one), (b, y, many) = gradients(model, pack(rows)), gradients(model, pack(rows, 60))
    assert len(pack(rows, 60)) > 5 and torch.allclose(one, many, atol=1e-6)
    assert a == pytest.approx(b, abs=1e-5) and [r['pair'] for r in x] == [r['pair'] for r in y]


def test_the_loss_is_the_mean_over_examples_of_their_token_means(tiny, rows):
    model, _ = tiny
    means, totals = [], []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.prompt + row.chosen])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(row.prompt)-1:, 0]
            means.append(-logps.mean().item()); totals.append(-logps.sum().item())
    report, records, _ = gradients(model, pack(rows))
    assert report['loss'] == pytest.approx(sum(means)/len(means), abs=1e-4)
    assert report['nll'] == pytest.approx(sum(totals)/report['num_scored'], abs=1e-4)
    assert [r['loss'] for r in records] == pytest.approx(means, abs=1e-3)


def test_a_weight_multiplies_its_example(tiny, rows):
    from dataclasses import replace
    model, _ = tiny
    heavy = [replace(row, weight=2. if i < 12 else 0.) for i, row in enumerate(rows)]
    weighted, plain = gradients(model, pack(heavy))[2], gradients(model, pack(rows[:12]))[2]
    assert torch.allclose(weighted, plain, atol=1e-6)


def test_nll_is_that_of_the_chosen_side_in_dpo(tiny):
    model, renderer = tiny
    pairs = load_pairs('toy').test[:60]
    rows = encode_pairs(pairs, renderer)
    dpo = evaluate_pairs(model, with_reference(rows, reference_logps(model, rows)))
    sft = evaluate_examples(model, encode_examples(chosen_only(pairs), renderer), token_budget=300)
    assert sft['nll'] == pytest.approx(dpo['chosen_nll'], abs=1e-5)
    assert sft['nll_low'] < sft['nll'] < sft['nll_high'] and len(sft.pairs) == 60


def test_the_interval_of_nll_covers():
    from dpo_lab.sft import token_mean_interval
    g = torch.Generator().manual_seed(0)
    def draw():             # long answers are the easier ones, and the tokens of an answer go together
        lengths = torch.randint(1, 30, (80,), generator=g).float()
        each = 3 - lengths/20 + torch.randn(80, generator=g)
        return each*lengths, lengths
    truth = sum(((3 - n/20)*n) for n in range(1, 30)) / sum(range(1, 30))
    hits = [low <= truth <= high for _, low, high in (token_mean_interval(*draw()) for _ in range(1000))]
    assert .92 < sum(hits)/1000 < .97


# runs

def test_a_run_folder_holds_what_it_should(whole):
    m = whole.metrics
    assert m.step.tolist() == list(range(7)) and m.columns[0] == 'step'
    assert m['test/nll'].notna().tolist() == [True, False, False, True, False, False, True]
    names = 'loss nll num_examples num_tokens learning_rate progress batch_time grad_norm test/nll_low test/nll_high'
    assert {*names.split()} <= {*m.columns} and 'dpo_loss' not in m
    assert [c['step'] for c in whole.checkpoints] == [4, 6] and whole.config['command'] == 'sft'
    assert {'versions', 'dataset_fingerprint', 'start_fingerprint', 'train_on_what'} <= whole.config.keys()
    assert (whole.pairs.query("split == 'train'").groupby('step').size() == 16).all()
    assert set(whole.samples.step) == {0, 6} and whole.events.event.tolist() == ['started', 'finished']


def test_left_early_and_resumed_equals_undisturbed(whole, tmp_path):
    for metrics in run_sft(short(tmp_path/'run'), quiet):
        if metrics.step == 5: break
    resumed = run_sft(short(tmp_path/'run', behavior_if_log_dir_exists='resume'), quiet)
    assert resumed.start == 4 and [m.step for m in resumed] == [4, 5, 6]
    assert torch.equal(weights(tmp_path/'run'), weights(whole.path))
    assert (resumed.run.metrics.loss.dropna() == whole.metrics.loss.dropna()).all()


def test_a_run_does_not_continue_on_other_examples(tmp_path, capsys):
    path = write_jsonl(tmp_path/'t.jsonl', [dict(messages=t) for t in TALKS])
    words = [f'log_path={tmp_path}/run', f'dataset={path}', 'max_steps=2', 'batch_size=4', 'eval_every=0']
    assert main(words) == 0
    write_jsonl(tmp_path/'t.jsonl', [dict(messages=t) for t in TALKS[::-1]])
    assert main([*words, 'max_steps=4', 'behavior_if_log_dir_exists=resume']) == 2
    assert 'the start is not the one this run began with: its tokens changed' in capsys.readouterr().err


def test_each_command_continues_its_own_runs(whole, capsys):
    from dpo_lab.train import main as train
    assert train([f'log_path={whole.path}', 'behavior_if_log_dir_exists=resume']) == 2
    assert 'was begun by `python -m dpo_lab.sft`' in capsys.readouterr().err


def test_the_result_is_start_and_reference_of_dpo_in_one_word(whole, tmp_path):
    start = str(whole.path/'final')
    config = Config(log_path=str(tmp_path/'run'), load_checkpoint_path=start, max_steps=1, eval_every=0)
    first, *_ = run_dpo(config, quiet)
    assert first['dpo_loss'] == pytest.approx(math.log(2), abs=1e-5) and first['margin'] == pytest.approx(0, abs=1e-5)
    last = whole.metrics['test/nll'].iloc[-1]
    assert first['test/chosen_nll'] == pytest.approx(last, abs=1e-4)


def test_adapters_learn_and_their_merged_result_is_a_start_too(tmp_path, whole):
    *_, last = run_sft(short(tmp_path/'run', lora_rank=4, learning_rate=1e-2), quiet)
    run = Run(tmp_path/'run')
    assert (run.path/'adapter'/'adapter_model.safetensors').exists()
    assert not torch.equal(weights(run.path), weights(whole.path))
    config = Config(log_path=str(tmp_path/'dpo'), load_checkpoint_path=str(run.path/'final'), max_steps=1, eval_every=0)
    first, *_ = run_dpo(config, quiet)
    assert first['dpo_loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert first['test/chosen_nll'] == pytest.approx(last['test/nll'], abs=1e-4)


def test_sft_lowers_the_nll_of_held_out_conversations(tmp_path):
    path = write_jsonl(tmp_path/'t.jsonl', [dict(messages=t) for t in TALKS])
    steps = list(run_sft(short(tmp_path/'run', dataset=path, batch_size=9, max_steps=20, num_epochs=10,
                               train_on_what='all_assistant_messages'), quiet))
    assert steps[-1]['test/nll'] < steps[0]['test/nll_low'] - 1


# the command

def test_the_command_shows_the_run_and_says_what_is_next(tmp_path, capsys):
    assert main([f'log_path={tmp_path}/run', 'max_steps=2', 'eval_every=0']) == 0
    out = capsys.readouterr().out
    assert 'test/nll' in out and 'Held-out, before and after' in out and 'load_checkpoint_path=' in out


def test_the_next_commands_work_as_they_are_printed(tmp_path, capsys):
    words = ['max_steps=2', 'eval_every=0', 'renderer_name=role_colon', 'batch_size=4']
    assert main([f'log_path={tmp_path}/a run', *words]) == 0
    shown = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if 'python -m dpo_lab' in line]
    prefer, further, _ = (line[3:] for line in shown)
    assert 'renderer_name=role_colon' in prefer
    assert train_main([*prefer, f'log_path={tmp_path}/dpo', 'max_steps=1', 'eval_every=0']) == 0
    assert main(further) == 0 and Run(tmp_path/'a run').metrics.step.max() == 4
    assert 'nothing is left to do' not in capsys.readouterr().out


def test_rows_that_are_left_out_are_said(tmp_path):
    rows = [dict(messages=t) for t in [*TALKS, said('no answer'), said('an empty one', ' ')]]
    heard, path = [], write_jsonl(tmp_path/'t.jsonl', rows)
    config = short(tmp_path/'run', dataset=f'{path}(test_fraction=0)', batch_size=4, max_steps=1)
    run_sft(config, heard.append)
    assert any("train: 1 dropped: last turn not the assistant's" in line for line in heard)
    assert any('train: 1 dropped: empty completion' in line for line in heard)


MISTAKES = {
    'learning_rat=1e-5': "Did you mean 'learning_rate'",
    'dpo_beta=0.1': 'dpo_beta',
    'grad_clip=-1': 'must be 0 (off) or more',
    'dataset=hhhh': "Did you mean 'hhh'",
    'dataset=nothing.jsonl': 'nothing.jsonl',
    'batch_size=100000': '800 training examples are fewer than one batch of 100000',
    'max_length=3': 'leaves none of 800',
    'train_on_what=last': 'choose one of last_assistant_turn',
}


@pytest.mark.parametrize('words', MISTAKES)
def test_a_mistake_is_one_plain_sentence_before_any_work(words, tmp_path, capsys):
    assert main([f'log_path={tmp_path}/run', *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and MISTAKES[words] in err and 'Traceback' not in err
    assert not (tmp_path/'run'/'metrics.jsonl').exists()


def test_columns_that_hold_no_conversation_are_named(tmp_path, capsys):
    path = write_jsonl(tmp_path/'t.jsonl', [dict(text='x')]*9)
    assert main([f'log_path={tmp_path}/run', f'dataset={path}']) == 2
    assert 'found text' in (err := capsys.readouterr().err) and 'f.jsonl(messages=talk)' in err


def test_help_needs_no_torch_and_is_quick():
    code = 'import sys, dpo_lab.sft; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
    start = time.monotonic()
    for words in (['-m', 'dpo_lab.sft', '--help'], ['-c', 'from dpo_lab.train import cli; cli(["sft", "--help"])']):
        shown = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0 and 'train_on_what' in shown.stdout
    assert time.monotonic() - start < 60            # a hang, not a benchmark


def test_the_command_is_interrupted_between_steps_and_says_how_to_continue(tmp_path):
    import signal
    process = subprocess.Popen([sys.executable, '-m', 'dpo_lab.sft', f'log_path={tmp_path}/run', 'num_epochs=100',
                                'eval_every=0', 'save_every=0'], cwd=ROOT, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (tmp_path/'run'/'metrics.jsonl').exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f'python -m dpo_lab.sft log_path={tmp_path}/run' in out, (out, err)
    run = Run(tmp_path/'run')
    assert run.checkpoints[-1]['step'] == run.metrics.step.max()
